"""0004: strides of the KV cache in the ROCm AITER backend (vllm/v1/attention/backends/rocm_aiter_fa.py).

The runner lays the cache of a hybrid model out as [K0][V0][K1][V1]; the kernels that write and gather it
used to derive the place of a block from the shape. The real wrappers run in triton's interpreter on one
flat storage that holds poison wherever nothing belongs; what must stand in it is laid out by plain torch.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from case_api import Case, Defect, expect
from torch.utils._python_dispatch import TorchDispatchMode

FILE = "vllm/v1/attention/backends/rocm_aiter_fa.py"
NUM_BLOCKS = 7
SLACK = 96  # elements before, between and after the two caches: a stray access hits poison
# The oldest aiter whose decode is known to follow an interleaved cache: the one that the release's
# docker/Dockerfile.rocm_base pins and, for other head sizes than 128, the one that keeps them off its ASM
# kernel (None: no aiter will do, the release calls that kernel for every batch).
AITER = {
    **dict.fromkeys(("0.18.0", "0.18.1", "0.19.0", "0.19.1"), ("0.1.10.post2", None)),
    **dict.fromkeys(("0.20.0", "0.20.1", "0.20.2"), ("0.1.10.post3", "0.1.12")),
    "0.21.0": ("0.1.13", "0.1.13"),
}
BEFORE = {
    "0.1.10.post2": "0.1.10.post1",
    "0.1.10.post3": "0.1.10.post2",
    "0.1.12": "0.1.11.post1",
    "0.1.13": "0.1.12.post1",
}

CASE = Case("0004")


@dataclass(frozen=True)
class Shape:
    head_size: int
    page: int
    heads: int
    dtype: torch.dtype  # of the model
    fp8: bool = False  # of the cache

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.fp8 else self.dtype

    @property
    def block(self) -> int:
        """Elements of one dense block."""
        return self.page * self.heads * self.head_size


SHAPES = (
    Shape(64, 64, 2, torch.bfloat16),
    Shape(128, 16, 1, torch.bfloat16),
    Shape(128, 16, 3, torch.float16),
    Shape(256, 32, 2, torch.bfloat16),
    Shape(64, 16, 3, torch.float16, fp8=True),
    Shape(128, 32, 2, torch.bfloat16, fp8=True),
)


@dataclass(frozen=True)
class Side:
    """Where K or V lies in the flat storage: first element and the strides of block, slot and head."""

    offset: int
    strides: tuple[int, int, int]

    def view(self, raw: torch.Tensor, shape: Shape) -> torch.Tensor:
        """The cache as the backend gets it: [num_blocks, page, heads, head_size]."""
        size = (NUM_BLOCKS, shape.page, shape.heads, shape.head_size)
        return raw.as_strided(size, (*self.strides, 1), self.offset)


def dense(shape: Shape, offset: int, block_stride: int) -> Side:
    """Dense blocks at *block_stride*; the stride of a single head means nothing and is no obstacle."""
    head_stride = shape.head_size if shape.heads > 1 else 5 * shape.head_size
    return Side(offset, (block_stride, shape.heads * shape.head_size, head_stride))


Place = Callable[["Shape"], tuple[Side, Side]]


def contiguous(shape: Shape) -> tuple[Side, Side]:
    """[K0][K1]...[V0][V1]..., the layout of a model without mamba layers."""
    second = 2 * SLACK + NUM_BLOCKS * shape.block
    return dense(shape, SLACK, shape.block), dense(shape, second, shape.block)


def interleaved(shape: Shape) -> tuple[Side, Side]:
    """[K0][V0][K1][V1]..., the layout of a hybrid model."""
    return dense(shape, SLACK, 2 * shape.block), dense(shape, SLACK + shape.block, 2 * shape.block)


def own_strides(shape: Shape) -> tuple[Side, Side]:
    """K and V at block strides of their own, neither a multiple of a block."""
    k_stride, v_stride = 2 * shape.block + 32, shape.block + 16
    return dense(shape, SLACK, k_stride), dense(shape, 2 * SLACK + NUM_BLOCKS * k_stride, v_stride)


def own_inner_strides(shape: Shape) -> tuple[Side, Side]:
    """All six strides of K and V different, with gaps between slots and between heads."""
    k_head, v_head = shape.head_size + 8, shape.head_size + 24
    k_slot, v_slot = shape.heads * k_head + 16, shape.heads * v_head + 40
    k_block, v_block = shape.page * k_slot + 48, shape.page * v_slot + 72
    key = Side(SLACK, (k_block, k_slot, k_head))
    return key, Side(2 * SLACK + NUM_BLOCKS * k_block, (v_block, v_slot, v_head))


def storage(sides: tuple[Side, Side], shape: Shape) -> torch.Tensor:
    """A flat storage for both sides; the poison 240 is a value that no test data take.

    It is long enough for either side at the other's block stride and at twice the dense one: a kernel that
    mixes them up is to be caught by what it writes, not to write outside and take the process down.
    """
    stride = max(2 * shape.block, *(side.strides[0] for side in sides))
    end = max(side.offset for side in sides) + NUM_BLOCKS * stride + SLACK
    return torch.full((end,), 240.0).to(shape.cache_dtype)


def values(generator: torch.Generator, size: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Multiples of a half up to 7.5: exact in every dtype used here, and after a scale of 2 or 0.5."""
    return (torch.randint(-15, 16, size, generator=generator) / 2).to(dtype)


def shuffle_offsets(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Offset in a dense block of element [slot, head, d], for K and V, from aiter's documented shapes.

    K is [heads, head_size // x, page, x] and V is [heads, page // x, head_size, x].
    """
    x = 16 // shape.cache_dtype.itemsize
    flat = torch.arange(shape.block)
    key = flat.reshape(shape.heads, shape.head_size // x, shape.page, x).permute(2, 0, 1, 3)
    value = flat.reshape(shape.heads, shape.page // x, shape.head_size, x).permute(1, 3, 0, 2)
    full = (shape.page, shape.heads, shape.head_size)
    return key.reshape(full), value.reshape(full)


def cells(side: Side, shape: Shape, inner: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Place in the flat storage of every element of the given slots: [slots, heads, head_size]."""
    starts = side.offset + slots // shape.page * side.strides[0]
    return starts[:, None, None] + inner[slots % shape.page]


def nhd_offsets(side: Side, shape: Shape) -> torch.Tensor:
    """Offset in a block of element [slot, head, d] for one side of the NHD layout."""
    _, slot, head = side.strides
    ranges = (torch.arange(size) for size in (shape.page, shape.heads, shape.head_size))
    slots, heads, elements = torch.meshgrid(*ranges, indexing="ij")
    return slots * slot + heads * head + elements


def inner_offsets(layout: str, sides: tuple[Side, Side], shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets inside a block, for K and V, of the named cache layout."""
    if layout == "SHUFFLE":
        return shuffle_offsets(shape)
    return nhd_offsets(sides[0], shape), nhd_offsets(sides[1], shape)


@cache
def backend(tree: Path) -> ModuleType:
    """The module under test with its ROCm part: loaded once, then again with is_rocm() true."""
    from vllm.platforms import current_platform

    module = importlib.import_module("vllm.v1.attention.backends.rocm_aiter_fa")
    if not Path(str(module.__file__)).is_relative_to(tree):
        raise RuntimeError(f"{module.__file__} is not of the tree under test")
    with mock.patch.object(current_platform, "is_rocm", return_value=True, create=True):
        return importlib.reload(module)


# Where the defects are: the first line that holds the second text after the line that holds the first.
NHD_GATHER = ('if CACHE_FORMAT == "NHD"', "block_id *")
SHUFFLE_GATHER = ('elif CACHE_FORMAT == "SHUFFLE"', "block_id *")
SHUFFLE_WRITE = ("def reshape_and_cache_shuffle_kernel(", "block_id *")
GATHER_WRAPPER = ("def cp_mha_gather_cache(", "page_size = key_cache.shape[1]")
WRITE_WRAPPER = ("def reshape_and_cache_shuffle_triton(", "num_blocks, block_size, _, _")
BUILDER = ("class AiterFlashAttentionMetadataBuilder(", "super().__init__(")


def place_of(tree: Path, place: tuple[str, str]) -> str:
    """file:line of one of the places above."""
    lines = enumerate((tree / FILE).read_text(encoding="utf-8").splitlines(), 1)
    after, text = place
    if any(after in line for _, line in lines):  # leaves the iterator behind that line
        return next((f"{FILE}:{number}" for number, line in lines if text in line), FILE)
    return FILE


class NoCopyOfCache(TorchDispatchMode):
    """A wrapper that copies the cache gathers the right rows too, at the price of the whole cache."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "clone" in str(func) and args[0].dim() == 4:
            raise Defect("gather-copies-the-cache", f"{func} of {tuple(args[0].shape)}", FILE)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def taken(name: str, where: str) -> Iterator[None]:
    """A layout that the kernels can follow must not meet an assertion."""
    try:
        yield
    except AssertionError as error:
        if isinstance(error, Defect):
            raise
        raise Defect(f"{name}-refuses-good-blocks", str(error), where) from error


# --- gather ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """A chunk of context to gather: three sequences, one of them empty, block tables with unused tails."""

    block_tables: torch.Tensor
    lengths: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def owners(self) -> torch.Tensor:
        """The sequence of every token."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))

    @property
    def cu_lengths(self) -> torch.Tensor:
        return torch.tensor((0, *self.lengths)).cumsum(0)

    def slots(self, page: int) -> torch.Tensor:
        """The slot of every token, sequence by sequence."""
        rows = zip(self.block_tables, self.lengths, self.starts, strict=True)
        found = []
        for blocks, length, start in rows:
            positions = torch.arange(start, start + length)
            found.append(blocks[positions // page] * page + positions % page)
        return torch.cat(found)


def chunk(page: int) -> Chunk:
    """A prefix that starts in its block and ends in the next, nothing, and one from the start of a block."""
    tables = torch.tensor([[5, 2, 6], [1, 1, 1], [4, 0, 3]])
    return Chunk(tables, (4, 0, 3), (page - 2, 0, 2 * page))


# The SHUFFLE kernels of these releases leave the scale out; 1 suits those of later ones as well.
K_SCALE = {"NHD": 2.0, "SHUFFLE": 1.0}
V_SCALE = {"NHD": 0.5, "SHUFFLE": 1.0}


def gather(
    module: ModuleType, layout: str, shape: Shape, raw: torch.Tensor, sides: tuple[Side, Side], what: Chunk
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the wrapper as the extend path does; one row more than asked for is to stay as it is."""
    tokens = sum(what.lengths)
    size = (tokens + 1, shape.heads, shape.head_size)
    key, value = (torch.full(size, 240.0, dtype=shape.dtype) for _ in range(2))
    module.cp_mha_gather_cache(
        key_cache=sides[0].view(raw, shape),
        value_cache=sides[1].view(raw, shape),
        key=key,
        value=value,
        block_tables=what.block_tables.to(torch.int32),
        k_scales=torch.tensor([K_SCALE[layout]]),
        v_scales=torch.tensor([V_SCALE[layout]]),
        cu_seqlens_kv=what.cu_lengths.to(torch.int32),
        token_to_batch=what.owners.to(torch.int32),
        seq_starts=torch.tensor(what.starts, dtype=torch.int32),
        dequant=shape.fp8,
        kv_cache_layout=layout,
        total_tokens=tokens,
    )
    return key, value


def gather_reference(
    shape: Shape, raw: torch.Tensor, side: Side, inner: torch.Tensor, what: Chunk, scale: float
) -> torch.Tensor:
    """The rows that the gather has to return for one side."""
    rows = raw.to(torch.float32)[cells(side, shape, inner, what.slots(shape.page))]
    rows = rows * (scale if shape.fp8 else 1.0)
    return torch.cat([rows, torch.full((1, *rows.shape[1:]), 240.0)]).to(shape.dtype)


def check_gather(tree: Path, layout: str, place: Place, line: tuple[str, str]) -> None:
    """Fill the whole storage, so that every wrong cell has a wrong value, gather and compare."""
    module, where = backend(tree), place_of(tree, line)
    name, scales = f"{layout.lower()}-gather", (K_SCALE[layout], V_SCALE[layout])
    for shape in SHAPES:
        sides, what = place(shape), chunk(shape.page)
        generator = torch.Generator().manual_seed(shape.block)
        raw = values(generator, tuple(storage(sides, shape).shape), shape.cache_dtype)
        with taken(name, where), NoCopyOfCache():
            found = gather(module, layout, shape, raw, sides, what)
        inner = inner_offsets(layout, sides, shape)
        for kind, got, side, offsets, scale in zip("KV", found, sides, inner, scales, strict=True):
            wanted = gather_reference(shape, raw, side, offsets, what, scale)
            wrong = int((got != wanted).flatten(1).any(1).sum())
            detail = f"{wrong} of {len(wanted)} rows of {kind} are wrong for {shape}"
            expect(wrong == 0, f"{name}-wrong-rows", detail, where)


@CASE.check("nhd-gather-contiguous")
def nhd_gather_contiguous(tree: Path) -> None:
    """Control."""
    check_gather(tree, "NHD", contiguous, NHD_GATHER)


@CASE.check("nhd-gather-interleaved")
def nhd_gather_interleaved(tree: Path) -> None:
    """A hybrid model's cache in the default layout."""
    check_gather(tree, "NHD", interleaved, NHD_GATHER)


@CASE.check("nhd-gather-own-strides")
def nhd_gather_own_strides(tree: Path) -> None:
    """Each of the six strides counts, K's for K and V's for V."""
    check_gather(tree, "NHD", own_inner_strides, NHD_GATHER)


@CASE.check("shuffle-gather-contiguous")
def shuffle_gather_contiguous(tree: Path) -> None:
    """Control."""
    check_gather(tree, "SHUFFLE", contiguous, SHUFFLE_GATHER)


@CASE.check("shuffle-gather-interleaved")
def shuffle_gather_interleaved(tree: Path) -> None:
    """A hybrid model's cache in the SHUFFLE layout."""
    check_gather(tree, "SHUFFLE", interleaved, SHUFFLE_GATHER)


@CASE.check("shuffle-gather-own-strides")
def shuffle_gather_own_strides(tree: Path) -> None:
    """K's block stride for K and V's for V."""
    check_gather(tree, "SHUFFLE", own_strides, SHUFFLE_GATHER)


# --- write ----------------------------------------------------------------------------------------


def slot_mapping(page: int) -> torch.Tensor:
    """First and last slot of the first and last block, two neighbours, a padded token."""
    last = NUM_BLOCKS * page
    return torch.tensor([0, page - 1, 3 * page + 1, 3 * page + 2, -1, last - page, last - 1])


def write(module: ModuleType, shape: Shape, raw: torch.Tensor, sides: tuple[Side, Side]) -> tuple:
    """Call the writer with keys and values cut out of one fused projection; returns both and the slots."""
    slots = slot_mapping(shape.page)
    width = shape.heads * shape.head_size
    generator = torch.Generator().manual_seed(shape.block)
    fused = values(generator, (len(slots) + 1, 2 * width + 8), shape.dtype)
    size = (-1, shape.heads, shape.head_size)
    key, value = fused[:, :width].view(size), fused[:, width + 8 :].view(size)
    module.reshape_and_cache_shuffle_triton(
        key=key,
        value=value,
        key_cache=sides[0].view(raw, shape),
        value_cache=sides[1].view(raw, shape),
        slot_mapping=slots,
        kv_cache_dtype="fp8" if shape.fp8 else "auto",
        k_scales=torch.ones(1),
        v_scales=torch.ones(1),
    )
    return key, value, slots


def check_write(tree: Path, place: Place) -> None:
    """Write into a poisoned storage and compare all of it."""
    module, where = backend(tree), place_of(tree, SHUFFLE_WRITE)
    for shape in SHAPES:
        sides = place(shape)
        raw = storage(sides, shape)
        wanted = raw.to(torch.float32)
        with taken("shuffle-write", where):
            *written, slots = write(module, shape, raw, sides)
        for side, rows, inner in zip(sides, written, shuffle_offsets(shape), strict=True):
            targets = cells(side, shape, inner, slots[slots >= 0])
            wanted[targets] = rows[: len(slots)][slots >= 0].to(torch.float32)
        wrong = int((raw.to(torch.float32) != wanted).sum())
        detail = f"{wrong} cells of the storage are wrong for {shape}"
        expect(wrong == 0, "shuffle-write-wrong-cells", detail, where)


@CASE.check("shuffle-write-contiguous")
def shuffle_write_contiguous(tree: Path) -> None:
    """Control."""
    check_write(tree, contiguous)


@CASE.check("shuffle-write-interleaved")
def shuffle_write_interleaved(tree: Path) -> None:
    """No stray cell either: in this layout a wrong block of K is a block of V."""
    check_write(tree, interleaved)


@CASE.check("shuffle-write-own-strides")
def shuffle_write_own_strides(tree: Path) -> None:
    """K's block stride for K and V's for V."""
    check_write(tree, own_strides)


# --- blocks that are not dense ----------------------------------------------------------------------


# Torch can view blocks of these shapes as aiter's K and V in spite of a gap after every slot (of two bytes
# per element, x is 8: K's page times x is the row of one head, V's head size times x is the row of eight),
# so that nothing but the assertion stands between such blocks and wrong cells.
SPARSE = {"K": Shape(128, 16, 1, torch.bfloat16), "V": Shape(128, 16, 8, torch.bfloat16)}


def sparse_sides(kind: str) -> tuple[Side, Side]:
    """Interleaved blocks, one side of which has the gaps."""
    shape = SPARSE[kind]
    slot = shape.heads * shape.head_size + 32
    block = shape.page * slot
    key, value = dense(shape, SLACK, 2 * block), dense(shape, SLACK + block, 2 * block)
    gaps = (2 * block, slot, shape.head_size)
    return (Side(key.offset, gaps), value) if kind == "K" else (key, Side(value.offset, gaps))


def check_sparse(name: str, call: Callable[[Shape, torch.Tensor, tuple[Side, Side]], object], where: str) -> None:
    """A gap in the blocks of K, then of V, has to meet an assertion that says so, before any write."""
    for kind, shape in SPARSE.items():
        sides = sparse_sides(kind)
        raw = storage(sides, shape)
        try:
            call(shape, raw, sides)
        except AssertionError as error:
            strides = [side.view(raw, shape).stride() for side in sides]
            said = f"to be dense, but got strides {strides[0]} for K and {strides[1]} for V" in str(error)
            expect(said, f"{name}-says-nothing", str(error), where)
        else:
            raise Defect(f"{name}-takes-sparse-blocks", f"{kind} with gaps was taken", where)
        expect(bool((raw == 240).all()), f"{name}-writes-first", "the storage has changed", where)


@CASE.check("shuffle-gather-refuses-sparse-blocks")
def shuffle_gather_refuses_sparse(tree: Path) -> None:
    """The SHUFFLE gather derives offsets inside a block from the shape, so blocks have to be dense."""
    call = partial(gather, backend(tree), "SHUFFLE", what=chunk(16))
    check_sparse("shuffle-gather", call, place_of(tree, GATHER_WRAPPER))


@CASE.check("shuffle-write-refuses-sparse-blocks")
def shuffle_write_refuses_sparse(tree: Path) -> None:
    """So does the writer."""
    check_sparse("shuffle-write", partial(write, backend(tree)), place_of(tree, WRITE_WRAPPER))


# --- decode -----------------------------------------------------------------------------------------


def hybrid_cache(module: ModuleType, shape: Shape) -> torch.Tensor:
    """A layer's cache as the runner makes it for a hybrid model."""
    size = module.AiterFlashAttentionBackend.get_kv_cache_shape(NUM_BLOCKS, shape.page, shape.heads, shape.head_size)
    expect(size[:2] == (2, NUM_BLOCKS), "cache-shape-changed", f"{size}", FILE)
    kv_cache = torch.full(size, 240.0, dtype=shape.dtype)
    return kv_cache.as_strided_(size, (shape.block, 2 * shape.block, *kv_cache.stride()[2:]))


@contextlib.contextmanager
def shuffle_ops(module: ModuleType, enabled: bool = True) -> Iterator[dict]:
    """Aiter as far as the backend sees it: the SHUFFLE switch and a decode that keeps its arguments."""
    seen: dict = {}
    keep = staticmethod(lambda **arguments: seen.update(arguments))
    with contextlib.ExitStack() as stack:
        for name in ("pa_fwd_asm", "paged_attention_common"):
            stack.enter_context(mock.patch.object(module.rocm_aiter_ops, name, keep, create=True))
        switch = {"is_shuffle_kv_cache_enabled": lambda: enabled}
        stack.enter_context(mock.patch.multiple(module.rocm_aiter_ops, **switch))
        yield seen


def decode_rows(seen: dict, name: str, shape: Shape) -> torch.Tensor:
    """Read one sequence as aiter does: both sides at K's block and head strides, dense inside a head."""
    tensor, strides = seen[name], seen["K"].stride()
    inner = shuffle_offsets(shape)["KV".index(name)]
    inner = inner + torch.arange(shape.heads)[None, :, None] * (strides[1] - shape.block // shape.heads)
    slots = torch.arange(int(seen["context_lens"][0]))
    blocks = seen["block_tables"][0].long()[slots // shape.page]
    flat = tensor.as_strided((tensor.untyped_storage().size() // tensor.itemsize,), (1,), 0)
    return flat[tensor.storage_offset() + (blocks * strides[0])[:, None, None] + inner[slots % shape.page]]


@CASE.check("decode-reads-what-was-written")
def decode_reads_what_was_written(tree: Path) -> None:
    """do_kv_cache_update, then forward up to aiter: what aiter is handed leads to the rows written."""
    module, shape = backend(tree), Shape(128, 16, 2, torch.bfloat16)
    kv_cache, tokens, table = hybrid_cache(module, shape), 21, torch.tensor([[5, 2]], dtype=torch.int32)
    generator = torch.Generator().manual_seed(4)
    written = values(generator, (2, tokens, shape.heads, shape.head_size), shape.dtype)
    slots = table[0].long()[torch.arange(tokens) // shape.page] * shape.page
    slots += torch.arange(tokens) % shape.page
    impl = module.AiterFlashAttentionImpl(
        num_heads=4,
        head_size=shape.head_size,
        scale=1.0,
        num_kv_heads=shape.heads,
        alibi_slopes=None,
        sliding_window=None,
        kv_cache_dtype="auto",
    )
    layer = SimpleNamespace(_k_scale=torch.ones(1), _v_scale=torch.ones(1))
    query = torch.zeros(1, 4, shape.head_size, dtype=shape.dtype)
    metadata = SimpleNamespace(
        num_actual_tokens=1,
        num_decodes=1,
        num_decode_tokens=1,
        num_prefills=0,
        num_extends=0,
        num_extend_tokens=0,
        use_cascade=False,
        decode_metadata=SimpleNamespace(max_query_len=1),
        block_table=table,
        seq_lens=torch.tensor([tokens], dtype=torch.int32),
        max_seq_len=tokens,
        k_scale=torch.ones(1),
        v_scale=torch.ones(1),
    )
    with shuffle_ops(module) as seen, taken("decode", place_of(tree, WRITE_WRAPPER)):
        impl.do_kv_cache_update(layer, *written, kv_cache, slots)
        impl.forward(layer, query, written[0, -1:], written[1, -1:], kv_cache, metadata, query.clone())
    for name, rows in zip("KV", written, strict=True):
        same = torch.equal(decode_rows(seen, name, shape), rows)
        detail = f"aiter is led to other rows of {name} than were written"
        expect(same, "decode-reads-other-cells", detail, place_of(tree, SHUFFLE_WRITE))


# --- the refusal ------------------------------------------------------------------------------------


@contextlib.contextmanager
def installed_aiter(version: str | None) -> Iterator[None]:
    """The metadata of an amd-aiter of this version, first in sys.path; None adds none."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(sys, "path", [folder, *sys.path]):
        if version is not None:
            info = Path(folder, "amd_aiter-0.dist-info")
            info.mkdir()
            text = f"Metadata-Version: 2.1\nName: amd-aiter\nVersion: {version}\n"
            (info / "METADATA").write_text(text, encoding="utf-8")
        yield


def build(tree: Path, aiter: str | None, head_size: int, hybrid: bool = True, shuffle: bool = True) -> None:
    """Run the real __init__ of the metadata builder; the layer's head size is not the model's here."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    module = backend(tree)
    model = SimpleNamespace(
        is_hybrid=hybrid,
        dtype=torch.bfloat16,
        get_num_attention_heads=lambda parallel: 4,
        get_num_kv_heads=lambda parallel: 1,
        get_head_size=lambda: 64 if head_size == 128 else 128,
    )
    config = SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        compilation_config=SimpleNamespace(static_forward_context={}),
        speculative_config=None,
    )
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=head_size, dtype=torch.bfloat16)
    with shuffle_ops(module, shuffle), installed_aiter(aiter):
        builder = module.AiterFlashAttentionMetadataBuilder(spec, [], config, torch.device("cpu"))
    expect(builder.block_size == 16 and builder.scale.numel() == 1, "builder-not-made", "", FILE)


def aiter_needed() -> dict[int, str | None]:
    """The oldest aiter whose decode is known to follow the cache, by head size."""
    at_128, at_others = AITER[os.environ["VLLM_PATCHES_RELEASE"]]
    return {64: at_others, 128: at_128, 256: at_others}


def too_old(needed: str | None) -> list[str | None]:
    """Versions to refuse: older ones, development ones that may be older, none that can be compared."""
    if needed is None:
        return ["0.1.10.post2", "0.1.13", "0.1.26", None]
    base = needed.partition(".post")[0]
    return [BEFORE[needed], f"{base}rc4", f"{base}.dev7+g0123abc", "0.1.7.post2.dev18", "main", None]


def new_enough(needed: str | None) -> list[str]:
    """Versions to accept: the one needed as aiter's own wheels spell it, and newer ones."""
    if needed is None:
        return []
    return [needed, f"{needed}+rocm7.2.3.g0123abc", "0.1.14.dev3+g0123abc", "0.1.26"]


def refusal_says(text: str, aiter: str | None, head_size: int) -> bool:
    """What is refused and why, what is needed, what was found, what to do."""
    needed = aiter_needed()[head_size] or aiter_needed()[128]
    found = "of unknown version" if aiter in (None, "main") else aiter
    parts = (
        "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT does not support this hybrid model: ",
        "known to follow its interleaved KV cache only with ",
        f"amd-aiter >= {needed}, but found ",
        f"amd-aiter {found}. Unset VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT",
    )
    return all(part in text for part in parts)


@CASE.check("builder-refuses")
def builder_refuses(tree: Path) -> None:
    """Hybrid model, SHUFFLE, and an aiter that cannot be shown to follow the cache: no start."""
    where = place_of(tree, BUILDER)
    for head_size, needed in aiter_needed().items():
        for aiter in too_old(needed):
            what = f"head size {head_size} with amd-aiter {aiter}"
            try:
                build(tree, aiter, head_size)
            except (RuntimeError, ValueError, ImportError) as error:
                said = refusal_says(str(error), aiter, head_size)
                expect(said, "refusal-does-not-say-why", f"{what}: {error}", where)
            else:
                raise Defect("hybrid-shuffle-not-refused", what, where)


def build_or_defect(tree: Path, aiter: str | None, head_size: int, **flags: bool) -> None:
    """Make a builder; a refusal is the defect here."""
    try:
        build(tree, aiter, head_size, **flags)
    except (RuntimeError, ValueError, ImportError) as error:
        raise Defect("builder-refuses-too-much", f"{error}", place_of(tree, BUILDER)) from error


@CASE.check("builder-accepts")
def builder_accepts(tree: Path) -> None:
    """Control: with an aiter that follows the cache the builder is made as ever."""
    for head_size, needed in aiter_needed().items():
        for aiter in new_enough(needed):
            build_or_defect(tree, aiter, head_size)


@CASE.check("builder-leaves-others-alone")
def builder_leaves_others_alone(tree: Path) -> None:
    """Control: neither the default layout nor a model that is not hybrid depends on aiter's version."""
    for head_size in (64, 128, 256):
        for aiter in ("0.1.7.post2.dev18", None):
            build_or_defect(tree, aiter, head_size, hybrid=False)
            build_or_defect(tree, aiter, head_size, shuffle=False)
