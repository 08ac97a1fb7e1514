"""`apply --src`: new commits on a new branch of a user's own checkout, or not a single byte changed."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_apply import next_command
from world import (
    ENGINE,
    FIRST,
    KERNEL,
    SCRIPT,
    SECOND,
    THIRD,
    Change,
    Ran,
    World,
    edited,
    plain_env,
    plain_git,
    scratch_left,
    sdist_files,
    snapshot,
    write_tree,
)

BRANCH = "vllm-patches/0.20.2"
ALL = (FIRST, SECOND, THIRD)


def files_of(source: Path, skip: tuple[str, ...]) -> dict[str, str]:
    """Every file; git leaves the empty folder of a ref that is gone."""
    return {name: kind for name, kind in snapshot(source, skip=skip).items() if not kind.startswith("4")}


def refused(world: World, source: Path, *arguments: object, says: tuple[str, ...], skip: tuple[str, ...] = ()) -> Ran:
    """It fails, says these parts and the next command, and every byte of the checkout is as it was."""
    before = files_of(source, skip)
    ran = world.run("apply", "--src", source, *arguments)
    assert ran.status == 1, ran
    assert ran.says("error: ", "\n  next:     ", *says)
    assert files_of(source, skip) == before
    assert scratch_left(source) == []
    return ran


def patched_files() -> dict[str, bytes]:
    files = sdist_files("0.20.2")
    for change in ALL:
        files = edited(change, files)
    return files


def assert_patched(source: Path, base: str) -> None:
    """A new branch on *base* with the patched files, a clean work tree, and nothing left over."""
    assert plain_git(source, "symbolic-ref", "--short", "HEAD") == BRANCH
    assert plain_git(source, "status", "--porcelain") == ""
    assert plain_git(source, "merge-base", base, "HEAD") == base
    for path in (ENGINE, KERNEL, SCRIPT):
        assert plain_git(source, "cat-file", "blob", f"HEAD:{path}").encode() == patched_files()[path].rstrip(b"\n")
    assert plain_git(source, "for-each-ref", "refs/vllm-patches") == ""
    plain_git(source, "fsck", "--strict")


# --- what it makes


def test_a_pristine_checkout(world: World) -> None:
    source = world.checkout()
    base = world.head(source)
    ran = world.run("apply", "--src", source, "--json")
    result = json.loads(ran.out)[0]
    assert ran.status == 0
    assert (result["release"], result["outcome"], result["head"]) == ("0.20.2", "applied", world.head(source))
    assert [row["result"] for row in result["rows"]][:3] == ["applied", "fixed upstream", "applied"]
    assert_patched(source, base)
    assert plain_git(source, "rev-list", "--count", f"{base}..HEAD") == "3"
    for path in (ENGINE, KERNEL, SCRIPT):
        assert (source / path).read_bytes() == patched_files()[path]
    assert (source / SCRIPT).stat().st_mode & 0o100
    assert plain_git(source, "rev-parse", "main") == base, "the user's own branch does not move"


def test_the_commits_equal_what_git_am_makes(world: World) -> None:
    source = world.checkout()
    world.run("apply", "--src", source)
    ours = world.head(source)
    plain_git(source, "switch", "--quiet", "--detach", "main")
    patches = [str(world.patch(number)) for number in ("0001", "0003", "0005")]
    plain_git(source, "am", "--quiet", "--committer-date-is-author-date", *patches)
    assert world.head(source) == ours


def test_the_release_may_be_named(world: World) -> None:
    source = world.checkout("0.20.1")
    assert world.run("apply", "--src", source, "--pin", "0.20.1").says("vLLM 0.20.1: applied")
    assert plain_git(source, "symbolic-ref", "--short", "HEAD") == "vllm-patches/0.20.1"


def test_of_releases_with_the_same_files_the_default_one_is_taken(world: World) -> None:
    """A checkout has no version file; what was looked at is said."""
    ran = world.run("apply", "--src", world.checkout("0.20.1"))
    assert ran.says("vLLM 0.20.2: applied", "judged by the git blobs of the files that the series touches")


def test_another_release_is_told_by_its_blobs(world: World) -> None:
    assert world.run("apply", "--src", world.checkout("0.21.0")).says("vLLM 0.21.0: applied")


def test_a_fork_with_changes_elsewhere(world: World) -> None:
    source = world.checkout()
    (source / "README.md").write_text("my fork\n", encoding="utf-8")
    (source / "vllm" / "mine.py").write_text("mine\n", encoding="utf-8")
    world.commit(source, "mine")
    base = world.head(source)
    assert world.run("apply", "--src", source).status == 0
    assert_patched(source, base)
    assert (source / "README.md").read_text(encoding="utf-8") == "my fork\n"


def test_a_linked_work_tree(world: World) -> None:
    source, linked = world.checkout(), world.root / "linked"
    plain_git(source, "worktree", "add", "--quiet", "--detach", str(linked))
    before = snapshot(source, skip=(".git",))
    assert world.run("apply", "--src", linked).status == 0
    assert_patched(linked, world.head(source))
    assert snapshot(source, skip=(".git",)) == before


def test_a_link_to_a_checkout(world: World) -> None:
    link = world.root / "link"
    link.symlink_to(world.checkout())
    assert world.run("apply", "--src", link).status == 0


def test_a_relative_path_and_a_detached_head(world: World) -> None:
    source = world.checkout()
    plain_git(source, "switch", "--quiet", "--detach")
    base = world.head(source)
    assert world.run("apply", "--src", ".", cwd=source).status == 0
    assert_patched(source, base)


# --- what is there already


def test_an_already_patched_checkout(world: World) -> None:
    source = world.checkout(changes=ALL)
    before = snapshot(source)
    ran = world.run("apply", "--src", source)
    assert ran.status == 0
    assert ran.says("already patched", "nothing was changed", f"HEAD: {world.head(source)}", "already in")
    assert snapshot(source) == before


def test_applied_twice(world: World) -> None:
    source = world.checkout()
    assert world.run("apply", "--src", source).status == 0
    before = snapshot(source)
    assert world.run("apply", "--src", source).says("already patched")
    assert snapshot(source) == before


@pytest.mark.parametrize("there", [(FIRST,), (THIRD,), (FIRST, SECOND), (FIRST, THIRD)])
def test_the_rest_is_applied(world: World, there: tuple[Change, ...]) -> None:
    source = world.checkout(changes=there)
    base = world.head(source)
    ran = world.run("apply", "--src", source, "--json")
    results = {row["fix"]: row["result"] for row in json.loads(ran.out)[0]["rows"]}
    for change in ALL:
        assert results[change.fix] == ("already in" if change in there else "applied")
    assert plain_git(source, "rev-list", "--count", f"{base}..HEAD") == str(3 - len(there))
    assert_patched(source, base)


def _half(*paths: str) -> Change:
    return replace(SECOND, edits={path: SECOND.edits[path] for path in paths})


@pytest.mark.parametrize(
    ("there", "pristine"),
    [((FIRST, _half(KERNEL)), ENGINE), ((FIRST, _half(ENGINE)), KERNEL), ((_half(KERNEL),), ENGINE)],
)
def test_one_of_two_files_of_a_patch_is_patched(world: World, there: tuple[Change, ...], pristine: str) -> None:
    source = world.checkout(changes=there)
    refused(
        world,
        source,
        says=(
            "a patch is only partly in the checkout",
            "release:  0.20.2",
            "patch:    0003-mla-flat-buffer.patch",
            f"file:     {pristine}\n",
            f"found:    pristine: {pristine}\n",
            f"vllm-patches check --tree {source} --pin 0.20.2",
        ),
    )


# --- what is no usable checkout


def _modified(source: Path) -> None:
    (source / "README.md").write_text("mine", encoding="utf-8")


def _staged(source: Path) -> None:
    _modified(source)
    plain_git(source, "add", "README.md")


def _untracked(source: Path) -> None:
    (source / "notes.txt").write_text("mine", encoding="utf-8")


def _deleted(source: Path) -> None:
    (source / KERNEL).unlink()


@pytest.mark.parametrize(
    ("dirty", "line"),
    [(_modified, " M README.md"), (_staged, "M  README.md"), (_untracked, "?? notes.txt"), (_deleted, f" D {KERNEL}")],
)
def test_a_dirty_checkout(world: World, dirty: Callable[[Path], None], line: str) -> None:
    source = world.checkout()
    dirty(source)
    ran = refused(world, source, says=("the checkout is not clean; nothing was changed", f"found:    {line}"))
    subprocess.run(shlex.split(next_command(ran)), check=True, env=plain_env(), capture_output=True)
    assert world.run("apply", "--src", source).status == 0, "the told command makes it clean"


def test_ignored_files_are_no_dirt(world: World) -> None:
    source = world.checkout()
    (source / "built.so").touch()
    assert world.run("apply", "--src", source).status == 0
    assert (source / "built.so").exists()


def _conflict(source: Path, command: list[str]) -> None:
    """Leave the checkout in the middle of *command* with a conflict in README.md."""
    plain_git(source, "switch", "--quiet", "--create", "other")
    (source / "README.md").write_text("other\n", encoding="utf-8")
    plain_git(source, "commit", "--quiet", "-a", "-m", "other")
    plain_git(source, "switch", "--quiet", "main")
    (source / "README.md").write_text("mine\n", encoding="utf-8")
    plain_git(source, "commit", "--quiet", "-a", "-m", "mine")
    done = subprocess.run(["git", *command], cwd=source, env=plain_env(), capture_output=True, check=False)
    assert done.returncode != 0


@pytest.mark.parametrize(
    ("command", "mark"),
    [
        (["merge", "other"], "MERGE_HEAD"),
        (["rebase", "other"], "rebase-merge"),
        (["rebase", "--apply", "other"], "rebase-apply"),
        (["cherry-pick", "other"], "CHERRY_PICK_HEAD"),
        (["revert", "main~1"], "REVERT_HEAD"),
    ],
)
def test_a_checkout_in_the_middle_of_something(world: World, command: list[str], mark: str) -> None:
    source = world.checkout()
    if command[0] == "revert":
        (source / "README.md").write_text("first\n", encoding="utf-8")
        plain_git(source, "commit", "--quiet", "-a", "-m", "first")
    _conflict(source, command)
    refused(world, source, says=("the checkout is in the middle of something", f"found:    {mark}", "status"))


def test_a_merge_without_conflict_that_is_not_committed(world: World) -> None:
    """Its state is told as such, not as mere dirt."""
    source = world.checkout()
    plain_git(source, "switch", "--quiet", "--create", "other")
    (source / "README.md").write_text("other\n", encoding="utf-8")
    plain_git(source, "commit", "--quiet", "-a", "-m", "other")
    plain_git(source, "switch", "--quiet", "main")
    plain_git(source, "merge", "--quiet", "--no-commit", "--no-ff", "other")
    refused(world, source, says=("found:    MERGE_HEAD",))


def test_a_bisection(world: World) -> None:
    source = world.checkout(changes=(THIRD,))
    plain_git(source, "bisect", "start", "HEAD", "HEAD~1")
    refused(world, source, says=("found:    BISECT_LOG",))


def test_a_folder_that_is_no_checkout(world: World) -> None:
    folder = world.root / "plain"
    write_tree(folder, sdist_files("0.20.2"))
    refused(world, folder, says=("SRC is not the root of a git checkout", f"file:     {folder}", "patch -p1 -F0"))


def test_a_folder_inside_a_checkout(world: World) -> None:
    source = world.checkout()
    ran = world.run("apply", "--src", source / "vllm")
    assert ran.status == 1
    assert ran.says("SRC is not the root of a git checkout", f"file:     {source / 'vllm'}")
    assert plain_git(source, "status", "--porcelain") == ""


def test_a_file(world: World) -> None:
    ran = world.run("apply", "--src", world.sdist())
    assert (ran.status, ran.out) == (1, "")
    assert ran.says("SRC is not a folder", f"file:     {world.sdist()}", f"ls -ld {world.sdist()}")


def test_nothing_there(world: World) -> None:
    assert world.run("apply", "--src", world.root / "none").says("SRC is not a folder")


def test_a_bare_repository(world: World) -> None:
    bare = world.root / "bare"
    plain_git(world.root, "clone", "--quiet", "--bare", str(world.checkout()), str(bare))
    refused(world, bare, says=("SRC is not the root of a git checkout",))


def test_a_checkout_without_commits(world: World) -> None:
    source = world.root / "empty"
    source.mkdir()
    plain_git(source, "init", "--quiet")
    refused(world, source, says=("the checkout has no commit", f"file:     {source}"))


def test_a_checkout_of_something_else(world: World) -> None:
    source = world.root / "other"
    write_tree(source, {"setup.py": b"pass\n"})
    plain_git(source, "init", "--quiet")
    world.commit(source, "other")
    refused(world, source, says=("the checkout is not vLLM", "the files of one of the pins", "none of them"))


def test_another_version_is_named(world: World) -> None:
    source = world.checkout("0.21.0")
    ran = refused(
        world, source, "--pin", "0.20.2", says=("the checkout is vLLM 0.21.0, not 0.20.2", "release:  0.20.2")
    )
    assert next_command(ran) == f"make apply PIN=0.21.0 SRC={source}"


def test_a_fork_whose_touched_file_drifted(world: World) -> None:
    source = world.checkout()
    path = source / ENGINE
    path.write_bytes(path.read_bytes().replace(b"step = 60\n", b"step = sixty\n"))
    world.commit(source, "mine")
    ran = refused(world, source, says=("not a release with a series", "found:    nearest is ", "2 of 3 touched files"))
    assert next_command(ran) == f"vllm-patches check --tree {source} --pin 0.20.2"


def test_a_fork_that_drifted_with_its_release_named(world: World) -> None:
    source = world.checkout()
    (source / KERNEL).write_bytes(b"other\n")
    world.commit(source, "mine")
    says = ("not a release with a series", "release:  0.20.1", "expected: the files of 0.20.1", "--pin 0.20.1")
    refused(world, source, "--pin", "0.20.1", says=says)


def test_a_release_without_a_series(world: World) -> None:
    refused(world, world.checkout(), "--pin", "0.19.0", says=("there is no series", "release:  0.19.0", "0.21.0"))


def test_all_is_no_release_of_a_checkout(world: World) -> None:
    refused(world, world.checkout(), "--pin", "all", says=("unknown release",))


def test_committed_crlf_line_ends_are_the_reason(world: World) -> None:
    source = world.checkout()
    for path in (ENGINE, KERNEL, SCRIPT):
        (source / path).write_bytes((source / path).read_bytes().replace(b"\n", b"\r\n"))
    world.commit(source, "from Windows")
    says = ("CRLF line ends in its commits", f"file:     {source}", f"found:    CRLF in {KERNEL}, {SCRIPT}, {ENGINE}")
    ran = refused(world, source, says=says)
    subprocess.run(shlex.split(next_command(ran), comments=True), check=True, env=plain_env(), capture_output=True)
    plain_git(source, "commit", "--quiet", "-m", "as upstream has it")
    plain_git(source, "checkout", "--quiet", "--force", ".")
    assert world.run("apply", "--src", source).status == 0, "the told command mends it"


def test_crlf_line_ends_are_not_blamed_for_other_drift(world: World) -> None:
    source = world.checkout()
    (source / ENGINE).write_bytes((source / ENGINE).read_bytes().replace(b"\n", b"\r\n"))
    (source / KERNEL).write_bytes(b"other\n")
    world.commit(source, "mine")
    refused(world, source, says=("not a release with a series",))


# --- the branch


def _branch(source: Path, at: str) -> None:
    plain_git(source, "branch", BRANCH, at)


def test_a_branch_of_that_name_in_the_way(world: World) -> None:
    source = world.checkout()
    _branch(source, "main")
    existing = world.head(source)
    # The commits that were compared are objects of the repository now; no ref, no file and no index has changed.
    ran = refused(
        world,
        source,
        says=(
            "a branch of that name is in the way",
            f"found:    {BRANCH} at {existing}",
            f"expected: no branch {BRANCH}",
        ),
        skip=(".git/objects",),
    )
    assert plain_git(source, "for-each-ref", "refs/vllm-patches") == ""
    subprocess.run(shlex.split(next_command(ran)), check=True, env=plain_env(), capture_output=True)
    assert world.run("apply", "--src", source).status == 0, "the told command clears the way"


def test_a_branch_below_that_name_in_the_way(world: World) -> None:
    """refs/heads/vllm-patches is a file then, and can be no folder."""
    source = world.checkout()
    plain_git(source, "branch", "vllm-patches")
    refused(world, source, says=("vllm-patches",), skip=(".git/objects",))
    assert plain_git(source, "symbolic-ref", "--short", "HEAD") == "main"


def test_the_branch_of_an_earlier_run_is_taken_again(world: World) -> None:
    source = world.checkout()
    assert world.run("apply", "--src", source).status == 0
    head = world.head(source)
    plain_git(source, "switch", "--quiet", "main")
    assert world.run("apply", "--src", source).status == 0
    assert (world.head(source), plain_git(source, "symbolic-ref", "--short", "HEAD")) == (head, BRANCH)


def test_git_that_refuses_to_switch_leaves_no_branch(world: World) -> None:
    """The branch is checked out elsewhere in the meantime, or a lock stands: git's own words, and no trace."""
    source = world.checkout()
    (source / ".git" / "index.lock").touch()
    before = files_of(source, skip=(".git/objects",))
    ran = world.run("apply", "--src", source)
    assert ran.status == 1
    assert ran.says("index.lock", "next:")
    assert files_of(source, skip=(".git/objects",)) == before


def test_a_change_that_git_status_does_not_show_is_kept(world: World) -> None:
    """git itself refuses to overwrite it, and the branch is taken back."""
    source = world.checkout()
    plain_git(source, "update-index", "--skip-worktree", KERNEL)
    (source / KERNEL).write_bytes(b"mine\n")
    before = files_of(source, skip=(".git/objects",))
    ran = world.run("apply", "--src", source)
    assert ran.status == 1
    assert ran.says("next:")
    assert files_of(source, skip=(".git/objects",)) == before
