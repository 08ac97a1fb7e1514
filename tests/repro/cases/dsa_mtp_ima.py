"""Fix 0001: the indexer's K gather must leave rows at and past cu_seq_lens[-1] alone.

Two kernels do the same work. The C++ one is cut out of the tree's own .cu file and compiled for the host,
under AddressSanitizer and ThreadSanitizer (``shim/``); its Triton twin runs in triton's interpreter. Both get
outputs with more rows than the sequences have tokens, as callers may give them from 0.20.0 on.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import inspect
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from case_api import Case, Defect, expect, line_of

SHIM = Path(__file__).resolve().parent.parent / "shim"
KERNELS = "csrc/cache_kernels.cu"
TWIN = "vllm/v1/attention/ops/rocm_aiter_mla_sparse.py"
UNTOUCHED = 0xAA
INT32_MAX = 2**31 - 1

CASE = Case("0001")


# --- The C++ kernel -----------------------------------------------------------------------------------------

HEAD = re.compile(r"template <int BLOCK_Y_SIZE>\s*__global__ void cp_gather_indexer_k_quant_cache_kernel\(")
SHARED = re.compile(r"__shared__\s+(\w+)\s+(\w+)\[([^\]]+)\];")
# What shim/dsa_gather.cpp repeats of the launch; a tree that launches otherwise needs another driver.
LAUNCH = (
    "dim3((num_tokens + BLOCK_Y_SIZE - 1) / BLOCK_Y_SIZE, (head_dim + 8 * vec_size - 1) / (8 * vec_size)), "
    "dim3(8, BLOCK_Y_SIZE), 0, stream"
)
SANITIZERS = {
    # Wide redzones: a read past cu_seq_lens must not land in the next array.
    "address": {"ASAN_OPTIONS": "detect_leaks=0:redzone=2048:max_redzone=2048:exitcode=98"},
    "thread": {"TSAN_OPTIONS": "exitcode=97:halt_on_error=1"},
}
DIVERGENCE = 91  # shim::kDivergence
GUARD = "head_idx >= head_dim || token_idx >= num_tokens"  # the line that lets rows past the end go on


def cut_kernel(tree: Path) -> str:
    """The kernel's own text, numbered as in the tree, but for its __shared__ array: that is the shim's."""
    text = (tree / KERNELS).read_text(encoding="utf-8")
    if LAUNCH not in re.sub(r"[\s\\]+", " ", text):
        raise RuntimeError(f"{KERNELS} does not launch the gather kernel as shim/dsa_gather.cpp does")
    (start,) = (match.start() for match in HEAD.finditer(text))
    depth, end = 0, text.index("{", start)
    while True:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
        if not depth:
            break
    kernel, arrays = SHARED.subn(r"\1* const \2 = shim::shared_array<\1>(\3);", text[start:end])
    if arrays != 1:
        raise RuntimeError(f"expected one __shared__ array in the gather kernel, found {arrays}")
    return f'#line {text.count(chr(10), 0, start) + 1} "{KERNELS}"\n{kernel}\n'


@functools.cache
def workshop() -> tempfile.TemporaryDirectory[str]:
    """Where programs and their inputs lie; removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="dsa-gather-")


@functools.cache
def build(tree: Path, kind: str) -> Path:
    """The program for one sanitizer."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("this case compiles C++ and finds no g++ (Debian, Ubuntu: apt install g++)")
    out = Path(workshop().name)
    (out / "kernel.inc").write_text(cut_kernel(tree), encoding="utf-8")
    command = [compiler, "-std=c++20", "-O1", "-g1", "-pthread", f"-I{out}", "-iquote", str(tree / "csrc")]
    command += [str(SHIM / "dsa_gather.cpp"), f"-fsanitize={kind}", "-o", str(out / kind)]
    job = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if job.returncode:
        hint = f"is the library of its {kind} sanitizer installed? Fedora: dnf install libasan libtsan"
        raise RuntimeError(f"{compiler} cannot build the kernel for the host ({hint}):\n{job.stderr[-3000:]}")
    return out / kind


@dataclass(frozen=True)
class Shape:
    """A batch of sequences and an output that has *extra* rows more than they have tokens."""

    lengths: tuple[int, ...]
    extra: int
    head_dim: int = 128
    quant_block: int = 128
    block_size: int = 4

    def __str__(self) -> str:
        return f"{len(self.lengths)} sequences of {self.live} tokens in {self.rows} rows of {self.head_dim}"

    @property
    def live(self) -> int:
        return sum(self.lengths)

    @property
    def rows(self) -> int:
        return self.live + self.extra


def ragged(batch: int, longest: int, seed: int) -> tuple[int, ...]:
    """*batch* lengths in 0..longest; of three or more the first and the last are 0."""
    lengths = np.random.default_rng(seed).integers(0, longest + 1, batch)
    if batch > 2:
        lengths[[0, -1]] = 0
    return tuple(int(length) for length in lengths)


# Every BLOCK_Y_SIZE of the launcher; one round of its search (8 sequences) and up to 38; tails that
# end within a thread block and longer ones; sequences that end within a cache block.
SHAPES = (
    Shape((5,), 3),
    Shape((0, 0), 7),
    Shape((7, 0, 20), 9),
    Shape(ragged(9, 12, seed=1), 30, head_dim=64, quant_block=64),
    Shape(ragged(64, 4, seed=2), 21, head_dim=256),
    Shape(ragged(300, 2, seed=3), 40, block_size=8),
    Shape(ragged(33, 34, seed=4), 60, block_size=16),
)


class Gather:
    """Inputs of the C++ kernel for one shape, and what it has to write."""

    def __init__(self, shape: Shape, poison: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.shape, self.poison, self.blocks = shape, poison, 48
        scale_bytes = shape.head_dim // shape.quant_block * 4
        # No byte of the cache is the filling of the outputs, so that every stray store shows.
        self.keys = random.integers(0, UNTOUCHED, (self.blocks, shape.block_size, shape.head_dim), np.uint8)
        self.scales = random.integers(0, UNTOUCHED, (self.blocks, shape.block_size, scale_bytes), np.uint8)
        # As wide as the longest request may get, the rows past the end included.
        width = shape.rows // shape.block_size + 2
        self.table = random.integers(0, self.blocks, (len(shape.lengths), width), np.int32)
        self.cu_seq_lens = np.concatenate([[0], np.cumsum(shape.lengths)]).astype(np.int32)

    def encode(self) -> bytes:
        shape = self.shape
        header = (len(shape.lengths), shape.rows, shape.head_dim, shape.quant_block, shape.block_size)
        flat = [part.reshape(self.blocks, -1) for part in (self.keys, self.scales)]
        numbers = np.array([*header, self.table.shape[1], self.blocks, self.poison], np.int32)
        arrays = (numbers, np.concatenate(flat, axis=1), self.table, self.cu_seq_lens)
        return b"".join(array.tobytes() for array in arrays)

    def expected(self, source: np.ndarray) -> np.ndarray:
        """The live rows: token t of sequence s lies in block table[s, t // block_size]."""
        size = self.shape.block_size
        rows = [
            source[self.table[sequence, token // size], token % size]
            for sequence, length in enumerate(self.shape.lengths)
            for token in range(length)
        ]
        return np.array(rows, np.uint8).reshape(-1, source.shape[2])

    def compare(self, output: bytes, where: str) -> bytes:
        """Check this case's part of the program's output; returns what follows it."""
        for name, source in (("dst_k", self.keys), ("dst_scale", self.scales)):
            count = self.shape.rows * source.shape[2]
            got = np.frombuffer(output[:count], np.uint8).reshape(self.shape.rows, -1)
            output = output[count:]
            live, tail = got[: self.shape.live], got[self.shape.live :]
            wrong = np.flatnonzero((live != self.expected(source)).any(axis=1))
            text = f"{name}, {self.shape}, __shared__ poisoned with {self.poison}"
            expect(not wrong.size, "wrong-live-rows", f"{text}: rows {wrong[:3].tolist()} are wrong", where)
            stray = np.flatnonzero((tail != UNTOUCHED).any(axis=1))
            expect(not stray.size, "writes-past-the-end", f"{text}: {stray.size} rows past the end", where)
        return output


def no_randomization() -> None:
    """For the child: older sanitizer runtimes die where the system randomizes 32 bits of an address."""
    ctypes.CDLL(None).personality(0x0040000)  # ADDR_NO_RANDOMIZE; where it is refused, we go on without


def report(tree: Path, result: subprocess.CompletedProcess[str]) -> Defect | RuntimeError:
    """What a failed run means: the defect that its sanitizer names, or an error of ours."""
    text = result.stderr
    lines = re.search(rf"{re.escape(KERNELS)}:(\d+)", text)
    where = f"{KERNELS}:{lines[1]}" if lines else line_of(tree / KERNELS, GUARD, tree)
    if found := re.search(r"ERROR: AddressSanitizer: (heap-buffer-overflow|SEGV)\b[^\n]*", text):
        kind = "write" if re.search(r"^WRITE of size|caused by a WRITE", text, re.MULTILINE) else "read"
        return Defect(f"{kind}s-out-of-bounds", found[0], where)
    if "WARNING: ThreadSanitizer: data race" in text:
        return Defect("data-race", "threads of one block race for batch_idx", where)
    if result.returncode == DIVERGENCE:
        return Defect("returns-before-barrier", text.strip(), where)
    return RuntimeError(f"the gather program ended with {result.returncode}:\n{text[-3000:]}")


def run_gather(tree: Path, kind: str, platform: str, shapes: tuple[Shape, ...], poison: int | str) -> None:
    """Gather every shape in one process; *poison* as a str is an offset to the batch size ("+1")."""
    cases = []
    for seed, shape in enumerate(shapes):
        value = len(shape.lengths) + int(poison) if isinstance(poison, str) else poison
        cases.append(Gather(shape, value, seed))
    program = build(tree, kind)
    given, output = program.with_suffix(".in"), program.with_suffix(".out")
    given.write_bytes(b"".join(case.encode() for case in cases))
    result = subprocess.run(
        [program, platform, given, output],
        check=False,
        env=os.environ | SANITIZERS[kind],
        preexec_fn=no_randomization,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    if result.returncode:
        raise report(tree, result)
    rest, where = output.read_bytes(), line_of(tree / KERNELS, GUARD, tree)
    for case in cases:
        rest = case.compare(rest, where)
    if rest:
        raise RuntimeError(f"the gather program wrote {len(rest)} bytes too many")


PLATFORMS = ("cuda", "rocm")  # whose texts have different barriers
WITHOUT_TAIL = tuple(replace(shape, extra=0) for shape in SHAPES if shape.live)


@CASE.check("cxx-live-rows")
def cxx_live_rows(tree: Path) -> None:
    """Control: as many rows as tokens, whatever __shared__ memory holds."""
    for poison in (0, "+1"):
        run_gather(tree, "address", "cuda", WITHOUT_TAIL, poison)


@CASE.check("cxx-reads-in-bounds")
def cxx_reads_in_bounds(tree: Path) -> None:
    """Rows past the end, __shared__ memory that holds no index of a sequence."""
    for platform in PLATFORMS:
        for poison in ("+1", "+0", -1, -1000, INT32_MAX):
            run_gather(tree, "address", platform, SHAPES, poison)


@CASE.check("cxx-tail-untouched")
def cxx_tail_untouched(tree: Path) -> None:
    """Rows past the end, __shared__ memory that holds an index in range: no bad access, but stray rows."""
    for platform in PLATFORMS:
        for poison in (0, "-1"):
            run_gather(tree, "address", platform, SHAPES, poison)


@CASE.check("cxx-no-race")
def cxx_no_race(tree: Path) -> None:
    """No thread of a block reads batch_idx while another writes it."""
    run_gather(tree, "thread", "cuda", WITHOUT_TAIL, 0)


@CASE.check("cxx-no-race-rocm")
def cxx_no_race_rocm(tree: Path) -> None:
    """The same for the text that ROCm compiles."""
    run_gather(tree, "thread", "rocm", WITHOUT_TAIL, 0)


# --- The Triton twin ----------------------------------------------------------------------------------------

HEAD_DIM, BLOCK_SIZE, BLOCKS = 128, 32, 8
PAD = 64  # elements of decoy memory on each side of a view


def twin() -> Any:
    module = importlib.import_module("vllm.v1.attention.ops.rocm_aiter_mla_sparse")
    return module.cp_gather_indexer_k_quant_cache_triton


Span = tuple[int, int]


def span(tensor: Any) -> Span:
    """First byte of a contiguous tensor and the first one past it."""
    assert tensor.is_contiguous()
    return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def guarded(readable: list[Span], writable: list[Span]) -> Iterator[dict[str, int]]:
    """Bounds checks for the interpreter: accesses outside the spans do not happen, but are counted."""
    from triton.runtime import interpreter

    builder, counts = interpreter.InterpreterBuilder, {"read": 0, "write": 0}
    load, store = builder.create_masked_load, builder.create_masked_store

    def inside(kind: str, pointers: Any, mask: Any, spans: list[Span]) -> Any:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        address = pointers.data.astype(np.uint64)
        legal = np.zeros_like(address, bool)
        for start, end in spans:
            legal |= (address >= np.uint64(start)) & (address <= np.uint64(end - size))
        counts[kind] += int((mask.data & ~legal).sum())
        return interpreter.TensorHandle(mask.data & legal, mask.dtype)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(self, pointers, inside("read", pointers, mask, readable), *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, pointers, value, inside("write", pointers, mask, writable), *rest)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    try:
        yield counts
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


class TwinGather:
    """Inputs of cp_gather_indexer_k_quant_cache_triton and what it has to write.

    cu_seqlen and the block table are views into larger storages, the rest of which holds decoys: every id
    outside the batch looks like a sequence that ends past the last row, with blocks of its own.
    """

    def __init__(self, lengths: tuple[int, ...], extra: int) -> None:
        import torch

        self.torch, self.lengths, self.live = torch, torch.tensor(lengths), sum(lengths)
        self.rows = rows = self.live + extra
        torch.manual_seed(rows)
        self.keys = torch.randint(0, UNTOUCHED, (BLOCKS, BLOCK_SIZE, HEAD_DIM), dtype=torch.uint8)
        self.scales = torch.rand(BLOCKS, BLOCK_SIZE) + 0.5
        batch, width = len(lengths), max(rows // BLOCK_SIZE + 1, 2)
        cu_storage = torch.full((2 * PAD + batch + 1,), rows, dtype=torch.int32)
        self.cu_seqlen = cu_storage[PAD : PAD + batch + 1]
        self.cu_seqlen[0] = 0
        torch.cumsum(self.lengths, 0, dtype=torch.int32, out=self.cu_seqlen[1:])
        # Not contiguous: rows of the table are wider apart than the columns that this batch may read.
        table_storage = torch.randint(1, BLOCKS, (2 * PAD + batch, width + 3), dtype=torch.int32)
        self.block_table = table_storage[PAD : PAD + batch, :width]
        self.token_to_seq = torch.full((rows,), INT32_MAX, dtype=torch.int32)
        self.token_to_seq[: self.live] = torch.repeat_interleave(torch.arange(batch), self.lengths)
        self.k_cache = self.paged_cache()
        self.dst_k = torch.full((rows, HEAD_DIM), UNTOUCHED, dtype=torch.uint8)
        self.dst_scale = torch.full((rows, 4), UNTOUCHED, dtype=torch.uint8)

    def paged_cache(self) -> Any:
        """The cache in the layout that the wrapper names; a SHUFFLE block consists of tiles of 16 by 16."""
        (layout,) = set(re.findall(r'"(NHD|SHUFFLE)"', inspect.getsource(twin())))
        keys = self.keys
        if layout == "SHUFFLE":
            keys = keys.view(BLOCKS, BLOCK_SIZE // 16, 16, HEAD_DIM // 16, 16).permute(0, 1, 3, 2, 4)
        parts = keys.reshape(BLOCKS, -1), self.scales.view(self.torch.uint8).reshape(BLOCKS, -1)
        return self.torch.cat(parts, dim=1).view(BLOCKS, BLOCK_SIZE, HEAD_DIM + 4)

    def launch(self) -> None:
        from vllm.platforms import current_platform

        dst_k = self.dst_k.view(current_platform.fp8_dtype())
        twin()(self.k_cache, dst_k, self.dst_scale, self.block_table, self.cu_seqlen, self.token_to_seq)

    def launch_guarded(self, text: str, where: str) -> None:
        """Launch, and fail if the kernel reads outside its inputs or writes outside the live rows."""
        inputs = (self.k_cache, self.cu_seqlen, self.token_to_seq, *self.block_table)
        outputs = (self.dst_k[: self.live], self.dst_scale[: self.live])
        with guarded([span(tensor) for tensor in inputs], [span(tensor) for tensor in outputs]) as counts:
            self.launch()
        expect(not counts["read"], "twin-reads-out-of-bounds", f"{text}: {counts}", where)
        expect(not counts["write"], "twin-writes-past-the-end", f"{text}: {counts}", where)

    def check(self, text: str, where: str) -> None:
        torch = self.torch
        sequence = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        start = torch.cumsum(self.lengths, 0) - self.lengths
        token = torch.arange(self.live) - start[sequence]
        block = self.block_table[sequence, token // BLOCK_SIZE].long()
        scales = self.scales[..., None].view(torch.uint8)
        for got, source in ((self.dst_k, self.keys), (self.dst_scale, scales)):
            live = source[block, token % BLOCK_SIZE]
            expect(torch.equal(got[: self.live], live), "twin-wrong-live-rows", text, where)
            stray = (got[self.live :] != UNTOUCHED).any(dim=1).nonzero().flatten().tolist()
            expect(not stray, "twin-writes-past-the-end", f"{text}: rows {stray[:3]} past the end", where)


BATCHES = ((37,), (0, 20, 0, 45, 3, 0), (0, 0), (33, 40))


def twin_line(tree: Path) -> str:
    return line_of(tree / TWIN, "batch_id = tl.load(token_to_seq_ptr + tid", tree)


def tails(batch: int, extra: int) -> dict[str, list[int]]:
    """What the unwritten end of token_to_seq may hold, in reach of the decoys (PAD)."""
    return {
        "the next sequence": [batch] * extra,
        "far ids": [batch + 1 + i % 40 for i in range(extra)],
        "negative ids": [-3 - i % 40 for i in range(extra)],
        "a mixture": [(batch, -7, 0, batch - 1, batch + 9, -1)[i % 6] for i in range(extra)],
    }


def run_twin(tree: Path, lengths: tuple[int, ...], extra: int, tail: list[int], text: str) -> None:
    gather = TwinGather(lengths, extra)
    gather.token_to_seq[gather.live :] = gather.torch.tensor(tail, dtype=gather.torch.int32)
    gather.launch()
    gather.check(f"sequences of {lengths}, tail of token_to_seq: {text}", twin_line(tree))


@CASE.check("twin-live-rows")
def twin_live_rows(tree: Path) -> None:
    """Control: no tail; then a tail that holds ids of the batch, which is what stock takes well."""
    for lengths in BATCHES:
        if sum(lengths):
            run_twin(tree, lengths, 0, [], "none")
        for sequence in (0, len(lengths) - 1):
            run_twin(tree, lengths, 6, [sequence] * 6, f"{sequence} everywhere")


@CASE.check("twin-tail-untouched")
def twin_tail_untouched(tree: Path) -> None:
    """Rows past the end stay as they are, whatever token_to_seq holds there."""
    for lengths in BATCHES:
        for text, tail in tails(len(lengths), 12).items():
            run_twin(tree, lengths, 12, tail, text)


@CASE.check("twin-accesses-in-bounds")
def twin_accesses_in_bounds(tree: Path) -> None:
    """No load leaves its tensor, however far from an id token_to_seq's tail is; no store the live rows."""
    for lengths in BATCHES:
        batch = len(lengths)
        tail = [batch, -1, INT32_MAX, -INT32_MAX - 1, INT32_MAX - 1, 0, 1 << 20, 0x7F7F7F7F]
        gather = TwinGather(lengths, len(tail))
        gather.token_to_seq[gather.live :] = gather.torch.tensor(tail, dtype=gather.torch.int32)
        text = f"sequences of {lengths}, tail of token_to_seq: {tail}"
        gather.launch_guarded(text, twin_line(tree))
        gather.check(text, twin_line(tree))


# --- The metadata builder, which says whether such rows come up ---------------------------------------------

EXACT_LENGTHS, UPPER_BOUNDS = (20, 0, 45, 3), (23, 0, 48, 6)


def exact_metadata(indexer: ModuleType, block_table: Any) -> Any:
    """Up to 0.19.1: a method of the builder that knows one kind of lengths, those on the CPU."""
    import torch

    build_chunk = indexer.DeepseekV32IndexerMetadataBuilder.build_one_prefill_chunk
    builder = SimpleNamespace(device=torch.device("cpu"), max_prefill_buffer_size=1 << 20)
    lengths = torch.tensor(EXACT_LENGTHS, dtype=torch.int32)
    query_start = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)])
    count = len(EXACT_LENGTHS)
    if "reqs_start" in inspect.signature(build_chunk).parameters:
        return build_chunk(builder, 0, count, query_start, lengths, block_table)
    every_query = slice(0, sum(EXACT_LENGTHS))
    return build_chunk(builder, slice(0, count), every_query, query_start, lengths, block_table)


def upper_bound_metadata(indexer: ModuleType, block_table: Any) -> Any:
    """From 0.20.0 on: exact lengths on the device, upper bounds of them on the CPU."""
    import torch

    exact, bounds = (torch.tensor(lengths, dtype=torch.int32) for lengths in (EXACT_LENGTHS, UPPER_BOUNDS))
    query_start = torch.cat([torch.zeros(1, dtype=torch.int32), exact.cumsum(0, dtype=torch.int32)])
    count = len(EXACT_LENGTHS)
    # torch.empty then returns INT32_MAX everywhere, instead of what the allocator has left there.
    torch.use_deterministic_algorithms(True)
    try:
        return indexer.build_prefill_chunk_metadata(
            0, count, query_start, query_start, exact, exact, bounds, block_table, compress_ratio=1
        )
    finally:
        torch.use_deterministic_algorithms(False)


@CASE.check("twin-on-built-metadata")
def twin_on_built_metadata(tree: Path) -> None:
    """The twin on what the release's own builder hands to a gather: more rows than tokens from 0.20.0 on."""
    indexer = importlib.import_module("vllm.v1.attention.backends.mla.indexer")
    upper_bound = hasattr(indexer, "build_prefill_chunk_metadata")
    extra = sum(UPPER_BOUNDS) - sum(EXACT_LENGTHS) if upper_bound else 0
    gather = TwinGather(EXACT_LENGTHS, extra)
    metadata = (upper_bound_metadata if upper_bound else exact_metadata)(indexer, gather.block_table)
    sizes = int(metadata.total_seq_lens), metadata.cu_seq_lens.tolist()
    if sizes != (gather.rows, gather.cu_seqlen.tolist()):
        raise RuntimeError(f"the builder does not size its chunks as this check thinks: {sizes}")
    gather.cu_seqlen, gather.token_to_seq = metadata.cu_seq_lens, metadata.token_to_seq
    gather.launch_guarded("metadata of the release's builder", twin_line(tree))
    gather.check("metadata of the release's builder", twin_line(tree))
