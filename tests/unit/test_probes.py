"""Probes on a tree of the smallest files they can read: all fixed, then spoilt at one place at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from vllm_patches import probes
from vllm_patches.probes import Finding, ProbeError, Site, agrees

CUDA = "csrc/cache_kernels.cu"
TWIN = "vllm/v1/attention/ops/rocm_aiter_mla_sparse.py"
RECURRENT = "vllm/model_executor/layers/fla/ops/fused_recurrent.py"
SIGMOID = "vllm/model_executor/layers/fla/ops/fused_sigmoid_gating.py"
FLA = "vllm/model_executor/layers/fla/ops/__init__.py"
LIGHTNING = "vllm/model_executor/layers/lightning_attn.py"
UTILS = "vllm/v1/attention/backends/utils.py"
INDEXER = "vllm/v1/attention/backends/mla/indexer.py"
AITER = "vllm/v1/attention/backends/rocm_aiter_fa.py"
WORKER = "vllm/v1/worker/gpu_worker.py"
RUNNER = "vllm/v1/worker/gpu/model_runner.py"
OLD_RUNNER = "vllm/v1/worker/gpu_model_runner.py"
TABLES = "vllm/v1/worker/gpu/block_table.py"
EAGLE = "vllm/v1/worker/gpu/spec_decode/eagle/speculator.py"
SLEEP = "vllm/device_allocator/sleep_mode_backend.py"

TREE = {
    CUDA: """\
// __global__ void cp_gather_indexer_k_quant_cache_kernel( in a comment is no kernel
template <int ROWS>
__global__ void cp_gather_indexer_k_quant_cache_kernel(const int* ends, int n) {
  __shared__ int batch_idx[ROWS];
  if (threadIdx.x == 0) {
    batch_idx[threadIdx.y] = -1;
  }
  __syncthreads();
  for (int i = 0; i < n; i++) {
    if (row < ends[i]) { batch_idx[threadIdx.y] = i; }
  }
  __syncthreads();
  const int batch = batch_idx[threadIdx.y];
  if (row >= rows || batch < 0) {
    return;
  }
  use(ends[batch]);
}
""",
    TWIN: """\
def _cp_gather_indexer_quant_cache_kernel(cu_seqlen_ptr, token_to_seq_ptr, batch_size):
    tid = tl.program_id(0)
    if tid >= tl.load(cu_seqlen_ptr + batch_size):
        return
    seq = tl.load(token_to_seq_ptr + tid)
    start = tl.load(cu_seqlen_ptr + seq)


def cp_gather_indexer_k_quant_cache_triton(cu_seqlen, token_to_seq):
    _cp_gather_indexer_quant_cache_kernel[grid](cu_seqlen, token_to_seq, cu_seqlen.shape[0] - 1)
""",
    RECURRENT: """\
def fused_recurrent_gated_delta_rule_fwd_kernel(h0, ht, ssm_state_indices, T):
    if CONTINUOUS:
        slot = tl.load(ssm_state_indices).to(tl.int64)
        if slot <= 0:
            return
        p_h0 = h0 + slot * stride
    for i in range(0, T):
        last = tl.load(ssm_state_indices + i)
        if last > 0:
            p_ht = ht + last * stride


def fused_recurrent_gated_delta_rule_packed_decode_kernel(h0, ht, ssm_state_indices):
    slot = tl.load(ssm_state_indices)
    if slot <= 0:  # packed
        tl.store(o, 0, mask=mask_v)
        return
    p_h0 = h0 + slot * stride
    p_ht = ht + slot * stride
""",
    SIGMOID: """\
def fused_sigmoid_gating_delta_rule_update_kernel(h0, ht, ssm_state_indices, T):
    slot = tl.load(ssm_state_indices)
    if slot < 1:
        return
    p_h0 = h0 + slot * stride
    for i in range(0, T):
        last = tl.load(ssm_state_indices + i)
        if last >= 1:
            p_ht = ht + last * stride
""",
    LIGHTNING: """\
def _linear_attn_decode_kernel(kv_cache_ptr, slot_idx, pad_slot_id, null_block_id):
    slot = tl.load(slot_idx)
    if (slot == pad_slot_id) | (slot == null_block_id):
        return
    offset = slot * stride


def linear_decode_forward_triton(slot_idx):
    _linear_attn_decode_kernel[grid](
        slot_idx,
        pad_slot_id=PAD_SLOT_ID,
        null_block_id=NULL_BLOCK_ID,
    )
""",
    UTILS: "PAD_SLOT_ID = -1\nNULL_BLOCK_ID = 0\n",
    INDEXER: """\
def _prepare_uniform_decode_kernel(seq_lens_ptr, decode_seq_lens_ptr, max_decode_len):
    length = tl.maximum(tl.load(seq_lens_ptr) - max_decode_len + j + 1, 0)
    tl.store(decode_seq_lens_ptr + idx, length)


class DeepseekV32IndexerMetadataBuilder(Base):
    def __init__(self, config):
        next_n = config.next_n
        self.decode_seq_lens_buffer = torch.zeros(
            max(config.max_num_batched_tokens, config.max_num_seqs * next_n),
            dtype=torch.int32,
        )

    def _prepare_decode_tensors(self, seq_lens, num_decodes, max_decode_len):
        lengths = self.decode_seq_lens_buffer[
            : num_decodes * max_decode_len
        ].view(num_decodes, max_decode_len)
        lengths[:] = (seq_lens.unsqueeze(1) - max_decode_len + 1 + self.offsets).clamp_(min=0)
        return lengths
""",
    AITER: """\
if current_platform.is_rocm():

    def cp_mha_gather_cache_kernel(
        key_cache_ptr, value_cache_ptr, k_stride, k_stride1, k_stride2, v_stride, v_stride1, v_stride2
    ):
        block_id = tl.load(block_table_ptr)
        if CACHE_FORMAT == "NHD":
            key_at = key_cache_ptr + block_id * k_stride + slot_id * k_stride1 + head_id * k_stride2  # NHD
            value_at = value_cache_ptr + block_id * v_stride + slot_id * v_stride1 + head_id * v_stride2
            k = tl.load(key_at)
            v = tl.load(value_at)
        elif CACHE_FORMAT == "SHUFFLE":
            key_at = key_cache_ptr + block_id * k_stride + slot_id  # SHUFFLE
            value_at = value_cache_ptr + block_id * v_stride + slot_id
            k = tl.load(key_at)
            v = tl.load(value_at)

    def cp_mha_gather_cache(key_cache, value_cache):
        strides = key_cache.stride()
        cp_mha_gather_cache_kernel[grid](
            key_cache,
            value_cache,
            strides[0],
            strides[1],
            strides[2],
            v_stride=value_cache.stride(0),
            v_stride1=value_cache.stride(1),
            v_stride2=value_cache.stride(2),
        )

    def reshape_and_cache_shuffle_kernel(key_cache_ptr, value_cache_ptr, block_size, k_stride, v_stride):
        block_id = slot // block_size
        head = head_id * head_size * block_size
        to_key = block_id * k_stride + head  # write
        to_value = block_id * v_stride + head
        tl.store(key_cache_ptr + to_key, k)
        tl.store(value_cache_ptr + to_value, v)

    def reshape_and_cache_shuffle_triton(key_cache, value_cache):
        tiles = key_cache.view_as(template)
        reshape_and_cache_shuffle_kernel[grid](
            tiles, value_cache, size, k_stride=tiles.stride(0), v_stride=value_cache.stride(0)
        )


class Impl:
    def split(self, kv_cache):
        return kv_cache.unbind(0)
""",
    WORKER: """\
class Worker:
    def wake_up(self, tags):
        allocator.wake_up(tags)
        if tags is None or "kv_cache" in tags:
            self.model_runner.post_kv_cache_wake_up()

    def initialize_from_config(self, config):
        if self.sleep_mode:
            with allocator.use_memory_pool(tag="kv_cache"):
                self.model_runner.initialize_kv_cache(config)
        else:
            self.model_runner.initialize_kv_cache(config)
""",
    RUNNER: """\
class GPUModelRunner:
    def post_kv_cache_wake_up(self):
        self.block_tables.after_wake_up()
""",
    OLD_RUNNER: """\
class GPUModelRunner:
    def post_kv_cache_wake_up(self):
        self.init_fp8_kv_scales()
""",
    TABLES: """\
class BlockTables:
    def __init__(self):
        self.block_table_ptrs = torch.empty(2)
        self.block_table_strides = torch.empty(2)
        self.block_sizes_tensor = torch.empty(2)
        self.input_block_table_ptrs = torch.empty(2)
        self.fill()

    def after_wake_up(self):
        self.fill()

    def fill(self):
        self.block_table_ptrs.copy_(pointers(self.block_tables))
        self.block_table_strides.copy_(strides)
        self.block_sizes_tensor.copy_(sizes)
        self.input_block_table_ptrs[:] = pointers(self.input_block_tables)
""",
    EAGLE: """\
class Speculator:
    def capture(self):
        draft = self.fused if self.use_fused else self.generate
        self.manager.capture(draft, self.buffers)

    def propose(self):
        self.block_tables.compute_slot_mappings(idx)

    def generate(self):
        self.step()

    def fused(self):
        self.step()

    def step(self):
        self.run()
""",
}


@dataclass(frozen=True)
class Case:
    """*find* in *path* is replaced; *part* must then be *finding*, decided by a line with *at*."""

    part: str
    path: str
    find: str
    replace: str
    at: str
    finding: Finding = Finding.MISSING


RECREATED = """\
        self.block_table_ptrs = pointers(self.block_tables)
        self.block_table_strides = strides
        self.block_sizes_tensor = sizes
        self.input_block_table_ptrs = pointers(self.input_block_tables)
"""
FILLED = TREE[TABLES].split("def fill(self):\n")[1]
MASKED = """\
    valid = (seq >= 0) & (seq < batch_size)
    safe = tl.where(valid, seq, 0)
    start = tl.load(cu_seqlen_ptr + safe, mask=valid, other=0)
"""
EARLY = "    if tid >= tl.load(cu_seqlen_ptr + batch_size):\n        return\n"
LENGTH = "tl.load(seq_lens_ptr) - max_decode_len + j + 1"
HARD_CODED = "block_id * num_heads * head_size * PAGE_SIZE"
PACKED = "kv_cache.transpose(1, 2).split(self.head_size, dim=-1)"
PACKED_BUT_FOR_SHUFFLE = f"""\
        if ops.is_shuffle_kv_cache_enabled():
            return kv_cache.unflatten(-1, (heads, size)).unbind(1)
        return {PACKED}
"""
CAPTURED = "    def step(self):\n        self.block_tables.compute_slot_mappings(idx)  # captured\n"

CASES = [
    # 0001: each of the conditions that make the C++ kernel safe, and the twin's one test.
    Case("gather-cuda", CUDA, "batch_idx[threadIdx.y] = -1;", "", "batch = batch_idx"),
    Case("gather-cuda", CUDA, "  __syncthreads();\n  for", "  for", "batch = batch_idx"),
    Case("gather-cuda", CUDA, "  __syncthreads();\n  const", "  __syncwarp();\n  const", "batch = batch_idx"),
    Case(
        "gather-cuda",
        CUDA,
        "  __syncthreads();\n  const",
        "#ifndef USE_ROCM\n  __syncthreads();\n#endif\n  const",
        "batch = batch_idx",
    ),
    Case(
        "gather-cuda",
        CUDA,
        "  __syncthreads();\n  const",
        "#ifndef USE_ROCM\n  __syncwarp();\n#else\n  __syncthreads();\n#endif\n  const",
        "if (row >= rows",
        Finding.PRESENT,
    ),
    Case(
        "gather-cuda",
        CUDA,
        "  __syncthreads();\n  const",
        "#ifndef USE_ROCM\n  __syncwarp();\n#endif\n  const",
        "batch = batch_idx",
    ),
    Case("gather-cuda", CUDA, " || batch < 0", "", "batch = batch_idx"),
    Case(
        "gather-cuda",
        CUDA,
        "  for (int i",
        "  if (row >= rows) { return; }\n  for (int i",
        "batch = batch_idx",
    ),
    Case(
        "gather-cuda",
        CUDA,
        "  const int batch = batch_idx[threadIdx.y];\n  if (row >= rows || batch < 0) {",
        "  if (batch_idx[threadIdx.y] < 0) {",
        "if (batch_idx",
        Finding.PRESENT,
    ),
    Case("gather-triton", TWIN, EARLY, "", "start = tl.load"),
    Case("gather-triton", TWIN, "tid >= tl.load", "tid > tl.load", "start = tl.load"),
    Case("gather-triton", TWIN, "tid >= tl.load(cu_seqlen_ptr + batch_size)", "tid < 0", "start = tl.load"),
    Case(
        "gather-triton",
        TWIN,
        "tid >= tl.load(cu_seqlen_ptr + batch_size)",
        "tl.load(cu_seqlen_ptr + batch_size) <= tid",
        "<= tid",
        Finding.PRESENT,
    ),
    Case("gather-triton", TWIN, EARLY, EARLY.replace("batch_size", "seq"), "if tid >="),
    Case(
        "gather-triton",
        TWIN,
        EARLY + "    seq = tl.load(token_to_seq_ptr + tid)\n    start = tl.load(cu_seqlen_ptr + seq)\n",
        "    seq = tl.load(token_to_seq_ptr + tid)\n" + MASKED,
        "mask=valid",
        Finding.PRESENT,
    ),
    # 0002: the guard of each kernel lets slot 0 through, or is not there.
    Case("recurrent-load", RECURRENT, "        if slot <= 0:", "        if slot < 0:", "if slot < 0"),
    Case("recurrent-load", RECURRENT, "        if slot <= 0:\n            return\n", "", "p_h0 = h0"),
    Case("recurrent-store", RECURRENT, "if last > 0:", "if last >= 0:", "if last >= 0"),
    Case("packed-load", RECURRENT, "slot <= 0:  # packed", "slot < 0:", "if slot < 0"),
    Case("packed-load", RECURRENT, "slot <= 0:  # packed", "slot == -1 or slot == 0:", "or", Finding.PRESENT),
    Case("sigmoid-load", SIGMOID, "slot < 1", "slot == -1", "slot == -1"),
    Case("sigmoid-load", SIGMOID, "slot < 1", "slot * T <= 0", "slot * T", Finding.PRESENT),
    Case("sigmoid-load", SIGMOID, "slot < 1", "slot * T < 0", "slot * T"),
    Case("sigmoid-store", SIGMOID, "last >= 1", "last != -1", "last != -1"),
    Case("lightning", LIGHTNING, " | (slot == null_block_id)", "", "(slot == pad_slot_id)"),
    Case("lightning", LIGHTNING, "=NULL_BLOCK_ID", "=PAD_SLOT_ID", "null_block_id):"),
    Case(
        "lightning",
        LIGHTNING,
        "    if (slot == pad_slot_id) | (slot == null_block_id):",
        "    padded = slot <= NULL_BLOCK_ID\n    if padded:",
        "if padded",
        Finding.PRESENT,
    ),
    # 0003
    Case(
        "contiguous",
        INDEXER,
        "lengths = self.decode_seq_lens_buffer[\n            : num_decodes * max_decode_len\n        ].view(",
        "lengths = self.decode_seq_lens_buffer[:num_decodes, :max_decode_len]\n        zip(",
        "[:num_decodes, :max_decode_len]",
    ),
    Case(
        "buffer-size",
        INDEXER,
        "max(config.max_num_batched_tokens, config.max_num_seqs * next_n)",
        "(config.max_num_batched_tokens,)",
        "decode_seq_lens_buffer = ",
    ),
    Case(
        "buffer-size",
        INDEXER,
        "max(config.max_num_batched_tokens, config.max_num_seqs * next_n)",
        "(max(config.max_num_seqs * (1 + self.num_speculative_tokens), config.max_num_batched_tokens),)",
        "decode_seq_lens_buffer = ",
        Finding.PRESENT,
    ),
    Case("clamp-native", INDEXER, ".clamp_(min=0)", "", "unsqueeze"),
    Case(
        "clamp-native",
        INDEXER,
        ".clamp_(min=0)\n",
        "\n        lengths.clamp_(min=0)\n",
        "unsqueeze",
        Finding.PRESENT,
    ),
    Case("clamp-uniform", INDEXER, f"tl.maximum({LENGTH}, 0)", LENGTH, "length = "),
    # 0004: K or V alone is not enough; the write of packed K and V cannot be mended by strides.
    Case("nhd-gather", AITER, "block_id * k_stride + slot_id *", f"{HARD_CODED} + slot_id *", "PAGE_SIZE"),
    Case("nhd-gather", AITER, "head_id * v_stride2", "head_id * head_size", "head_id * head_size"),
    Case("shuffle-gather", AITER, "block_id * k_stride + slot_id  # SHUFFLE", HARD_CODED, "PAGE_SIZE"),
    Case(
        "shuffle-gather",
        AITER,
        "# SHUFFLE\n            value_at = value_cache_ptr + block_id * v_stride",
        f"\n            value_at = value_cache_ptr + {HARD_CODED}",
        "PAGE_SIZE",
    ),
    Case(
        "shuffle-write",
        AITER,
        "to_key = block_id * k_stride + head  # write",
        "to_key = block_id * num_kv_heads * head_size * block_size + head",
        "num_kv_heads",
    ),
    Case("shuffle-gather", AITER, "kv_cache.unbind(0)", PACKED, "split(self", Finding.BROKEN),
    Case("shuffle-write", AITER, "kv_cache.unbind(0)", PACKED, "split(self", Finding.BROKEN),
    Case("nhd-gather", AITER, "kv_cache.unbind(0)", PACKED, "# NHD", Finding.PRESENT),
    Case(
        "shuffle-write",
        AITER,
        "        return kv_cache.unbind(0)\n",
        PACKED_BUT_FOR_SHUFFLE,
        "# write",
        Finding.PRESENT,
    ),
    # 0005
    Case(
        "wake-up-hook",
        WORKER,
        "            self.model_runner.post_kv_cache_wake_up()\n",
        "            self.model_runner.init_fp8_kv_scales()\n",
        "init_fp8_kv_scales",
    ),
    Case("wake-up-hook", WORKER, "in tags:", "in tags and self.dtype == 'fp8':", "post_kv_cache_wake_up()"),
    Case("wake-up-hook", OLD_RUNNER, "def post_kv_cache_wake_up", "def other", "wake_up()"),
    Case("wake-up-hook", OLD_RUNNER, "self.init_fp8_kv_scales()", "pass", "wake_up()"),
    Case("layout-refresh", WORKER, "post_kv_cache_wake_up", "init_fp8_kv_scales", "block_table_ptrs = "),
    Case("layout-refresh", TABLES, "        self.block_sizes_tensor.copy_(sizes)\n", "", "sizes_tensor = "),
    Case("layout-refresh", TABLES, FILLED, RECREATED, "block_table_ptrs = pointers", Finding.PRESENT),
]


def reader(tree: dict[str, str]) -> probes.ReadFile:
    def read(path: str) -> str | None:
        assert path in probes.PATHS, f"{path} is not in PATHS"
        return tree.get(path)

    return read


def changed(path: str, find: str, replace: str, tree: dict[str, str] | None = None) -> dict[str, str]:
    base = TREE if tree is None else tree
    assert base[path].count(find) >= 1, f"{find!r} is not in {path}"
    return {**base, path: base[path].replace(find, replace)}


def site_of(part: str, tree: dict[str, str]) -> Site:
    fix = next(fix for fix, parts in probes.PARTS.items() if part in parts)
    return next(site for site in probes.PROBES[fix](reader(tree)) if site.part == part)


def test_a_fixed_tree_is_present_in_every_part() -> None:
    sites = probes.probe(reader(TREE))
    assert {site.part: site.finding for site in sites} == dict.fromkeys(
        (part for parts in probes.PARTS.values() for part in parts), Finding.PRESENT
    )


def test_sites_come_in_the_order_of_the_parts() -> None:
    order = [(fix, part) for fix, parts in probes.PARTS.items() for part in parts]
    assert [(site.fix, site.part) for site in probes.probe(reader(TREE))] == order


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.part}: {case.replace.strip()[:40] or 'cut'}")
def test_one_change_of_the_fixed_tree(case: Case) -> None:
    tree = changed(case.path, case.find, case.replace)
    site = site_of(case.part, tree)
    assert site.finding is case.finding, site
    assert case.at in tree[site.path].splitlines()[site.line - 1]


def test_every_part_has_a_spoilt_case() -> None:
    spoilt = {case.part for case in CASES if not case.finding.fixed}
    assert spoilt == {part for parts in probes.PARTS.values() for part in parts}


def test_the_note_names_what_the_kernel_lacks() -> None:
    site = site_of("gather-cuda", changed(CUDA, " || batch < 0", ""))
    assert site.note == "lacks: batch < 0 returns"


def test_a_second_twin_kernel_counts_as_well() -> None:
    unsafe = TREE[TWIN].replace(EARLY, "").replace("cache_kernel", "cache_gfx950_kernel")
    assert site_of("gather-triton", {**TREE, TWIN: TREE[TWIN] + "\n\n" + unsafe}).finding is Finding.MISSING


def test_files_may_lie_in_upstreams_newer_folders() -> None:
    tree = dict(TREE)
    tree["csrc/libtorch_stable/cache_kernels.cu"] = tree.pop(CUDA)
    for path in (RECURRENT, SIGMOID):
        tree[path.replace("model_executor/layers/fla", "third_party/flash_linear_attention")] = tree.pop(path)
    assert all(site.finding is Finding.PRESENT for site in probes.probe(reader(tree)))


def test_kernels_that_are_not_there_yet_are_gone() -> None:
    tree = changed(RECURRENT, TREE[RECURRENT].split("\n\n\n")[1], "")
    del tree[SIGMOID]
    tree[FLA] = "from .fused_recurrent import fused_recurrent\n"
    gone = {site.part for site in probes.probe(reader(tree)) if site.finding is Finding.GONE}
    assert gone == {"packed-load", "sigmoid-load", "sigmoid-store"}


def test_lightning_attention_needs_null_block_padding() -> None:
    tree = changed(LIGHTNING, " | (slot == null_block_id)", "")
    tree[UTILS] = "PAD_SLOT_ID = -1\n"
    assert site_of("lightning", tree).finding is Finding.GONE


def test_an_indexer_before_the_buffer_is_gone() -> None:
    tree = {**TREE, INDEXER: "class DeepseekV32IndexerMetadataBuilder(Base):\n    pass\n"}
    sites = probes.PROBES["0003"](reader(tree))
    assert {site.finding for site in sites} == {Finding.GONE}
    assert {site.line for site in sites} == {0}


def test_a_two_dimensional_buffer_has_no_size_of_its_own() -> None:
    tree = changed(
        INDEXER,
        "max(config.max_num_batched_tokens, config.max_num_seqs * next_n)",
        "(config.max_num_seqs, next_n)",
    )
    tree = changed(INDEXER, "[\n            : num_decodes * max_decode_len\n        ].view(", "[:n, :m]; zip(", tree)
    assert site_of("buffer-size", tree).finding is Finding.MISSING


@pytest.mark.parametrize("method", ["fused", "generate"])
def test_new_tensors_do_not_reach_a_graph_that_captured_the_old(method: str) -> None:
    tree = changed(TABLES, FILLED, RECREATED)
    tree = changed(
        EAGLE,
        f"    def {method}(self):\n        self.step()\n",
        f"    def {method}(self):\n        self.draft()\n",
        tree,
    )
    tree[EAGLE] += "\n" + CAPTURED.replace("step", "draft")
    site = site_of("layout-refresh", tree)
    assert site.finding is Finding.MISSING
    assert site.note.endswith(f"{EAGLE}:{tree[EAGLE][: tree[EAGLE].index('# captured')].count(chr(10)) + 1}")


def test_tensors_filled_in_place_may_be_captured() -> None:
    tree = changed(EAGLE, "    def step(self):\n", CAPTURED)
    assert site_of("layout-refresh", tree).finding is Finding.PRESENT


NARROW_POOL = """\
class Worker:
    def wake_up(self, tags):
        self.backend.resume(tags)

    def initialize_from_config(self, config):
        self.model_runner.initialize_kv_cache(
            config, kv_cache_allocation_context=self._maybe_get_memory_pool_context(tag="kv_cache")
        )
"""
SAVED_POOL = """\
class Worker:
    def initialize_from_config(self, config):
        pool = nullcontext() if xpu else self._maybe_get_memory_pool_context(tag="runtime")
        with pool:
            self.model_runner.initialize_kv_cache(config, kv_cache_allocation_context=cache_pool)
"""
SUSPEND = """\
class CuMemBackend:
    def suspend(self, level):
        offload_tags: tuple[str, ...] = ("runtime", "cudagraph")
        if level == 1:
            offload_tags = ("weights", *offload_tags)
        allocator.sleep(offload_tags=offload_tags)
"""
TAKES_THE_POOL = "def initialize_kv_cache(config, kv_cache_allocation_context): ...\n"


@pytest.mark.parametrize("worker", [NARROW_POOL, SAVED_POOL])
def test_a_pool_for_the_cache_alone_is_another_fix(worker: str) -> None:
    tree = {**TREE, WORKER: worker, RUNNER: TAKES_THE_POOL, SLEEP: SUSPEND}
    sites = probes.PROBES["0005"](reader(tree))
    assert {site.finding for site in sites} == {Finding.ELSEWISE}
    assert all("initialize_kv_cache" in worker.splitlines()[site.line - 1] for site in sites)


EARLY_AND_LOADS = EARLY + "    seq = tl.load(token_to_seq_ptr + tid)\n    start = tl.load(cu_seqlen_ptr + seq)"
HALF_MASKED = """\
    seq = tl.load(token_to_seq_ptr + tid)
    start = tl.load(cu_seqlen_ptr + seq, mask=seq < batch_size)"""
UNKNOWN = [
    ("0001", CUDA, "cp_gather_indexer_k_quant_cache_kernel", "renamed_kernel", "not found"),
    ("0001", CUDA, "= -1;", "= n;", "not as -1"),
    ("0001", CUDA, "if (threadIdx.x == 0)", "if (threadIdx.x + threadIdx.y == 0)", "which rows"),
    (
        "0001",
        CUDA,
        "|| batch < 0) {\n    return;",
        ") { return; }\n  if (batch >= 0) {",
        "does not just return",
    ),
    ("0001", TWIN, EARLY_AND_LOADS, HALF_MASKED, "does not bound"),
    ("0001", TWIN, "(token_to_seq_ptr + tid)", "(rows_ptr + tid)", "token_to_seq_ptr"),
    ("0001", TWIN, "cu_seqlen.shape[0] - 1", "cu_seqlen.shape[0]", "the number of sequences"),
    ("0001", TWIN, "def _cp_gather", "def _gather", "was it moved"),
    ("0002", RECURRENT, "fwd_kernel", "forward_kernel", "not found"),
    ("0002", RECURRENT, "        if slot <= 0:", "        if slot == 0:", "(True, False, True)"),
    ("0002", RECURRENT, "        if slot <= 0:", "        if slot in skipped:", "the test"),
    ("0002", RECURRENT, "mask=mask_v", "mask=mask_v & (slot > 0)", "masked by a slot number"),
    ("0002", RECURRENT, "packed_decode_kernel(", "packed_decode_kernel_v2(", "packed decode"),
    ("0003", INDEXER, ".view(num", ".contiguous().view(num", "CUDA graphs"),
    ("0003", INDEXER, "return lengths", "return lengths.clone()", "CUDA graphs"),
    ("0003", INDEXER, ".view(num_decodes, max_", ".view(max_decode_len, max_", "neither a flat"),
    ("0003", INDEXER, "lengths[:] = ", "lengths = ", "gets the lengths"),
    ("0003", INDEXER, "return lengths", "return seq_lens", "what is returned"),
    ("0003", INDEXER, "config.max_num_seqs * next_n", "512", "the size of"),
    ("0003", INDEXER, ".clamp_(min=0)", ".clamp_(max=0)", "bounded elsewhere"),
    ("0003", INDEXER, f"tl.maximum({LENGTH}, 0)", f"tl.abs({LENGTH})", "the form of the length"),
    ("0003", INDEXER, ".clamp_(min=0)\n", "\n        lengths = torch.where(a, b, c)\n", "bounded elsewhere"),
    ("0003", INDEXER, "decode_seq_lens_buffer", "lengths_buffer", "not the code of before"),
    ("0004", AITER, '== "NHD"', '== "HND"', "no branch"),
    ("0004", AITER, "block_id * k_stride + slot_id *", "block_id * (k_stride + 1) + slot_id *", "the offset"),
    ("0004", AITER, "            strides[0],", "            strides[1],", "no stride 0 of key_cache"),
    ("0004", AITER, "v_stride2=value_cache.stride(2)", "v_stride2=strides[2]", "no stride 2 of value_cache"),
    ("0004", AITER, "strides = key_cache", "strides = value_cache", "no stride 0 of key_cache"),
    (
        "0004",
        AITER,
        "key_cache.view_as(template)",
        "value_cache.view_as(template)",
        "no stride 0 of key_cache",
    ),
    ("0004", AITER, "key_cache.view_as(template)", "key_cache.contiguous()", "may copy"),
    ("0004", AITER, "kv_cache.unbind(0)", "cut(kv_cache)", "how K and V are cut"),
    ("0005", WORKER, "initialize_kv_cache", "make_kv_cache", "does not call"),
    ("0005", WORKER, 'with allocator.use_memory_pool(tag="kv_cache"):', "with pool():", "the context"),
    ("0005", WORKER, "post_kv_cache_wake_up", "after_sleep", "after_sleep"),
    ("0005", WORKER, "tags is None or ", "", "for which tags"),
    ("0005", WORKER, "        allocator.wake_up(tags)\n", "", "mapped again"),
    ("0005", TABLES, "block_sizes_tensor", "sizes_tensor", "no layout tensor"),
]


@pytest.mark.parametrize(("fix", "path", "find", "replace", "wanted"), UNKNOWN)
def test_an_unknown_form_is_an_error_and_no_guess(fix: str, path: str, find: str, replace: str, wanted: str) -> None:
    with pytest.raises(ProbeError) as caught:
        probes.PROBES[fix](reader(changed(path, find, replace)))
    assert caught.value.path == path
    assert wanted in str(caught.value)


@pytest.mark.parametrize("path", [CUDA, TWIN, RECURRENT, LIGHTNING, INDEXER, AITER, WORKER, RUNNER, TABLES])
def test_a_file_that_is_not_there_is_an_error(path: str) -> None:
    tree = {other: text for other, text in TREE.items() if other != path}
    with pytest.raises(ProbeError, match="no such file"):
        probes.probe(reader(tree))


def test_a_sigmoid_file_that_was_moved_is_an_error() -> None:
    tree = {other: text for other, text in TREE.items() if other != SIGMOID}
    tree[FLA] = "from .gating import fused_sigmoid_gating_delta_rule_update\n"
    with pytest.raises(ProbeError, match="from a file that is not there"):
        probes.probe(reader(tree))


def test_a_pool_that_no_sleep_saves_is_an_error() -> None:
    lost = SUSPEND.replace('("runtime", "cudagraph")', '("cudagraph",)')
    tree = {**TREE, WORKER: SAVED_POOL, RUNNER: TAKES_THE_POOL, SLEEP: lost}
    with pytest.raises(ProbeError, match="saves the memory pools runtime"):
        probes.probe(reader(tree))


def sites_with(*findings: Finding) -> Iterable[Site]:
    return (Site("0009", f"part-{n}", finding, "a.py", n, "") for n, finding in enumerate(findings))


P, E, M, B, G = Finding.PRESENT, Finding.ELSEWISE, Finding.MISSING, Finding.BROKEN, Finding.GONE


@pytest.mark.parametrize(
    ("state", "findings"),
    [
        ("fixed", (P, P)),
        ("fixed", (P, E)),
        ("fixed", (P, G)),
        ("absent", (G, G)),
        ("live", (P, M)),
        ("live", (M, B, G)),
        ("latent", (M,)),
        ("broken", (P, B)),
    ],
)
def test_a_state_that_agrees(state: str, findings: tuple[Finding, ...]) -> None:
    assert agrees(state, sites_with(*findings)) is None


@pytest.mark.parametrize(
    ("state", "findings", "said"),
    [
        ("fixed", (P, M), "live or latent"),
        ("fixed", (P, B), "broken"),
        ("fixed", (G,), "absent"),
        ("absent", (G, P), "fixed"),
        ("live", (P, P), "fixed"),
        ("live", (P, B), "broken"),
        ("latent", (G,), "absent"),
        ("broken", (M, B), "live or latent"),
    ],
)
def test_a_state_that_contradicts(state: str, findings: tuple[Finding, ...], said: str) -> None:
    contradiction = agrees(state, sites_with(*findings))
    assert contradiction is not None
    assert f"recorded as {state}, but the code says {said}" in contradiction


def test_agrees_takes_one_fix_and_a_known_state() -> None:
    with pytest.raises(ValueError, match="exactly one fix"):
        agrees("fixed", probes.probe(reader(TREE)))
    with pytest.raises(ValueError, match="exactly one fix"):
        agrees("fixed", [])
    with pytest.raises(ValueError, match="unknown state"):
        agrees("cured", sites_with(P))
