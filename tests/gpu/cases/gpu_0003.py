"""0003: DeepSeek-V3.2 with MTP survives decode rows that are shorter than its draft length."""

from __future__ import annotations

from typing import Any

import engine
from gpu_case import Context, case

RELEASES = ("0.20.2", "0.21.0")
CRASH = r"context_lens\.is_contiguous\(\)|lengths must be contiguous"
GRAPHS = (2, 4, 8, 16, 32)
MTP = {"method": "mtp", "num_speculative_tokens": 1}
LENGTH = 24


def words(seed: int, length: int) -> list[int]:
    """A prompt of token ids, none of them special."""
    return [2 + (seed * 131 + place * 17) % 1000 for place in range(length)]


ONE_TOKEN = [{"prompts": [words(seed, 1) for seed in range(12)], "length": LENGTH}]
# Chunks of 128 tokens: a prompt of 129 ends with a step of one token in every row at once.
CHUNKED = [{"prompts": [words(seed, 129) for seed in range(8)], "length": LENGTH}]
# The first pass leaves 128 tokens in the cache. Of these MTP takes 64 (it drops the last block), then a chunk of 64
# follows, and one token is left.
PREFIX = [
    {"prompts": [words(seed, 128) for seed in range(8)], "length": 1},
    {"prompts": [[*words(seed, 128), 5 + seed] for seed in range(8)], "length": LENGTH},
]
# The builder counts the leading rows of one length as decodes: here the three prompts of one token.
MIXED = [{"prompts": [words(seed, size) for seed, size in enumerate((1, 1, 1, 40, 7, 130, 1, 20))], "length": LENGTH}]
LONG = [{"prompts": [words(seed, 20 + seed) for seed in range(8)], "length": LENGTH}]


def speculate(context: Context, work: list[dict[str, Any]], graphs: bool, **more: Any) -> dict[str, Any]:
    """Answer with MTP, then without it in another process, and compare."""
    chosen = engine.options(context, "deepseek", graphs=GRAPHS if graphs else (), **more)
    found = engine.phases(engine.start(chosen | {"speculative_config": MTP}), work)
    wanted = engine.reference(context, chosen, work)
    compared = [engine.compare(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)]
    return {"against_no_speculation": compared, "tokens": [[row["tokens"] for row in phase] for phase in found]}


def register(name: str, work: list[dict[str, Any]], about: str, **more: Any) -> None:
    """The case, eager and in full CUDA graphs."""
    for graphs in (False, True):
        mode = "graphs" if graphs else "eager"

        def run(context: Context, graphs: bool = graphs) -> dict[str, Any]:
            return speculate(context, work, graphs, **more)

        text = f"Engine, tiny DeepSeek-V3.2 + MTP 1, {mode}: {about}"
        case(f"0003-{name}-{mode}", "0003", RELEASES, stock=CRASH, about=text)(run)


register("one-token", ONE_TOKEN, "12 prompts of one token")
register("mixed", MIXED, "prompts of 1 to 130 tokens together")
register("prefix-hit", PREFIX, "prefix hits whose last chunk is one token", enable_prefix_caching=True,
         long_prefill_token_threshold=64)  # fmt: skip
register("chunk-rest", CHUNKED, "chunked prompts whose last chunk is one token", long_prefill_token_threshold=128)


@case("0003-long-prompts-graphs", "0003", RELEASES, equal=("tokens",))
def long_prompts(context: Context) -> dict[str, Any]:
    """Engine, tiny DeepSeek-V3.2 + MTP 1, graphs: longer prompts, which stock survives: a control."""
    return speculate(context, LONG, graphs=True)
