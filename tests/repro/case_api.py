"""What a repro case is written with; imported in the child process only.

A case is a module in ``cases/`` that registers named checks. A check returns when the tree is sound and
raises `Defect` when it meets the defect it looks for. Anything else it raises is an *error*: never a pass,
and never the expected failure of a stock tree either.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


class Defect(AssertionError):
    """The repro's own assertion: *assertion* is its stable id, *where* the line of the defect (file:line)."""

    def __init__(self, assertion: str, detail: str, where: str) -> None:
        super().__init__(f"{assertion}: {detail} ({where})")
        self.assertion = assertion
        self.detail = detail
        self.where = where


EXPECTED = Path(__file__).resolve().with_name("expected.toml")


@dataclass
class Case:
    """The checks of one fix, and what the stock tree of each release must answer."""

    fix: str
    checks: dict[str, Callable[[Path], None]] = field(default_factory=dict)

    @property
    def stock_fails(self) -> dict[str, dict[str, str]]:
        """release -> check -> id of the assertion that the stock tree must reach, out of ``expected.toml``.

        Checks that are not listed for a release are controls: they pass on stock too.
        """
        rows = tomllib.loads(EXPECTED.read_text(encoding="utf-8"))["expected"]
        return {release: row["stock_fails"] for row in rows if row["fix"] == self.fix for release in row["releases"]}

    def check(self, name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
        """Register a check; it is called with the root of the vLLM source tree under test."""

        def register(function: Callable[[Path], None]) -> Callable[[Path], None]:
            if name in self.checks:
                raise ValueError(f"check {name!r} is registered twice in case {self.fix}")
            self.checks[name] = function
            return function

        return register


def expect(condition: bool, assertion: str, detail: str, where: str) -> None:
    """Raise `Defect` unless *condition* holds."""
    if not condition:
        raise Defect(assertion, detail, where)


def line_of(path: Path, text: str, tree: Path) -> str:
    """``file:line`` of the first line of *path* that holds *text*, for `Defect`; the file alone if none does."""
    name = path.relative_to(tree).as_posix()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if text in line:
            return f"{name}:{number}"
    return name
