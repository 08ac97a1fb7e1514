"""0002: padded rows leave the null block's state alone, in the GDN kernels and in lightning attention."""

from __future__ import annotations

from typing import Any

import engine
from gpu_case import Context, Defect, case, expect
from proof_on_cuda import run_checks

GDN = ("0.18.1", "0.19.1")
LIGHTNING = ("0.20.2", "0.21.0")
CHANGED = r"failed as named: .*null-block-changed"


@case("0002-gdn-small", "0002", GDN, stock=CHANGED)
def gdn_small(context: Context) -> dict[str, Any]:
    """GDN and KDA kernels, compiled, against the delta rule in plain torch (float32, small heads)."""
    names = (
        "recurrent: null block as padding",
        "recurrent: null block in speculative tables",
        "KDA: null block as padding",
        "packed decode: null block as padding",
        "sigmoid gating: null block as padding",
        "sigmoid gating: null block in speculative tables",
        "sigmoid gating, KDA: null block as padding",
        "GDN kernels: padding of -1",
    )
    return run_checks(context, "gdn_null_block_guard", names)


@case("0002-lightning-small", "0002", LIGHTNING, stock=CHANGED)
def lightning_small(context: Context) -> dict[str, Any]:
    """The lightning decode kernel, compiled, against its recurrence in plain torch."""
    names = ("lightning: null block as padding", "lightning: padding of -1")
    return run_checks(context, "gdn_null_block_guard", names)


# Key heads, value heads, key and value size: Qwen3-Next-80B-A3B and Qwen3.5-35B-A3B, whole and at TP 2.
HEADS = ((16, 32, 128, 128), (8, 16, 128, 128))
SLOTS, ROWS = 96, 64


@case("0002-gdn-real-shapes", "0002", GDN, stock=r"slot 0 was changed by: recurrent, .*packed decode.*sigmoid gating")
def gdn_real(context: Context) -> dict[str, Any]:
    """All five guards at Qwen3-Next's head shapes, bf16 states, plain and speculative tables.

    A row padded with 0 must leave every slot bit for bit as a row padded with -1 does, which stock skips too.
    """
    changed: list[str] = []
    for heads in HEADS:
        for name, run in kernels().items():
            for tokens in (1,) if name in ("packed decode", "KDA") else (1, 3):
                if not same(run, heads, tokens, f"{name}, {tokens} tokens a row, {heads}"):
                    changed.append(name)
    if changed:
        raise Defect("slot 0 was changed by: " + ", ".join(dict.fromkeys(changed)))
    return {"kernels": list(kernels()), "heads": [list(heads) for heads in HEADS], "rows": ROWS}


def same(run: Any, heads: tuple[int, ...], tokens: int, what: str) -> bool:
    """Whether slot 0 is bit-identical; the other slots and the live outputs must be, whatever slot 0 is."""
    import torch

    states, outputs, live = [], [], table(tokens, 0) > 0
    for pad in (-1, 0):
        torch.manual_seed(7)
        state = torch.randn(SLOTS, heads[1], heads[3], heads[2], device="cuda").to(torch.bfloat16)
        outputs.append(run(heads, tokens, state, table(tokens, pad)))
        states.append(state)
    torch.cuda.synchronize()
    expect(torch.equal(bits(states[0][1:]), bits(states[1][1:])), f"{what}: another slot than 0 differs")
    rows = live[:, 0].repeat_interleave(tokens)
    ours, theirs = (output.reshape(rows.numel(), -1)[rows] for output in outputs)
    expect(torch.equal(bits(ours), bits(theirs)), f"{what}: the output of a live row differs")
    return torch.equal(bits(states[0][0]), bits(states[1][0]))


def bits(x: Any) -> Any:
    """For comparisons that NaN and -0.0 cannot deceive."""
    import torch

    return x.contiguous().view(torch.int16)


def table(tokens: int, pad: int) -> Any:
    """[64, tokens] slots, no two alike; every fourth row is padding, and so is what the slots do not suffice for."""
    import torch

    slots = torch.full((ROWS, tokens), pad, device="cuda", dtype=torch.int32)
    own = min(ROWS, (SLOTS - 1) // tokens)
    slots[:own] = torch.arange(1, 1 + own * tokens, device="cuda", dtype=torch.int32).view(own, tokens)
    slots[::4] = pad
    slots[1::8, 2:] = pad  # live rows whose last draft has no slot
    return slots


def kernels() -> dict[str, Any]:
    """The entries that the layers call, by name."""
    return {"recurrent": recurrent, "KDA": kda, "packed decode": packed, "sigmoid gating": sigmoid}


def inputs(heads: tuple[int, ...], rows: int) -> tuple[Any, Any, Any]:
    """q, k and v in bf16: [1, rows, heads, size]."""
    import torch

    shapes = ((heads[0], heads[2]), (heads[0], heads[2]), (heads[1], heads[3]))
    q, k, v = (torch.randn(1, rows, *shape, device="cuda").to(torch.bfloat16) for shape in shapes)
    return q, k, v


def places(slots: Any) -> dict[str, Any]:
    """The index arguments: 1-D for plain decode; for speculation 2-D, with all but one draft accepted."""
    import torch

    rows, tokens = slots.shape
    starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32) * tokens
    if tokens == 1:
        return {"cu_seqlens": starts, "ssm_state_indices": slots[:, 0].contiguous()}
    accepted = torch.full((rows,), tokens - 1, device="cuda", dtype=torch.int32)
    return {"cu_seqlens": starts, "ssm_state_indices": slots, "num_accepted_tokens": accepted}


def recurrent(heads: tuple[int, ...], tokens: int, state: Any, slots: Any) -> Any:
    """fused_recurrent_gated_delta_rule: load and store guards."""
    import torch
    from vllm.model_executor.layers.fla.ops.fused_recurrent import fused_recurrent_gated_delta_rule as call

    q, k, v = inputs(heads, ROWS * tokens)
    g = -torch.rand(1, ROWS * tokens, heads[1], device="cuda")
    beta = torch.rand(1, ROWS * tokens, heads[1], device="cuda").to(torch.bfloat16)
    return call(q, k, v, g, beta, initial_state=state, use_qk_l2norm_in_kernel=True, **places(slots))[0]


def kda(heads: tuple[int, ...], tokens: int, state: Any, slots: Any) -> Any:
    """KDA's entry to the same kernel: as many key heads as value heads, a decay per key element."""
    import torch
    from vllm.model_executor.layers.fla.ops.kda import fused_recurrent_kda as call

    q, k, v = inputs((heads[1], *heads[1:]), ROWS * tokens)
    g = -torch.rand(1, ROWS * tokens, heads[1], heads[2], device="cuda")
    beta = torch.rand(1, ROWS * tokens, heads[1], device="cuda").to(torch.bfloat16)
    return call(q, k, v, g, beta, initial_state=state, use_qk_l2norm_in_kernel=True, **places(slots))[0]


def gates(heads: tuple[int, ...], rows: int) -> dict[str, Any]:
    """What decay and beta are made from."""
    import torch

    drawn = {"a": torch.randn(rows, heads[1], device="cuda").to(torch.bfloat16)}
    drawn |= {"b": torch.randn(rows, heads[1], device="cuda").to(torch.bfloat16)}
    return drawn | {name: torch.randn(heads[1], device="cuda") for name in ("A_log", "dt_bias")}


def packed(heads: tuple[int, ...], tokens: int, state: Any, slots: Any) -> Any:
    """fused_recurrent_gated_delta_rule_packed_decode: one guard for both."""
    import torch
    from vllm.model_executor.layers.fla.ops import fused_recurrent

    mixed = torch.cat([x.reshape(ROWS, -1) for x in inputs(heads, ROWS)], 1)
    out = torch.empty(ROWS, 1, heads[1], heads[3], device="cuda", dtype=torch.bfloat16)
    fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode(
        mixed, **gates(heads, ROWS), scale=heads[2] ** -0.5, initial_state=state, out=out,
        ssm_state_indices=slots[:, 0].contiguous(), use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    return out


def sigmoid(heads: tuple[int, ...], tokens: int, state: Any, slots: Any) -> Any:
    """fused_sigmoid_gating_delta_rule_update: load and store guards."""
    from vllm.model_executor.layers.fla.ops.fused_sigmoid_gating import fused_sigmoid_gating_delta_rule_update as call

    q, k, v = inputs(heads, ROWS * tokens)
    given = gates(heads, ROWS * tokens)
    return call(**given, q=q, k=k, v=v, initial_state=state, use_qk_l2norm_in_kernel=True, **places(slots))[0]


def linear_layers(model_engine: Any) -> dict[str, Any]:
    """The state of every linear-attention layer, [slots, heads, size, size], by the layer's name."""
    found: list[dict[str, Any]] = model_engine.collective_rpc(_states)
    return found[0]


def _states(worker: Any) -> dict[str, Any]:
    layers = worker.model_runner.compilation_config.static_forward_context
    linear = {name: layer for name, layer in layers.items() if "Linear" in type(layer).__name__}
    return {name: layer.kv_cache[0] for name, layer in linear.items()}


def minimax(context: Context, batches: tuple[int, ...], graphs: tuple[int, ...]) -> dict[str, Any]:
    """Fill slot 0 of every layer with ones, answer a batch, and look at slot 0; raises `Defect` if it changed."""
    model = engine.start(engine.options(context, "minimax", graphs=graphs))
    layers = linear_layers(model)
    expect(len(layers) == 3, f"three linear-attention layers expected, found {list(layers)}")
    changed: dict[str, int] = {}
    for batch in batches:
        for state in layers.values():
            state[0].fill_(1.0)
        prompts = [[2 + row * 7 + place for place in range(6)] for row in range(batch)]
        engine.answer(model, prompts, 12)
        changed[str(batch)] = sum(bool((state[0] != 1.0).any()) for state in layers.values())
    text = ", ".join(f"{layers} layers in batches of {batch}" for batch, layers in changed.items() if layers)
    expect(not text, f"slot 0 was changed: {text}")
    return {"layers_changed": changed}


@case("0002-minimax-padded-graphs", "0002", LIGHTNING, stock=r"slot 0 was changed: 3 layers .*of 3, 3 layers .*of 5")
def minimax_padded(context: Context) -> dict[str, Any]:
    """Engine, tiny MiniMax-Text-01, batches of 3 and 5 in full decode graphs of 4 and 8."""
    return minimax(context, (3, 5), (4, 8))


@case("0002-minimax-exact-graphs", "0002", LIGHTNING)
def minimax_exact(context: Context) -> dict[str, Any]:
    """The same with batches of 4 and 8, which need no padding: a control."""
    return minimax(context, (4, 8), (4, 8))
