"""What a proof run answers for one fix on one release, and the rule by which that is a proof.

Only the pair counts: stock fails on the assertions that are named for this release, and on nothing else; patched passes
every check. Where upstream has the fix, or the code is not there, stock passes every check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Side:
    """What one tree answered. *outcomes* is check to "pass", "error: …" or "fail: <assertion id>"."""

    release: str
    side: str  # "stock" or "patched"
    outcomes: dict[str, str]
    where: dict[str, str]  # check to file:line of the defect it met
    stock_fails: dict[str, str]  # check to the assertion id that is wanted of this release's stock tree
    trouble: str  # why the run as a whole cannot be judged; empty if it can
    seconds: float


@dataclass(frozen=True)
class Proof:
    """Both sides of one fix on one release; *patched* is None where the series does not carry the fix."""

    fix: str
    release: str
    state: str
    stock: Side
    patched: Side | None

    @property
    def complaints(self) -> list[str]:
        """Everything that keeps this from being a proof; empty for a proof."""
        expected = self.stock.stock_fails
        found = [f"stock: {text}" for text in _judge(self.stock, expected)]
        if self.patched is not None:
            found += [f"patched: {text}" for text in _judge(self.patched, {})]
            if not expected:
                found.append("the series carries a patch, but no check fails on the stock tree")
        elif expected:
            found.append("stock must fail, but the series carries no patch")
        return found


def _judge(side: Side, expected: Mapping[str, str]) -> list[str]:
    if side.trouble:
        return [side.trouble]
    if not side.outcomes:
        return ["no check was run"]
    wrong = [f"{check} is expected to fail but was not run" for check in expected if check not in side.outcomes]
    for check, outcome in side.outcomes.items():
        wanted = f"fail: {expected[check]}" if check in expected else "pass"
        if outcome != wanted:
            wrong.append(f"{check}: expected {wanted!r}, got {outcome!r}")
        elif check in expected and ":" not in side.where.get(check, ""):
            wrong.append(f"{check}: failed as expected, but named no file:line")
    return wrong
