"""`export` and `record`: a round trip where nothing was changed, and refusals that change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from world import ENGINE, FIRST, KERNEL, PATCH_DATE, SCRIPT, World, message, plain_env, plain_git, snapshot

NAMES = ("0001-dsa-mtp-ima.patch", "0003-mla-flat-buffer.patch", "0005-mrv2-wake-up.patch")


@pytest.fixture
def tree(world: World) -> Path:
    """A tree made by apply."""
    assert world.apply().status == 0
    return world.tree()


def _series(world: World) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (world.patches / "v0.20.2").iterdir()}


def _commit(tree: Path, text: str) -> None:
    env = plain_env(GIT_AUTHOR_DATE=PATCH_DATE, GIT_COMMITTER_DATE=PATCH_DATE)
    plain_git(tree, "commit", "--quiet", "-a", "-F", "-", env=env, stdin=text)


def _export(world: World, tree: Path, pin: str = "0.20.2") -> dict[str, bool]:
    ran = world.run("export", "--pin", pin, "--tree", tree, "--json")
    assert ran.status == 0, ran
    changed: dict[str, bool] = json.loads(ran.out)
    return changed


def _refused(world: World, tree: Path, *says: str) -> None:
    before = snapshot(world.patches)
    ran = world.run("export", "--pin", "0.20.2", "--tree", tree)
    assert ran.status == 1, ran
    assert ran.says("error: ", "next:", *says)
    assert snapshot(world.patches) == before


@pytest.mark.parametrize("version", ["0.20.1", "0.20.2", "0.21.0"])
def test_an_untouched_tree_changes_no_byte(world: World, version: str) -> None:
    assert world.apply("--pin", version).status == 0
    before = snapshot(world.patches)
    assert set(_export(world, world.tree(version), version).values()) == {False}
    assert snapshot(world.patches) == before


def test_the_default_tree_is_the_one_that_apply_makes(world: World) -> None:
    assert world.run("apply").status == 0
    ran = world.run("export", "--pin", "0.20.2")
    assert ran.status == 0
    assert ran.out.splitlines() == [f"same     {name}" for name in (*NAMES, "series")]


def test_an_amended_commit_changes_its_own_patch(world: World, tree: Path) -> None:
    before = _series(world)
    path = tree / SCRIPT
    path.write_bytes(path.read_bytes().replace(b"--now", b"--soon"))
    plain_git(tree, "commit", "--quiet", "-a", "--amend", "--no-edit")
    assert _export(world, tree) == {NAMES[0]: False, NAMES[1]: False, NAMES[2]: True, "series": False}
    after = _series(world)
    assert b"+exec true --soon\n" in after[NAMES[2]]
    assert {name: after[name] for name in NAMES[:2]} == {name: before[name] for name in NAMES[:2]}
    assert world.run("record").status == 0
    assert world.run("check").status == 0


def test_a_commit_that_is_dropped_takes_its_patch_away(world: World, tree: Path) -> None:
    plain_git(tree, "reset", "--quiet", "--hard", "HEAD~1")
    assert _export(world, tree) == {NAMES[0]: False, NAMES[1]: False, NAMES[2]: True, "series": True}
    assert sorted(_series(world)) == [*NAMES[:2], "series"]
    assert _series(world)["series"] == f"{NAMES[0]}\n{NAMES[1]}\n".encode()


def test_a_commit_at_the_wrong_place_is_refused(world: World, tree: Path) -> None:
    (tree / ENGINE).write_bytes((tree / ENGINE).read_bytes() + b"step = 61\n")
    _commit(tree, message(replace(FIRST, fix="0002", subject="engine: go on"), "v0.20.2"))
    # A patch is named by its number, so a commit that belongs between others has to stand between them.
    _refused(world, tree, "the commits are not in the order of their fixes", "0002", "rebase --interactive pristine")


def test_a_new_last_commit_becomes_a_patch(world: World, tree: Path) -> None:
    plain_git(tree, "reset", "--quiet", "--hard", "HEAD~1")
    (tree / ENGINE).write_bytes((tree / ENGINE).read_bytes() + b"step = 61\n")
    _commit(tree, message(replace(FIRST, fix="0004", subject="engine: go on"), "v0.20.2"))
    assert _export(world, tree)["0004-rocm-kv-strides.patch"] is True


def test_the_first_series_of_a_release(world: World, tree: Path) -> None:
    """A release that has none yet gets a directory of its own."""
    world.write_release(replace(world.release("0.20.2"), series="", head="", blobs={}))
    _export(world, tree)
    assert sorted(path.name for path in (world.patches / "v0.20.2").iterdir()) == sorted((*NAMES, "series"))


def test_two_commits_of_one_fix_are_refused(world: World, tree: Path) -> None:
    """One of them would be lost."""
    (tree / SCRIPT).write_bytes(b"fixed up\n")
    plain_git(tree, "commit", "--quiet", "-a", "-C", "HEAD")
    _refused(world, tree, "two commits for one fix", "0005-mrv2-wake-up.patch", "rebase --interactive pristine")


def test_a_tree_without_commits_does_not_empty_the_series(world: World, tree: Path) -> None:
    plain_git(tree, "branch", "--quiet", "--force", "pristine", "HEAD")
    _refused(world, tree, "no commit", f"file:     {tree}", "make apply PIN=0.20.2")


def test_a_commit_that_does_not_say_which_fix_it_is(world: World, tree: Path) -> None:
    (tree / ENGINE).write_bytes(b"mine\n")
    _commit(tree, "engine: mine\n")
    head = world.head(tree)
    _refused(
        world, tree, "a commit does not say which fix it is", head, "expected: a trailer 'Test: ", "found:    none"
    )


def test_a_fix_that_nobody_knows(world: World, tree: Path) -> None:
    (tree / ENGINE).write_bytes(b"mine\n")
    _commit(tree, message(replace(FIRST, fix="0009"), "v0.20.2"))
    _refused(world, tree, "does not say which fix it is", "test_proof[0009-0.20.2]")


def _modified(tree: Path) -> None:
    (tree / KERNEL).write_bytes(b"mine\n")


def _untracked(tree: Path) -> None:
    (tree / "mine").touch()


@pytest.mark.parametrize(("dirty", "line"), [(_modified, f" M {KERNEL}"), (_untracked, "?? mine")])
def test_a_change_that_is_not_committed(world: World, tree: Path, dirty: Callable[[Path], None], line: str) -> None:
    dirty(tree)
    _refused(world, tree, "not a clean tree made by apply", f"found:    {line}", "every change committed")


def test_a_checkout_that_apply_did_not_make(world: World) -> None:
    _refused(world, world.checkout(), "not a clean tree made by apply", "a branch pristine", "found:    no such branch")


def test_a_folder_that_is_no_checkout(world: World) -> None:
    folder = world.root / "plain"
    folder.mkdir()
    _refused(world, folder, "not a git checkout", f"file:     {folder}")


def test_a_file_added_by_a_commit_is_refused(world: World, tree: Path) -> None:
    """Our patches change files that are there; apply could not make this one."""
    (tree / "new.py").write_bytes(b"new\n")
    plain_git(tree, "add", "new.py")
    plain_git(tree, "commit", "--quiet", "--amend", "--no-edit")
    _refused(world, tree, "malformed patch", "new file mode", "file:     new.py")


# --- record


def _record(world: World) -> dict[str, bool]:
    ran = world.run("record", "--json")
    assert ran.status == 0, ran
    changed: dict[str, bool] = json.loads(ran.out)
    return changed


def test_record_changes_nothing_where_all_is_recorded(world: World) -> None:
    """The heads in the table are those of the plain way (world.py)."""
    table = world.patches / "releases.toml"
    before = table.read_bytes()
    assert set(_record(world).values()) == {False}
    assert table.read_bytes() == before
    assert set(_record(world).values()) == {False}
    assert table.read_bytes() == before


def test_record_fills_in_what_is_missing_or_wrong(world: World) -> None:
    table = world.patches / "releases.toml"
    before = table.read_bytes()
    world.write_release(replace(world.release("0.20.1"), head="", blobs={}))
    world.write_release(replace(world.release("0.21.0"), head="0" * 40, blobs={ENGINE: "0" * 40, "gone.py": "1" * 40}))
    assert _record(world) == {"0.19.0": False, "0.20.1": True, "0.20.2": False, "0.21.0": True, "0.22.0": False}
    # Whatever the head was before, it was another: a version that users saw must not mean two states of the series.
    assert [world.release(version).revision for version in ("0.20.1", "0.20.2", "0.21.0")] == [2, 1, 2]
    assert table.read_bytes().replace(b"revision = 2\n", b"revision = 1\n") == before
    assert set(_record(world).values()) == {False}


def test_record_of_a_series_that_does_not_apply_writes_nothing(world: World) -> None:
    path = world.patch("0003", "v0.21.0")
    path.write_bytes(path.read_bytes().replace(b" int lane = 6\n", b" int lane = 7\n"))
    world.write_release(replace(world.release("0.20.1"), head=""))
    before = snapshot(world.patches)
    ran = world.run("record")
    assert ran.status == 1
    assert ran.says("release:  0.21.0", "patch:    0003-mla-flat-buffer.patch", "hunk:     1")
    assert snapshot(world.patches) == before


def test_record_names_a_touched_file_that_the_sdist_lacks(world: World) -> None:
    path = world.patch("0003", "v0.21.0")
    path.write_bytes(path.read_bytes().replace(b"vllm/engine.py", b"vllm/motor.py"))
    ran = world.run("record")
    assert ran.status == 1
    assert ran.says("the sdist lacks a file that the series touches", "file:     vllm/motor.py", "release:  0.21.0")
