"""`check`: drift in each place is reported with patch, file, hunk, expected, found and the next command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from vllm_patches.errors import PatchesError
from vllm_patches.render import jsonable
from vllm_patches.sources.store import pristine_files
from vllm_patches.upkeep.check import check_catalog, round_trip
from world import ENGINE, KERNEL, PINS, World, snapshot


def _check(world: World) -> tuple[list[dict[str, object]], dict[str, object]]:
    """The errors and the whole JSON of `check`, which must have changed nothing."""
    before = snapshot(world.patches)
    ran = world.run("check", "--json")
    assert snapshot(world.patches) == before
    report = json.loads(ran.out)
    assert ran.status == (0 if not report["problems"] and not any(p["error"] for p in report["pins"]) else 1)
    return [pin["error"] for pin in report["pins"] if pin["error"]], report


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_bytes()
    assert old.encode() in text
    path.write_bytes(text.replace(old.encode(), new.encode(), 1))


def test_a_sound_catalogue(world: World) -> None:
    errors, report = _check(world)
    assert (errors, report["problems"]) == ([], [])
    pins = [(pin["release"], pin["series"], pin["patches"], pin["files"], pin["hunks"]) for pin in report["pins"]]
    assert pins == [("0.20.1", "v0.20.2", 3, 3, 6), ("0.20.2", "v0.20.2", 3, 3, 6), ("0.21.0", "v0.21.0", 1, 2, 3)]


def test_the_json_equals_what_the_text_is_made_of(world: World) -> None:
    _edit(world.patch("0003", "v0.21.0"), " int lane = 6\n", " int lane = 7\n")
    _, report = _check(world)
    catalog = world.catalog
    direct = check_catalog(catalog, catalog.pins, lambda release: world.sdist(release.version))
    assert report == json.loads(json.dumps(jsonable(direct)))
    text = world.run("check").out
    error = next(pin.error for pin in direct.pins if pin.error)
    assert str(error) in text


EXPECTED_AT = "vllm-patches check --tree DIR --pin 0.20.2"

# the damage to 0003 of v0.20.2: old, new, then what of the error
DRIFT: dict[str, tuple[str, str, dict[str, object]]] = {
    "context line": (
        " int lane = 28\n",
        " int lane = 2.8\n",
        {"file": KERNEL, "hunk": 2, "expected": "line 28: int lane = 2.8", "found": "line 28: int lane = 28"},
    ),
    "removed line": (
        "-step = 22\n",
        "-step = 2.2\n",
        {"file": ENGINE, "hunk": 1, "expected": "line 23: step = 2.2", "found": "line 23: step = 22"},
    ),
    "added line": ("+long lane = 9\n", "+short lane = 9\n", {"file": KERNEL, "expected": "56cea534"}),
    "header shifted": (
        "@@ -6,7 +6,7 @@",
        "@@ -7,7 +7,7 @@",
        {"file": KERNEL, "hunk": 1, "expected": "line 7: int lane = 6", "found": "line 7: int lane = 7"},
    ),
    "new start shifted": (
        "@@ -27,7 +27,6 @@",
        "@@ -27,7 +28,6 @@",
        {"file": KERNEL, "hunk": 2, "expected": "its lines at 27", "found": "+28,6"},
    ),
    "blob before": (
        "index 6a8c41ae5c",
        "index 0000000000",
        {"file": KERNEL, "expected": "0000000000", "found": "6a8c41ae5c"},
    ),
    "blob after": ("..56cea534d8", "..0000000000", {"file": KERNEL, "expected": "0000000000", "found": "56cea534d8"}),
}


@pytest.mark.parametrize("case", DRIFT)
def test_drift_names_its_place(world: World, case: str) -> None:
    old, new, fields = DRIFT[case]
    _edit(world.patch("0003"), old, new)
    errors, report = _check(world)
    assert [error["release"] for error in errors] == ["0.20.1", "0.20.2"], "0.21.0 is not concerned"
    error = errors[1]
    assert error["patch"] == "0003-mla-flat-buffer.patch"
    for name, value in fields.items():
        assert error[name] == value if isinstance(value, int) else value in error[name], (name, error)
    assert error["next_command"]
    assert report["pins"][2]["error"] is None  # type: ignore[index]


def test_drift_of_the_message_alone_is_a_matter_of_the_head(world: World) -> None:
    """The files are the same, so hunks and blobs fit; only `apply` meets the commit (test_apply.py)."""
    _edit(world.patch("0003"), "Why: because", "Why: only because")
    errors, report = _check(world)
    assert (errors, report["problems"]) == ([], [])


def _swap(world: World) -> None:
    path = world.patches / "v0.20.2" / "series"
    first, second, third = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text(second + first + third, encoding="utf-8")


def _forget(world: World) -> None:
    path = world.patches / "v0.20.2" / "series"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")


@pytest.mark.parametrize("damage", [_swap, _forget])
def test_a_patch_that_needs_another_before_it(world: World, damage: Callable[[World], None]) -> None:
    damage(world)
    errors, report = _check(world)
    assert errors[0]["patch"] == "0003-mla-flat-buffer.patch"
    assert (errors[0]["file"], errors[0]["hunk"]) == (ENGINE, 1)
    assert report["problems"]


def test_a_malformed_patch_does_not_hide_the_other_pins(world: World) -> None:
    _edit(world.patch("0001"), "@@ -18,6 +18,7 @@", "@@ -18,6 +18,8 @@")
    _edit(world.patch("0003", "v0.21.0"), " int lane = 6\n", " int lane = 7\n")
    errors, report = _check(world)
    assert [error["release"] for error in errors] == ["0.21.0"]
    problem = report["problems"][0]  # type: ignore[index]
    assert (problem["rule"], problem["file"]) == ("unreadable", "0001-dsa-mtp-ima.patch")
    assert problem["expected"] == "6 old and 8 new lines, as the hunk header says"


def test_crlf_patches_are_told_as_such(world: World) -> None:
    path = world.patch("0003")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    _, report = _check(world)
    found = [(p["rule"], p["expected"], p["found"]) for p in report["problems"]]  # type: ignore[attr-defined]
    assert ("unreadable", "LF line ends", "a carriage return (a CRLF checkout?)") in found


def test_a_touched_file_without_a_recorded_blob(world: World) -> None:
    release = world.release("0.21.0")
    world.write_release(replace(release, blobs={KERNEL: release.blobs[KERNEL]}))
    errors, _ = _check(world)
    assert [(e["release"], e["file"], e["next_command"]) for e in errors] == [("0.21.0", ENGINE, "make record")]


def test_a_blob_of_another_release_is_drift(world: World) -> None:
    """The directory serves a release only where the files are the same."""
    release, other = world.release("0.21.0"), world.release("0.20.2")
    world.write_release(
        replace(release, series="v0.20.2", blobs=release.blobs | {"tools/run.sh": other.blobs["tools/run.sh"]})
    )
    errors, _ = _check(world)
    assert errors[0]["release"] == "0.21.0"
    assert (errors[0]["patch"], errors[0]["hunk"]) == ("0001-dsa-mtp-ima.patch", 1)


def test_only_the_named_pins_are_checked(world: World) -> None:
    _edit(world.patch("0003", "v0.21.0"), " int lane = 6\n", " int lane = 7\n")
    ran = world.run("check", "--pin", "0.20.1", "--pin", "v0.20.2", "--json")
    assert [pin["release"] for pin in json.loads(ran.out)["pins"]] == ["0.20.1", "0.20.2"]
    assert ran.status == 0


def test_a_release_without_a_series_has_nothing_to_check(world: World) -> None:
    ran = world.run("check", "--pin", "0.22.0", "--json")
    assert ran.status == 1
    assert json.loads(ran.out)["error"]["expected"] == "one of 0.20.1, 0.20.2, 0.21.0"
    assert ran.says("there is no series for this release", "release:  0.22.0", "next:     make matrix")


def test_a_given_sdist_is_used(world: World) -> None:
    moved = world.sdist().rename(world.root / "mine.tar.gz")
    assert world.run("check", "--pin", "0.20.2", "--sdist", moved).status == 0
    assert world.run("check", "--pin", "0.20.2", "--sdist", world.root / "none").status == 0, "all is cached by now"


@pytest.mark.parametrize("pins", [[], ["--pin", "0.20.1", "--pin", "0.20.2"]])
def test_a_given_sdist_needs_its_one_pin(world: World, pins: list[str]) -> None:
    ran = world.run("check", *pins, "--sdist", world.sdist())
    assert ran.status == 1
    assert ran.says("--sdist needs the one release", "expected: one --pin", "next:")


def test_a_changed_readme_is_a_problem(world: World) -> None:
    _edit(world.patches.parent / "README.md", "**applied**", "applied")
    errors, report = _check(world)
    assert errors == []
    assert [problem["rule"] for problem in report["problems"]] == ["matrix"]  # type: ignore[attr-defined]


def test_going_back_is_checked_too(world: World) -> None:
    release = world.release()
    series = world.catalog.series_of(release)
    contents = pristine_files([release], lambda release: world.sdist(release.version))
    round_trip(release, series, contents)
    wrong = dict(contents) | {release.blobs[ENGINE]: b"other\n"}
    with pytest.raises(PatchesError):
        round_trip(release, series, wrong)


def test_every_pin_is_checked_without_an_index_once_the_blobs_are_cached(world: World) -> None:
    assert world.run("check").status == 0
    for version in PINS:
        (world.cache / "vllm-patches" / "sdist" / world.release(version).sha256).rename(world.root / f"away-{version}")
    assert world.run("check").status == 0
