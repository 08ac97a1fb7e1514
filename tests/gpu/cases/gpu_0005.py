"""0005: model runner v2 after a sleep: the block tables' layout tensors lie in memory that the sleep discards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engine
from gpu_case import Context, Defect, Side, case, expect
from serving import Server

RELEASES = ("0.20.2",)
RECREATED = ("0.28.0",)  # no series of ours: upstream's hook re-creates the tensors, and a graph holds the draft loop
CRASH = r"illegal memory access"
GRAPHS = (1, 2, 4, 8, 16, 32)
LENGTH = 24
TABLES = ("block_table_ptrs", "block_table_strides", "block_sizes_tensor", "input_block_table_ptrs")
KV_GIB = 8  # large beside what other cases take meanwhile: the worker asserts that a sleep frees memory
PROMPTS = [[2 + (seed * 131 + place * 17) % 1000 for place in range(9 + seed)] for seed in range(8)]


def sleepy(context: Context, model: str, graphs: bool, v2: bool = True, **more: Any) -> Any:
    """An engine with sleep mode, on the V2 runner unless told otherwise."""
    import os

    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if v2 else "0"
    sizes = GRAPHS if graphs else ()
    return engine.start(engine.options(context, model, graphs=sizes, kv_gib=KV_GIB, enable_sleep_mode=True, **more))


def layout(model: Any) -> dict[str, list[int]]:
    """The four layout tensors' contents."""
    found: list[dict[str, list[int]]] = model.collective_rpc(_layout)
    return found[0]


def _layout(worker: Any) -> dict[str, list[int]]:
    import torch

    tables = worker.model_runner.block_tables
    return {name: getattr(tables, name).view(-1).to(torch.int64).tolist() for name in TABLES}


def refill(model: Any) -> None:
    """What level 2 needs after it: the weights again."""
    model.collective_rpc(_refill)


def _refill(worker: Any) -> None:
    import seeded_weights

    seeded_weights.fill(worker.model_runner.model)


def overwrite() -> None:
    """Take what the sleep freed, fill it with 0x7f and give it back, so that no old content survives by chance."""
    import torch

    torch.cuda.synchronize()
    taken = [torch.full((engine.GIB,), 0x7F, dtype=torch.uint8, device="cuda") for _ in range(KV_GIB + 2)]
    torch.cuda.synchronize()
    del taken
    torch.cuda.empty_cache()


def cycle(model: Any, level: int, tags: tuple[str, ...] = ()) -> None:
    """Sleep, overwrite, wake up: with *tags*, one part after the other."""
    model.sleep(level=level)
    overwrite()
    for tag in tags:
        model.wake_up(tags=[tag])
    if not tags:
        model.wake_up()
    if level == 2:
        refill(model)


def answers(model: Any) -> list[list[int]]:
    """Greedy tokens of all prompts."""
    return [row["tokens"] for row in engine.answer(model, PROMPTS, LENGTH)]


def sleep_and_answer(model: Any, cycles: list[tuple[int, tuple[str, ...]]]) -> dict[str, Any]:
    """Answers and layout tensors must be the same after each cycle; raises `Defect`, or what the engine raises."""
    wanted, tables = answers(model), layout(model)
    repeated = answers(model)
    expect(repeated == wanted, "the engine does not repeat its own answers, sleep or not")
    lost = 0
    for number, (level, tags) in enumerate(cycles, 1):
        cycle(model, level, tags)
        lost += layout(model) != tables
        found = answers(model)
        same = _same(found, wanted)
        expect(same == len(wanted), f"cycle {number}: {same} of {len(wanted)} answers as before the sleep")
        expect(not lost, f"cycle {number}: the layout tensors differ from those at start-up")
    return {"cycles": len(cycles), "answers": len(wanted), "tokens": sum(map(len, wanted))}


def register(name: str, graphs: bool, cycles: list[tuple[int, tuple[str, ...]]], about: str) -> None:
    """A case on the tiny dense model."""

    def run(context: Context) -> dict[str, Any]:
        return sleep_and_answer(sleepy(context, "dense", graphs), cycles)

    case(name, "0005", RELEASES, stock=CRASH, about=about)(run)


PARTS = ("weights", "kv_cache")
register("0005-level-1-eager", False, [(1, ())], "Engine, MRv2, eager: sleep level 1, freed memory overwritten")
register("0005-level-2-eager", False, [(2, ())], "the same, level 2, weights filled anew")
register("0005-level-1-graphs", True, [(1, ())], "level 1, full decode graphs")
register("0005-level-2-graphs", True, [(2, ())], "level 2, full decode graphs")
register("0005-tags-graphs", True, [(1, PARTS), (1, PARTS[::-1]), (2, PARTS)], "tags woken one by one, both orders")
register("0005-20-cycles-graphs", True, [(1 + n % 2, PARTS if n % 3 else ()) for n in range(20)], "20 cycles, mixed")


@case("0005-v1-runner-graphs", "0005", RELEASES)
def v1_runner(context: Context) -> dict[str, Any]:
    """The default runner, level 1, full decode graphs: a control."""
    model = sleepy(context, "dense", True, v2=False)
    wanted = answers(model)
    cycle(model, 1)
    expect(answers(model) == wanted, "the answers differ after the sleep")
    return {"answers": len(wanted)}


# Short enough that the first drafts stay in the prompt's own block: past it they would be written to the null block,
# all rows racing, and no two runs would draft alike.
DRAFT_PROMPTS = [prompt[: 5 + row] for row, prompt in enumerate(PROMPTS)]


@case("0005-eagle3tokens-graphs", "0005", RELEASES, stock=CRASH, sides=(Side.STOCK, Side.PATCHED, Side.UPSTREAM))
def draft_graphs(context: Context) -> dict[str, Any]:
    """EAGLE draft of 3 tokens in captured graphs: answers and drafts after a sleep as before it."""
    model = drafting(context, True)
    if context.side is Side.UPSTREAM:
        recreate_instead()
    figures: dict[str, Any] = {}
    whole = sleep_and_draft(model, figures)
    if figures["repeats"] != whole or not figures["draft_graphs"]:
        raise _with(RuntimeError(f"the engine does not repeat its own answers and drafts: {figures}"), figures)
    if figures["and_once_more"] != whole or figures["after_the_sleep"] != whole:
        raise _with(Defect(f"other answers or drafts after the sleep: {figures}"), figures)
    return figures


def drafting(context: Context, graphs: bool) -> Any:
    """An engine on the V2 runner with an EAGLE draft of 3 tokens."""
    draft = {"method": "eagle", "model": str(engine.model_folder("eagle", context.shared)), "num_speculative_tokens": 3}
    return sleepy(context, "dense", graphs, speculative_config=draft)


def sleep_and_draft(model: Any, figures: dict[str, Any]) -> dict[str, str]:
    """Fill *figures* with what is alike before and after a sleep; returns what they say where all is alike."""
    drafts = record_drafts(model)
    runs = [drafted(model, drafts) for _ in range(3)]  # the first run fills the blocks, the others repeat
    figures |= {"draft_graphs": draft_graph_count(model), "repeats": alike(runs[1], runs[2])}
    addresses = layout_addresses(model)
    cycle(model, 1)
    figures["layout_tensors_moved"] = layout_addresses(model) != addresses
    for name in ("after_the_sleep", "and_once_more"):
        figures[name] = alike(runs[2], drafted(model, drafts))
    return alike(runs[2], runs[2])


def observe_recreated(name: str, about: str, graphs: bool = True, refreshed: bool = False) -> None:
    """A case of releases whose own hook re-creates the tensors: what is seen, also where it ends in a crash."""

    def run(context: Context) -> dict[str, Any]:
        model = drafting(context, graphs)
        if refreshed:
            model.collective_rpc(_refresh_instead)
        loop_in_a_graph = model.collective_rpc(_speculator)[0].use_fused_multi_step_decode and graphs
        figures: dict[str, Any] = {"draft_loop_in_a_graph": loop_in_a_graph}
        return _with_figures(figures, lambda: sleep_and_draft(model, figures))

    case(f"0005-recreated-{name}", "0005", RECREATED, judged=False, sides=(Side.STOCK,), about=about)(run)


def _refresh_instead(worker: Any) -> None:
    """The hook of this worker fills the tensors that the captured graphs read, in place of new ones."""
    tables = worker.model_runner.block_tables
    create = tables.init_block_table_layout_tensors

    def refresh() -> None:
        known = {name: getattr(tables, name) for name in TABLES}
        create()
        for name, tensor in known.items():
            tensor.copy_(getattr(tables, name))
            setattr(tables, name, tensor)

    tables.init_block_table_layout_tensors = refresh


observe_recreated("eagle3tokens-graphs", "EAGLE draft of 3 tokens, graphs, upstream's hook: drafts after a sleep")
observe_recreated("eagle3tokens-eager", "the same, eager", graphs=False)
observe_recreated(
    "eagle3tokens-refreshed", "graphs; the hook changed at run time to fill the old tensors", refreshed=True
)


@case("0005-recreated-level-1-graphs", "0005", RECREATED, judged=False, sides=(Side.STOCK,))
def recreated_without_draft(context: Context) -> dict[str, Any]:
    """No draft, full decode graphs, upstream's hook: answers after a sleep."""
    model = sleepy(context, "dense", True)
    wanted = answers(model)
    figures: dict[str, Any] = {"answers": len(wanted), "repeated": _same(answers(model), wanted)}

    def look() -> None:
        cycle(model, 1)
        for name in ("after_the_sleep", "and_once_more"):
            figures[name] = _same(answers(model), wanted)

    return _with_figures(figures, look)


def _same(found: list[list[int]], wanted: list[list[int]]) -> int:
    return sum(a == b for a, b in zip(found, wanted, strict=True))


def _with_figures(figures: dict[str, Any], look: Callable[[], object]) -> dict[str, Any]:
    """*figures*, which *look* adds to; an error that it ends with takes along what there is."""
    try:
        look()
    except Exception as error:
        raise _with(error, figures) from error.__cause__
    return figures


def _with(error: Exception, figures: dict[str, Any]) -> Exception:
    """The error with its figures, which the result keeps."""
    error.measures = figures  # type: ignore[attr-defined]
    return error


Drafted = tuple[list[list[int]], list[list[list[int]]]]


def drafted(model: Any, drafts: list[Any]) -> Drafted:
    """Answers to the short prompts, and the drafts of every step."""
    drafts.clear()
    found = [row["tokens"] for row in engine.answer(model, DRAFT_PROMPTS, LENGTH)]
    return found, [step.tolist() for step in drafts]


def alike(a: Drafted, b: Drafted) -> dict[str, str]:
    """How many answers and draft steps are the same."""
    same = [sum(x == y for x, y in zip(left, right, strict=False)) for left, right in zip(a, b, strict=True)]
    sizes = [max(len(left), len(right)) for left, right in zip(a, b, strict=True)]
    return {name: f"{n} of {size}" for name, n, size in zip(("answers", "draft_steps"), same, sizes, strict=True)}


def recreate_instead() -> None:
    """Upstream's form of the hook (pull 40648): new layout tensors instead of refreshed ones; nothing is zeroed."""
    from vllm.v1.worker.gpu.block_table import BlockTables

    def post_kv_cache_wake_up(self: Any) -> None:
        for name in TABLES:
            setattr(self, name, getattr(self, name).new_empty(getattr(self, name).shape))
        self.init_block_table_layout_tensors()

    BlockTables.post_kv_cache_wake_up = post_kv_cache_wake_up


def record_drafts(model: Any) -> list[Any]:
    """A list that every draft step adds its tokens to."""
    seen: list[Any] = []
    speculator = model.collective_rpc(_speculator)[0]
    propose = speculator.propose

    def recorded(*arguments: Any, **more: Any) -> Any:
        drafts = propose(*arguments, **more)
        if not more.get("dummy_run"):
            seen.append(drafts.clone())
        return drafts

    speculator.propose = recorded
    return seen


def _speculator(worker: Any) -> Any:
    return worker.model_runner.speculator


def draft_graph_count(model: Any) -> int:
    """Captured full graphs of the draft's decode loop."""
    return len(model.collective_rpc(_speculator)[0].decode_cudagraph_manager.graphs)


def layout_addresses(model: Any) -> list[int]:
    """Where the layout tensors lie."""
    found: list[list[int]] = model.collective_rpc(_addresses)
    return found[0]


def _addresses(worker: Any) -> list[int]:
    tables = worker.model_runner.block_tables
    return [getattr(tables, name).data_ptr() for name in TABLES]


@case("0005-server", "0005", RELEASES, stock=r"after the wake-up: .*(500|no answer)|illegal memory access")
def server(context: Context) -> dict[str, Any]:
    """API server, MRv2: completions, /sleep, /wake_up and completions again, over HTTP."""
    options = engine.options(context, "dense", kv_gib=KV_GIB, enable_sleep_mode=True)
    with Server(context, options, {"VLLM_USE_V2_MODEL_RUNNER": "1"}) as api:
        wanted = [api.complete(prompt, LENGTH) for prompt in PROMPTS]
        api.post("/sleep?level=1")
        expect(api.get("/is_sleeping")["is_sleeping"], "the server does not sleep")
        api.post("/wake_up")
        try:
            found = [api.complete(prompt, LENGTH) for prompt in PROMPTS]
        except OSError as error:
            raise Defect(f"after the wake-up: {error}; the server said: {api.complaint()}") from error
    same = _same(found, wanted)
    expect(same == len(wanted), f"after the wake-up: {same} of {len(wanted)} answers as before")
    return {"answers": len(wanted)}


@case("0005-dsa-mtp-builder-constants", "0005", RELEASES, judged=False)
def builder_constants(context: Context) -> dict[str, Any]:
    """Default runner, tiny DeepSeek-V3.2 + MTP 1, eager: the indexer constants after a sleep (not patched)."""
    model = sleepy(
        context, "deepseek", False, v2=False, speculative_config={"method": "mtp", "num_speculative_tokens": 1}
    )
    wanted = answers(model)
    names = ("offsets_buffer", "arange_buffer")
    before = model.collective_rpc(_constants, args=(names,))[0]
    cycle(model, 1)
    after = model.collective_rpc(_constants, args=(names,))[0]
    lost = {name: before[name] != after[name] for name in before}
    figures: dict[str, Any] = {"constants_lost": lost, "first_values": {name: after[name][:4] for name in after}}
    try:
        found = answers(model)
        figures["same_answers"] = _same(found, wanted)
    except Exception as error:
        figures["answers"] = f"{type(error).__name__}: {str(error)[:300]}"
    return figures | {"prompts": len(wanted)}


def _constants(worker: Any, names: tuple[str, ...]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for groups in worker.model_runner.attn_groups:
        for group in groups:
            builder = group.get_metadata_builder()
            found |= {name: getattr(builder, name).tolist() for name in names if hasattr(builder, name)}
    return found
