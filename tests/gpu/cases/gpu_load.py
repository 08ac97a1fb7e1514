"""Load: thousands of requests at concurrency 200, no failure on the patched server, and its tokens per second."""

from __future__ import annotations

import random
import statistics
from typing import Any

import engine
from gpu_case import Context, Defect, case, expect
from serving import Server, body, load

RELEASES = ("0.20.2",)
REQUESTS, CONTROL, CONCURRENCY, LENGTH = 10_000, 4_000, 200, 16
GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 400, 512)
MTP = {"method": "mtp", "num_speculative_tokens": 1}
SEATS = {"max_num_seqs": 200, "max_num_batched_tokens": 8192, "max_model_len": 512}
PROBES = [[2 + (seed * 131 + place * 17) % 1000 for place in range(9 + seed)] for seed in range(8)]


def prompts(count: int, shortest: int) -> list[list[int]]:
    """Seeded prompts of *shortest* to 64 tokens; where one token is allowed, every fifth has one."""
    draw = random.Random(count)
    sizes = [1 if shortest == 1 and number % 5 == 0 else draw.randint(max(shortest, 2), 64) for number in range(count)]
    return [[draw.randrange(2, engine.VOCABULARY) for _ in range(size)] for size in sizes]


def served(context: Context, model: str, v2: bool, **more: Any) -> Server:
    """A server with full decode graphs."""
    options = engine.options(context, model, graphs=GRAPHS, kv_gib=8, **SEATS | more)
    return Server(context, options, {"VLLM_USE_V2_MODEL_RUNNER": "1" if v2 else "0"})


def failing(figures: dict[str, Any], server: Server) -> None:
    """Raise `Defect` if a request failed."""
    if figures["failures"]:
        error = Defect(f"{figures['failures']} requests failed: {figures['errors']}; server: {server.complaint()}")
        error.measures = figures  # type: ignore[attr-defined]
        raise error


def burst(server: Server) -> int:
    """Requests of eight one-token prompts each, one after the other on an idle server; raises `Defect` at a failure.

    In the load that follows there is nearly always a row with a draft, and then stock's slice is contiguous.
    """
    asked = 20
    for number in range(asked):
        one_token = [[2 + number * 8 + row] for row in range(8)]
        try:
            server.post("/v1/completions", body(one_token, LENGTH))
        except OSError as error:
            raise Defect(f"request {number} of {asked}: {error}; server: {server.complaint()}") from error
    return asked


@case("load-mtp", "0003", RELEASES, stock=r"request \d+ of 20: .*is_contiguous", alone=True, limit=300.0)
def mtp(context: Context) -> dict[str, Any]:
    """Tiny DeepSeek-V3.2 + MTP 1: prompts of one token on an idle server, then 10,000 requests at concurrency 200."""
    with served(context, "deepseek", v2=False, speculative_config=MTP) as server:
        burst(server)
        figures = load(server, prompts(REQUESTS, 1), LENGTH, CONCURRENCY).figures()
        failing(figures, server)
    return figures


def rounds(server: Server, shortest: int) -> dict[str, Any]:
    """Five rounds of 4,000 requests after one that is not counted: the median is the figure, the rest its spread."""
    seen = [load(server, prompts(CONTROL, shortest), LENGTH, CONCURRENCY).figures() for _ in range(6)]
    for figures in seen:
        failing(figures, server)
    rates = [figures["tokens_per_second"] for figures in seen[1:]]
    return {"requests": CONTROL * 5, "failures": 0, "tokens_per_second": statistics.median(rates), "rounds": rates}


@case("load-mtp-control", "0003", RELEASES, alone=True, limit=300.0)
def mtp_control(context: Context) -> dict[str, Any]:
    """The same with longer prompts, which stock survives: tokens per second of both."""
    with served(context, "deepseek", v2=False, speculative_config=MTP) as server:
        return rounds(server, shortest=16)


def half(server: Server) -> dict[str, Any]:
    """Half of the requests; raises `Defect` if one failed."""
    figures = load(server, prompts(REQUESTS // 2, 1), LENGTH, CONCURRENCY).figures()
    failing(figures, server)
    return figures


def half_and_sleep(server: Server) -> tuple[dict[str, Any], int]:
    """Half of the requests, a sleep and a wake-up; how many probes are answered after it as before all that."""
    wanted = [server.complete(prompt, LENGTH) for prompt in PROBES]
    figures = half(server)
    server.post("/sleep?level=1")
    server.post("/wake_up")
    found = [server.complete(prompt, LENGTH) for prompt in PROBES]
    return figures, sum(a == b for a, b in zip(found, wanted, strict=True))


@case("load-mrv2-sleep", "0005", RELEASES, stock=r"requests failed|no answer|answered 500", alone=True, limit=300.0)
def mrv2_sleep(context: Context) -> dict[str, Any]:
    """MRv2, tiny dense model: 10,000 requests at concurrency 200 with a sleep and a wake-up in the middle."""
    with served(context, "dense", v2=True, enable_sleep_mode=True) as server:
        first, equal = half_and_sleep(server)
        expect(equal == len(PROBES), "the probes' answers differ after the sleep")
        second = half(server)
    return {"before": first, "after": second, "probes_equal": equal}


@case("load-mtp-sleep", "0003", RELEASES, stock=r"request \d+ of 20: .*is_contiguous", alone=True, limit=300.0)
def mtp_sleep(context: Context) -> dict[str, Any]:
    """The same server with a sleep and a wake-up in the middle, which zeroes the sparse indexer's constants.

    Whether the answers survive that is recorded, not judged: the constants are not this series' to restore.
    """
    with served(context, "deepseek", v2=False, speculative_config=MTP, enable_sleep_mode=True) as server:
        burst(server)
        first, equal = half_and_sleep(server)
        burst(server)
        second = half(server)
    return {"before": first, "after": second, "probes": len(PROBES), "probes_equal": equal}


@case("load-mrv2-control", "0005", RELEASES, alone=True, limit=300.0)
def mrv2_control(context: Context) -> dict[str, Any]:
    """The same server without a sleep: tokens per second of stock and patched."""
    with served(context, "dense", v2=True) as server:
        return rounds(server, shortest=1)
