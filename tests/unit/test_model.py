"""The values that everything else hands around."""

from __future__ import annotations

import datetime

import pytest
from test_patchfile import NEW, OLD, SOUND, TAIL
from vllm_patches.errors import PatchesError
from vllm_patches.outcome import fix_rows
from vllm_patches.series.model import FIX_IDS, Disposition, Fix, FixState, Hunk, Release, Series, State
from vllm_patches.series.patchfile import parse_patch

PATCH = parse_patch("0001-x.patch", SOUND)
SECOND = parse_patch(
    "0002-y.patch",
    SOUND.replace(OLD.encode(), b"x").replace(NEW.encode(), TAIL.encode()).replace(b"x..", NEW.encode() + b".."),
)


def release(states: dict[str, FixState], series: str = "") -> Release:
    return Release("1.2.3", datetime.date(2026, 1, 2), "s", "h", 1, states, series)


def test_a_hunk_undone_twice_is_itself() -> None:
    hunk = Hunk(3, 2, 4, 3, (b" a\n", b"-b\n", b"+c\n", b"+d\n"))
    assert hunk.reversed().reversed() == hunk
    assert (hunk.reversed().old, hunk.reversed().new) == (hunk.new, hunk.old)


def test_a_series_knows_its_files_and_their_blobs() -> None:
    series = Series("v1.2.3", (PATCH,))
    assert series.paths == ("vllm/a.py", "tools/run.sh")
    assert series.blob_chain("vllm/a.py") == [OLD, NEW]
    assert series.blob_chain("tools/run.sh") == [NEW, TAIL]
    assert series.blob_chain("nothing") == []


def test_a_chain_has_a_blob_for_each_patch_that_touches_the_file() -> None:
    assert Series("v1.2.3", (PATCH, SECOND)).blob_chain("vllm/a.py") == [OLD, NEW, TAIL]


def test_a_trailer_that_is_not_there_is_empty() -> None:
    assert (PATCH.trailer("Origin"), PATCH.trailer("Bug")) == ("here", "")


# what the release's code does, has it a series, what its user gets
DISPOSITIONS = [
    (State.LIVE, "v1", Disposition.APPLIED),
    (State.LATENT, "v1", Disposition.APPLIED),
    (State.LIVE, "", Disposition.NO_SERIES),
    (State.LATENT, "", Disposition.NO_SERIES),
    (State.FIXED, "v1", Disposition.FIXED),
    (State.ABSENT, "", Disposition.ABSENT),
    (State.BROKEN, "v1", Disposition.BROKEN),
]


@pytest.mark.parametrize(("state", "series", "expected"), DISPOSITIONS)
def test_disposition(state: State, series: str, expected: Disposition) -> None:
    assert release({"0001": FixState(state, "f:1")}, series).disposition("0001") is expected


def _fix(number: str) -> Fix:
    return Fix(number, "slug", f"title {number}", "", "", (), "", "", "", "", ())


def test_the_table_of_five_says_what_and_why() -> None:
    states = dict.fromkeys(FIX_IDS, FixState(State.FIXED, "f:1"))
    states |= {"0001": FixState(State.LIVE, "g:2", "on Hopper"), "0002": FixState(State.LATENT, "h:3")}
    rows = fix_rows(release(states, "v1"), {i: _fix(i) for i in FIX_IDS}, already_in=("0002",))
    assert [row.fix for row in rows] == list(FIX_IDS)
    assert [row.result for row in rows] == [
        "applied",
        "already in",
        "fixed upstream",
        "fixed upstream",
        "fixed upstream",
    ]
    assert [row.reason for row in rows[:3]] == ["was live (g:2); on Hopper", "was latent (h:3)", "fixed (f:1)"]
    assert rows[0].name == "slug"


def test_a_fix_knows_its_patch_file() -> None:
    assert _fix("0004").patch_name == "0004-slug.patch"


FULL = PatchesError(
    "it failed",
    release="1.2.3",
    patch="0001-x.patch",
    file="a.py",
    hunk=2,
    expected="one\ntwo",
    found="three",
    next_command="make it",
)


def test_an_error_shows_every_field_in_order() -> None:
    assert str(FULL).split("\n") == [
        "it failed",
        "  release:  1.2.3",
        "  patch:    0001-x.patch",
        "  file:     a.py",
        "  hunk:     2",
        "  expected: one",
        "            two",
        "  found:    three",
        "  next:     make it",
    ]


def test_an_error_leaves_out_what_is_not_known() -> None:
    assert str(PatchesError("it failed", found="x\n")) == "it failed\n  found:    x"
    assert PatchesError("it failed", found="x").as_dict() == {"what": "it failed", "found": "x"}
    assert FULL.as_dict()["hunk"] == 2
