"""Any series of small edits and any choice of it: what is accepted is what the chosen edits alone would have made.

The oracle knows nothing of hunks: all lines are different, and every edit names the line that it is about.
"""

from __future__ import annotations

import datetime
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from vllm_patches.dist.bundle import Bundle
from vllm_patches.dist.combined import diff
from vllm_patches.dist.compose import Wish, compose
from vllm_patches.errors import PatchesError
from vllm_patches.series.model import Release, Series
from vllm_patches.series.patchfile import FROM_LINE, parse_patch

PATH = "vllm/engine.py"
RELEASE = Release("0.20.2", datetime.date(2026, 5, 10), "vllm-0.20.2.tar.gz", "0" * 64, 1, {}, "v0.20.2", revision=1)


class Edit(NamedTuple):
    """Delete *line*, replace it by *new*, or put *new* behind it."""

    line: str
    new: str
    kind: str

    def on(self, lines: list[str]) -> list[str] | None:
        """The lines after it; None where its line is not there."""
        if self.line not in lines:
            return None
        at = lines.index(self.line)
        after = {"delete": [], "replace": [self.new], "insert": [self.line, self.new]}[self.kind]
        return [*lines[:at], *after, *lines[at + 1 :]]


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[str], list[list[Edit]]]:
    """A file, and for each of several patches its edits; each is about a line that is there by then."""
    first = [f"line {n}" for n in range(draw(st.integers(1, 30)))]
    lines, patches = first, []
    for number in range(draw(st.integers(2, 4))):
        edits: list[Edit] = []
        before = lines
        for step in range(draw(st.integers(1, 2))):
            kinds = ["delete", "replace", "insert"] if len(lines) > 1 else ["replace", "insert"]
            edit = Edit(draw(st.sampled_from(lines)), f"patch {number} step {step}", draw(st.sampled_from(kinds)))
            lines = edit.on(lines) or []
            edits.append(edit)
        assume(lines != before)  # git makes no patch of nothing
        patches.append(edits)
    return first, patches


def data(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def series_of(first: list[str], patches: list[list[Edit]]) -> Series:
    made, lines = [], first
    for number, edits in enumerate(patches, 1):
        before = lines
        for edit in edits:
            lines = edit.on(lines) or []
        section = diff(Bundle(RELEASE, "", (), {PATH: data(before)}, {PATH: data(lines)}, {PATH: "100644"}), [PATH])
        head = f"{FROM_LINE}\nFrom: a <a@a.invalid>\nDate: Sat, 21 Nov 2026 00:00:00 +0000\nSubject: [PATCH] x\n\nx\n\n"
        made.append(parse_patch(f"{number:04}-x.patch", head.encode() + section))
    return Series("v0.20.2", tuple(made))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(histories(), st.data())
def test_a_choice_is_right_or_refused(history: tuple[list[str], list[list[Edit]]], draw: st.DataObject) -> None:
    first, patches = history
    series = series_of(first, patches)
    numbers = draw.draw(st.sets(st.sampled_from(range(len(patches))), min_size=1))
    chosen = tuple(f"{n + 1:04}" for n in sorted(numbers))
    lines: list[str] | None = first
    for edit in (edit for n in sorted(numbers) for edit in patches[n]):
        lines = edit.on(lines) if lines is not None else None
    try:
        bundle = compose(RELEASE, series, Wish(chosen), lambda paths: {PATH: data(first)})
    except PatchesError as error:
        event("refused")
        assert "cannot be had without" in error.what and len(chosen) < len(patches)
        return
    event("accepted")
    assert lines is not None
    assert bundle.after[PATH] == data(lines)


@pytest.mark.parametrize(("gone", "changed"), [("line 9", "line 7"), ("line 0", "line 2")], ids=["end", "start"])
def test_a_hunk_at_an_edge_stays_at_an_edge(gone: str, changed: str) -> None:
    """With less context on one side, patch takes a hunk at that edge of the file only: without 0001 it is not there."""
    first = [f"line {n}" for n in range(10)]
    series = series_of(first, [[Edit(gone, "", "delete")], [Edit(changed, "new", "replace")]])
    with pytest.raises(PatchesError, match="0002 cannot be had without 0001") as caught:
        compose(RELEASE, series, Wish(("0002",)), lambda paths: {PATH: data(first)})
    assert "0001-x.patch" in caught.value.found and gone in caught.value.found
