"""0003: the sparse MLA indexer's per-token context lengths live in one flat, non-negative buffer.

The real metadata builder runs on the CPU: its constructor, build() with real CommonAttentionMetadata, and
the Triton kernel of the flatten path in the interpreter. Only the platform and DeepGEMM's two entry points
are stood in for; the stand-in records what DeepGEMM would be given, which must be contiguous.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from case_api import Case, expect, line_of
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.mla import indexer
from vllm.v1.kv_cache_interface import MLAAttentionSpec

CASE = Case("0003")

RELEASE = os.environ["VLLM_PATCHES_RELEASE"]
# The 2-D buffer came with 0.20.0; before it there is one thing to assert: that it is not there.
ABSENT = {"0.18.1", "0.19.1"}

SOURCE = "vllm/v1/attention/backends/mla/indexer.py"
MAX_SEQS = 5
BLOCK_SIZE = 64
MAX_MODEL_LEN = 4096
# A request as (query length, sequence length); (0, 0) is how the runner pads a batch for a CUDA graph.
Rows = list[tuple[int, int]]
PADDING = (0, 0)


def absent(name: str):
    """Register a check for the releases that never had the 2-D buffer."""
    return CASE.check(name) if RELEASE in ABSENT else lambda function: function


def present(name: str):
    """Register a check for the releases that have (or had) the 2-D buffer."""
    return CASE.check(name) if RELEASE not in ABSENT else lambda function: function


@contextmanager
def platform(blackwell: bool = False, deep_gemm: list[torch.Tensor] | None = None) -> Iterator[None]:
    """The module's view of the machine; *deep_gemm* collects the lengths that DeepGEMM is given."""

    def paged_mqa_metadata(context_lens: torch.Tensor, block_size: int, num_sms: int) -> torch.Tensor:
        assert deep_gemm is not None
        deep_gemm.append(context_lens)
        return torch.zeros((num_sms + 1, 2), dtype=torch.int32)

    machine = SimpleNamespace(
        is_cuda=lambda: deep_gemm is not None,
        is_rocm=lambda: False,
        is_xpu=lambda: False,
        is_device_capability_family=lambda family: blackwell and family == 100,
    )
    with (
        mock.patch.object(indexer, "current_platform", machine),
        mock.patch.object(indexer, "num_compute_units", lambda *_: 4),
        # 0.18.1 asks by another name; nothing asks there, since the machine is not a CUDA one.
        mock.patch.object(indexer, "has_deep_gemm", lambda: True, create=RELEASE in ABSENT),
        mock.patch.object(indexer, "get_paged_mqa_logits_metadata", paged_mqa_metadata),
    ):
        yield


def make_builder(
    next_n: int, *, blackwell: bool = False, batched_tokens: int = 64, ratio: int = 1, device: str = "cpu"
):
    """The real builder for next_n - 1 speculative tokens."""
    # 0.18.1 and 0.19.1 have no compress_ratio.
    compression = {"compress_ratio": ratio} if ratio > 1 else {}
    spec = MLAAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=128, dtype=torch.uint8, **compression)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_SEQS, max_num_batched_tokens=batched_tokens),
        speculative_config=SimpleNamespace(num_speculative_tokens=next_n - 1) if next_n > 1 else None,
        attention_config=SimpleNamespace(use_fp4_indexer_cache=False),
        model_config=SimpleNamespace(max_model_len=MAX_MODEL_LEN),
        parallel_config=SimpleNamespace(
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            cp_kv_cache_interleave_size=1,
        ),
    )
    with platform(blackwell), mock.patch.object(indexer, "get_total_cp_world_size", lambda: 1):
        return indexer.DeepseekV32IndexerMetadataBuilder(spec, ["indexer"], config, torch.device(device))


def native_builder(next_n: int, **options):
    """A builder on the native path: any machine for one speculative token, Blackwell for more."""
    builder = make_builder(next_n, blackwell=next_n > 2, **options)
    assert not builder.use_flattening
    return builder


def flatten_builder(next_n: int, **options):
    """A builder on the flatten path: more than one speculative token, not on Blackwell."""
    builder = make_builder(next_n, **options)
    assert builder.use_flattening
    return builder


def common_metadata(rows: Rows, num_tokens: int | None = None) -> CommonAttentionMetadata:
    """What the model runner hands to every builder; *num_tokens* where it is padded as well."""
    query_lens = torch.tensor([query for query, _ in rows], dtype=torch.int32)
    seq_lens = torch.tensor([length for _, length in rows], dtype=torch.int32)
    start = torch.zeros(len(rows) + 1, dtype=torch.int32)
    start[1:] = torch.cumsum(query_lens, 0)
    tokens = int(start[-1]) if num_tokens is None else num_tokens
    width = MAX_MODEL_LEN // BLOCK_SIZE
    fields = {
        "query_start_loc": start,
        "query_start_loc_cpu": start.clone(),
        "seq_lens": seq_lens,
        "num_reqs": len(rows),
        "num_actual_tokens": tokens,
        "max_query_len": int(query_lens.max()),
        "max_seq_len": int(seq_lens.max()),
        "block_table_tensor": 1 + torch.arange(len(rows) * width, dtype=torch.int32).view(-1, width),
        "slot_mapping": torch.arange(tokens, dtype=torch.int64),
    }
    if RELEASE not in ABSENT:
        fields["seq_lens_cpu_upper_bound"] = seq_lens.clone()
    return CommonAttentionMetadata(**fields)


def build(builder, rows: Rows, *, deep_gemm: list[torch.Tensor] | None = None, num_tokens: int | None = None):
    """One step: the decode part of the metadata that build() makes of *rows*."""
    with platform(deep_gemm=deep_gemm):
        return builder.build(0, common_metadata(rows, num_tokens)).decode


def uniform_batches(length: int) -> Iterator[Rows]:
    """Batches of 1 to MAX_SEQS requests of *length* tokens each, without padding."""
    for count in range(1, MAX_SEQS + 1):
        yield [(length, length + 7 * row) for row in range(count)]


def padded_batches(length: int) -> Iterator[Rows]:
    """The same, padded to MAX_SEQS rows."""
    for rows in uniform_batches(length):
        if len(rows) < MAX_SEQS:
            yield rows + [PADDING] * (MAX_SEQS - len(rows))


def native_shapes() -> Iterator[tuple[int, int]]:
    """Every (next_n, longest decode query) the native path takes."""
    return ((next_n, length) for next_n in range(2, 9) for length in range(1, next_n + 1))


def native_lengths(rows: Rows, length: int, ratio: int = 1) -> list[list[int]]:
    """Token j of a request of L tokens attends to L - length + j + 1 of them, padding to none."""
    return [[max(total - length + j + 1, 0) // ratio for j in range(length)] for _, total in rows]


def flat_lengths(rows: Rows) -> list[int]:
    """The same for the flatten path: one entry per token of the batch, none for padding."""
    return [total - query + j + 1 for query, total in rows for j in range(query)]


def where(tree: Path, *texts: str) -> str:
    """The first of *texts* that the source holds (stock first), as file:line."""
    found = [line_of(tree / SOURCE, text, tree) for text in texts]
    return next((place for place in found if ":" in place), SOURCE)


def at_slice(tree: Path) -> str:
    """Where the native path makes the lengths it returns."""
    return where(tree, "[:num_decodes, :max_decode_len] = (", ": num_decodes * max_decode_len")


def at_buffer(tree: Path) -> str:
    """Where the buffer is made."""
    return where(tree, "self.decode_seq_lens_buffer = torch.zeros(")


def expect_values(tree: Path, actual: torch.Tensor, wanted: list, what: str, assertion: str) -> None:
    """Shape and every value, the latter against a formula in plain Python."""
    shape = tuple(torch.tensor(wanted).shape)
    expect(tuple(actual.shape) == shape, "wrong-shape", f"{what}: {tuple(actual.shape)}", at_slice(tree))
    expect(actual.dtype == torch.int32, "wrong-dtype", f"{what}: {actual.dtype}", at_slice(tree))
    expect(actual.tolist() == wanted, assertion, f"{what}: {actual.tolist()} != {wanted}", at_slice(tree))


def expect_in_buffer(tree: Path, builder, address: int, actual: torch.Tensor, what: str) -> None:
    """The lengths start where the buffer started at construction: no storage of this step's own."""
    buffer = builder.decode_seq_lens_buffer
    expect(buffer.data_ptr() == address, "buffer-moved", what, at_slice(tree))
    expect(actual.data_ptr() == address, "address-not-fixed", what, at_slice(tree))
    same = actual.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    expect(same, "new-storage", what, at_slice(tree))


def expect_contiguous(tree: Path, actual: torch.Tensor, what: str) -> None:
    """What DeepGEMM (context_lens.is_contiguous()) and persistent_topk ask for."""
    stride = f"{what}: shape {tuple(actual.shape)}, stride {actual.stride()}"
    expect(actual.is_contiguous(), "lengths-not-contiguous", stride, at_slice(tree))


@absent("there is no 2-D buffer")
def no_two_dimensional_buffer(tree: Path) -> None:
    """0.18.1 and 0.19.1 hand 1-D lengths on: no buffer of per-token lengths for the native path exists."""
    for next_n in range(1, 5):
        builder = make_builder(next_n)
        expect(not hasattr(builder, "decode_seq_lens_buffer"), "buffer-present", f"{next_n}", SOURCE)
        for length in range(1, next_n + 1):
            rows: Rows = [(length, length + 9), (length, length + 30), (length, length + 2)]
            lengths = build(builder, rows).seq_lens
            detail = f"next_n {next_n}, {length} tokens each: {tuple(lengths.shape)} {lengths.stride()}"
            expect(lengths.dim() == 1 and lengths.is_contiguous(), "lengths-not-flat", detail, SOURCE)


@present("one flat buffer")
def one_flat_buffer(tree: Path) -> None:
    """1-D int32 whatever next_n and path, large enough for both uses of it, on the builder's device."""
    for next_n, blackwell in [(n, b) for n in range(1, 9) for b in (False, True)]:
        for batched_tokens in (MAX_SEQS, 64):
            builder = make_builder(next_n, blackwell=blackwell, batched_tokens=batched_tokens)
            buffer = builder.decode_seq_lens_buffer
            what = f"next_n {next_n}, {batched_tokens} batched tokens: {buffer.dtype} {tuple(buffer.shape)}"
            expect(buffer.dim() == 1 and buffer.dtype == torch.int32, "buffer-not-flat", what, at_buffer(tree))
            needed = max(batched_tokens, MAX_SEQS * next_n)
            expect(buffer.numel() >= needed, "buffer-too-small", f"{what} < {needed}", at_buffer(tree))
    # "meta" plays the accelerator, so that its buffers differ from those on the host.
    place = make_builder(2, device="meta").decode_seq_lens_buffer.device
    expect(place.type == "meta", "buffer-elsewhere", f"a builder for meta has its buffer on {place}", at_buffer(tree))


@present("native: lengths are contiguous")
def native_contiguous(tree: Path) -> None:
    """Every shape the native path can take, from one row to MAX_SEQS, with padding and without."""
    for next_n, length in native_shapes():
        builder = native_builder(next_n)
        for rows in [*uniform_batches(length), *padded_batches(length)]:
            what = f"next_n {next_n}, {len(rows)} x {length}"
            expect_contiguous(tree, build(builder, rows).seq_lens, what)


@present("native: lengths and their address")
def native_values(tree: Path) -> None:
    """Right values at the buffer's own address, step after step, through one builder (control)."""
    for next_n in range(2, 9):
        builder = native_builder(next_n)
        address = builder.decode_seq_lens_buffer.data_ptr()
        # Full, then shorter, then full again: nothing of an earlier step may show.
        for length in (next_n, *range(1, next_n + 1)):
            for rows in uniform_batches(length):
                what = f"next_n {next_n}, {len(rows)} x {length}"
                decode = build(builder, rows)
                expect_values(tree, decode.seq_lens, native_lengths(rows, length), what, "wrong-length")
                expect_in_buffer(tree, builder, address, decode.seq_lens, what)
                expect(not decode.requires_padding, "wrong-padding", what, at_slice(tree))


@present("native: what DeepGEMM is given")
def native_deep_gemm(tree: Path) -> None:
    """End to end: the very lengths that the metadata carries go to DeepGEMM, contiguous."""
    for next_n, length in ((2, 2), (2, 1), (4, 3)):
        builder = native_builder(next_n)
        for rows in uniform_batches(length):
            given: list[torch.Tensor] = []
            decode = build(builder, rows, deep_gemm=given)
            what = f"next_n {next_n}, {len(rows)} x {length}"
            expect(len(given) == 1, "not-called-once", what, at_slice(tree))
            expect_contiguous(tree, given[0], what)
            expect(given[0].data_ptr() == decode.seq_lens.data_ptr(), "other-lengths", what, at_slice(tree))
            expect_values(tree, given[0], native_lengths(rows, length), what, "wrong-length")


@present("native: draft steps of one token")
def native_draft_steps(tree: Path) -> None:
    """A drafter of several tokens: a first pass of next_n tokens per request, then passes of one."""
    builder = native_builder(3)
    for step in range(3):
        length = 3 if step == 0 else 1
        rows: Rows = [(length, 40 + step), (length, 9 + step), (length, 200 + step)]
        lengths = build(builder, rows).seq_lens
        expect_contiguous(tree, lengths, f"draft step {step}")
        expect_values(tree, lengths, native_lengths(rows, length), f"draft step {step}", "wrong-length")


def roomy_builder(tree: Path, next_n: int, batched_tokens: int):
    """A native builder whose buffer holds MAX_SEQS rows of next_n: `.view` fails on a smaller one."""
    builder = native_builder(next_n, batched_tokens=batched_tokens)
    room, needed = builder.decode_seq_lens_buffer.numel(), MAX_SEQS * next_n
    what = f"next_n {next_n}, {batched_tokens} batched tokens: {room} < {needed}"
    expect(room >= needed, "buffer-too-small", what, at_buffer(tree))
    return builder


@present("native: rows x length above the batched tokens")
def native_beyond_batched_tokens(tree: Path) -> None:
    """The native view covers padding rows too, so its size is bounded by rows and next_n alone (control)."""
    for next_n in range(2, 9):
        builder = roomy_builder(tree, next_n, batched_tokens=MAX_SEQS)
        rows: Rows = [(next_n, next_n + row) for row in range(MAX_SEQS)]
        lengths = build(builder, rows).seq_lens
        expect_values(tree, lengths, native_lengths(rows, next_n), f"next_n {next_n}", "wrong-length")
        expect_contiguous(tree, lengths, f"next_n {next_n}")


@present("native: padded rows")
def native_padded(tree: Path) -> None:
    """CUDA-graph padding (0 tokens of 0) comes out as 0 for every token, and as wide as a real row."""
    for next_n, length in native_shapes():
        # Few batched tokens and many: rows x length exceeds the former.
        builders = [roomy_builder(tree, next_n, batched_tokens) for batched_tokens in (MAX_SEQS, 64)]
        for builder, rows in product(builders, padded_batches(length)):
            what = f"next_n {next_n}, {rows}"
            address = builder.decode_seq_lens_buffer.data_ptr()
            decode = build(builder, rows)
            lengths, lowest = decode.seq_lens, int(decode.seq_lens.min())
            expect(lowest >= 0, "negative-length", f"{what}: {lengths.tolist()}", at_slice(tree))
            expect_values(tree, lengths, native_lengths(rows, length), what, "wrong-length")
            expect_in_buffer(tree, builder, address, lengths, what)
            expect(decode.requires_padding, "wrong-padding", what, at_slice(tree))


@present("native: padded rows, compressed")
def native_padded_compressed(tree: Path) -> None:
    """DeepSeek-V4 divides the lengths in place; -1 // 4 would be -1 again."""
    for next_n, length in ((2, 2), (2, 1), (4, 4), (4, 3)):
        builder = native_builder(next_n, ratio=4)
        address = builder.decode_seq_lens_buffer.data_ptr()
        rows: Rows = [(length, 41), (length, 8), (length, length), PADDING, PADDING]
        what = f"next_n {next_n}, {length} tokens each, compressed by 4"
        lengths = build(builder, rows).seq_lens
        expect(int(lengths.min()) >= 0, "negative-length", f"{what}: {lengths.tolist()}", at_slice(tree))
        expect_values(tree, lengths, native_lengths(rows, length, ratio=4), what, "wrong-length")
        expect_contiguous(tree, lengths, what)
        expect_in_buffer(tree, builder, address, lengths, what)


@present("native: compressed, without padding")
def native_compressed(tree: Path) -> None:
    """The division stays in the builder's buffer; the runner's lengths are shared (control)."""
    for next_n in (2, 4):
        builder = native_builder(next_n, ratio=4)
        rows: Rows = [(next_n, 41), (next_n, 8), (next_n, 130)]
        common = common_metadata(rows)
        with platform():
            lengths = builder.build(0, common).decode.seq_lens
        wanted = native_lengths(rows, next_n, ratio=4)
        expect_values(tree, lengths, wanted, f"next_n {next_n}, compressed", "wrong-length")
        untouched = common.seq_lens.tolist() == [total for _, total in rows]
        expect(untouched, "shared-lengths-changed", f"{common.seq_lens.tolist()}", at_slice(tree))


@present("native: a captured graph's rows")
def native_replay(tree: Path) -> None:
    """A CUDA graph knows an address and a layout: what it captured must show every later step (control)."""
    for next_n in (2, 4):
        builder = native_builder(next_n)
        rows: Rows = [(next_n, next_n)] * 4
        captured = build(builder, rows).seq_lens
        expect_values(tree, captured, native_lengths(rows, next_n), "capture", "wrong-length")
        graph = captured.as_strided((4, next_n), (next_n, 1))
        for step in range(3):
            rows = [(next_n, 50 + 13 * row + step) for row in range(4)]
            build(builder, rows)
            expect_values(tree, graph, native_lengths(rows, next_n), f"replay {step}", "stale-length")


@present("native: decodes and prefills in one batch")
def native_mixed(tree: Path) -> None:
    """Decodes first, then a prefill: only the decodes' lengths are in the buffer (control)."""
    builder = native_builder(2)
    decodes: Rows = [(2, 90), (2, 17)]
    with platform():
        metadata = builder.build(0, common_metadata([*decodes, (9, 9)]))
    expect((metadata.num_decodes, metadata.num_prefills) == (2, 1), "wrong-split", "2 and 1", at_slice(tree))
    wanted = native_lengths(decodes, 2)
    expect_values(tree, metadata.decode.seq_lens, wanted, "2 decodes, 1 prefill", "wrong-length")
    ends = metadata.prefill.chunks[0].cu_seqlen_ke.tolist()
    expect(ends == list(range(1, 10)), "wrong-prefill", f"{ends}", SOURCE)


@present("plain decode passes the lengths through")
def plain_decode(tree: Path) -> None:
    """Without speculation the runner's own lengths go on, as a column, padding included (control)."""
    builder = make_builder(1)
    for real in range(1, MAX_SEQS + 1):
        rows: Rows = [(1, 5 + row) for row in range(real)] + [PADDING] * (MAX_SEQS - real)
        common = common_metadata(rows)
        with platform():
            lengths = builder.build(0, common).decode.seq_lens
        expect(lengths.data_ptr() == common.seq_lens.data_ptr(), "not-passed-through", f"{real}", at_slice(tree))
        expect_values(tree, lengths, [[total] for _, total in rows], f"{real} rows", "wrong-length")
        expect_contiguous(tree, lengths, f"{real} rows")


def expect_flattened(tree: Path, builder, rows: Rows, decode, what: str, num_tokens: int | None = None) -> None:
    """One entry per token, its request's block table row beside it, and zeroes to the buffer's end."""
    lengths = flat_lengths(rows)
    tail = [0] * ((num_tokens or len(lengths)) - len(lengths))
    expect_values(tree, decode.seq_lens, [[length] for length in lengths + tail], what, "wrong-length")
    expect_in_buffer(tree, builder, builder.decode_seq_lens_buffer.data_ptr(), decode.seq_lens, what)
    expect_contiguous(tree, decode.seq_lens, what)
    unused = builder.decode_seq_lens_buffer[len(lengths) :]
    expect(not unused.any(), "tail-not-zero", what, SOURCE)
    table = common_metadata(rows).block_table_tensor
    owner = [row for row, (query, _) in enumerate(rows) for _ in range(query)]
    same = torch.equal(decode.block_table[: len(owner)], table[owner])
    expect(same, "wrong-block-table", what, SOURCE)
    ones = decode.decode_lens.tolist() == [1] * len(lengths + tail)
    expect(ones and not decode.requires_padding, "wrong-decode-lens", what, SOURCE)


@present("flatten: uniform and variable batches")
def flatten_values(tree: Path) -> None:
    """More than one speculative token off Blackwell, both of its branches, through one builder (control)."""
    for next_n in (3, 4):
        builder = flatten_builder(next_n)
        batches: list[Rows] = [
            [(next_n, 30), (next_n, next_n), (next_n, 77)],
            [(2, 12), (2, 90)],
            [(3, 10), (1, 7), (2, 12)],
            [(next_n, 30), (next_n, 31), PADDING, PADDING],
        ]
        for rows in batches:
            what = f"next_n {next_n}, {rows}"
            expect_flattened(tree, builder, rows, build(builder, rows), what)


@present("flatten: tokens padded above rows x next_n")
def flatten_padded_tokens(tree: Path) -> None:
    """The runner pads the token count as well, up to the batched tokens (control)."""
    builder = flatten_builder(3, batched_tokens=64)
    room = builder.decode_seq_lens_buffer.numel()
    expect(room >= 64, "buffer-too-small", f"{room} < 64", at_buffer(tree))
    rows: Rows = [(3, 30), (1, 7), (2, 12)]
    expect_flattened(tree, builder, rows, build(builder, rows, num_tokens=64), "64 tokens", num_tokens=64)


@present("flatten: compressed")
def flatten_compressed(tree: Path) -> None:
    """The flatten path divides in place as well, uniform and variable (control)."""
    builder = flatten_builder(3, ratio=4)
    batches: list[Rows] = [[(3, 30), (3, 3), (3, 77)], [(3, 10), (1, 7), (2, 12)]]
    for rows in batches:
        wanted = [[length // 4] for length in flat_lengths(rows)]
        expect_values(tree, build(builder, rows).seq_lens, wanted, f"{rows}", "wrong-length")


@present("flatten: one token per request")
def flatten_single_token(tree: Path) -> None:
    """Nothing to flatten: the runner's lengths pass through as in plain decode (control)."""
    builder = flatten_builder(3)
    rows: Rows = [(1, 30), (1, 1), (1, 77)]
    common = common_metadata(rows)
    with platform():
        lengths = builder.build(0, common).decode.seq_lens
    expect(lengths.data_ptr() == common.seq_lens.data_ptr(), "not-passed-through", "1 token", at_slice(tree))
    expect_values(tree, lengths, [[30], [1], [77]], "1 token each", "wrong-length")


@present("flatten: padded rows, uniform")
def flatten_padded_uniform(tree: Path) -> None:
    """The uniform kernel, given requests shorter than their query: 0, never below."""
    place = where(tree, "per_token_seq_len = ")
    for length in (2, 3, 4):
        builder = flatten_builder(4)
        rows: Rows = [(length, 30), (length, 0), (length, 1), (length, length)]
        lengths = build(builder, rows).seq_lens
        wanted = [[value] for row in native_lengths(rows, length) for value in row]
        expect(int(lengths.min()) >= 0, "negative-length", f"{lengths.flatten().tolist()}", place)
        expect_values(tree, lengths, wanted, f"{rows}", "wrong-length")
