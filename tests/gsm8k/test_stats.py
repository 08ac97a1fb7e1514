"""The statistics against published values, closed forms and the definitions."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
from gsm8k import stats
from gsm8k.stats import Verdict

Z = 1.959963984540054


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), two-sided 95 % intervals for one proportion, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(right: int, count: int, low: float, high: float) -> None:
    found = stats.share(right, count)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@pytest.mark.parametrize(("right", "count"), [(1, 0), (5, 4), (-1, 4)])
def test_a_share_of_nothing_is_refused(right: int, count: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        stats.share(right, count)


@pytest.mark.parametrize(("lost", "gained"), [(0, 5), (2, 9), (7, 3), (12, 12), (0, 1)])
def test_mcnemar_is_the_two_sided_binomial_sum(lost: int, gained: int) -> None:
    count, least = lost + gained, min(lost, gained)
    tail = sum(Fraction(math.comb(count, k), 2**count) for k in range(least + 1))
    assert stats.mcnemar(lost, gained) == pytest.approx(float(min(Fraction(1), 2 * tail)))


def test_mcnemar_without_discordant_pairs_is_one() -> None:
    assert stats.mcnemar(0, 0) == 1.0


@pytest.mark.parametrize("count", [10, 189, 1319])
def test_tango_without_discordant_pairs_has_its_closed_form(count: int) -> None:
    low, high = stats.tango(0, 0, count)
    assert high == pytest.approx(Z**2 / (count + Z**2), abs=1e-9)
    assert low == pytest.approx(-high)


@pytest.mark.parametrize(("gained", "lost", "count"), [(3, 10, 100), (0, 1, 44), (25, 5, 200), (1, 1, 12)])
def test_tangos_ends_are_where_the_restricted_score_is_z(gained: int, lost: int, count: int) -> None:
    """At an end, the score with the likelihood's own nuisance estimate (found here by search) is z."""
    for end in stats.tango(gained, lost, count):
        best = max(
            (k / 200_000 for k in range(1, 200_000)),
            key=lambda p: _log_likelihood(p, end, gained, lost, count),
        )
        variance = count * (2 * best + end * (1 - end))
        assert abs(gained - lost - count * end) / math.sqrt(variance) == pytest.approx(Z, rel=2e-3)


def _log_likelihood(lost_share: float, delta: float, gained: int, lost: int, count: int) -> float:
    shares = (lost_share + delta, lost_share, 1 - 2 * lost_share - delta)
    counts = (gained, lost, count - gained - lost)
    if any(share <= 0 for share in shares):
        return -math.inf
    return sum(n * math.log(share) for n, share in zip(counts, shares, strict=True))


def test_tango_mirrors_when_the_sides_are_swapped() -> None:
    low, high = stats.tango(4, 11, 90)
    assert stats.tango(11, 4, 90) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("gained", "lost"), [(10, 0), (0, 10)])
def test_tango_stays_within_bounds_where_every_pair_differs(gained: int, lost: int) -> None:
    low, high = stats.tango(gained, lost, 10)
    assert -1 <= low < high <= 1
    assert (high == 1) if gained else (low == -1)


def test_tango_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, covered, trials = random.Random(5), 0, 400
    for _ in range(trials):
        draws = rng.choices((1, -1, 0), (0.10, 0.05, 0.85), k=150)
        low, high = stats.tango(draws.count(1), draws.count(-1), 150)
        covered += low <= 0.05 <= high
    assert 0.92 <= covered / trials <= 0.98


def _pairs(both: int, lost: int, gained: int, neither: int) -> list[tuple[bool, bool]]:
    return [(True, True)] * both + [(True, False)] * lost + [(False, True)] * gained + [(False, False)] * neither


@pytest.mark.parametrize(
    ("pairs", "margin", "verdict"),
    [
        (_pairs(900, 0, 0, 100), 0.02, Verdict.SAME),
        (_pairs(900, 5, 5, 90), 0.02, Verdict.SAME),
        (_pairs(60, 0, 0, 40), 0.02, Verdict.UNDECIDED),  # identical answers, but too few of them
        (_pairs(600, 200, 10, 190), 0.02, Verdict.WORSE),
        (_pairs(600, 10, 200, 190), 0.02, Verdict.BETTER),
        (_pairs(500, 30, 25, 445), 0.01, Verdict.UNDECIDED),
        (_pairs(9900, 30, 5, 65), 0.02, Verdict.SAME),  # a certain loss, but within what the margin allows
    ],
)
def test_the_verdict_is_the_intervals(pairs: list[tuple[bool, bool]], margin: float, verdict: Verdict) -> None:
    found = stats.compare(pairs, margin)
    assert found.verdict is verdict
    assert found.low <= found.difference <= found.high
    assert found.difference == pytest.approx(found.patched.value - found.stock.value)


def test_no_questions_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="no question"):
        stats.compare([], 0.02)


@pytest.mark.parametrize("margin", [0.02, 0.05, 0.15])
def test_enough_is_the_least_number_that_can_show_the_same(margin: float) -> None:
    least = stats.enough(margin)
    assert stats.compare(_pairs(least, 0, 0, 0), margin).verdict is Verdict.SAME
    assert stats.compare(_pairs(least - 1, 0, 0, 0), margin).verdict is Verdict.UNDECIDED


def test_only_same_better_and_a_crash_of_stock_are_fine() -> None:
    assert {verdict for verdict in Verdict if verdict.fine} == {Verdict.SAME, Verdict.BETTER, Verdict.STOCK_CRASHED}
