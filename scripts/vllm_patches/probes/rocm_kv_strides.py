"""0004: strides of the interleaved KV cache in ROCm's AITER gather and SHUFFLE write (upstream #37228)."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from .base import Finding, ReadFile, Site
from .source import (
    Source,
    assigned_once,
    calls_in,
    factors,
    inlined,
    launch_argument,
    leaves,
    names_in,
    open_source,
    terms,
)

FIX = "0004"
PARTS = ("nhd-gather", "shuffle-gather", "shuffle-write")
BACKEND = "vllm/v1/attention/backends/rocm_aiter_fa.py"
PATHS = (BACKEND,)

_GATHER = ("cp_mha_gather_cache_kernel", "cp_mha_gather_cache")
_WRITER = ("reshape_and_cache_shuffle_kernel", "reshape_and_cache_shuffle_triton")
_INDICES = ("block_id", "slot_id", "head_id")
_CACHES = {"key": "key_cache_ptr", "value": "value_cache_ptr"}
_SHAPE_NAMES = {"num_heads", "num_kv_heads", "head_size", "PAGE_SIZE", "block_size"}


def probe(read: ReadFile) -> tuple[Site, ...]:
    """The gathers and the writer of 0004."""
    source = open_source(read, BACKEND)
    gather = source.need_function(_GATHER[0])
    sites = (
        _judge(source, "nhd-gather", _GATHER, _branch(source, gather, "NHD")),
        _judge(source, "shuffle-gather", _GATHER, _branch(source, gather, "SHUFFLE")),
        _judge(source, "shuffle-write", _WRITER, source.need_function(_WRITER[0]).body),
    )
    packed = _packed_split(source)
    if packed is None:
        return sites
    note = "broken: K and V packed per token, SHUFFLE tiles need a plane each"
    return (sites[0], *(Site(FIX, part, Finding.BROKEN, BACKEND, packed, note) for part in PARTS[1:]))


def _branch(source: Source, kernel: ast.FunctionDef, layout: str) -> list[ast.stmt]:
    """The kernel's statements for one layout: those before the choice and those of the branch."""
    for position, statement in enumerate(kernel.body):
        branch: ast.stmt | None = statement
        while isinstance(branch, ast.If):
            test = ast.unparse(branch.test)
            if "CACHE_FORMAT" in test and re.search(rf"== ['\"]{layout}['\"]", test):
                return [*kernel.body[:position], *branch.body]
            branch = branch.orelse[0] if len(branch.orelse) == 1 else None
    raise source.unknown(f"{kernel.name}: no branch for CACHE_FORMAT == {layout!r}")


def _judge(source: Source, part: str, names: tuple[str, str], body: Sequence[ast.stmt]) -> Site:
    """PRESENT if K's and V's blocks are addressed by strides that the wrapper takes from the tensors."""
    kernel, wrapper = (source.need_function(name) for name in names)
    if any(calls_in(wrapper, copying) for copying in ("contiguous", "clone", "reshape")):
        raise source.unknown(f"{wrapper.name}: it copies, or may copy, what it hands to the kernel")
    hard_coded: list[ast.expr] = []
    strided: list[ast.expr] = []
    # Inside a block only the NHD cache is addressed by strides: a SHUFFLE block is a dense tile of its own.
    for dimension, index in enumerate(_INDICES if part == "nhd-gather" else _INDICES[:1]):
        for side, pointer in _CACHES.items():
            term = _term_of(source, kernel, body, pointer, index)
            others = [factor for factor in factors(term) if index not in names_in(factor)]
            if others and all(isinstance(other, ast.Name) and other.id in _SHAPE_NAMES for other in others):
                hard_coded.append(term)
            elif len(others) == 1 and isinstance(others[0], ast.Name):
                _need_stride(source, kernel, wrapper, others[0].id, side, dimension)
                strided.append(term)
            else:
                raise source.unknown(f"{kernel.name}: the offset {ast.unparse(term)} at {pointer}")
    if not hard_coded:
        note = "strides of K and V from the tensors"
        return Site(FIX, part, Finding.PRESENT, BACKEND, strided[0].lineno, note)
    note = f"offset rebuilt from the shape: {ast.unparse(hard_coded[0])}"
    return Site(FIX, part, Finding.MISSING, BACKEND, hard_coded[0].lineno, note)


def _term_of(source: Source, kernel: ast.FunctionDef, body: Sequence[ast.stmt], pointer: str, index: str) -> ast.expr:
    """The term with *index* in the address that is loaded from or stored to at *pointer*."""
    values = assigned_once(body)
    for statement in body:
        for call in calls_in(statement, "load") + calls_in(statement, "store"):
            address = inlined(call.args[0], values, frozenset(_INDICES))
            if pointer not in names_in(address):
                continue
            found = [term for term in terms(address) if index in names_in(term)]
            if len(found) == 1:
                return found[0]
    raise source.unknown(f"{kernel.name}: one term with {index} in the address at {pointer}")


def _need_stride(
    source: Source, kernel: ast.FunctionDef, wrapper: ast.FunctionDef, name: str, side: str, dimension: int
) -> None:
    argument = launch_argument(source, kernel, wrapper, name)
    value = inlined(argument, assigned_once(wrapper.body), frozenset({"key_cache", "value_cache"}))
    if _tensor_of_stride(value, dimension) != f"{side}_cache":
        given = f"{name} is {ast.unparse(argument)}"
        raise source.unknown(f"{kernel.name}: no stride {dimension} of {side}_cache: {given}")


def _tensor_of_stride(value: ast.expr, dimension: int) -> str | None:
    """``t`` for ``t.stride(d)``, ``t.stride()[d]`` and ``t.view_as(u).stride(d)``, else None."""
    wanted = str(dimension)
    if isinstance(value, ast.Subscript) and ast.unparse(value.slice) == wanted:
        value, wanted = value.value, ""
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute)):
        return None
    given = ", ".join(ast.unparse(argument) for argument in value.args)
    tensor = value.func.value if value.func.attr == "stride" and given == wanted else None
    while isinstance(tensor, ast.Call) and isinstance(tensor.func, ast.Attribute):
        # Only a view has the strides that the cache itself has.
        tensor = tensor.func.value if tensor.func.attr in ("view", "view_as") else None
    return tensor.id if isinstance(tensor, ast.Name) else None


def _packed_split(source: Source) -> int | None:
    """Line where K and V are cut out of a packed content dimension although SHUFFLE may be on."""
    cuts = list(re.finditer(r"\bkv_cache(?:\.\w+\([^()]*\))*\.(split|unbind)\(", source.text))
    if not cuts:
        raise source.unknown("how K and V are cut out of kv_cache")
    for cut in cuts:
        if cut[1] == "split" and not _shuffle_returns_before(source, cut.start()):
            return source.line_at(cut.start())
    return None


def _shuffle_returns_before(source: Source, offset: int) -> bool:
    line = source.line_at(offset)
    return any(
        isinstance(statement, ast.If)
        and statement.lineno < line
        and "is_shuffle_kv_cache_enabled" in ast.unparse(statement.test)
        and leaves(statement.body)
        for statement in source.function_at(offset).body
    )
