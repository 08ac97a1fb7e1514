"""What every probe answers with."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# Text of a path inside the vLLM source tree, None if the tree has no such file.
ReadFile = Callable[[str], str | None]


class Finding(enum.Enum):
    """What one place of the code says about one part of a fix."""

    PRESENT = "present"  # the guard or fix stands in the code, in our spelling or in upstream's
    ELSEWISE = "elsewise"  # the defect is gone by another way than ours; the note says how
    MISSING = "missing"  # the defective code stands there
    BROKEN = "broken"  # dead for another reason, which this fix cannot mend; the note says why
    GONE = "gone"  # the code that the defect needs is not in this tree

    @property
    def fixed(self) -> bool:
        """True where the code is sound, in our way or another."""
        return self in (Finding.PRESENT, Finding.ELSEWISE)


@dataclass(frozen=True)
class Site:
    """The finding for one part, and the line that decides it (0 where the code is gone)."""

    fix: str
    part: str
    finding: Finding
    path: str
    line: int
    note: str


class ProbeError(Exception):
    """The code has a form that the probe does not know: a person has to look, the probe does not guess."""

    def __init__(self, path: str, wanted: str) -> None:
        super().__init__(f"{path}: cannot tell: {wanted}")
        self.path = path
        self.wanted = wanted


STATES = ("live", "latent", "broken", "fixed", "absent")


def agrees(state: str, sites: Iterable[Site]) -> str | None:
    """None if a fix's recorded *state* is consistent with its *sites*, else the contradiction in words.

    A probe sees code and not callers, so it cannot tell live from latent; everything else it can. The
    recorded state is that of the worst part: a part that is merely not there does not spoil ``fixed``, and
    ``broken`` stands only where no part is plainly missing.
    """
    if state not in STATES:
        raise ValueError(f"unknown state {state!r}; known are {', '.join(STATES)}")
    found = list(sites)
    if len({site.fix for site in found}) != 1:
        raise ValueError("agrees() takes the sites of exactly one fix")
    expected = _states_allowed({site.finding for site in found})
    if state in expected:
        return None
    shown = ", ".join(f"{site.part} {site.finding.value} ({site.path}:{site.line})" for site in found)
    return f"fix {found[0].fix} is recorded as {state}, but the code says {' or '.join(expected)}: {shown}"


def _states_allowed(findings: set[Finding]) -> tuple[str, ...]:
    if Finding.MISSING in findings:
        return ("live", "latent")
    if Finding.BROKEN in findings:
        return ("broken",)
    if any(finding.fixed for finding in findings):
        return ("fixed",)
    return ("absent",)
