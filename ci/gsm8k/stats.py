"""The statistics of a paired comparison: two systems, the same questions, right or wrong.

The interval of one accuracy is Wilson's, the test exact McNemar (both from scipy). The interval of the difference is
Tango's score interval for paired proportions (Statistics in Medicine 17, 1998), which is honest where no question
differs: then it is +-z^2 / (n + z^2), not zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from math import sqrt

from scipy.optimize import brentq
from scipy.stats import binomtest, norm

CONFIDENCE = 0.95


class Verdict(Enum):
    """What a comparison shows."""

    SAME = "same"  # the whole interval of the difference lies within the margin
    BETTER = "better"  # the whole interval lies above 0, and not within the margin
    WORSE = "worse"  # the whole interval lies below 0, and not within the margin
    UNDECIDED = "undecided"  # too few questions for this margin
    STOCK_CRASHED = "stock crashed"  # and patched finished: there is nothing to pair
    PATCHED_CRASHED = "patched crashed"
    BOTH_CRASHED = "both crashed"

    @property
    def fine(self) -> bool:
        """True where the patched side has shown itself no worse."""
        return self in (Verdict.SAME, Verdict.BETTER, Verdict.STOCK_CRASHED)


@dataclass(frozen=True)
class Share:
    """*right* of *count*, with its interval; all shares are between 0 and 1."""

    right: int
    count: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself."""
        return self.right / self.count


@dataclass(frozen=True)
class Comparison:
    """Both sides on the questions that both answered; *difference* is patched minus stock."""

    stock: Share
    patched: Share
    only_stock: int  # right on stock alone
    only_patched: int
    difference: float
    low: float
    high: float
    p_value: float  # exact McNemar, two-sided
    margin: float
    verdict: Verdict


def share(right: int, count: int) -> Share:
    """An accuracy with its Wilson interval."""
    if not 0 <= right <= count or not count:
        raise ValueError(f"{right} of {count} is no share")
    interval = binomtest(right, count).proportion_ci(CONFIDENCE, method="wilson")
    return Share(right, count, float(interval.low), float(interval.high))


def mcnemar(only_stock: int, only_patched: int) -> float:
    """Exact two-sided p-value of the discordant pairs; 1 where there are none."""
    discordant = only_stock + only_patched
    return float(binomtest(only_patched, discordant, 0.5).pvalue) if discordant else 1.0


def tango(gained: int, lost: int, count: int) -> tuple[float, float]:
    """Score interval of (gained - lost) / count, for *count* pairs of which *gained* and *lost* differ."""
    z = float(norm.ppf(0.5 + CONFIDENCE / 2))
    centre = (gained - lost) / count

    def low_end(delta: float) -> float:
        return _score(gained, lost, count, delta) - z

    def high_end(delta: float) -> float:
        return _score(gained, lost, count, delta) + z

    edge = 1 - 1e-12
    low = brentq(low_end, -edge, centre, xtol=1e-12) if low_end(-edge) > 0 and centre > -edge else -1.0
    high = brentq(high_end, centre, edge, xtol=1e-12) if high_end(edge) < 0 and centre < edge else 1.0
    return float(low), float(high)


def _score(gained: int, lost: int, count: int, delta: float) -> float:
    """Tango's statistic at *delta*: standard normal where *delta* is the true difference."""
    gap = gained - lost - count * delta
    if gap == 0:
        return 0.0
    # The likelihood's own estimate of the share of pairs that are lost, given the difference delta.
    linear = -gained - lost + (2 * count - gained + lost) * delta
    constant = -lost * delta * (1 - delta)
    lost_share = (sqrt(max(0.0, linear**2 - 8 * count * constant)) - linear) / (4 * count)
    variance = count * (2 * lost_share + delta * (1 - delta))
    return gap / sqrt(variance) if variance > 0 else float("inf") * gap


def compare(pairs: Iterable[tuple[bool, bool]], margin: float) -> Comparison:
    """Compare (right on stock, right on patched) of every question."""
    answered = list(pairs)
    if not answered:
        raise ValueError("no question was answered by both sides")
    count = len(answered)
    lost = sum(stock and not patched for stock, patched in answered)
    gained = sum(patched and not stock for stock, patched in answered)
    low, high = tango(gained, lost, count)
    return Comparison(
        share(sum(stock for stock, _ in answered), count),
        share(sum(patched for _, patched in answered), count),
        lost,
        gained,
        (gained - lost) / count,
        low,
        high,
        mcnemar(lost, gained),
        margin,
        judge(low, high, margin),
    )


def judge(low: float, high: float, margin: float) -> Verdict:
    """The verdict of an interval of the difference against *margin*."""
    if -margin < low and high < margin:
        return Verdict.SAME
    if low > 0:
        return Verdict.BETTER
    return Verdict.WORSE if high < 0 else Verdict.UNDECIDED


def enough(margin: float) -> int:
    """The fewest questions that can show "same" within *margin*: where no answer differs."""
    z_squared = float(norm.ppf(0.5 + CONFIDENCE / 2)) ** 2
    return int(z_squared * (1 - margin) / margin) + 1
