"""`check --tree`: how the series stands to somebody's tree; it reads and never writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_hunks import git_diff
from vllm_patches.errors import PatchesError
from vllm_patches.render import tree_text
from vllm_patches.series.hunks import split_lines
from vllm_patches.series.model import Series
from vllm_patches.trees.treecheck import Fit, HunkFit, TreeReport, check_tree, fit_series
from world import ENGINE, FIRST, KERNEL, SCRIPT, SECOND, THIRD, World, sdist_files, snapshot, write_tree

FIT_BEST = "its files and patches fit best"


def _check(world: World, tree: Path, pin: str | None = "0.20.2") -> TreeReport:
    """The report; the tree must be as it was."""
    before = snapshot(tree)
    report = check_tree(world.catalog, tree, world.release(pin) if pin else None)
    assert snapshot(tree) == before
    return report


def _fits(report: TreeReport) -> list[Fit]:
    return [patch.fit for patch in report.patches]


def _edit(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def test_a_pristine_tree(world: World) -> None:
    report = _check(world, world.checkout())
    assert _fits(report) == [Fit.APPLIES] * 3
    assert (report.ok, report.exact, report.release, report.chosen_by) == (True, True, "0.20.2", "--pin")
    assert [hunk.line for hunk in report.patches[0].hunks] == [18, 47], "as the tree has them"


def test_a_patched_tree_is_in_although_later_patches_changed_the_context(world: World) -> None:
    """0003 changes a line that 0001 has as context: undone alone, 0001 would seem to conflict."""
    report = _check(world, world.checkout(changes=(FIRST, SECOND, THIRD)))
    assert _fits(report) == [Fit.IN] * 3
    assert {hunk.fit for patch in report.patches for hunk in patch.hunks} == {Fit.IN}
    assert [hunk.line for hunk in report.patches[0].hunks] == [18, 48], "as the tree has them"
    assert report.exact


def test_a_tree_with_the_first_patch(world: World) -> None:
    report = _check(world, world.checkout(changes=(FIRST,)))
    assert _fits(report) == [Fit.IN, Fit.APPLIES, Fit.APPLIES]
    assert report.exact


def test_a_tree_with_the_last_patch(world: World) -> None:
    assert _fits(_check(world, world.checkout(changes=(THIRD,)))) == [Fit.APPLIES, Fit.APPLIES, Fit.IN]


def test_an_offset_is_told_and_is_not_exact(world: World) -> None:
    source = world.checkout()
    _edit(source / ENGINE, b"step = 1\n", b"# one\n# two\nstep = 1\n")
    report = _check(world, source)
    assert _fits(report) == [Fit.OFFSET, Fit.OFFSET, Fit.APPLIES]
    assert [(hunk.fit, hunk.offset, hunk.line) for hunk in report.patches[0].hunks] == [
        (Fit.OFFSET, 2, 20),
        (Fit.OFFSET, 2, 49),
    ]
    assert (report.ok, report.exact) == (True, False)


def test_an_offset_backwards_within_the_file(world: World) -> None:
    """Only the second hunk has moved: the first one's own growth is no offset."""
    source = world.checkout()
    _edit(source / ENGINE, b"step = 30\nstep = 31\n", b"step = 30\n")
    first = _check(world, source).patches[0]
    assert [(hunk.fit, hunk.offset) for hunk in first.hunks] == [(Fit.APPLIES, 0), (Fit.OFFSET, -1)]
    assert first.fit is Fit.OFFSET


def test_among_equal_lines_the_stated_place_is_taken() -> None:
    """Counted with what the earlier hunks of the file have added."""
    old = b"top\n" + b"same\n" * 60
    new = b"top\n" + b"new\n" * 5 + b"same\n" * 30 + b"changed\n" + b"same\n" * 29
    series = Series("v1.2.3", (git_diff(old, new),))
    assert [fit.fit for fit in fit_series(series, {"f": split_lines(old)})] == [Fit.APPLIES]
    assert [fit.fit for fit in fit_series(series, {"f": split_lines(new)})] == [Fit.IN]


def test_a_patched_tree_that_moved_is_still_in(world: World) -> None:
    source = world.checkout(changes=(FIRST, SECOND, THIRD))
    _edit(source / ENGINE, b"step = 1\n", b"# one\nstep = 1\n")
    assert _fits(_check(world, source)) == [Fit.IN] * 3


def test_the_nearest_of_several_places_is_taken(world: World) -> None:
    source, block = world.checkout(), b"".join(b"step = %d\n" % number for number in range(17, 25))
    with (source / ENGINE).open("ab") as file:
        file.write(block)
    _edit(source / ENGINE, b"step = 1\n", b"# moved\nstep = 1\n")
    assert _check(world, source).patches[0].hunks[0].offset == 1


def test_a_conflict_names_the_line_and_both_texts(world: World) -> None:
    source = world.checkout()
    _edit(source / ENGINE, b"step = 21\n", b"step = twenty-one\n")
    report = _check(world, source)
    assert _fits(report) == [Fit.CONFLICT, Fit.CONFLICT, Fit.APPLIES]
    first, second = report.patches[0].hunks
    assert first == HunkFit(ENGINE, 1, Fit.CONFLICT, 0, 21, "step = 21", "step = twenty-one")
    assert second.fit is Fit.APPLIES
    assert not report.ok


def test_a_conflict_is_named_where_most_of_the_hunk_still_stands(world: World) -> None:
    source = world.checkout()
    _edit(source / ENGINE, b"step = 1\n", b"# one\n# two\n# three\nstep = 1\n")
    _edit(source / ENGINE, b"step = 21\n", b"step = twenty-one\n")
    with (source / ENGINE).open("ab") as file:
        file.write(b"step = 18\nstep = 19\n")  # a place with less of it
    first = _check(world, source).patches[0].hunks[0]
    assert (first.line, first.expected, first.found) == (24, "step = 21", "step = twenty-one")


def test_the_end_of_the_file_is_named(world: World) -> None:
    source = world.checkout()
    _edit(source / ENGINE, b"".join(b"step = %d\n" % number for number in range(51, 61)), b"")
    second = _check(world, source).patches[0].hunks[1]
    assert (second.line, second.expected, second.found) == (51, "step = 51", "the end of the file")


def test_half_of_a_patch_is_partly_in(world: World) -> None:
    """Of 0003's two files one is patched."""
    source = world.checkout(changes=(FIRST, replace(SECOND, edits={KERNEL: SECOND.edits[KERNEL]})))
    report = _check(world, source)
    assert _fits(report) == [Fit.IN, Fit.PARTLY, Fit.APPLIES]
    assert [(hunk.file, hunk.fit) for hunk in report.patches[1].hunks] == [
        (KERNEL, Fit.IN),
        (KERNEL, Fit.IN),
        (ENGINE, Fit.APPLIES),
    ]
    assert not report.ok


def test_one_hunk_of_a_file_is_partly_in(world: World) -> None:
    source = world.checkout()
    _edit(source / ENGINE, b"step = 50\n", b"step = 50 + 0\n")
    report = _check(world, source)
    assert [hunk.fit for hunk in report.patches[0].hunks] == [Fit.APPLIES, Fit.IN]
    assert report.patches[0].fit is Fit.PARTLY


def test_after_a_conflict_the_other_patches_are_still_looked_at(world: World) -> None:
    source = world.checkout(changes=(THIRD,))
    _edit(source / KERNEL, b"lane = 31\n", b"lane = thirty-one\n")
    assert _fits(_check(world, source)) == [Fit.APPLIES, Fit.CONFLICT, Fit.IN]


def test_a_patch_on_top_of_one_that_conflicts_conflicts_too(world: World) -> None:
    source = world.checkout()
    _edit(source / ENGINE, b"step = 51\n", b"step = fifty-one\n")
    assert _fits(_check(world, source)) == [Fit.CONFLICT, Fit.CONFLICT, Fit.APPLIES]


def test_a_missing_file_is_a_conflict_of_every_hunk(world: World) -> None:
    source = world.checkout()
    (source / KERNEL).unlink()
    report = _check(world, source)
    assert _fits(report) == [Fit.APPLIES, Fit.CONFLICT, Fit.APPLIES]
    assert [(hunk.file, hunk.hunk, hunk.expected, hunk.found) for hunk in report.patches[1].hunks[:2]] == [
        (KERNEL, 1, "the file", "no such file"),
        (KERNEL, 2, "the file", "no such file"),
    ]


def test_crlf_line_ends_are_named(world: World) -> None:
    source = world.checkout()
    (source / KERNEL).write_bytes((source / KERNEL).read_bytes().replace(b"\n", b"\r\n"))
    hunk = _check(world, source).patches[1].hunks[0]
    assert hunk.fit is Fit.CONFLICT
    assert (hunk.expected, hunk.found) == ("int lane = 6", "int lane = 6\\r    (CRLF line ends)")


def test_a_text_for_a_person(world: World) -> None:
    source = world.checkout(changes=(THIRD,))
    _edit(source / ENGINE, b"step = 1\n", b"# one\nstep = 1\n")
    _edit(source / KERNEL, b"lane = 9", b"line = 9")
    assert tree_text(_check(world, source)).splitlines() == [
        f"{source}: series of vLLM 0.20.2 (--pin)",
        "0001-dsa-mtp-ima.patch  applies at an offset",
        f"  {ENGINE} hunk 1: at line 19, +1 lines",
        f"  {ENGINE} hunk 2: at line 48, +1 lines",
        "0003-mla-flat-buffer.patch  conflict",
        f"  {KERNEL} hunk 1: conflict at line 9",
        "    expected: int lane = 9",
        "    found:    int line = 9",
        f"  {ENGINE} hunk 1: at line 21, +1 lines",
        "0005-mrv2-wake-up.patch  already in",
    ]


def test_a_text_of_a_partly_patched_tree(world: World) -> None:
    source = world.checkout(changes=(FIRST, replace(SECOND, edits={KERNEL: SECOND.edits[KERNEL]})))
    lines = tree_text(_check(world, source)).splitlines()
    assert "0003-mla-flat-buffer.patch  partly in" in lines
    assert f"  {KERNEL} hunk 1: already in, at line 6" in lines


@pytest.mark.parametrize(("version", "name"), [("0.20.1", "vllm/_version.py"), ("0.21.0", "vllm/_version.py")])
def test_the_trees_own_version_file_chooses(world: World, version: str, name: str) -> None:
    tree = world.root / "unpacked"
    write_tree(tree, sdist_files(version))
    report = _check(world, tree, None)
    assert (report.release, report.chosen_by) == (version, f"{name} says {version}")
    assert report.exact


def test_an_unpacked_sdist_is_told_by_its_metadata(world: World) -> None:
    tree = world.root / "unpacked"
    write_tree(tree, sdist_files("0.20.1"))
    (tree / "vllm/_version.py").unlink()
    assert _check(world, tree, None).chosen_by == "PKG-INFO says 0.20.1"


def test_a_development_version_is_taken_for_its_release(world: World) -> None:
    source = world.checkout("0.21.0")
    (source / "vllm/_version.py").write_text("__version__ = '0.21.0.dev3+gabc'\n", encoding="utf-8")
    assert _check(world, source, None).chosen_by == "vllm/_version.py says 0.21.0.dev3+gabc"


def test_without_one_the_series_that_fits_best_is_taken(world: World) -> None:
    report = _check(world, world.checkout("0.21.0"), None)
    assert (report.release, report.chosen_by) == ("0.21.0", FIT_BEST)


def test_a_fork_is_told_by_the_files_that_it_left_alone(world: World) -> None:
    """Of 0.21.0's series one file is its own; of 0.20.2's longer one more patches fit, at offsets."""
    source = world.checkout("0.21.0")
    _edit(source / ENGINE, b"step = 60\n", b"step = sixty\n")
    assert _check(world, source, None).release == "0.21.0"


def test_of_equals_the_default_pin_is_taken(world: World) -> None:
    assert _check(world, world.checkout("0.20.1"), None).release == "0.20.2"


def test_a_version_without_a_series_is_told_by_what_fits(world: World) -> None:
    source = world.checkout("0.21.0")
    (source / "vllm/_version.py").write_text("__version__ = '0.22.0'\n", encoding="utf-8")
    assert _check(world, source, None).chosen_by == FIT_BEST


def test_a_tree_that_nothing_fits(world: World, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(PatchesError) as caught:
        check_tree(world.catalog, tmp_path / "other")
    error = caught.value
    assert error.what == "no patch of any series fits this tree"
    assert error.expected.endswith("0.20.1, 0.20.2, 0.21.0")
    assert error.next_command == f"ls {tmp_path / 'other'}/vllm"


def test_a_tree_that_is_no_folder(world: World) -> None:
    with pytest.raises(PatchesError) as caught:
        check_tree(world.catalog, world.sdist())
    assert (caught.value.what, caught.value.file) == ("not a folder", str(world.sdist()))


def test_a_release_without_a_series(world: World) -> None:
    with pytest.raises(PatchesError) as caught:
        check_tree(world.catalog, world.checkout(), world.release("0.19.0"))
    assert caught.value.what == "there is no series for this release"
    assert caught.value.next_command == "make matrix"


def test_a_file_without_a_line_feed_at_its_end(world: World) -> None:
    source = world.checkout()
    with (source / SCRIPT).open("ab") as file:
        file.write(b"\n")
    hunk = _check(world, source).patches[2].hunks[0]
    assert hunk.fit is Fit.CONFLICT
    assert hunk.line == 5
