"""0003: the MLA indexer's context lengths in one flat buffer, none below 0 (upstream #42135, #51593)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from .base import Finding, ReadFile, Site
from .source import Source, assigned_once, calls_in, inlined, keyword_of, names_in, open_source, statements

FIX = "0003"
PARTS = ("contiguous", "buffer-size", "clamp-native", "clamp-uniform")
INDEXER = "vllm/v1/attention/backends/mla/indexer.py"
PATHS = (INDEXER,)

_BUILDER = "DeepseekV32IndexerMetadataBuilder"
_BUFFER = "decode_seq_lens_buffer"
_COPYING = ("contiguous", "clone", "empty_like", "zeros_like", "empty", "zeros", "new_empty", "new_zeros")
_BOUNDING = ("clamp", "clamp_", "clamp_min", "clamp_min_", "maximum", "relu", "relu_", "where")


def probe(read: ReadFile) -> tuple[Site, ...]:
    """The buffer and the clamps of 0003."""
    source = open_source(read, INDEXER)
    if _BUFFER not in source.text:
        # Up to 0.19.1 the lengths stay one-dimensional and the kernels take the offsets themselves.
        if "_prepare_decode_tensors" in source.text or f"class {_BUILDER}" not in source.text:
            raise source.unknown(f"no {_BUFFER}, yet not the code of before it either")
        return tuple(Site(FIX, part, Finding.GONE, INDEXER, 0, f"no {_BUFFER}") for part in PARTS)
    prepare = source.need_function("_prepare_decode_tensors", within=_BUILDER)
    sizes = _buffer_sizes(source)
    return (
        _contiguous(source, sizes, prepare),
        _size(source, sizes),
        _clamp_native(source, prepare),
        _clamp_uniform(source),
    )


def _site(part: str, finding: Finding, line: int, note: str) -> Site:
    return Site(FIX, part, finding, INDEXER, line, note)


def _buffer_sizes(source: Source) -> list[ast.expr]:
    """The shape of every allocation of the buffer, with local names resolved."""
    init = source.need_function("__init__", within=_BUILDER)
    values = assigned_once(init.body)
    shapes = []
    for statement, _ in statements(init.body):
        if not isinstance(statement, ast.Assign) or not _is_buffer(statement.targets[0]):
            continue
        call = statement.value
        if not isinstance(call, ast.Call) or not call.args:
            raise source.unknown(f"line {statement.lineno}: how {_BUFFER} is allocated")
        shape = call.args[0] if len(call.args) == 1 else ast.Tuple(call.args, ast.Load())
        shapes.append(ast.copy_location(inlined(shape, values), statement))
    if not shapes:
        raise source.unknown(f"{_BUILDER}.__init__ does not allocate {_BUFFER}")
    return shapes


def _is_buffer(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == _BUFFER


def _dimensions(shape: ast.expr) -> int:
    return len(shape.elts) if isinstance(shape, ast.Tuple | ast.List) else 1


def _buffer_slices(prepare: ast.FunctionDef) -> Iterator[ast.Subscript]:
    for node in ast.walk(prepare):
        if isinstance(node, ast.Subscript) and _is_buffer(node.value):
            yield node


def _contiguous(source: Source, sizes: list[ast.expr], prepare: ast.FunctionDef) -> Site:
    for name in _COPYING:
        if calls_in(prepare, name):
            raise source.unknown(f"{name}() beside the lengths: CUDA graphs do not know the address of a copy")
    two_dimensional = [node for node in _buffer_slices(prepare) if isinstance(node.slice, ast.Tuple)]
    if two_dimensional:
        read = [node for node in two_dimensional if isinstance(node.ctx, ast.Load)] or two_dimensional
        note = "a column slice of a 2-D buffer is handed out"
        return _site("contiguous", Finding.MISSING, read[0].lineno, note)
    view = _flat_view(prepare)
    if view is None or any(_dimensions(shape) != 1 for shape in sizes):
        raise source.unknown(f"neither a flat {_BUFFER} that is viewed nor a 2-D one that is sliced")
    if not _written_and_handed_out(prepare, view.targets[0]):
        raise source.unknown(f"whether the view at line {view.lineno} gets the lengths and is what is returned")
    return _site("contiguous", Finding.PRESENT, view.lineno, "a view of the flat buffer")


def _flat_view(prepare: ast.FunctionDef) -> ast.Assign | None:
    """``x = buffer[: rows * columns].view(rows, columns)``."""
    for statement, _ in statements(prepare.body):
        if not isinstance(statement, ast.Assign):
            continue
        text = ast.unparse(statement.value)
        if re.fullmatch(rf"self\.{_BUFFER}\[:(\w+) \* (\w+)\]\.(view|reshape)\(\(?\1, \2\)?\)", text):
            return statement
    return None


def _written_and_handed_out(prepare: ast.FunctionDef, view: ast.expr) -> bool:
    name = ast.unparse(view)
    written = handed_out = False
    for statement, _ in statements(prepare.body):
        if isinstance(statement, ast.Assign):
            into = ast.unparse(statement.targets[0]) in (f"{name}[:]", f"{name}[...]")
            written |= into and bool(calls_in(statement.value, "unsqueeze"))
            handed_out |= ast.unparse(statement.value) == name
        elif isinstance(statement, ast.Return) and statement.value is not None:
            handed_out |= name in names_in(statement.value)
    return written and handed_out


def _size(source: Source, sizes: list[ast.expr]) -> Site:
    if any(_dimensions(shape) != 1 for shape in sizes):
        shape = next(shape for shape in sizes if _dimensions(shape) != 1)
        return _site("buffer-size", Finding.MISSING, shape.lineno, "2-D buffer: no flat one to size")
    for shape in sizes:
        length = shape.elts[0] if isinstance(shape, ast.Tuple | ast.List) else shape
        if ast.unparse(length).endswith("max_num_batched_tokens"):
            note = "sized for max_num_batched_tokens alone"
            return _site("buffer-size", Finding.MISSING, shape.lineno, note)
        if not _is_maximum_of_both(length):
            raise source.unknown(f"line {shape.lineno}: the size of {_BUFFER}: {ast.unparse(length)}")
    return _site("buffer-size", Finding.PRESENT, sizes[0].lineno, "sized for the larger of both needs")


def _names_and_attributes(node: ast.expr) -> set[str]:
    attributes = {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}
    return names_in(node) | attributes


def _is_maximum_of_both(length: ast.expr) -> bool:
    if not isinstance(length, ast.Call) or ast.unparse(length.func) != "max":
        return False
    needs = [_names_and_attributes(argument) for argument in length.args]
    requests = any("max_num_seqs" in need and need & {"next_n", "num_speculative_tokens"} for need in needs)
    return requests and any("max_num_batched_tokens" in need for need in needs)


def _clamp_native(source: Source, prepare: ast.FunctionDef) -> Site:
    for statement, _ in statements(prepare.body):
        if not isinstance(statement, ast.Assign):
            continue
        if calls_in(statement.value, "unsqueeze") and "max_decode_len" in names_in(statement.value):
            target = ast.unparse(statement.targets[0]).split("[")[0]
            clamped = _is_clamped(statement.value) or _clamped_later(prepare, target, statement.lineno)
            if not clamped and any(calls_in(prepare, name) for name in _BOUNDING):
                raise source.unknown(f"the native lengths at line {statement.lineno} may be bounded elsewhere")
            finding = Finding.PRESENT if clamped else Finding.MISSING
            note = "clamped at 0" if clamped else "the lengths are below 0 for a padded row"
            return _site("clamp-native", finding, statement.lineno, note)
    raise source.unknown("the native lengths, seq_lens.unsqueeze(1) - max_decode_len + ..., not found")


def _is_clamped(value: ast.expr) -> bool:
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return False
    if value.func.attr in ("clamp", "clamp_"):
        bound = keyword_of(value, "min")
        if bound is None:
            # torch.clamp(x, 0) has the tensor first, x.clamp(0) has not.
            position = 1 if ast.unparse(value.func.value) == "torch" else 0
            bound = value.args[position] if len(value.args) > position else None
        return bound is not None and ast.unparse(bound) == "0"
    if value.func.attr in ("clamp_min", "clamp_min_", "maximum"):
        return any(ast.unparse(argument) == "0" for argument in value.args)
    return value.func.attr in ("relu", "relu_")


def _clamped_later(function: ast.FunctionDef, target: str, line: int) -> bool:
    return any(
        statement.lineno > line
        and isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Call)
        and isinstance(statement.value.func, ast.Attribute)
        and statement.value.func.attr.endswith("_")
        and ast.unparse(statement.value.func.value).split("[")[0] == target
        and _is_clamped(statement.value)
        for statement, _ in statements(function.body)
    )


def _clamp_uniform(source: Source) -> Site:
    kernel = source.function("_prepare_uniform_decode_kernel")
    if kernel is None:
        kernel = source.need_function("kernel", within="PrepareUniformDecodeKernel")
    values = assigned_once(kernel.body)
    for call in calls_in(kernel, "store"):
        if len(call.args) < 2 or "decode_seq_lens_ptr" not in names_in(call.args[0]):
            continue
        length = inlined(call.args[1], values)
        if not {"seq_lens_ptr", "max_decode_len"} <= names_in(length):
            raise source.unknown(f"{kernel.name}: the length stored at line {call.lineno}")
        clamped = _is_clamped(length)
        if not clamped and not isinstance(length, ast.BinOp):
            raise source.unknown(f"{kernel.name}: the form of the length {ast.unparse(length)}")
        finding = Finding.PRESENT if clamped else Finding.MISSING
        note = "clamped at 0" if clamped else "the length is below 0 for a padded row"
        return _site("clamp-uniform", finding, length.lineno, note)
    raise source.unknown(f"{kernel.name}: no store of the lengths")
