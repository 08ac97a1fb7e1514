"""0002: no state kernel reads or writes the null block (slot 0) when it comes as padding.

The real Triton kernels run in the interpreter, through the functions the layers call. Slot 0 is filled with
a pattern and must be bit-identical afterwards; the other slots and the live outputs must equal the gated
delta rule (and lightning attention's recurrence) written out in plain torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from case_api import Case, expect, line_of
from vllm.model_executor.layers.fla.ops import fused_recurrent, fused_sigmoid_gating, kda
from vllm.model_executor.layers.lightning_attn import linear_decode_forward_triton
from vllm.triton_utils import tl
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import utils
from vllm.v1.attention.backends.linear_attn import LinearAttentionMetadataBuilder
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import MambaSpec

# fused_recurrent binds tl.exp at import, before the interpreter patches it at launch.
fused_recurrent.exp = lambda x: tl.exp(x)

CASE = Case("0002")

RELEASE = os.environ["VLLM_PATCHES_RELEASE"]
# CUDA-graph padding is -1 up to 0.19.1 and the null block from 0.20.0 on.
PADS_WITH_NULL_BLOCK = RELEASE not in {"0.18.1", "0.19.1"}

OPS = "vllm/model_executor/layers/fla/ops"
RECURRENT = f"{OPS}/fused_recurrent.py"
SIGMOID = f"{OPS}/fused_sigmoid_gating.py"
LIGHTNING = "vllm/model_executor/layers/lightning_attn.py"
POOL = "vllm/v1/core/block_pool.py"
RUNNER = "vllm/v1/worker/gpu_model_runner.py"

SLOTS = 10
NULL_BLOCK, NEGATIVE = 0, -1
# A row of a batch: the slots of its tokens, and how many tokens of the step before were accepted; its
# state is loaded from the slot of the last of those.
Table = list[tuple[list[int], int]]
# One token of one row for all heads: (state, token) -> (new state, output).
Step = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


class Heads(NamedTuple):
    """Query heads, value heads and their sizes."""

    q: int
    v: int
    k_dim: int
    v_dim: int


GDN = Heads(2, 4, 16, 8)
KDA = Heads(2, 2, 16, 16)


def decode_tables(pad: int) -> list[Table]:
    """One token per row; padding at the end, in the middle and alone. Slot 1 is the lowest a request gets."""
    columns = [[3, 1, 5, pad, pad], [pad, 3, pad, 1, 9], [pad, pad]]
    return [[([slot], 1) for slot in column] for column in columns]


def speculative_tables(pad: int) -> list[Table]:
    """Two tokens per row: padding for the row, for one of its tokens, and for the slot it loads from."""
    return [
        [([1, 2], 1), ([3, pad], 1), ([pad, pad], 1)],
        [([1, 2], 2), ([pad, pad], 2), ([pad, 3], 2), ([4, 5], 1)],
        # Nothing to load: the row is padding, so slots 6 and 7 stay as they are.
        [([pad, 6], 1), ([7, pad], 2), ([1, 2], 1)],
    ]


def random(*shape: int, seed: int) -> torch.Tensor:
    """Reproducible values around zero."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_states(*shape: int) -> torch.Tensor:
    """Every slot its own values; slot 0 far from all of them, so that reading it shows as well.

    The storage goes on before slot 0, so that a kernel which takes -1 for a slot stays within it.
    """
    states = random(1 + SLOTS, *shape, seed=1)
    states[1] = 1000 + random(*shape, seed=2)
    return states[1:]


def before_first(states: torch.Tensor) -> torch.Tensor:
    """What a kernel finds at slot -1."""
    first = states[0]
    return first.as_strided(first.shape, first.stride(), states.storage_offset() - states.stride(0))


def normalized(x: torch.Tensor) -> torch.Tensor:
    """What use_qk_l2norm_in_kernel means."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def delta_rule(heads: Heads, state, q, k, v, decay, beta) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of the gated delta rule: state [heads, V, K], output [heads, V]; decay per head or per K."""
    q = normalized(q).repeat_interleave(heads.v // heads.q, 0) * heads.k_dim**-0.5
    k = normalized(k).repeat_interleave(heads.v // heads.q, 0)
    state = state * decay.reshape(heads.v, 1, -1)
    update = (v - torch.einsum("hvk,hk->hv", state, k)) * beta[:, None]
    state = state + update[:, :, None] * k[:, None, :]
    return state, torch.einsum("hvk,hk->hv", state, q)


def reference(states: torch.Tensor, table: Table, step: Step) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """All slots after the batch, and the outputs of its live tokens."""
    states, outputs, token = states.clone(), {}, 0
    for slots, accepted in table:
        live = slots[accepted - 1] > 0
        state = states[slots[accepted - 1]]
        for slot in slots:
            if live:
                state, outputs[token] = step(state, token)
            if live and slot > 0:
                states[slot] = state
            token += 1
    return states, outputs


def bits(x: torch.Tensor) -> torch.Tensor:
    """For comparisons that NaN and -0.0 cannot deceive."""
    return x.contiguous().view(torch.int32)


def compare(where: str, table: Table, before, after, output, step: Step) -> None:
    """Slot 0 first, then the slots that nothing may write, then the live slots and outputs."""
    indices = [slots for slots, _ in table]
    same = torch.equal(bits(after[0]), bits(before[0]))
    expect(same, "null-block-changed", f"slot 0 after {indices}", where)
    same = torch.equal(bits(before_first(after)), bits(before_first(before)))
    expect(same, "slot-before-first-changed", f"slot -1 after {indices}", where)
    wanted_states, wanted = reference(before, table, step)
    for slot in range(1, SLOTS):
        if torch.equal(bits(wanted_states[slot]), bits(before[slot])):
            same = torch.equal(bits(after[slot]), bits(before[slot]))
            expect(same, "idle-slot-changed", f"slot {slot} after {indices}", where)
        off = float((after[slot] - wanted_states[slot]).abs().max())
        expect(off < 1e-4, "live-slot-wrong", f"slot {slot} after {indices}: off by {off}", where)
    for token, value in wanted.items():
        off = float((output[token] - value).abs().max())
        expect(off < 1e-4, "live-output-wrong", f"token {token} of {indices}: off by {off}", where)


def indices_of(table: Table) -> dict[str, torch.Tensor | None]:
    """The index arguments that the layers pass for *table*: 1-D for plain decode, 2-D for speculation."""
    width = len(table[0][0])
    indices = torch.tensor([slots for slots, _ in table], dtype=torch.int32)
    accepted = torch.tensor([count for _, count in table], dtype=torch.int32)
    arguments = {
        "cu_seqlens": torch.arange(len(table) + 1, dtype=torch.int32) * width,
        "ssm_state_indices": indices if width > 1 else indices[:, 0].contiguous(),
    }
    return arguments | ({"num_accepted_tokens": accepted} if width > 1 else {})


def qkv_of(table: Table, heads: Heads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs [1, tokens, heads, size]."""
    tokens = sum(len(slots) for slots, _ in table)
    q = random(1, tokens, heads.q, heads.k_dim, seed=3)
    k = random(1, tokens, heads.q, heads.k_dim, seed=4)
    return q, k, random(1, tokens, heads.v, heads.v_dim, seed=5)


def guard(tree: Path, path: str, indent: int = 12) -> str:
    """The guard of a GDN kernel: 12 columns in where a state is loaded, 4 in packed decode."""
    lines = (tree / path).read_text(encoding="utf-8").splitlines()
    found = [number for number, line in enumerate(lines, 1) if line.startswith(" " * indent + "if state_idx <")]
    return f"{path}:{found[0]}" if found else path


def run_recurrent(tree: Path, table: Table, heads: Heads) -> None:
    """fused_recurrent_gated_delta_rule, or KDA's entry to the same kernel (a decay per K)."""
    q, k, v = qkv_of(table, heads)
    tokens = q.shape[1]
    is_kda = heads is KDA
    g = -random(1, tokens, heads.v, *([heads.k_dim] if is_kda else []), seed=6).abs()
    beta = random(1, tokens, heads.v, seed=7).sigmoid()
    before, after = (make_states(heads.v, heads.v_dim, heads.k_dim) for _ in range(2))
    run = kda.fused_recurrent_kda if is_kda else fused_recurrent.fused_recurrent_gated_delta_rule
    output, _ = run(q, k, v, g, beta, initial_state=after, use_qk_l2norm_in_kernel=True, **indices_of(table))

    def step(state: torch.Tensor, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        return delta_rule(heads, state, q[0, token], k[0, token], v[0, token], g[0, token].exp(), beta[0, token])

    compare(guard(tree, RECURRENT), table, before, after, output.squeeze(0), step)


def gates_of(tokens: int, heads: Heads, *, per_k: bool) -> dict[str, torch.Tensor]:
    """What the gated kernels make decay and beta from."""
    size = [heads.k_dim] if per_k else []
    return {
        "A_log": random(heads.v, seed=8),
        "a": random(tokens, heads.v, *size, seed=9),
        "b": random(tokens, heads.v, seed=10),
        "dt_bias": random(heads.v, *size, seed=11),
    }


def decay_and_beta(gates: dict[str, torch.Tensor], token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """exp(-exp(A_log) * softplus(a + dt_bias)) and sigmoid(b)."""
    strength = torch.nn.functional.softplus(gates["a"][token] + gates["dt_bias"])
    rate = gates["A_log"].exp().reshape(-1, *[1] * (strength.dim() - 1))
    return (-rate * strength).exp(), gates["b"][token].sigmoid()


def run_sigmoid(tree: Path, table: Table, heads: Heads) -> None:
    """fused_sigmoid_gating_delta_rule_update, with GDN's or KDA's gates."""
    q, k, v = qkv_of(table, heads)
    gates = gates_of(q.shape[1], heads, per_k=heads is KDA)
    before, after = (make_states(heads.v, heads.v_dim, heads.k_dim) for _ in range(2))
    output, _ = fused_sigmoid_gating.fused_sigmoid_gating_delta_rule_update(
        **gates,
        q=q,
        k=k,
        v=v,
        initial_state=after,
        use_qk_l2norm_in_kernel=True,
        is_kda=heads is KDA,
        **indices_of(table),
    )

    def step(state: torch.Tensor, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        return delta_rule(heads, state, q[0, token], k[0, token], v[0, token], *decay_and_beta(gates, token))

    compare(guard(tree, SIGMOID), table, before, after, output.squeeze(0), step)


def run_packed(tree: Path, table: Table) -> None:
    """fused_recurrent_gated_delta_rule_packed_decode: one tensor of q, k and v; zeros for padded rows."""
    q, k, v = qkv_of(table, GDN)
    rows = q.shape[1]
    gates = gates_of(rows, GDN, per_k=False)
    before, after = (make_states(GDN.v, GDN.v_dim, GDN.k_dim) for _ in range(2))
    output = torch.full((rows, 1, GDN.v, GDN.v_dim), float("nan"))
    fused_recurrent.fused_recurrent_gated_delta_rule_packed_decode(
        torch.cat([x.reshape(rows, -1) for x in (q, k, v)], 1),
        **gates,
        scale=GDN.k_dim**-0.5,
        initial_state=after,
        out=output,
        ssm_state_indices=indices_of(table)["ssm_state_indices"],
        use_qk_l2norm_in_kernel=True,
    )

    def step(state: torch.Tensor, token: int) -> tuple[torch.Tensor, torch.Tensor]:
        return delta_rule(GDN, state, q[0, token], k[0, token], v[0, token], *decay_and_beta(gates, token))

    where = guard(tree, RECURRENT, indent=4)
    compare(where, table, before, after, output.squeeze(1), step)
    padded = output[[row for row, (slots, _) in enumerate(table) if slots[0] <= 0]]
    expect(not padded.any(), "padded-output-not-zero", f"{padded.flatten()[:4].tolist()}", where)


def run_lightning(tree: Path, table: Table) -> None:
    """linear_decode_forward_triton: state = exp(-slope) * state + k v^T, output = q state."""
    rows, heads, size = len(table), 2, 32
    q, k, v = (random(rows, heads, 1, size, seed=seed) for seed in (3, 4, 5))
    slope = torch.tensor([0.25, 0.5])
    before, after = (make_states(heads, size, size) for _ in range(2))
    slots = indices_of(table)["ssm_state_indices"]
    output = linear_decode_forward_triton(q, k, v, after, slope, slots, BLOCK_SIZE=16)

    def step(state: torch.Tensor, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        state = torch.exp(-slope)[:, None, None] * state + k[row].transpose(1, 2) * v[row]
        return state, torch.einsum("hk,hkv->hv", q[row, :, 0], state)

    where = line_of(tree / LIGHTNING, "if slot_id == ", tree)
    compare(where, table, before, after, output.view(rows, heads, size), step)


@CASE.check("recurrent: null block as padding")
def recurrent_decode(tree: Path) -> None:
    """Plain decode, one token per row."""
    for table in decode_tables(NULL_BLOCK):
        run_recurrent(tree, table, GDN)


@CASE.check("recurrent: null block in speculative tables")
def recurrent_speculative(tree: Path) -> None:
    """Two tokens per row: load and store slots differ, so each guard shows without the other."""
    for table in speculative_tables(NULL_BLOCK):
        run_recurrent(tree, table, GDN)


@CASE.check("KDA: null block as padding")
def kda_decode(tree: Path) -> None:
    """KDA decodes with the same kernel."""
    for table in decode_tables(NULL_BLOCK):
        run_recurrent(tree, table, KDA)


@CASE.check("packed decode: null block as padding")
def packed_decode(tree: Path) -> None:
    """One guard for load and store, and zeros for the padded rows."""
    for table in decode_tables(NULL_BLOCK):
        run_packed(tree, table)


@CASE.check("sigmoid gating: null block as padding")
def sigmoid_decode(tree: Path) -> None:
    """Plain decode."""
    for table in decode_tables(NULL_BLOCK):
        run_sigmoid(tree, table, GDN)


@CASE.check("sigmoid gating: null block in speculative tables")
def sigmoid_speculative(tree: Path) -> None:
    """Two tokens per row."""
    for table in speculative_tables(NULL_BLOCK):
        run_sigmoid(tree, table, GDN)


@CASE.check("sigmoid gating, KDA: null block as padding")
def sigmoid_kda(tree: Path) -> None:
    """The kernel's KDA branch stands behind the same guards."""
    for table in decode_tables(NULL_BLOCK):
        run_sigmoid(tree, table, KDA)


@CASE.check("GDN kernels: padding of -1")
def gdn_negative(tree: Path) -> None:
    """The padding of 0.18 and 0.19, which every release skips (control)."""
    for table in decode_tables(NEGATIVE):
        run_recurrent(tree, table, GDN)
        run_recurrent(tree, table, KDA)
        run_packed(tree, table)
        run_sigmoid(tree, table, GDN)
    for table in speculative_tables(NEGATIVE):
        run_recurrent(tree, table, GDN)
        run_sigmoid(tree, table, GDN)


@CASE.check("lightning: padding of -1")
def lightning_negative(tree: Path) -> None:
    """Skipped in every release (control)."""
    for table in decode_tables(NEGATIVE):
        run_lightning(tree, table)


@CASE.check("no request gets the null block")
def allocator(tree: Path) -> None:
    """What the guards rest on: the block pool keeps block 0 to itself, whatever it hands out (control)."""
    pool = BlockPool(num_gpu_blocks=8, enable_caching=False, hash_block_size=16)
    given = [block.block_id for block in pool.get_new_blocks(pool.get_num_free_blocks())]
    where = line_of(tree / POOL, "self.null_block = self.free_block_queue.popleft()", tree)
    expect(pool.null_block.block_id == 0, "null-block-not-0", f"{pool.null_block.block_id}", where)
    expect(sorted(given) == list(range(1, 8)), "null-block-given", f"{given}", where)


def padded_slots(real: list[int], rows: int) -> torch.Tensor:
    """The slots that the real metadata builder makes of a batch padded for a CUDA graph."""
    start = torch.arange(rows + 1, dtype=torch.int32).clamp_(max=len(real))
    table = torch.full((rows, 1), utils.NULL_BLOCK_ID, dtype=torch.int32)
    table[: len(real), 0] = torch.tensor(real, dtype=torch.int32)
    spec = MambaSpec(block_size=64, shapes=((2, 32, 32),), dtypes=(torch.float32,))
    config = SimpleNamespace(cache_config=SimpleNamespace(mamba_cache_mode="none"))
    builder = LinearAttentionMetadataBuilder(spec, ["layer"], config, torch.device("cpu"))
    metadata = builder.build(
        0,
        CommonAttentionMetadata(
            query_start_loc=start,
            query_start_loc_cpu=start.clone(),
            seq_lens=torch.diff(start) * 20,
            num_reqs=rows,
            num_actual_tokens=rows,
            max_query_len=1,
            max_seq_len=20,
            block_table_tensor=table,
            slot_mapping=torch.zeros(rows, dtype=torch.int64),
        ),
    )
    return metadata.state_indices_tensor[: metadata.num_decodes]


def lightning_padded_batch(tree: Path) -> None:
    """A batch of three in a graph of five, from the block table on: the padding arrives as slot 0."""
    filled = line_of(tree / RUNNER, "blk_table_tensor[num_reqs:num_reqs_padded].fill_(NULL_BLOCK_ID)", tree)
    expect(":" in filled, "padding-not-null", "the padded rows are not filled with NULL_BLOCK_ID", RUNNER)
    slots = padded_slots([4, 1, 7], rows=5).tolist()
    expect(slots == [4, 1, 7, 0, 0], "other-slots", f"{slots}", filled)
    run_lightning(tree, [([slot], 1) for slot in slots])


def lightning_null_block(tree: Path) -> None:
    """Block tables are padded with the null block from 0.20.0 on."""
    for table in decode_tables(NULL_BLOCK):
        run_lightning(tree, table)
    # Either padding may stand beside the other.
    run_lightning(tree, [([slot], 1) for slot in (NEGATIVE, 3, NULL_BLOCK, 1, NEGATIVE)])


def negative_padding_only(tree: Path) -> None:
    """Up to 0.19.1 the null block is no padding: rows are padded with -1, which the kernels skip."""
    filled = line_of(tree / RUNNER, "blk_table_tensor[num_reqs:num_reqs_padded].fill_(-1)", tree)
    expect(":" in filled, "padding-not-negative", "no fill_(-1) of the padded rows", RUNNER)
    named = hasattr(utils, "NULL_BLOCK_ID")
    expect(not named, "null-block-named", "NULL_BLOCK_ID", "vllm/v1/attention/backends/utils.py")


if PADS_WITH_NULL_BLOCK:
    CASE.check("lightning: null block as padding")(lightning_null_block)
    CASE.check("lightning: a batch padded for a CUDA graph")(lightning_padded_batch)
else:
    CASE.check("lightning: the null block is no padding")(negative_padding_only)
