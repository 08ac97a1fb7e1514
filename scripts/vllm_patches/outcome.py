"""What the verbs return: frozen values that the command line prints as text or as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from vllm_patches.series.model import Disposition, Fix, Release

Say = Callable[[str], None]  # takes one line of progress


class ApplyOutcome(Enum):
    """How an `apply` ended; anything else is a `PatchesError`."""

    APPLIED = "applied"  # commits were made
    ALREADY = "already patched"  # the tree holds the whole series; nothing was changed
    NOTHING = "nothing to do"  # the release needs none of the five
    ASSERTED = "no series"  # `PIN=all` alone: the release's states are shown, nothing is applied


@dataclass(frozen=True)
class FixRow:
    """One line of the table of five: *result* is what became of the fix, *reason* why."""

    fix: str
    name: str
    result: str
    reason: str


@dataclass(frozen=True)
class Applied:
    """The result of `apply` for one release; *head* is empty where no tree was made."""

    release: str
    outcome: ApplyOutcome
    rows: tuple[FixRow, ...]
    tree: str = ""
    head: str = ""
    notes: tuple[str, ...] = ()


def fix_rows(release: Release, fixes: dict[str, Fix], already_in: tuple[str, ...] = ()) -> tuple[FixRow, ...]:
    """All five fixes for *release*; those named in *already_in* were there before `apply` came."""
    rows = []
    for fix_id, fix in fixes.items():
        disposition, state = release.disposition(fix_id), release.states[fix_id]
        result = "already in" if fix_id in already_in else disposition.value
        note = f"; {state.note}" if state.note else ""
        was = "was " if disposition is Disposition.APPLIED else ""
        rows.append(FixRow(fix_id, fix.slug, result, f"{was}{state.state.value} ({state.evidence}){note}"))
    return tuple(rows)
