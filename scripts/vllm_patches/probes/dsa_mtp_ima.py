"""0001: rows past the last sequence in the gather of the DSA indexer's K cache (upstream #40772)."""

from __future__ import annotations

import ast
import re

from .base import Finding, ReadFile, Site
from .source import (
    Source,
    assigned_once,
    blank_comments,
    calls_in,
    closing,
    inlined,
    keyword_of,
    launch_argument,
    leaves,
    names_in,
    open_source,
    statements,
)

FIX = "0001"
PARTS = ("gather-cuda", "gather-triton")
CUDA = ("csrc/cache_kernels.cu", "csrc/libtorch_stable/cache_kernels.cu")
TRITON = "vllm/v1/attention/ops/rocm_aiter_mla_sparse.py"
PATHS = (*CUDA, TRITON)

_CUDA_KERNEL = "cp_gather_indexer_k_quant_cache_kernel"
# The threads of a row are neighbours in one warp; ROCm has no barrier of a warp here.
_WARP_OR_BLOCK = re.compile(
    r"#[ \t]*ifndef[ \t]+USE_ROCM\s+__syncwarp\(\);\s*#[ \t]*else\s+__syncthreads\(\);\s*#[ \t]*endif"
)
_TRITON_WRAPPER = "cp_gather_indexer_k_quant_cache_triton"
_TRITON_KERNEL = re.compile(r"^def (_cp_gather_indexer_quant_cache\w*kernel)\b", re.MULTILINE)


def probe(read: ReadFile) -> tuple[Site, ...]:
    """The gather kernels of 0001: CUDA and Triton."""
    return (_cuda(open_source(read, *CUDA)), _triton(open_source(read, TRITON)))


def probe_python(read: ReadFile) -> tuple[Site, ...]:
    """The Triton kernel alone, for a package that holds the CUDA one only compiled."""
    return (_triton(open_source(read, TRITON)),)


def _cuda(source: Source) -> Site:
    code = blank_comments(source.text)
    start, end = _kernel_body(source, code)
    body = _WARP_OR_BLOCK.sub(lambda pair: "__syncthreads();".ljust(len(pair[0])), code[start:end])
    array = re.search(r"__shared__\s+int\s+(\w+)\s*\[", body)
    loop = re.search(r"\bfor\s*\(", body)
    if array is None or loop is None or array.start() > loop.start():
        raise source.unknown(f"{_CUDA_KERNEL}: a shared array of ints, then the loop that searches the batch")
    name = array[1]
    search_end = _end_of_loop(source, body, loop)
    reads = list(re.finditer(rf"\b{name}\s*\[[^\]]*\](?!\s*=[^=])", body[search_end:]))
    if not reads:
        raise source.unknown(f"{_CUDA_KERNEL}: no read of {name} after the search")
    first_read = search_end + reads[0].start()

    initialised = _initialised(source, body[: loop.start()], name)
    barriers = _barrier(body[1 : loop.start()]) and _barrier(body[search_end:first_read])
    guard = _negative_batch_guard(source, body, search_end, name)
    # A barrier that some threads have left by then hangs the block.
    until_last_barrier = body[: max(0, body.rfind("__syncthreads"))]
    held = {
        "batch_idx set to -1": initialised,
        "barriers": barriers,
        "no return before them": not re.search(r"\breturn\b", until_last_barrier),
        "batch < 0 returns": guard is not None,
    }
    missing = [what for what, there in held.items() if not there]
    if not missing:
        return _cuda_site(Finding.PRESENT, source, start + (guard or 0), ", ".join(held))
    return _cuda_site(Finding.MISSING, source, start + first_read, "lacks: " + ", ".join(missing))


def _cuda_site(finding: Finding, source: Source, offset: int, note: str) -> Site:
    return Site(FIX, PARTS[0], finding, source.path, source.line_at(offset), note)


def _kernel_body(source: Source, code: str) -> tuple[int, int]:
    header = re.search(rf"__global__\s+void\s+{_CUDA_KERNEL}\s*\(", code)
    if header is None:
        raise source.unknown(f"kernel {_CUDA_KERNEL} not found; was it moved?")
    parameters_end = closing(code, header.end() - 1)
    start = -1 if parameters_end is None else code.find("{", parameters_end)
    end = None if start < 0 else closing(code, start)
    if end is None:
        raise source.unknown(f"the body of {_CUDA_KERNEL} has no end")
    return start, end


def _end_of_loop(source: Source, body: str, loop: re.Match[str]) -> int:
    header_end = closing(body, loop.end() - 1)
    start = -1 if header_end is None else body.find("{", header_end)
    end = None if start < 0 else closing(body, start)
    if end is None:
        raise source.unknown(f"{_CUDA_KERNEL}: the loop that searches the batch has no end")
    return end


def _initialised(source: Source, before_loop: str, name: str) -> bool:
    values = re.findall(rf"\b{name}\s*\[[^\]]*\]\s*=\s*([^;=][^;]*);", before_loop)
    if any(value.strip() != "-1" for value in values):
        raise source.unknown(f"{_CUDA_KERNEL}: {name} starts as {', '.join(values)}, not as -1")
    if any("threadIdx.y" in test for test in re.findall(r"\bif\s*\(([^{;]*)\)", before_loop)):
        raise source.unknown(f"{_CUDA_KERNEL}: which rows of the block are initialised")
    return bool(values)


def _barrier(code: str) -> bool:
    """Whether *code* holds a barrier that no condition takes away, C++ or preprocessor, for CUDA and for ROCm."""
    depth = 0
    token = r"^[ \t]*#[ \t]*(if|ifdef|ifndef|endif)\b|[{}]|\b__syncthreads\s*\(\s*\)"
    for match in re.finditer(token, code, re.MULTILINE):
        if match[0].startswith("__syncthreads"):
            if depth == 0:
                return True
        else:
            depth += -1 if match[0] == "}" or match[1] == "endif" else 1
    return False


def _negative_batch_guard(source: Source, body: str, search_end: int, name: str) -> int | None:
    """Offset of the ``if`` that makes a row without a batch return; None if nothing tests for one."""
    local = re.search(rf"\bint\s+(\w+)\s*=\s*{name}\s*\[[^\]]*\]\s*;", body[search_end:])
    batch = rf"(?:{local[1]}|{name}\s*\[[^\]]*\])" if local else rf"{name}\s*\[[^\]]*\]"
    for test in re.finditer(r"\bif\s*\(", body[search_end:]):
        opening = search_end + test.end() - 1
        end = closing(body, opening)
        if end is None:
            raise source.unknown(f"{_CUDA_KERNEL}: a test without an end")
        alternatives = [part.strip() for part in body[opening + 1 : end - 1].split("||")]
        negative = any(re.fullmatch(rf"{batch}\s*(?:<\s*0|==\s*-1)", part) for part in alternatives)
        if negative and re.match(r"\s*\{?\s*return\s*;", body[end:]):
            return search_end + test.start()
    if re.search(rf"{batch}\s*[<>=!]=?\s*-?[01]\b", body[search_end:]):
        raise source.unknown(f"{_CUDA_KERNEL}: a test of the batch that does not just return")
    return None


def _triton(source: Source) -> Site:
    kernels = [match[1] for match in _TRITON_KERNEL.finditer(source.text)]
    if not kernels:
        raise source.unknown("no kernel _cp_gather_indexer_quant_cache*_kernel; was it moved?")
    sites = [_triton_kernel(source, source.need_function(name)) for name in kernels]
    worst = [site for site in sites if site.finding is Finding.MISSING]
    return worst[0] if worst else sites[0]


def _triton_kernel(source: Source, kernel: ast.FunctionDef) -> Site:
    values = assigned_once(kernel.body)
    batch = [name for name, value in values.items() if _loads_from(value, "token_to_seq_ptr")]
    if len(batch) != 1:
        raise source.unknown(f"{kernel.name}: one name that is loaded from token_to_seq_ptr")
    lengths = [
        call
        for call in calls_in(kernel, "load")
        if _loads_from(call, "cu_seqlen_ptr") and batch[0] in names_in(inlined(call.args[0], values, frozenset(batch)))
    ]
    if not lengths:
        raise source.unknown(f"{kernel.name}: no load of cu_seqlen_ptr at {batch[0]}")
    early = _returns_past_the_end(source, kernel, values)
    if early is not None:
        note = f"{kernel.name}: returns past cu_seqlen's last entry"
        return _triton_site(Finding.PRESENT, source, early, note)
    if all(_bounds_batch(call, values, batch[0]) for call in lengths):
        note = f"{kernel.name}: loads masked by the range of the batch id"
        return _triton_site(Finding.PRESENT, source, lengths[0].lineno, note)
    if any(keyword_of(call, "mask") is not None for call in lengths):
        raise source.unknown(f"{kernel.name}: the mask of a load of cu_seqlen_ptr does not bound {batch[0]}")
    note = f"{kernel.name}: cu_seqlen_ptr is read at an uninitialised token_to_seq entry"
    return _triton_site(Finding.MISSING, source, lengths[0].lineno, note)


def _triton_site(finding: Finding, source: Source, line: int, note: str) -> Site:
    return Site(FIX, PARTS[1], finding, source.path, line, note)


def _loads_from(node: ast.expr, pointer: str) -> bool:
    return any(call.args and pointer in names_in(call.args[0]) for call in calls_in(node, "load"))


def _returns_past_the_end(source: Source, kernel: ast.FunctionDef, values: dict[str, ast.expr]) -> int | None:
    """Line of ``if tid >= tl.load(cu_seqlen_ptr + batch_size): return`` before token_to_seq is used."""
    parameters = {argument.arg for argument in kernel.args.args}
    for statement, conditions in statements(kernel.body):
        if isinstance(statement, ast.Assign) and _loads_from(statement.value, "token_to_seq_ptr"):
            return None
        if not isinstance(statement, ast.If) or conditions or not leaves(statement.body):
            continue
        test = ast.unparse(inlined(statement.test, values, frozenset({"tid"})))
        end = r"tl\.load\(cu_seqlen_ptr \+ (\w+)\)"
        match = re.fullmatch(rf"tid >= {end}|{end} <= tid", test)
        index = (match[1] or match[2]) if match else None
        if index in parameters:
            _need_number_of_sequences(source, kernel, str(index))
            return statement.lineno
    return None


def _need_number_of_sequences(source: Source, kernel: ast.FunctionDef, name: str) -> None:
    wrapper = source.need_function(_TRITON_WRAPPER)
    given = ast.unparse(launch_argument(source, kernel, wrapper, name))
    if not re.fullmatch(r"cu_seqlen\.(shape\[0\]|size\(0\)|numel\(\)) - 1|block_table\.(shape\[0\]|size\(0\))", given):
        raise source.unknown(f"{kernel.name}: whether {name}, {given}, is the number of sequences")


def _bounds_batch(call: ast.Call, values: dict[str, ast.expr], batch: str) -> bool:
    mask = keyword_of(call, "mask")
    if mask is None:
        return False
    lower = upper = False
    for node in ast.walk(inlined(mask, values, frozenset({batch}))):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == batch:
            lower |= isinstance(node.ops[0], ast.GtE) and ast.unparse(node.comparators[0]) == "0"
            upper |= isinstance(node.ops[0], ast.Lt)
    return lower and upper
