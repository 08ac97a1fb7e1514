"""0005: sleep mode discards the memory pool of the KV cache, and with it the V2 runner's block tables.

Real BlockTables with their Triton kernels in the interpreter, real Worker.sleep and wake_up, the real hooks
of both model runners; what stands in is the allocator. It keeps CuMemAllocator's contract: after a wake-up
every tensor is at its old address, and whatever was not offloaded holds anything. "Anything" is tried twice:
zeros (null pointers: a stock tree dies, so that runs in a forked process), and pointers to a valid decoy with
plausible strides and sizes, which a stock tree follows to wrong values.
"""

from __future__ import annotations

import ast
import gc
import inspect
import os
import resource
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from case_api import Case, Defect, expect, line_of
from torch.overrides import TorchFunctionMode
from vllm.config.compilation import CUDAGraphMode
from vllm.device_allocator.cumem import CuMemAllocator
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backends.mla import flashmla_sparse, indexer
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheTensor, MLAAttentionSpec
from vllm.v1.worker import cpu_worker, gpu_model_runner, gpu_worker, xpu_model_runner
from vllm.v1.worker.gpu import block_table, buffer_utils, cudagraph_utils, model_runner
from vllm.v1.worker.gpu.spec_decode.eagle import speculator

CASE = Case("0005")

RELEASE = os.environ["VLLM_PATCHES_RELEASE"]
VERSION = tuple(map(int, RELEASE.split(".")))
# #40648 came with 0.21.0. It re-creates the layout tensors and leaves the tables themselves alone: where this
# series goes further, the check states for 0.21.0 what upstream's fix does instead.
UPSTREAM_FIX = VERSION >= (0, 21)

BLOCK_TABLE = "vllm/v1/worker/gpu/block_table.py"
WORKER = "vllm/v1/worker/gpu_worker.py"
# Rows of every group are padded to the width of group 0, so that must be the narrower one.
BLOCK_SIZES = [64, 16]
MAX_MODEL_LEN = 256
MAX_REQS = 5
MAX_TOKENS = 64
PADDED_REQS, PADDED_TOKENS = MAX_REQS, 40  # as a batch is padded for a CUDA graph
PAD = -1
LAYOUT = ("block_table_ptrs", "block_table_strides", "block_sizes_tensor", "input_block_table_ptrs")
# (row, block ids of each group, position of the first token, number of tokens)
Request = tuple[int, tuple[list[int], list[int]], int, int]
BEFORE: list[Request] = [
    (2, ([11, 12], [21, 22, 23, 24, 25]), 60, 10),
    (0, ([13], [31, 32]), 0, 20),
    (4, ([14, 15, 16, 17], [50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65]), 255, 1),
]
AFTER: list[Request] = [
    (0, ([5, 9], [40, 41, 42, 43, 44]), 50, 20),
    (3, ([7], [46]), 3, 5),
]

torch.set_num_threads(1)  # a forked process must not meet another one's OpenMP threads


# --- what stands in ---------------------------------------------------------------------------------------


class HostBuffer:
    """UvaBuffer without pinned memory: the three views share one host tensor."""

    def __init__(self, size: int | tuple[int, ...], dtype: torch.dtype) -> None:
        self.cpu = self.uva = torch.zeros(size, dtype=dtype)
        self.np = self.cpu.numpy()


def host_to_device(data: list[int], dtype: torch.dtype, device: torch.device, **_: Any) -> torch.Tensor:
    """async_tensor_h2d without pinned memory."""
    return torch.tensor(data, dtype=dtype, device=device)


for module, name, stand_in in (
    (buffer_utils, "UvaBuffer", HostBuffer),
    (buffer_utils, "async_tensor_h2d", host_to_device),
    (torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 31)),
):
    assert hasattr(module, name)
    setattr(module, name, stand_in)


class Allocator:
    """CuMemAllocator as Worker sees it; *lose* overwrites what the pools hold."""

    def __init__(self, lose: dict[str, Callable[[], None]]) -> None:
        self.lose = lose
        self.discarded: set[str] = set()

    def sleep(self, offload_tags: tuple[str, ...]) -> None:
        self.discarded = {"weights", "kv_cache"} - set(offload_tags)
        self.lose_all(self.discarded)

    def wake_up(self, tags: list[str] | None) -> None:
        # What was written before the memory is mapped again does not count.
        mapped = self.discarded if tags is None else self.discarded & set(tags)
        self.lose_all(mapped)
        self.discarded -= mapped

    def lose_all(self, tags: set[str]) -> None:
        for tag in tags & self.lose.keys():
            self.lose[tag]()


def pool(tables: block_table.BlockTables) -> dict[str, torch.Tensor]:
    """What BlockTables keeps in the pool; the check of the pool itself shows that this is all of it."""
    tensors = {name: getattr(tables, name) for name in (*LAYOUT, "slot_mappings")}
    for group in range(tables.num_kv_cache_groups):
        tensors[f"block_tables[{group}].gpu"] = tables.block_tables[group].gpu
        tensors[f"input_block_tables[{group}]"] = tables.input_block_tables[group]
    return tensors


def fill_decoy(tables: block_table.BlockTables, decoy: torch.Tensor) -> None:
    """Wrong contents in every tensor, and yet no kernel leaves its tables: shorter rows, larger blocks."""
    for name, tensor in pool(tables).items():
        if name.endswith("_ptrs"):
            tensor.copy_(torch.full(tensor.shape, decoy.data_ptr(), dtype=torch.uint64))
        else:
            tensor.fill_({"block_table_strides": 1, "block_sizes_tensor": 1024}.get(name, 7777))


def fill_zeros(tables: block_table.BlockTables) -> None:
    for tensor in pool(tables).values():
        tensor.zero_()


def make_tables(**cp: int) -> block_table.BlockTables:
    """Real BlockTables; the releases differ in how they are told the width of a row."""
    width: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN}
    if "max_model_len" not in inspect.signature(block_table.BlockTables).parameters:
        shards = cp.get("cp_size", 1)
        width = {"max_num_blocks_per_group": [MAX_MODEL_LEN // (size * shards) for size in BLOCK_SIZES]}
    return block_table.BlockTables(
        block_sizes=BLOCK_SIZES,
        max_num_reqs=MAX_REQS,
        max_num_batched_tokens=MAX_TOKENS,
        device=torch.device("cpu"),
        **width,
        **cp,
    )


class Engine:
    """A real Worker over a V2 model runner that has real BlockTables and nothing else."""

    def __init__(self, tree: Path, **cp: int) -> None:
        self.where = line_of(tree / BLOCK_TABLE, "self.block_table_ptrs = ", tree)
        self.tables = make_tables(**cp)
        self.decoy = torch.full((1 << 20,), 31337, dtype=torch.int32)  # 4 MB
        runner = object.__new__(model_runner.GPUModelRunner)
        runner.block_tables = self.tables
        runner.model = torch.nn.Module()
        runner.model.register_buffer("cos", torch.tensor([1.5, 2.5]))
        self.runner = runner
        self.worker = make_worker(runner, "auto")
        self.allocator = Allocator(
            {
                "kv_cache": lambda: fill_decoy(self.tables, self.decoy),
                "weights": lambda: runner.model.cos.fill_(99.0),
            }
        )
        self.expect_layout("wrong-before-sleep", "after __init__")

    def sleep(self, level: int) -> None:
        with mock.patch.object(CuMemAllocator, "get_instance", lambda: self.allocator):
            self.worker.sleep(level)

    def wake_up(self, *steps: list[str] | None) -> None:
        with mock.patch.object(CuMemAllocator, "get_instance", lambda: self.allocator):
            for tags in steps:
                self.worker.wake_up(tags)

    def expect_layout(self, assertion: str, when: str) -> None:
        """The layout tensors describe the tables; looked at before a kernel follows them."""
        tables = self.tables
        want = {
            "block_table_ptrs": [t.gpu.data_ptr() for t in tables.block_tables],
            "block_table_strides": [t.gpu.stride(0) for t in tables.block_tables],
            "block_sizes_tensor": list(tables.block_sizes),
            "input_block_table_ptrs": [t.data_ptr() for t in tables.input_block_tables],
        }
        for name, values in want.items():
            got = getattr(tables, name).tolist()
            expect(got == values, assertion, f"{when}: {name} is {got}, not {values}", self.where)

    def expect_steps(self, requests: list[Request], assertion: str, when: str) -> None:
        """Run a step and compare the block tables and the slots with plain Python."""
        requests = shard(requests, self.tables.cp_size)
        gathered, slots = run_step(self.tables, requests)
        width = self.tables.input_block_tables[0].shape[1]
        for group, reference in enumerate(reference_rows(requests, width)):
            for row, ids in enumerate(reference):
                got = gathered[group][row, : len(ids)].tolist()
                detail = f"{when}: group {group}, batch row {row}: blocks {got} are not {ids}"
                expect(got == ids, assertion, detail, self.where)
            want = reference_slots(self.tables, requests, group)
            detail = f"{when}: group {group}: slots {slots[group].tolist()} are not {want}"
            expect(slots[group].tolist() == want, assertion, detail, self.where)


def make_worker(runner: object, cache_dtype: str) -> gpu_worker.Worker:
    worker = object.__new__(gpu_worker.Worker)
    worker.model_runner = runner
    worker.cache_config = SimpleNamespace(cache_dtype=cache_dtype)
    worker._sleep_saved_buffers = {}
    return worker


# --- one step, and the plain reference --------------------------------------------------------------------


def batch(requests: list[Request]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row of each request, start of each query (padded as the runner pads it), position of each token."""
    rows = torch.tensor([row for row, _, _, _ in requests], dtype=torch.int32)
    starts = [0]
    for *_, count in requests:
        starts.append(starts[-1] + count)
    starts += [starts[-1]] * (PADDED_REQS + 1 - len(starts))
    positions = [start + i for _, _, start, count in requests for i in range(count)]
    positions += [0] * (MAX_TOKENS - len(positions))
    return rows, torch.tensor(starts, dtype=torch.int32), torch.tensor(positions, dtype=torch.int64)


def shard(requests: list[Request], ranks: int) -> list[Request]:
    """The same requests with context parallelism: a block holds the tokens of *ranks* blocks."""
    return [
        (row, tuple(ids[: -(-len(ids) // ranks)] for ids in groups), start, count)
        for row, groups, start, count in requests
    ]


def run_step(tables: block_table.BlockTables, requests: list[Request]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """New requests through BlockTables as execute_model does it."""
    for half, overwrite in ((slice(0, 1), True), (slice(1, None), False)):  # each request grows once
        for row, (first, second), _, _ in requests:
            tables.append_block_ids(row, (first[half], second[half]), overwrite=overwrite)
        tables.apply_staged_writes()
    rows, starts, positions = batch(requests)
    gathered = tables.gather_block_tables(rows, num_reqs_padded=PADDED_REQS)
    return gathered, tables.compute_slot_mappings(rows, starts, positions, PADDED_TOKENS)


def reference_rows(requests: list[Request], width: int) -> list[list[list[int]]]:
    """For each group: the blocks of each request, then zeros (as wide as group 0) in the rows that pad."""
    padding = [[0] * width] * (PADDED_REQS - len(requests))
    return [[ids[group] for _, ids, _, _ in requests] + padding for group in range(len(BLOCK_SIZES))]


def reference_slots(tables: block_table.BlockTables, requests: list[Request], group: int) -> list[int]:
    """Where each token's KV goes; with context parallelism only the tokens of this rank have a slot."""
    size, shards, rank, chunk = BLOCK_SIZES[group], tables.cp_size, tables.cp_rank, tables.cp_interleave
    slots = []
    for _, ids, start, count in requests:
        for position in range(start, start + count):
            block, offset = divmod(position, size * shards)
            local = offset // (chunk * shards) * chunk + offset % chunk
            mine = offset // chunk % shards == rank
            slots.append(ids[group][block] * size + local if mine else PAD)
    return slots + [PAD] * (PADDED_TOKENS - len(slots))


# --- sleep and wake-up ------------------------------------------------------------------------------------


def sleep_and_wake(engine: Engine, level: int, *steps: list[str] | None) -> None:
    engine.sleep(level)
    engine.wake_up(*steps)
    cos = engine.runner.model.cos.tolist()
    expect(cos == [1.5, 2.5], "buffers-lost", f"level {level}: the model's buffers are {cos}", WORKER)


@CASE.check("before any sleep")
def before_any_sleep(tree: Path) -> None:
    for cp in ({}, {"cp_size": 2, "cp_rank": 1, "cp_interleave": 4}):
        engine = Engine(tree, **cp)
        engine.expect_steps(BEFORE, "wrong-before-sleep", "first step")
        engine.expect_steps(AFTER, "wrong-before-sleep", "second step")


def decoy_cycle(engine: Engine, level: int, *steps: list[str] | None) -> None:
    """A step, sleep, wake-up, a step."""
    engine.expect_steps(BEFORE, "wrong-before-sleep", "before the sleep")
    sleep_and_wake(engine, level, *steps)
    engine.expect_steps(AFTER, "wrong-after-wake-up", f"level {level}, wake-up {steps}")
    engine.expect_layout("wrong-after-wake-up", f"level {level}, wake-up {steps}")


@CASE.check("decoy, level 1")
def decoy_level_1(tree: Path) -> None:
    decoy_cycle(Engine(tree), 1, None)


@CASE.check("decoy, level 2")
def decoy_level_2(tree: Path) -> None:
    decoy_cycle(Engine(tree), 2, None)


@CASE.check("decoy, kv_cache last")
def decoy_tags(tree: Path) -> None:
    for level in (1, 2):
        decoy_cycle(Engine(tree), level, ["weights"], ["kv_cache"])
    decoy_cycle(Engine(tree), 1, ["kv_cache", "weights"])


@CASE.check("decoy, twice")
def decoy_twice(tree: Path) -> None:
    engine = Engine(tree)
    decoy_cycle(engine, 1, None)
    decoy_cycle(engine, 2, ["weights"], ["kv_cache"])


@CASE.check("decoy, context parallel")
def decoy_context_parallel(tree: Path) -> None:
    decoy_cycle(Engine(tree, cp_size=2, cp_rank=1, cp_interleave=4), 1, None)


@CASE.check("requests from before the sleep")
def requests_from_before(tree: Path) -> None:
    """A request that the sleep preempts comes back as a new one, in the row that it had or in another's."""
    engine = Engine(tree)
    engine.expect_steps(BEFORE, "wrong-before-sleep", "before the sleep")
    sleep_and_wake(engine, 1, None)
    other_rows = [(row, ids, *rest) for (row, *_), (_, ids, *rest) in zip(BEFORE, BEFORE[::-1], strict=True)]
    for requests in (BEFORE, other_rows, AFTER):
        engine.expect_steps(requests, "wrong-after-wake-up", "resumed")


@CASE.check("weights awake, KV cache asleep")
def weights_tag(tree: Path) -> None:
    """The pool is not mapped yet: on a GPU every access to it would be an illegal one."""
    engine = Engine(tree)
    engine.sleep(1)
    asleep = {name: tensor.clone() for name, tensor in pool(engine.tables).items()}
    engine.wake_up(["weights"])
    for name, tensor in pool(engine.tables).items():
        same = torch.equal(tensor, asleep[name])
        expect(same, "touched-asleep", f"wake_up(['weights']) wrote to {name}", WORKER)


def in_a_fork(function: Callable[[], None], seconds: int = 60) -> int:
    """How *function* ends in a forked process: 0, 2 with a Defect, 1 otherwise, or minus the signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(seconds)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a crash is expected: no dump of the stack
            function()
            status = 0
        except Defect:
            status = 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@CASE.check("zeros")
def zeros(tree: Path) -> None:
    """What a GPU usually hands out: every pointer null, every divisor zero."""
    for level in (1, 2):
        engine = Engine(tree)
        engine.allocator.lose["kv_cache"] = partial(fill_zeros, engine.tables)
        engine.expect_steps(BEFORE, "wrong-before-sleep", "before the sleep")
        sleep_and_wake(engine, level, None)
        status = in_a_fork(partial(engine.expect_steps, AFTER, "wrong-after-wake-up", "zeros"))
        detail = f"level {level}: the first step ends with status {status}"
        expect(status != -signal.SIGALRM, "hangs-after-wake-up", detail, engine.where)
        expect(status == 0, "died-after-wake-up", detail, engine.where)


# --- addresses and CUDA graphs ----------------------------------------------------------------------------


@CASE.check("addresses")
def addresses(tree: Path) -> None:
    engine = Engine(tree)
    before = {name: tensor.data_ptr() for name, tensor in pool(engine.tables).items()}
    kept = list(pool(engine.tables).values())  # a freed block must not be handed out again
    for steps in ([None], [["weights"], ["kv_cache"]]):
        sleep_and_wake(engine, 1, *steps)
        now = {name: tensor.data_ptr() for name, tensor in pool(engine.tables).items()}
        moved = sorted(name for name in before if now[name] != before[name])
        # Upstream re-creates the four; this series never moves one.
        want = sorted(LAYOUT) if UPSTREAM_FIX else []
        expect(moved == want, "addresses-moved", f"wake-up moves {moved}, expected {want}", engine.where)
    del kept


@CASE.check("captured draft graph")
def captured_draft_graph(tree: Path) -> None:
    """A launch recorded before the sleep, replayed after it: its arguments are the tensors of the capture."""
    engine = Engine(tree)
    tables = engine.tables
    kernel = block_table._compute_slot_mappings_kernel
    captured: list[tuple[Any, tuple, dict]] = []

    class Launches:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **kwargs: captured.append((grid, args, kwargs))

    inputs = rows, starts, positions = batch(AFTER)
    with mock.patch.object(block_table, "_compute_slot_mappings_kernel", Launches()):
        tables.compute_slot_mappings(rows, starts, positions, PADDED_TOKENS)
    ((grid, args, kwargs),) = captured
    sleep_and_wake(engine, 1, None)
    if UPSTREAM_FIX:
        stale = [name for name in LAYOUT if not any(getattr(tables, name) is arg for arg in args)]
        expect(stale == list(LAYOUT), "graph-follows", f"the graph follows all but {stale}", engine.where)
        return
    engine.expect_steps(AFTER, "wrong-after-wake-up", "outside the graph")
    tables.slot_mappings.fill_(4444)
    for tensor, fresh in zip(inputs, batch(AFTER), strict=True):
        tensor.copy_(fresh)
    kernel[grid](*args, **kwargs)
    for group in range(len(BLOCK_SIZES)):
        got = tables.slot_mappings[group, :PADDED_TOKENS].tolist()
        want = reference_slots(tables, AFTER, group)
        expect(got == want, "wrong-draft-graph", f"group {group}: slots {got}, not {want}", engine.where)


def draft_model(steps: int, launches: list[str]) -> speculator.EagleSpeculator:
    """A speculator around a model that does nothing; *launches* collects compute_slot_mappings."""
    draft = object.__new__(speculator.EagleSpeculator)
    draft.num_speculative_steps = steps
    draft.max_model_len = MAX_MODEL_LEN
    draft.draft_logits = draft.temperature = draft.seeds = draft.hidden_states = None
    draft.current_draft_step = torch.zeros(1, dtype=torch.int64)
    draft.last_token_indices = torch.zeros(MAX_REQS, dtype=torch.int64)
    draft.draft_tokens = torch.zeros((MAX_REQS, steps), dtype=torch.int64)
    draft.idx_mapping = torch.zeros(MAX_REQS, dtype=torch.int32)
    draft.input_buffers = SimpleNamespace(
        positions=torch.zeros(MAX_REQS, dtype=torch.int64),
        query_start_loc=torch.zeros(MAX_REQS + 1, dtype=torch.int32),
    )
    draft.run_model = lambda *args, **kwargs: (torch.zeros(2, 4), torch.zeros(2, 4))
    draft.model = SimpleNamespace(compute_logits=lambda hidden: torch.zeros(2, 8))
    draft.block_tables = SimpleNamespace(compute_slot_mappings=lambda *args: launches.append("slots"))
    draft.model_state = draft.attn_groups = draft.kv_cache_config = None
    return draft


def captured_functions(draft: speculator.EagleSpeculator) -> list[str]:
    """What the real capture_model hands to the managers of the CUDA graphs."""
    names: list[str] = []
    manager = SimpleNamespace(capture=lambda function, *args, **kwargs: names.append(function.__name__))
    draft.cudagraph_manager = draft.prefill_cudagraph_manager = draft.decode_cudagraph_manager = manager
    if hasattr(draft, "capture_model"):
        draft.capture_model()
    else:
        draft.capture({})
    return names


@CASE.check("what the draft graph holds")
def draft_graph_contents(tree: Path) -> None:
    """generate_draft is captured, and until 0.21 it maps slots itself from three draft tokens on."""
    source = tree / "vllm/v1/worker/gpu/spec_decode/eagle/speculator.py"
    where = line_of(source, "def generate_draft", tree)
    helpers = {"gumbel_sample", "update_eagle_inputs", "update_eagle_draft_inputs"} & vars(speculator).keys()
    for steps in (2, 3, 4):
        launches: list[str] = []
        draft = draft_model(steps, launches)
        captured = captured_functions(draft)
        expect("generate_draft" in captured, "draft-graph", f"captured are {captured}", where)
        with mock.patch.multiple(speculator, **dict.fromkeys(helpers, lambda *a, **k: torch.zeros(2))):
            draft.generate_draft(2, 2, {}, {}, num_tokens_across_dp=None)
        want = 0 if UPSTREAM_FIX else steps - 2
        detail = f"{steps} draft tokens: {len(launches)} launches in the captured function, expected {want}"
        expect(len(launches) == want, "draft-graph", detail, where)


# --- entries that are read before a request writes them ---------------------------------------------------


@CASE.check("entries no request has written")
def unwritten_entries(tree: Path) -> None:
    """Dummy batches and draft steps read them: null block and slot, as after __init__."""
    engine = Engine(tree)
    engine.expect_steps(BEFORE, "wrong-before-sleep", "before the sleep")
    sleep_and_wake(engine, 1, None)
    engine.expect_layout("undefined-entries", "after the wake-up")  # before a kernel follows them
    tables = engine.tables
    # An idle data-parallel rank: dummy tables and slots as the last step left them, and its draft model.
    rows, starts, positions = batch([(row, ([], []), 0, 1) for row in range(MAX_REQS)])
    entries = {
        "slots": tables.slot_mappings.clone(),
        **{f"group {i}": t for i, t in enumerate(tables.get_dummy_block_tables(MAX_REQS))},
        **{f"source {i}": t.gpu for i, t in enumerate(tables.block_tables)},
    }
    undefined = sorted(name for name, tensor in entries.items() if tensor.any())
    want = sorted(entries) if UPSTREAM_FIX else []
    detail = f"undefined after the wake-up: {undefined}, expected {want}"
    expect(undefined == want, "undefined-entries", detail, engine.where)
    slots = tables.compute_slot_mappings(rows, starts, positions, MAX_REQS)
    if not UPSTREAM_FIX:
        expect(not slots.any(), "undefined-entries", f"draft slots {slots.tolist()}", engine.where)


# --- both hooks, FP8, runners without it ------------------------------------------------------------------


def v1_runner(cache_dtype: str) -> gpu_model_runner.GPUModelRunner:
    """The other model runner, as a wake-up leaves it: cache and scales hold anything."""
    layer = object.__new__(gpu_model_runner.Attention)
    torch.nn.Module.__init__(layer)
    layer._k_scale, layer._v_scale = torch.tensor(0.0), torch.tensor(0.0)
    runner = object.__new__(gpu_model_runner.GPUModelRunner)
    runner.cache_config = SimpleNamespace(cache_dtype=cache_dtype)
    runner.compilation_config = SimpleNamespace(static_forward_context={"layer": layer})
    runner.kv_caches = [torch.full((2, 3), 7.0), None, torch.full((4,), 7.0)]
    return runner


def fp8_state(runner: gpu_model_runner.GPUModelRunner) -> tuple[float, float, float]:
    layer = runner.compilation_config.static_forward_context["layer"]
    cells = torch.cat([cache.flatten() for cache in runner.kv_caches if cache is not None])
    return layer._k_scale.item(), layer._v_scale.item(), cells.abs().sum().item()


UNTOUCHED = (0.0, 0.0, 70.0)
RESET = (1.0, 1.0, 0.0)


@CASE.check("FP8 scales after a wake-up")
def fp8_scales(tree: Path) -> None:
    for cache_dtype, tags, want in (
        ("fp8", None, RESET),
        ("fp8_e4m3", ["kv_cache"], RESET),
        ("fp8", ["weights", "kv_cache"], RESET),
        ("fp8", ["weights"], UNTOUCHED),
        ("auto", None, UNTOUCHED),
        ("bfloat16", ["kv_cache"], UNTOUCHED),
    ):
        runner = v1_runner(cache_dtype)
        with mock.patch.object(CuMemAllocator, "get_instance", lambda: Allocator({})):
            make_worker(runner, cache_dtype).wake_up(tags)
        got = fp8_state(runner)
        detail = f"{cache_dtype}, wake_up({tags}): scales and sum of the cache are {got}, not {want}"
        expect(got == want, "fp8-scales", detail, line_of(tree / WORKER, "def wake_up", tree))


@CASE.check("hook resets FP8 scales")
def hook_resets_fp8(tree: Path) -> None:
    """Workers of other packages call the hook themselves."""
    where = line_of(tree / "vllm/v1/worker/gpu_model_runner.py", "def init_fp8_kv_scales", tree)
    for cache_dtype, want in (("fp8", RESET), ("auto", UNTOUCHED)):
        runner = v1_runner(cache_dtype)
        expect(hasattr(runner, "post_kv_cache_wake_up"), "no-hook", "the V1 runner has no hook", where)
        runner.post_kv_cache_wake_up()
        got = fp8_state(runner)
        expect(got == want, "fp8-scales", f"hook, {cache_dtype}: {got}, not {want}", where)


@CASE.check("hook of every runner")
def hooks_in_the_tree(tree: Path) -> None:
    """Every model runner of the tree that Worker drives has the hook; CPUWorker never reaches it."""
    runners = (
        model_runner.GPUModelRunner,
        gpu_model_runner.GPUModelRunner,
        xpu_model_runner.XPUModelRunnerV2,
        xpu_model_runner.XPUModelRunner,
    )
    where = line_of(tree / WORKER, "def wake_up", tree)
    for runner in runners:
        has_hook = callable(getattr(runner, "post_kv_cache_wake_up", None))
        expect(has_hook, "no-hook", f"{runner.__module__}.{runner.__name__} has no hook", where)
    calls: list[str] = []
    both = SimpleNamespace(
        post_kv_cache_wake_up=lambda: calls.append("hook"), init_fp8_kv_scales=lambda: calls.append("reset")
    )
    with mock.patch.object(CuMemAllocator, "get_instance", lambda: Allocator({})):
        make_worker(both, "fp8").wake_up(None)
    expect(calls == ["hook"], "hook-calls", f"wake_up calls {calls}, not the hook alone", where)
    worker = object.__new__(cpu_worker.CPUWorker)  # without a runner: an access to it would raise
    expect(worker.wake_up(None) is None, "cpu-worker", "CPUWorker.wake_up returns something", where)


@CASE.check("runner without the hook")
def runner_without_hook(tree: Path) -> None:
    """One of another package keeps what it had: the FP8 reset if it has one, and no exception."""
    where = line_of(tree / WORKER, "def wake_up", tree)
    for cache_dtype, tags, want in (
        ("fp8", None, 1),
        ("fp8", ["kv_cache"], 1),
        ("fp8", ["weights"], 0),
        ("auto", None, 0),
    ):
        resets: list[None] = []
        has_reset = SimpleNamespace(init_fp8_kv_scales=lambda calls=resets: calls.append(None))
        for runner in (has_reset, SimpleNamespace()):
            with mock.patch.object(CuMemAllocator, "get_instance", lambda: Allocator({})):
                try:
                    make_worker(runner, cache_dtype).wake_up(tags)
                except AttributeError as error:
                    # upstream calls the hook whether it is there or not
                    loud = UPSTREAM_FIX and tags != ["weights"]
                    expect(loud, "no-hook-raises", f"{cache_dtype}, wake_up({tags}): {error}", where)
        want = 0 if UPSTREAM_FIX else want
        detail = f"{cache_dtype}, wake_up({tags}): {len(resets)} resets, not {want}"
        expect(len(resets) == want, "no-hook-reset", detail, where)


# --- what else lives in the pool --------------------------------------------------------------------------


class Recorder(TorchFunctionMode):
    """Every tensor that is made on the meta device, which plays the accelerator here."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice
        self.tensors: list[weakref.ref[torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = storage
                self.tensors.append(weakref.ref(tensor))
        return out


class PoolRecorder:
    """The allocator while the KV cache is set up: what is made under which tag."""

    def __init__(self) -> None:
        self.pools: dict[str, Recorder] = {}

    @contextmanager
    def use_memory_pool(self, tag: str) -> Iterator[None]:
        with self.pools.setdefault(tag, Recorder()):
            yield


class Layer(AttentionLayerBase):
    """An attention layer that is nothing but its backend."""

    def __init__(self, backend: type) -> None:
        self.backend = backend

    def get_attn_backend(self) -> type:
        return self.backend

    def get_kv_cache_spec(self, vllm_config: Any) -> None:
        return None


def config(layers: dict[str, Layer]) -> Any:
    """A sparse MLA model with one draft token, in sleep mode."""
    dims = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    hf = SimpleNamespace(index_topk=2048, v_head_dim=128, **dims)
    compilation = SimpleNamespace(
        static_forward_context=layers,
        cudagraph_capture_sizes=[],
        resolve_cudagraph_mode_and_sizes=lambda *args: CUDAGraphMode.NONE,
        adjust_cudagraph_sizes_for_spec_decode=lambda *args: None,
    )
    model = SimpleNamespace(
        enable_sleep_mode=True,
        enable_return_routed_experts=False,
        max_model_len=MAX_MODEL_LEN,
        hf_config=hf,
        hf_text_config=hf,
        get_num_attention_heads=lambda parallel: 128,
    )
    axes = ("data", "tensor", "pipeline", "prefill_context", "decode_context")
    parallel = SimpleNamespace(cp_kv_cache_interleave_size=1, **{f"{axis}_parallel_size": 1 for axis in axes})
    return SimpleNamespace(
        model_config=model,
        compilation_config=compilation,
        parallel_config=parallel,
        cache_config=SimpleNamespace(cache_dtype="fp8_ds_mla", num_gpu_blocks=0, enable_prefix_caching=True),
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQS, max_num_batched_tokens=MAX_TOKENS),
        speculative_config=SimpleNamespace(num_speculative_tokens=1, parallel_drafting=False),
        attention_config=SimpleNamespace(use_fp4_indexer_cache=False),
        kv_transfer_config=None,
        mamba_config=None,
    )


def two_groups() -> tuple[dict[str, Layer], KVCacheConfig]:
    """A group of sparse MLA layers and a group of indexer caches."""
    layers = {
        "model.layers.0.attn": Layer(flashmla_sparse.FlashMLASparseBackend),
        "model.layers.1.indexer": Layer(indexer.DeepseekV32IndexerBackend),
    }
    specs = [
        MLAAttentionSpec(block_size=size, num_kv_heads=1, head_size=head, dtype=torch.uint8)
        for size, head in zip(BLOCK_SIZES, (656, 132), strict=True)
    ]
    named = list(zip(layers, specs, strict=True))
    return layers, KVCacheConfig(
        num_blocks=3,
        kv_cache_tensors=[KVCacheTensor(size=3 * s.page_size_bytes, shared_by=[name]) for name, s in named],
        kv_cache_groups=[KVCacheGroupSpec([name], spec) for name, spec in named],
    )


def walk(owner: Any, path: str, seen: set[int], device: str = "meta") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor on the accelerator that is reachable from *owner* by attributes and items, by name."""
    if id(owner) in seen or isinstance(owner, (type, SimpleNamespace)):
        return
    seen.add(id(owner))
    if isinstance(owner, torch.Tensor):
        if owner.device.type == device:
            yield path, owner
    elif isinstance(owner, (list, tuple)):
        for index, item in enumerate(owner):
            yield from walk(item, f"{path}[{index}]", seen, device)
    elif isinstance(owner, dict):
        for key, item in owner.items():
            yield from walk(item, f"{path}[{key}]", seen, device)
    elif type(owner).__module__.startswith(("vllm.", __name__)):
        name = path if isinstance(owner, buffer_utils.StagedWriteTensor) else type(owner).__name__
        for key, item in vars(owner).items():
            yield from walk(item, f"{name}.{key}", seen, device)


def initialize(device: str) -> tuple[Any, PoolRecorder]:
    """Real Worker.initialize_from_config and GPUModelRunner.initialize_kv_cache on *device*."""
    layers, kv_cache_config = two_groups()
    vllm_config = config(layers)
    runner = object.__new__(model_runner.GPUModelRunner)
    vars(runner).update(vars(vllm_config))
    vars(runner).update(
        vllm_config=vllm_config,
        device=torch.device(device),
        max_model_len=MAX_MODEL_LEN,
        max_num_reqs=MAX_REQS,
        max_num_tokens=MAX_TOKENS,
        is_encoder_decoder=False,
        dcp_size=1,
        dcp_rank=0,
        cp_interleave=1,
        speculator=None,
        decode_query_len=2,
        uniform_decode_query_len=2,
    )
    worker = make_worker(runner, "fp8_ds_mla")
    worker.vllm_config, worker.model_config = vllm_config, vllm_config.model_config
    worker.cache_config = vllm_config.cache_config
    recorder = PoolRecorder()
    one_rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    with (
        mock.patch.object(CuMemAllocator, "get_instance", lambda: recorder),
        mock.patch.object(indexer, "num_compute_units", lambda *args: 4),
        mock.patch.object(flashmla_sparse, "num_compute_units", lambda *args: 4),
        mock.patch.object(indexer, "get_total_cp_world_size", lambda: 1),
        mock.patch.object(cudagraph_utils, "get_pp_group", lambda: one_rank, create=True),
    ):
        worker.initialize_from_config(kv_cache_config)
    return runner, recorder


BLOCK_TABLES_IN_POOL = {
    *(f"BlockTables.{name}" for name in (*LAYOUT, "slot_mappings")),
    *(f"BlockTables.block_tables[{group}].gpu" for group in (0, 1)),
    *(f"BlockTables.input_block_tables[{group}]" for group in (0, 1)),
}
# Attributes of the two builders; of these, no step writes the constants again.
CONSTANTS_IN_POOL = ("offsets_buffer", "arange_buffer", "topk_tokens_tensor", "max_model_len_tensor")
INDEXER_IN_POOL = {
    "offsets_buffer",
    "arange_buffer",
    "decode_lens_buffer",
    "expanded_block_table_buffer",
    "scheduler_metadata_buffer",
    "expanded_seq_lens_buffer" if VERSION < (0, 20) else "decode_seq_lens_buffer",
}
FLASHMLA_SPARSE_IN_POOL = {
    "topk_tokens_tensor",
    "max_model_len_tensor",
    "dummy_block_table",
    "tile_scheduler_metadata_buffer",
    "num_splits_buffer",
    "req_id_per_token_buffer",
}


@CASE.check("what the pool holds")
def pool_contents(tree: Path) -> None:
    """Everything that initialize_kv_cache makes on the device, and so everything that a sleep discards."""
    where = line_of(tree / WORKER, 'use_memory_pool(tag="kv_cache")', tree)
    try:
        runner, recorder = initialize("meta")
    except NotImplementedError as error:  # "meta" holds no data that could be copied from it
        raise Defect("pool", f"what belongs in the pool is copied to the host: {error}", where) from error
    expect(set(recorder.pools) == {"kv_cache"}, "pool", f"tags {sorted(recorder.pools)}", where)
    made = recorder.pools["kv_cache"]
    found = dict(walk(runner, "", set()))
    want = (
        BLOCK_TABLES_IN_POOL
        | {f"DeepseekV32IndexerMetadataBuilder.{name}" for name in INDEXER_IN_POOL}
        | {f"FlashMLASparseMetadataBuilder.{name}" for name in FLASHMLA_SPARSE_IN_POOL}
        | {f"GPUModelRunner.kv_caches[{layer}]" for layer in (0, 1)}
    )
    detail = f"not expected {sorted(set(found) - want)}, missing {sorted(want - set(found))}"
    expect(set(found) == want, "pool", detail, where)
    outside = [name for name, tensor in found.items() if tensor.untyped_storage()._cdata not in made.storages]
    expect(not outside, "pool", f"made outside the pool: {outside}", where)
    gc.collect()
    reached = {tensor.untyped_storage()._cdata for tensor in found.values()}
    alive = [tensor for ref in made.tensors if (tensor := ref()) is not None]
    lost = [tuple(t.shape) for t in alive if t.untyped_storage()._cdata not in reached]
    expect(not lost, "pool", f"tensors of these shapes are alive and not named: {lost}", where)
    names = {f"BlockTables.{name}" for name in pool(runner.block_tables)}
    expect(names == BLOCK_TABLES_IN_POOL, "pool", f"the other checks overwrite {sorted(names)}", where)


@CASE.check("constants of a builder stay lost")
def constants_stay_lost(tree: Path) -> None:
    """The limit of the hook, of upstream's too: what the attention metadata builders keep is not restored."""
    runner, _ = initialize("cpu")
    builders = dict(walk(runner.attn_groups, "", set(), "cpu"))
    constants = {name: tensor for name, tensor in builders.items() if name.endswith(CONSTANTS_IN_POOL)}
    expect(len(constants) == len(CONSTANTS_IN_POOL), "pool", f"constants found: {sorted(constants)}", WORKER)
    for name, tensor in constants.items():
        expect(bool(tensor.any()), "pool", f"{name} holds nothing to lose", WORKER)
        tensor.zero_()
    with mock.patch.object(CuMemAllocator, "get_instance", lambda: Allocator({})):
        make_worker(runner, "fp8_ds_mla").wake_up(None)
    restored = sorted(name for name, tensor in constants.items() if tensor.any())
    expect(not restored, "pool", f"a wake-up restores {restored}: say so in the patch's header", WORKER)


BACKENDS = "vllm/v1/attention/backends/"
# Builder constants of every backend: lost with the pool, restored by no hook, this series' included.
CONSTANTS = {
    "flashinfer.py": {"_workspace_buffer"},
    "mla/flashmla_sparse.py": {"topk_tokens_tensor", "max_model_len_tensor"},
    "mla/indexer.py": {"offsets_buffer", "arange_buffer"},
    "mla/rocm_aiter_mla.py": {"paged_kv_last_page_len"},
    "mla/rocm_aiter_mla_sparse.py": {"qo_indptr", "paged_kv_last_page_len", "max_model_len_tensor"},
    "mla/xpu_mla_sparse.py": {"topk_tokens_tensor", "max_model_len_tensor"},
    "rocm_aiter_fa.py": {"scale"},
}
if not UPSTREAM_FIX:
    CONSTANTS["tree_attn.py"] = {"tree_attn_bias"}
    CONSTANTS["mla/rocm_aiter_mla_sparse.py"].add("topk_tokens_tensor")
VALUES = {"torch.arange", "torch.full", "torch.ones", "torch.tensor", "_prepare_tree_attn_bias"}


def constants_of(path: Path) -> set[str]:
    """Attributes that a metadata builder's constructor fills with values, and FlashInfer's workspace."""
    found = set()
    for builder in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(builder, ast.ClassDef) and builder.name.endswith("MetadataBuilder")):
            continue
        for method in builder.body:
            name = getattr(method, "name", "")
            values = {"__init__": VALUES, "_get_workspace_buffer": {"torch.zeros"}}.get(name, set())
            for node in ast.walk(method):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                    target = ast.unparse(node.targets[0])
                    if ast.unparse(node.value.func) in values and target.startswith("self."):
                        found.add(target.removeprefix("self."))
    return found


@CASE.check("constants of the attention backends")
def backend_constants(tree: Path) -> None:
    root = tree / BACKENDS
    sources = sorted(root.rglob("*.py"))
    found = {path.relative_to(root).as_posix(): names for path in sources if (names := constants_of(path))}
    detail = f"builders make {found}, listed are {CONSTANTS}"
    expect(found == CONSTANTS, "constants", detail, line_of(tree / WORKER, "use_memory_pool", tree))
