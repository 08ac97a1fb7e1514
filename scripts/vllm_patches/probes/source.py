"""Reading source code without running it: single functions by `ast`, kernels in C++ by braces.

Only the functions that a probe asks for are parsed. vLLM's model runners have 7,000 lines, and parsing one of
them whole takes as long as all probes together.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .base import ProbeError, ReadFile


@dataclass(frozen=True)
class Source:
    """One file of the tree."""

    path: str
    text: str
    _parsed: dict[tuple[int, int], ast.FunctionDef] = field(default_factory=dict, compare=False, repr=False)

    def unknown(self, wanted: str) -> ProbeError:
        """The error for code of a form that no probe knows."""
        return ProbeError(self.path, wanted)

    def line_at(self, offset: int) -> int:
        """The line, from 1, of a character offset."""
        return self.text.count("\n", 0, offset) + 1

    def function(self, name: str, *, within: str | None = None) -> ast.FunctionDef | None:
        """The function *name*, of the class *within* if that is given; None if there is none."""
        start, end = 0, len(self.text)
        if within is not None:
            span = self._span("class", within, 0, len(self.text))
            if span is None:
                return None
            start, end = span
        found = self._span("def", name, start, end)
        return None if found is None else self._parse(*found)

    def need_function(self, name: str, *, within: str | None = None) -> ast.FunctionDef:
        """The named function; its absence is a `ProbeError`."""
        function = self.function(name, within=within)
        if function is None:
            where = f" of class {within}" if within else ""
            raise self.unknown(f"function {name}{where} not found")
        return function

    def function_at(self, offset: int) -> ast.FunctionDef:
        """The innermost function whose body holds *offset*."""
        for header in reversed(list(_HEADER.finditer(self.text, 0, offset))):
            if header["kind"] != "def":
                continue
            span = self._span("def", header["name"], header.start(), len(self.text))
            if span is not None and span[0] <= offset < span[1]:
                return self._parse(*span)
        raise self.unknown(f"no function around line {self.line_at(offset)}")

    def _span(self, kind: str, name: str, start: int, end: int) -> tuple[int, int] | None:
        for header in _HEADER.finditer(self.text, start, end):
            if header["kind"] == kind and header["name"] == name:
                return header.start(), min(end, self._end_of_block(header))
        return None

    def _end_of_block(self, header: re.Match[str]) -> int:
        # The line that closes a long signature starts with a bracket at the indentation of the header.
        dedent = re.compile(rf"^[ ]{{0,{len(header['indent'])}}}(?![)\]#])\S", re.MULTILINE)
        stop = dedent.search(self.text, header.end())
        return len(self.text) if stop is None else stop.start()

    def _parse(self, start: int, end: int) -> ast.FunctionDef:
        if (start, end) not in self._parsed:
            self._parsed[start, end] = self._parse_anew(start, end)
        return self._parsed[start, end]

    def _parse_anew(self, start: int, end: int) -> ast.FunctionDef:
        line = self.line_at(start)
        # An indented block is parsed under a header of its own: no dedent that would touch strings. Empty
        # lines in front make the nodes' line numbers those of the file.
        wrapped = self.text[start] == " "
        header = "if True:\n" if wrapped else ""
        try:
            tree = ast.parse("\n" * (line - 1 - len(header.splitlines())) + header + self.text[start:end])
        except SyntaxError as error:
            raise self.unknown(f"function at line {line} does not parse: {error.msg}") from error
        top = tree.body[0]
        node = top.body[0] if wrapped and isinstance(top, ast.If) else top
        if not isinstance(node, ast.FunctionDef):
            raise self.unknown(f"no plain function at line {line}")
        return node


_HEADER = re.compile(r"^(?P<indent>[ ]*)(?P<kind>def|class) (?P<name>\w+)\b", re.MULTILINE)


def open_source(read: ReadFile, *paths: str) -> Source:
    """The first of *paths* that the tree has."""
    for path in paths:
        text = read(path)
        if text is not None:
            return Source(path, text)
    raise ProbeError(" or ".join(paths), "no such file in the tree; was it moved?")


def statements(
    body: Sequence[ast.stmt], conditions: tuple[tuple[ast.expr, bool], ...] = ()
) -> Iterator[tuple[ast.stmt, tuple[tuple[ast.expr, bool], ...]]]:
    """All statements under *body*, each with the tests (and their outcomes) that lead to it.

    ``if test: return`` makes *test* false for everything after it; ``continue`` does so inside a loop.
    """
    for statement in body:
        yield statement, conditions
        if isinstance(statement, ast.If):
            yield from statements(statement.body, (*conditions, (statement.test, True)))
            yield from statements(statement.orelse, (*conditions, (statement.test, False)))
            if leaves(statement.body):
                conditions = (*conditions, (statement.test, False))
        elif isinstance(statement, ast.For | ast.While | ast.With):
            yield from statements(statement.body, conditions)


def leaves(body: Sequence[ast.stmt]) -> bool:
    """True where the block ends by leaving the function or loop."""
    return bool(body) and isinstance(body[-1], ast.Return | ast.Continue | ast.Raise)


def assigned_once(body: Sequence[ast.stmt]) -> dict[str, ast.expr]:
    """Local names with their only value; names that get several are left out."""
    values: dict[str, ast.expr] = {}
    ambiguous: set[str] = set()
    for statement, _ in statements(body):
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign | ast.AugAssign | ast.For):
            targets = [statement.target]
        for target in targets:
            for name in sorted(names_in(target)):
                plain = isinstance(statement, ast.Assign) and isinstance(target, ast.Name)
                if name in values or not plain:
                    ambiguous.add(name)
                if isinstance(statement, ast.Assign):
                    values[name] = statement.value
    return {name: value for name, value in values.items() if name not in ambiguous}


def inlined(node: ast.expr, values: dict[str, ast.expr], stop: frozenset[str] = frozenset()) -> ast.expr:
    """*node* with local names replaced by what they stand for; names in *stop* stay.

    Nodes that change are copied, with their positions: the function stays as it was read.
    """
    if isinstance(node, ast.Name):
        value = None if node.id in stop else values.get(node.id)
        return node if value is None else inlined(value, values, stop | {node.id})
    if not (names_in(node) & values.keys()) - stop:
        return node
    changed = copy.copy(node)
    for name, field_value in ast.iter_fields(node):
        setattr(changed, name, _inlined_field(field_value, values, stop))
    return changed


def _inlined_field(value: object, values: dict[str, ast.expr], stop: frozenset[str]) -> object:
    if isinstance(value, ast.expr):
        return inlined(value, values, stop)
    if isinstance(value, ast.keyword):
        return ast.keyword(arg=value.arg, value=inlined(value.value, values, stop))
    if isinstance(value, list):
        return [_inlined_field(item, values, stop) for item in value]
    return value


def names_in(node: ast.AST) -> set[str]:
    """Every name used below *node*."""
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def calls_in(node: ast.AST, attribute: str) -> list[ast.Call]:
    """Calls of ``<anything>.attribute(...)`` under *node*, in the order of the source."""
    found = [
        child
        for child in ast.walk(node)
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute) and child.func.attr == attribute
    ]
    return sorted(found, key=lambda call: (call.lineno, call.col_offset))


def factors(node: ast.expr) -> list[ast.expr]:
    """The factors of a product, flattened."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return factors(node.left) + factors(node.right)
    return [node]


def terms(node: ast.expr) -> list[ast.expr]:
    """The terms of a sum, flattened."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return terms(node.left) + terms(node.right)
    return [node]


def keyword_of(call: ast.Call, name: str) -> ast.expr | None:
    """The value of a keyword argument, or None."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    return None


def launch_argument(source: Source, kernel: ast.FunctionDef, wrapper: ast.FunctionDef, name: str) -> ast.expr:
    """What *wrapper* gives *kernel* for its parameter *name* in ``kernel[grid](...)``."""
    position = [argument.arg for argument in kernel.args.args].index(name)
    for node in ast.walk(wrapper):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)):
            continue
        if ast.unparse(node.func.value) != kernel.name:
            continue
        given = keyword_of(node, name)
        if given is None and not any(isinstance(argument, ast.Starred) for argument in node.args):
            given = node.args[position] if position < len(node.args) else None
        if given is not None:
            return given
    raise source.unknown(f"{wrapper.name}: the argument {name} of the launch of {kernel.name}")


def blank_comments(text: str) -> str:
    """C++ text with its comments blanked out, all offsets and lines kept."""
    return re.sub(
        r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/',
        lambda match: match[0] if match[0][0] == '"' else re.sub(r"[^\n]", " ", match[0]),
        text,
        flags=re.DOTALL,
    )


def closing(text: str, opening: int) -> int | None:
    """Offset just after the bracket that closes the one at *opening*."""
    pair = {"{": "}", "(": ")"}
    opener = text[opening]
    closer = pair[opener]
    depth = 0
    for match in re.finditer(rf"[{re.escape(opener + closer)}]", text[opening:]):
        depth += 1 if match[0] == opener else -1
        if depth == 0:
            return opening + match.end()
    return None
