"""What a person reads, and the same as JSON."""

from __future__ import annotations

import datetime
import io

import pytest
from vllm_patches.errors import PatchesError
from vllm_patches.outcome import Applied, ApplyOutcome, FixRow
from vllm_patches.render import DownloadBar, applied_text, check_text, jsonable, say, table
from vllm_patches.series.headers import Problem
from vllm_patches.series.model import State
from vllm_patches.upkeep.check import CheckReport, PinReport

ROWS = (FixRow("0001", "one", "applied", "was live (a.py:1)"), FixRow("0002", "two", "fixed upstream", "fixed"))


def test_columns_are_aligned_and_no_line_ends_in_blanks() -> None:
    assert table([("a", "long", "x"), ("longer", "b", "")]) == "a       long  x\nlonger  b"


def test_an_applied_series() -> None:
    text = applied_text(Applied("1.2.3", ApplyOutcome.APPLIED, ROWS, "build/x", "abc", ("a note",)))
    assert text.split("\n") == [
        "vLLM 1.2.3: applied",
        "fix   name  result          why",
        "0001  one   applied         was live (a.py:1)",
        "0002  two   fixed upstream  fixed",
        "tree: build/x",
        "HEAD: abc",
        "a note",
    ]


def test_an_applied_series_that_was_there_before_says_that_nothing_changed() -> None:
    text = applied_text(Applied("1.2.3", ApplyOutcome.ALREADY, ROWS, "build/x", "abc"))
    assert text.split("\n")[0] == "vLLM 1.2.3: already patched"
    assert text.split("\n")[-1] == "nothing was changed"


def test_nothing_to_do_names_no_tree() -> None:
    text = applied_text(Applied("1.2.3", ApplyOutcome.NOTHING, ROWS))
    assert text.startswith("vLLM 1.2.3: nothing to do\n")
    assert "tree:" not in text
    assert "nothing was changed" not in text


SOUND = PinReport("1.2.3", "v1.2.3", 2, 5, 3, None)
DRIFTED = PinReport("1.2.4", "v1.2.3", 2, 5, 3, PatchesError("it drifted", release="1.2.4", expected="x", found="y"))


def test_a_sound_check() -> None:
    assert check_text(CheckReport((SOUND,), ())).split("\n") == [
        "pin    series  patches  files  hunks  fuzz 0, offset 0",
        "1.2.3  v1.2.3  2        3      5      in and out again",
        "",
        "all patches apply",
    ]


def test_a_check_with_drift_shows_every_error_in_full() -> None:
    text = check_text(CheckReport((SOUND, DRIFTED), (Problem("rule", "f", "this", "that"),)))
    assert "1.2.4  v1.2.3  2        3      5      DRIFT" in text
    assert f"error: {DRIFTED.error}" in text
    assert "problem: f: rule\n  expected: this\n  found:    that" in text
    assert text.endswith("1 patch error(s) and 1 problem(s) found")


def test_problems_alone_are_no_sound_check() -> None:
    assert check_text(CheckReport((SOUND,), (Problem("r", "f", "x", "y"),))).endswith(
        "0 patch error(s) and 1 problem(s) found"
    )


def test_values_as_json_takes_them() -> None:
    assert jsonable(DRIFTED) == {
        "release": "1.2.4",
        "series": "v1.2.3",
        "patches": 2,
        "hunks": 5,
        "files": 3,
        "error": {"what": "it drifted", "release": "1.2.4", "expected": "x", "found": "y"},
    }
    assert jsonable([State.LIVE, ApplyOutcome.NOTHING]) == ["live", "nothing to do"]
    assert jsonable({State.LIVE: (datetime.date(2026, 1, 2), [None, True])}) == {
        "State.LIVE": ["2026-01-02", [None, True]]
    }
    assert jsonable(ROWS[0]) == {"fix": "0001", "name": "one", "result": "applied", "reason": "was live (a.py:1)"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _show(out: io.StringIO, total: int | None, *steps: int) -> str:
    with DownloadBar("f.gz", total, out) as bar:
        for step in steps:
            bar.update(step)
    return out.getvalue()


def test_a_bar_on_a_terminal_stays_on_its_line() -> None:
    shown = _show(Terminal(), 2_000_000, 500_000, 1, 1_499_999)
    assert shown == "\rf.gz:  25 % of 2.0 MB\rf.gz: 100 % of 2.0 MB\n"


def test_elsewhere_it_is_a_line_per_quarter() -> None:
    shown = _show(io.StringIO(), 2_000_000, *[10_000] * 200)
    assert shown.splitlines() == [f"f.gz: {percent:3d} % of 2.0 MB" for percent in (0, 25, 50, 75, 100)]


def test_an_unknown_size_is_no_error() -> None:
    assert _show(io.StringIO(), None, 10, 20) == "f.gz:   0 % of 0.0 MB\n"


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    say("making it")
    assert capsys.readouterr() == ("", "making it\n")
