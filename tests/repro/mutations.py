"""The wrong trees that the proofs must tell from the patched one: what each mutant's file holds.

Three kinds. The listed mutants of ``mutants/<fix>.toml`` are half-fixes that somebody might write. The others are made
here: each line of code that a patch adds is taken out alone, and each statement of several added lines, or alone in its
block, gives way to ``pass`` (without one of its lines such a statement is hardly ever Python).
"""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_patches.series.hunks import index_of
from vllm_patches.series.model import FilePatch, Fix, Series

TABLES = Path(__file__).resolve().parent / "mutants"


@dataclass(frozen=True)
class Mutant:
    """One wrong tree: *file* with *text* instead of the patched one."""

    fix: str
    release: str
    name: str
    file: str
    text: str
    killed_by: tuple[str, ...] = ()  # every one of these checks must fail on it; empty: any check may
    equivalent: str = ""  # why no check can tell it from the patch

    @property
    def syntax_error(self) -> str:
        """Why Python cannot compile it; empty where it can, and for other languages."""
        if self.file.endswith(".py"):
            try:
                compile(self.text, self.file, "exec", dont_inherit=True)
            except SyntaxError as error:
                return f"{type(error).__name__}: {error.msg}, line {error.lineno}"
        return ""


def mutants_of(fix: Fix, series: Series, tree: Path, *, listed_only: bool = False) -> Iterator[Mutant]:
    """Every mutant of the patch that *series* carries for *fix*; *tree* is its patched tree.

    A row of the table that fits nothing is an error (`SystemExit`).
    """
    release = series.name.removeprefix("v")
    table = tomllib.loads((TABLES / f"{fix.id}.toml").read_text(encoding="utf-8"))
    yield from _listed(table, fix, release, tree)
    if listed_only:
        return
    excused = {key: {row["line"].strip(): row["reason"] for row in table.get(key, ())} for key in EXCUSES}
    for patch in series.patches:
        for file in patch.files if patch.number == fix.id else ():
            text = (tree / file.path).read_text(encoding="utf-8")
            for name, key, code, mutated in _made(file, text):
                yield Mutant(fix.id, release, name, file.path, mutated, (), excused[key].get(code, ""))


LINE, STATEMENT = EXCUSES = ("equivalent_line", "equivalent_statement")


def _listed(table: dict, fix: Fix, release: str, tree: Path) -> Iterator[Mutant]:
    for row in table.get("mutant", ()):
        if release not in row["releases"]:
            continue
        text = (tree / row["file"]).read_text(encoding="utf-8")
        if text.count(row["find"]) != 1:
            times = f"'find' occurs {text.count(row['find'])} times in {release}, not once"
            raise SystemExit(f"mutants/{fix.id}.toml: {row['name']}: {times}")
        killed_by, equivalent = tuple(row.get("killed_by", ())), row.get("equivalent", "")
        if bool(killed_by) == bool(equivalent):
            raise SystemExit(f"mutants/{fix.id}.toml: {row['name']}: wants either killed_by or equivalent")
        mutated = text.replace(row["find"], row["replace"])
        yield Mutant(fix.id, release, row["name"], row["file"], mutated, killed_by, equivalent)


def _made(file: FilePatch, text: str) -> Iterator[tuple[str, str, str, str]]:
    """(name, kind of excuse, the code that the excuse quotes, text) of each deletion."""
    lines = text.splitlines(keepends=True)
    added = set(_added(file, lines))
    prose = _docstring_lines(text) if file.path.endswith(".py") else set()
    for at in sorted(added - prose):
        code = lines[at].strip()
        if not _is_comment(code):
            name = f"without {file.path}:{at + 1}: {code}"
            yield name, LINE, code, "".join(lines[:at] + lines[at + 1 :])
    for start, end in _statements(text, added) if file.path.endswith(".py") else ():
        code = lines[start].strip()
        indent = lines[start][: len(lines[start]) - len(lines[start].lstrip())]
        place = f"{start + 1}-{end}" if end - start > 1 else end
        name = f"pass for {file.path}:{place}: {code}"
        yield name, STATEMENT, code, "".join([*lines[:start], f"{indent}pass\n", *lines[end:]])


def _added(file: FilePatch, lines: list[str]) -> Iterator[int]:
    """Indexes in the patched file of the lines that the patch adds; *lines* must be the patched file."""
    for hunk in file.hunks:
        at = index_of(hunk.new_start, hunk.new_count)
        for line in hunk.lines:
            if line[:1] == b"+":
                if lines[at].encode() != line[1:]:
                    raise SystemExit(f"{file.path}:{at + 1} of the patched tree is not the patch's line")
                yield at
            at += line[:1] != b"-"


def _is_comment(code: str) -> bool:
    """Nothing that runs; a closing bracket alone can only be a syntax error."""
    return not code or code.startswith(("#", "//")) or code in (")", "}", "(", "{", "],", "),", "):")


def _docstring_lines(text: str) -> set[int]:
    """Indexes of the lines of strings that stand as statements."""
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    return {at for node in nodes for at in range(node.lineno - 1, node.end_lineno or node.lineno)}


def _statements(text: str, added: set[int]) -> Iterator[tuple[int, int]]:
    """[start, end) of each added statement that has several lines or is all of its block's code."""
    prose = _docstring_lines(text)
    for parent in ast.walk(ast.parse(text)):
        for block in ("body", "orelse", "finalbody"):
            body = getattr(parent, block, None)
            nodes = [n for n in body if n.lineno - 1 not in prose] if isinstance(body, list) else []
            for node in nodes:
                first = min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", ()))])
                lines = range(first - 1, node.end_lineno)
                if added.issuperset(lines) and (len(lines) > 1 or len(nodes) == 1):
                    yield lines.start, lines.stop
