"""0002: recurrent-state kernels must skip the null block, slot 0 (upstream #39064).

Every kernel here reads a slot number for its row and then addresses a state with it. Whether that happens for
slot -1 (old padding), 0 (null block) and 1 (a request) is worked out from the conditions that lead to it.
"""

from __future__ import annotations

import ast
import copy
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .base import Finding, ReadFile, Site
from .source import Source, assigned_once, calls_in, inlined, keyword_of, names_in, open_source, statements

FIX = "0002"
PARTS = ("recurrent-load", "recurrent-store", "packed-load", "sigmoid-load", "sigmoid-store", "lightning")
FOLDERS = ("vllm/third_party/flash_linear_attention/ops", "vllm/model_executor/layers/fla/ops")
RECURRENT = tuple(f"{folder}/fused_recurrent.py" for folder in FOLDERS)
SIGMOID = tuple(f"{folder}/fused_sigmoid_gating.py" for folder in FOLDERS)
PACKAGES = tuple(f"{folder}/__init__.py" for folder in FOLDERS)
LIGHTNING = "vllm/model_executor/layers/lightning_attn.py"
BACKEND_UTILS = "vllm/v1/attention/backends/utils.py"
PATHS = (*RECURRENT, *SIGMOID, *PACKAGES, LIGHTNING, BACKEND_UTILS)

_CONSTANTS = {"NULL_BLOCK_ID": 0, "PAD_SLOT_ID": -1}


@dataclass(frozen=True)
class _Use:
    """One place where a state is addressed by the slot number in *slot*."""

    slot: str
    line: int
    base: frozenset[str]
    conditions: tuple[tuple[ast.expr, bool], ...]


@dataclass(frozen=True)
class _Kernel:
    """A kernel's local names with their values, and where it uses slot numbers."""

    source: Source
    name: str
    values: dict[str, ast.expr]
    uses: tuple[_Use, ...]

    @classmethod
    def read(cls, source: Source, function: ast.FunctionDef) -> _Kernel:
        values = assigned_once(function.body)
        slots = frozenset(name for name, value in values.items() if _is_slot_load(value))
        kernel = cls(source, function.name, values, tuple(_uses(function, slots)))
        kernel._refuse_masks(function, slots)
        return kernel

    def about(self, test: ast.expr, slot: str) -> bool:
        return slot in names_in(inlined(test, self.values, frozenset({slot})))

    def reached_by(self, use: _Use, number: int) -> bool:
        """Whether a row with slot *number* gets to *use*."""
        for test, outcome in use.conditions:
            if not self.about(test, use.slot):
                continue
            known = inlined(_without_tokens(test), self.values, frozenset({use.slot}))
            result = _evaluate(known, lambda name: self._number(name, use.slot, number))
            if result is None:
                raise self.source.unknown(f"{self.name}: the test {ast.unparse(test)} at line {test.lineno}")
            if bool(result) is not outcome:
                return False
        return True

    def _number(self, name: str, slot: str, number: int) -> int | None:
        return number if name == slot else _constant(self.source, name)

    def _refuse_masks(self, function: ast.FunctionDef, slots: frozenset[str]) -> None:
        for call in calls_in(function, "load") + calls_in(function, "store"):
            mask = keyword_of(call, "mask")
            if mask is not None and names_in(inlined(mask, self.values, slots)) & slots:
                what = f"{self.name}: line {call.lineno} is masked by a slot number; not a form that is known"
                raise self.source.unknown(what)


class _WithoutTokens(ast.NodeTransformer):
    """``slot * T`` is ``slot``: a row that gets here has T >= 1 tokens, and only signs are compared."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        tokens = isinstance(node.op, ast.Mult) and isinstance(node.right, ast.Name) and node.right.id == "T"
        return node.left if tokens else node


def _without_tokens(test: ast.expr) -> ast.expr:
    found: ast.expr = _WithoutTokens().visit(copy.deepcopy(test))
    return found


def probe(read: ReadFile) -> tuple[Site, ...]:
    """The guards of 0002, one site each."""
    recurrent = open_source(read, *RECURRENT)
    kernel = _Kernel.read(recurrent, recurrent.need_function("fused_recurrent_gated_delta_rule_fwd_kernel"))
    return (
        _judge("recurrent-load", kernel, "h0"),
        _judge("recurrent-store", kernel, "ht"),
        _packed(recurrent),
        *_sigmoid(read),
        _lightning(read),
    )


def _packed(source: Source) -> Site:
    function = source.function("fused_recurrent_gated_delta_rule_packed_decode_kernel")
    if function is not None:
        return _judge("packed-load", _Kernel.read(source, function), "h0", "ht")
    if "packed_decode" in source.text:
        raise source.unknown("a packed decode, but not the kernel that this probe knows")
    return Site(FIX, "packed-load", Finding.GONE, source.path, 0, "no packed decode kernel")


def _sigmoid(read: ReadFile) -> tuple[Site, Site]:
    if all(read(path) is None for path in SIGMOID):
        # The package that would export it is still there, so the file was not just moved.
        package = open_source(read, *PACKAGES)
        if "sigmoid_gating" in package.text:
            raise package.unknown("it exports a sigmoid gating kernel from a file that is not there")
        gone = Site(FIX, "sigmoid-load", Finding.GONE, package.path, 0, "no sigmoid gating kernel")
        return gone, replace(gone, part="sigmoid-store")
    source = open_source(read, *SIGMOID)
    kernel = _Kernel.read(source, source.need_function("fused_sigmoid_gating_delta_rule_update_kernel"))
    return _judge("sigmoid-load", kernel, "h0"), _judge("sigmoid-store", kernel, "ht")


def _lightning(read: ReadFile) -> Site:
    source = open_source(read, LIGHTNING)
    site = _judge("lightning", _Kernel.read(source, source.need_function("_linear_attn_decode_kernel")))
    utils = open_source(read, BACKEND_UTILS)
    if site.finding is Finding.MISSING and not re.search(r"^NULL_BLOCK_ID\b", utils.text, re.MULTILINE):
        note = "padding is still -1 here, which the kernel skips: no NULL_BLOCK_ID"
        return Site(FIX, "lightning", Finding.GONE, source.path, 0, note)
    return site


def _judge(part: str, kernel: _Kernel, *bases: str) -> Site:
    """PRESENT if no slot but a request's reaches a state at *bases* (any state if none are named)."""
    source = kernel.source
    uses = [use for use in kernel.uses if not bases or use.base & set(bases)]
    if not uses:
        raise source.unknown(f"{kernel.name}: no state addressed by a loaded slot number")
    # The worst use decides: the one that the null block reaches.
    worst = max(uses, key=lambda use: kernel.reached_by(use, 0))
    reached = tuple(kernel.reached_by(worst, slot) for slot in (-1, 0, 1))
    if reached not in ((False, False, True), (False, True, True), (True, True, True)):
        raise source.unknown(f"{kernel.name}: line {worst.line} is reached by slots -1, 0, 1: {reached}")
    guard = [test.lineno for test, _ in worst.conditions if kernel.about(test, worst.slot)]
    line = guard[-1] if guard else worst.line
    if not reached[1]:
        return Site(FIX, part, Finding.PRESENT, source.path, line, f"{kernel.name}: only slots above 0")
    what = "slot 0 passes the guard" if guard else "no guard"
    return Site(FIX, part, Finding.MISSING, source.path, line, f"{kernel.name}: {what}")


def _uses(function: ast.FunctionDef, slots: frozenset[str]) -> Iterator[_Use]:
    for statement, conditions in statements(function.body):
        if not isinstance(statement, ast.Assign):
            continue
        for product in ast.walk(statement.value):
            used = names_in(product) & slots if _is_product(product) else set()
            if used:
                base = frozenset(names_in(statement.value))
                yield _Use(min(used), statement.lineno, base, conditions)
                break


def _is_product(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)


def _is_slot_load(value: ast.expr) -> bool:
    pointers = {"ssm_state_indices", "slot_idx"}
    return any(call.args and pointers & names_in(call.args[0]) for call in calls_in(value, "load"))


def _constant(source: Source, name: str) -> int | None:
    """Value of a constant, or of the keyword that a kernel is launched with."""
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    given = set(re.findall(rf"^\s+{name}=(\w+),?$", source.text, re.MULTILINE))
    return _CONSTANTS.get(given.pop()) if len(given) == 1 else None


_COMPARE: dict[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def _evaluate(node: ast.expr, value_of: Callable[[str], int | None]) -> int | None:
    """A test over integers; None for anything that is not plainly one."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return value_of(node.id)
    if isinstance(node, ast.UnaryOp):
        inner = _evaluate(node.operand, value_of)
        if inner is None or not isinstance(node.op, ast.USub | ast.Not):
            return None
        return -inner if isinstance(node.op, ast.USub) else int(not inner)
    if isinstance(node, ast.BoolOp | ast.BinOp):
        return _evaluate_both(node, value_of)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        left, right = _evaluate(node.left, value_of), _evaluate(node.comparators[0], value_of)
        if left is None or right is None:
            return None
        return int(_COMPARE[type(node.ops[0])](left, right))
    return None


def _evaluate_both(node: ast.BoolOp | ast.BinOp, value_of: Callable[[str], int | None]) -> int | None:
    operands = node.values if isinstance(node, ast.BoolOp) else [node.left, node.right]
    results = [_evaluate(operand, value_of) for operand in operands]
    known = [bool(result) for result in results if result is not None]
    if len(known) != len(results):
        return None
    if isinstance(node.op, ast.And | ast.BitAnd):
        return int(all(known))
    if isinstance(node.op, ast.Or | ast.BitOr):
        return int(any(known))
    return None
