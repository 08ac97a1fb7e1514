"""Subsets and stacking on a synthetic series in which patches depend on each other, as today's five do not."""

from __future__ import annotations

import datetime
import itertools
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from vllm_patches.dist.bundle import Bundle
from vllm_patches.dist.compose import Wish, compose
from vllm_patches.dist.stacking import Position, ThirdSeries, read_third
from vllm_patches.errors import PatchesError
from vllm_patches.series.hunks import blob_id
from vllm_patches.series.model import IDENT_EMAIL, IDENT_NAME, FixState, Release, Series, State
from vllm_patches.series.patchfile import parse_patch
from vllm_patches.trees import git
from world import PATCH_DATE, plain_env, plain_git

ENGINE, OTHER = "vllm/engine.py", "vllm/other.py"
PRISTINE = {
    ENGINE: b"".join(f"step {n}\n".encode() for n in range(1, 61)),
    OTHER: b"".join(f"line {n}\n".encode() for n in range(1, 21)),
}
RELEASE = Release("0.20.2", datetime.date(2026, 5, 10), "vllm-0.20.2.tar.gz", "0" * 64, 1, {}, "v0.20.2", revision=3)

# 0002 has a line of 0001 in its context, and takes a line of 0003's context away; 0003 is above both; 0004 is free;
# 0005 stands alone in another file, but says that it requires 0004.
EDITS: dict[str, tuple[tuple[str, bytes, bytes], ...]] = {
    "0001": ((ENGINE, b"step 20\n", b"step 20\nstep 20a\nstep 20b\n"),),
    "0002": ((ENGINE, b"step 22\n", b"step 22, twice\n"),),
    "0003": ((ENGINE, b"step 10\n", b"step 10\nstep 10a\n"),),
    "0004": ((ENGINE, b"step 50\n", b""), (ENGINE, b"step 57\n", b"step 57!\n")),
    "0005": ((OTHER, b"line 5\n", b"line five\n"),),
}
REQUIRES = {"0005": "0004"}
CLOSED = {  # the one dependency by lines, 0002 on 0001, and the one by word, 0005 on 0004
    chosen
    for count in range(1, 6)
    for chosen in itertools.combinations(EDITS, count)
    if ("0002" not in chosen or "0001" in chosen) and ("0005" not in chosen or "0004" in chosen)
}


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Series:
    """The five by git format-patch, each on top of the ones before."""
    tree = tmp_path_factory.mktemp("series")
    write(tree, PRISTINE)
    env = plain_env(GIT_AUTHOR_DATE=PATCH_DATE, GIT_COMMITTER_DATE=PATCH_DATE)
    plain_git(tree, "init", "--quiet")
    plain_git(tree, "add", "-A")
    plain_git(tree, "commit", "--quiet", "-m", "pristine", env=env)
    patches = []
    for fix, edits in EDITS.items():
        for path, old, new in edits:
            data = (tree / path).read_bytes()
            assert data.count(old) == 1
            (tree / path).write_bytes(data.replace(old, new))
        text = f"engine: change {fix}\n\nRequires: {REQUIRES.get(fix, 'none')}\nUpstream-Status: Pending\n"
        plain_git(tree, "commit", "--quiet", "-a", "-F", "-", env=env, stdin=text)
        patches.append(parse_patch(f"{fix}-change.patch", git.format_patch(tree, "HEAD")))
    return Series("v0.20.2", tuple(patches))


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def composed(series: Series, *fixes: str, third: ThirdSeries | None = None, below: bool = False) -> Bundle:
    wish = Wish(tuple(fixes), third, Position.BELOW if below else Position.ABOVE)
    return compose(RELEASE, series, wish, lambda paths: {p: PRISTINE[p] for p in paths if p in PRISTINE})


def strictly_applied(bundle: Bundle, folder: Path) -> None:
    """GNU patch and git am take the patches in order, without a word of offset or fuzz, and end in *after*."""
    write(folder, PRISTINE)
    for item in bundle.items:
        done = subprocess.run(
            ["patch", "-p1", "-F0"], cwd=folder, input=item.raw, capture_output=True, env={**os.environ, "LC_ALL": "C"}
        )
        assert done.returncode == 0, (item.name, done.stdout)
        assert b"offset" not in done.stdout and b"fuzz" not in done.stdout, (item.name, done.stdout)
    found = {path: (folder / path).read_bytes() if (folder / path).exists() else None for path in bundle.after}
    assert found == dict(bundle.after)


@pytest.mark.parametrize("chosen", sorted(CLOSED), ids=" ".join)
def test_every_closed_choice_applies_at_its_stated_lines(
    series: Series, chosen: tuple[str, ...], tmp_path: Path
) -> None:
    bundle = composed(series, *chosen)
    assert [item.fix for item in bundle.items] == list(chosen)
    assert [item.number for item in bundle.items] == [int(fix) for fix in chosen]
    strictly_applied(bundle, tmp_path / "tree")


def test_git_am_takes_a_choice_and_finds_the_blobs_it_names(series: Series, tmp_path: Path) -> None:
    bundle = composed(series, "0001", "0002", "0004")
    tree = tmp_path / "tree"
    write(tree, PRISTINE)
    plain_git(tree, "init", "--quiet")
    plain_git(tree, "add", "-A")
    plain_git(tree, "commit", "--quiet", "-m", "pristine")
    for item in bundle.items:
        (tmp_path / item.name).write_bytes(item.raw)
        plain_git(tree, "am", "--quiet", str(tmp_path / item.name))
        promised = parse_patch(item.name, item.raw).files[0].new_blob
        assert blob_id((tree / ENGINE).read_bytes()) == promised
    assert plain_git(tree, "log", "-1", "--format=%an <%ae>") == f"{IDENT_NAME} <{IDENT_EMAIL}>"


def test_all_of_them_are_the_very_files(series: Series) -> None:
    bundle = composed(series)
    assert [item.raw for item in bundle.items] == [patch.raw for patch in series.patches]
    assert not any(item.refreshed for item in bundle.items)
    assert (bundle.version, bundle.left_out) == ("0.20.2+patches.3", ())


def test_only_numbers_and_blobs_are_written_anew(series: Series) -> None:
    bundle = composed(series, "0004")
    before, after = series.patches[3].raw.split(b"\n"), bundle.items[0].raw.split(b"\n")
    changed = [line for line, other in zip(after, before, strict=True) if line != other]
    assert [line[:3] for line in changed] == [b"ind", b"@@ "]
    assert b"@@ -47,14 +47,13 @@" in changed[1]
    assert (bundle.version, bundle.left_out) == ("0.20.2+patches.3.only.4", ("0001", "0002", "0003", "0005"))
    assert bundle.items[0].refreshed


def test_a_patch_without_the_one_it_stands_on_is_refused(series: Series) -> None:
    with pytest.raises(PatchesError) as caught:
        composed(series, "0002", "0004")
    error = caught.value
    assert error.what == "0002 cannot be had without 0001"
    assert (error.patch, error.file, error.hunk) == ("0002-change.patch", ENGINE, 1)
    assert "0001-change.patch" in error.found and "step 20" in error.found
    assert error.next_command == "vllm-patches dist --pin 0.20.2 --fixes '0001 0002 0004'"


def test_a_dependency_by_word_is_held_to(series: Series) -> None:
    with pytest.raises(PatchesError) as caught:
        composed(series, "0001", "0005")
    assert caught.value.what == "0005 cannot be had without 0004"
    assert caught.value.found == "Requires: 0004"


@pytest.mark.parametrize(
    "chosen",
    sorted(set(itertools.chain.from_iterable(itertools.combinations(EDITS, n) for n in range(1, 6))) - CLOSED),
    ids=" ".join,
)
def test_every_other_choice_is_refused(series: Series, chosen: tuple[str, ...]) -> None:
    with pytest.raises(PatchesError, match="cannot be had without"):
        composed(series, *chosen)


def test_a_fix_that_the_series_lacks(series: Series) -> None:
    with pytest.raises(PatchesError) as caught:
        composed(series, "0001", "0009")
    assert (caught.value.expected, caught.value.found) == ("some of 0001, 0002, 0003, 0004, 0005", "0009")


def third(folder: Path, series: str = "theirs.patch\n", **patches: bytes) -> ThirdSeries:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "series").write_text(series, encoding="utf-8")
    for name, data in patches.items():
        (folder / f"{name}.patch").write_bytes(data)
    return read_third(folder)


def diff(old: dict[str, bytes], new: dict[str, bytes], tmp_path: Path, *options: str) -> bytes:
    """What `diff -u` of two trees prints, a and b, as most people's patches are."""
    for name, files in (("a", old), ("b", new)):
        write(tmp_path / name, files)
    done = subprocess.run(
        ["diff", "-Nr", *(options or ("-u",)), "a", "b"], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 1
    return done.stdout


def changed(old: bytes, new: bytes, base: dict[str, bytes] = PRISTINE) -> dict[str, bytes]:
    assert base[ENGINE].count(old) == 1
    return base | {ENGINE: base[ENGINE].replace(old, new)}


def test_theirs_above_made_for_the_release_is_refreshed(series: Series, tmp_path: Path) -> None:
    """The lines of ours have moved it by three; its header and text stay."""
    raw = b"Description: theirs\n" + diff(PRISTINE, changed(b"step 35\n", b"step 35, theirs\n"), tmp_path / "d")
    bundle = composed(series, third=third(tmp_path / "own", theirs=raw))
    last = bundle.items[-1]
    assert (last.name, last.number, last.fix, last.subject) == ("theirs.patch", 1001, "", "theirs")
    assert last.refreshed and b"@@ -35,7 +35,7 @@" in last.raw and last.raw.startswith(b"Description: theirs\n")
    assert bundle.version == "0.20.2+patches.3.with.own" and not bundle.mails
    strictly_applied(bundle, tmp_path / "tree")


def test_theirs_above_made_for_our_tree_goes_out_as_it_is(series: Series, tmp_path: Path) -> None:
    ours = {path: data for path, data in composed(series).after.items() if data is not None}
    raw = diff(ours, changed(b"step 20a\n", b"step 20a, theirs\n", ours), tmp_path / "d")
    bundle = composed(series, third=third(tmp_path / "own", theirs=raw))
    assert bundle.items[-1].raw == raw and not bundle.items[-1].refreshed
    strictly_applied(bundle, tmp_path / "tree")


def test_theirs_below_moves_ours(series: Series, tmp_path: Path) -> None:
    raw = diff(PRISTINE, changed(b"step 3\n", b"step 3\ntheirs\ntheirs\n"), tmp_path / "d")
    bundle = composed(series, third=third(tmp_path / "own", theirs=raw), below=True)
    assert [item.number for item in bundle.items] == [1, 1001, 1002, 1003, 1004, 1005]
    assert bundle.items[0].raw == raw
    assert [item.refreshed for item in bundle.items[1:]] == [True, True, True, True, False]
    strictly_applied(bundle, tmp_path / "tree")


@pytest.mark.parametrize("below", [False, True])
def test_a_conflict_names_both_sides(series: Series, tmp_path: Path, below: bool) -> None:
    raw = diff(PRISTINE, changed(b"step 21\n", b"step 21, theirs\n"), tmp_path / "d")
    with pytest.raises(PatchesError) as caught:
        composed(series, third=third(tmp_path / "own", theirs=raw), below=below)
    error = caught.value
    first, second = ("0001-change.patch", "theirs.patch") if below else ("theirs.patch", "0001-change.patch")
    assert error.what.startswith(f"{first} conflicts with ")
    assert second in error.what and error.patch.startswith(f"{first} against ")
    assert below or "0002-change.patch" in error.what  # which stands on the line after it
    assert (error.file, error.hunk, error.release) == (ENGINE, 1, "0.20.2")


def test_the_same_lines_deleted_by_both_are_a_conflict(series: Series, tmp_path: Path) -> None:
    raw = diff(PRISTINE, changed(b"step 50\n", b""), tmp_path / "d")
    with pytest.raises(PatchesError, match=r"theirs\.patch conflicts with 0004-change\.patch"):
        composed(series, third=third(tmp_path / "own", theirs=raw))


def test_left_out_patches_are_nobodys_conflict(series: Series, tmp_path: Path) -> None:
    raw = diff(PRISTINE, changed(b"step 21\n", b"step 21, theirs\n"), tmp_path / "d")
    bundle = composed(series, "0003", "0004", third=third(tmp_path / "own", theirs=raw))
    strictly_applied(bundle, tmp_path / "tree")


def test_new_and_deleted_files(series: Series, tmp_path: Path) -> None:
    after = {ENGINE: PRISTINE[ENGINE], "vllm/new.py": b"new\nfile"}
    raw = diff(PRISTINE, after, tmp_path / "d")
    bundle = composed(series, "0001", third=third(tmp_path / "own", theirs=raw))
    assert (bundle.before["vllm/new.py"], bundle.after["vllm/new.py"]) == (None, b"new\nfile")
    assert bundle.after[OTHER] is None
    strictly_applied(bundle, tmp_path / "tree")


def test_a_file_that_theirs_deletes_and_ours_changes(series: Series, tmp_path: Path) -> None:
    raw = diff(PRISTINE, {ENGINE: PRISTINE[ENGINE]}, tmp_path / "d")
    with pytest.raises(PatchesError, match="0005"):
        composed(series, third=third(tmp_path / "own", theirs=raw), below=True)


def test_a_second_patch_of_theirs_on_the_first(series: Series, tmp_path: Path) -> None:
    one = changed(b"step 35\n", b"step 35, theirs\n")
    two = changed(b"step 35, theirs\n", b"step 35, theirs again\n", one)
    patches = {"one": diff(PRISTINE, one, tmp_path / "1"), "two": diff(one, two, tmp_path / "2")}
    own = third(tmp_path / "own", "one.patch\n# a comment\n\ntwo.patch -p1 # another\n", **patches)
    for below in (False, True):
        bundle = composed(series, third=own, below=below)
        strictly_applied(bundle, tmp_path / f"tree-{below}")


def test_only_with_fuzz_is_refused(series: Series, tmp_path: Path) -> None:
    other = changed(b"step 38\n", b"step 38, another release\n")
    raw = diff(other, changed(b"step 35\n", b"theirs\n", other), tmp_path / "d")
    with pytest.raises(PatchesError) as caught:
        composed(series, third=third(tmp_path / "own", theirs=raw))
    error = caught.value
    assert (error.patch, error.file, error.hunk) == ("theirs.patch", ENGINE, 1)
    assert (error.expected, error.found) == ("fuzz 0", "a place with fuzz 1 only")
    assert error.next_command.startswith("quilt refresh")


def test_a_hunk_that_ends_with_the_file(series: Series, tmp_path: Path) -> None:
    """patch takes it at the end only: not where another release, or somebody's patch, goes on."""
    other = changed(b"step 59\nstep 60\n", b"")
    raw = diff(other, changed(b"step 56\n", b"theirs\n", other), tmp_path / "d")
    with pytest.raises(PatchesError) as caught:
        composed(series, "0001", third=third(tmp_path / "own", theirs=raw))
    assert (caught.value.expected, caught.value.found) == ("line 61: the end of the file", "line 61: step 59")


def test_a_change_without_context_is_for_the_end(series: Series, tmp_path: Path) -> None:
    """So git holds it."""
    raw = diff(PRISTINE, changed(b"step 35\n", b"theirs\n"), tmp_path / "d", "-U0")
    with pytest.raises(PatchesError, match="fits nowhere"):
        composed(series, third=third(tmp_path / "own", theirs=raw))
    raw = diff(PRISTINE, changed(b"step 60\n", b"theirs\n"), tmp_path / "e", "-U0")
    strictly_applied(composed(series, third=third(tmp_path / "own", theirs=raw)), tmp_path / "tree")


def test_text_that_is_nowhere_is_quoted(series: Series, tmp_path: Path) -> None:
    other = changed(b"step 34\nstep 35\n", b"moved\non\n")
    raw = diff(other, changed(b"moved\n", b"theirs\n", other), tmp_path / "d")
    with pytest.raises(PatchesError) as caught:
        composed(series, third=third(tmp_path / "own", theirs=raw))
    assert caught.value.expected.endswith(": moved") and caught.value.found.endswith(": step 34")


@pytest.mark.parametrize(
    ("stated", "level"), [("vllm/engine.py", 0), ("x/a/vllm/engine.py", 2)], ids=["one too few", "one too many"]
)
def test_a_wrong_strip_level(series: Series, tmp_path: Path, stated: str, level: int) -> None:
    raw = diff(PRISTINE, changed(b"step 35\n", b"theirs\n"), tmp_path / "d")
    raw = raw.replace(b"a/vllm/engine.py", stated.encode()).replace(b"b/vllm/engine.py", stated.encode())
    with pytest.raises(PatchesError) as caught:
        composed(series, third=third(tmp_path / "own", theirs=raw))
    assert caught.value.found == f"wrong strip level: {stated}"
    assert caught.value.expected == f"-p1: as -p{level} it would be vllm/engine.py"


def test_a_new_file_made_for_p0(series: Series, tmp_path: Path) -> None:
    """Stripped once more it would land beside the package."""
    raw = b"--- /dev/null\n+++ vllm/new.py\n@@ -0,0 +1 @@\n+new\n"
    own = third(tmp_path / "own", theirs=raw)
    with pytest.raises(PatchesError) as caught:
        compose(
            RELEASE, series, Wish((), own), lambda paths: {p: PRISTINE[p] for p in paths if p in PRISTINE}, {"vllm"}
        )
    assert caught.value.found == "wrong strip level: vllm/new.py"


def test_a_fix_that_the_release_does_not_need(series: Series) -> None:
    states = {"0006": FixState(State.FIXED, ""), "0007": FixState(State.LIVE, "")}
    release = replace(RELEASE, states=states)
    read = PRISTINE.items
    bundle = compose(release, series, Wish(("0003", "0006")), lambda paths: dict(read()))
    assert [item.fix for item in bundle.items] == ["0003"]
    for fixes in (("0006",), ("0003", "0007")):
        with pytest.raises(PatchesError, match="the series has no patch"):
            compose(release, series, Wish(fixes), lambda paths: dict(read()))


def test_a_file_that_is_nowhere(series: Series, tmp_path: Path) -> None:
    raw = diff({"vllm/gone.py": b"1\n"}, {"vllm/gone.py": b"2\n"}, tmp_path / "d")
    with pytest.raises(PatchesError) as caught:
        composed(series, third=third(tmp_path / "own", theirs=raw))
    assert (caught.value.file, caught.value.found) == ("vllm/gone.py", "no such file")


def test_a_name_of_ours(series: Series, tmp_path: Path) -> None:
    raw = diff(PRISTINE, changed(b"step 35\n", b"theirs\n"), tmp_path / "d")
    own = third(tmp_path / "own", "0001-change.patch\n", **{"0001-change": raw})
    with pytest.raises(PatchesError) as caught:
        composed(series, third=own)
    assert caught.value.expected == "a name that none of ours has"
