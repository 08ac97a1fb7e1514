"""The git calls: in our own environment nothing of the user's counts, in theirs everything does."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_commits import ENTRIES, RELEASE
from vllm_patches.errors import PatchesError
from vllm_patches.trees import git
from vllm_patches.trees.commits import pristine_stream
from world import ENGINE, FIRST, SECOND, World, plain_env, plain_git, snapshot


@pytest.fixture
def source(world: World) -> Path:
    return world.checkout(changes=(FIRST, SECOND))


def _wrapper(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a `git` before the real one on PATH; ``$REAL`` is the real one."""
    folder.mkdir()
    real = next(Path(p) / "git" for p in os.environ["PATH"].split(":") if (Path(p) / "git").exists())
    (folder / "git").write_text(f"#!/bin/sh\nREAL={real}\n{script}\n", encoding="utf-8")
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_without_git_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PatchesError) as caught:
        git.init(tmp_path / "r", "main")
    assert caught.value.what == "git is not installed"
    assert "install git" in caught.value.next_command


def test_an_unknown_failure_is_quoted(source: Path) -> None:
    with pytest.raises(PatchesError) as caught:
        git.update_ref(source, "refs/heads/x", "nonsense")
    assert caught.value.what.startswith("git update-ref failed with exit status")
    assert "nonsense" in caught.value.found
    assert str(source) in caught.value.next_command


def test_outside_any_repository(tmp_path: Path) -> None:
    with pytest.raises(PatchesError) as caught:
        git.status(tmp_path)
    assert caught.value.what == "not a git checkout"


def test_another_users_checkout_is_named_with_the_command(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # git's own test switch, set where our clean environment cannot drop it.
    _wrapper(tmp_path / "bin", 'GIT_TEST_ASSUME_DIFFERENT_OWNER=1 exec $REAL "$@"', monkeypatch)
    with pytest.raises(PatchesError) as caught:
        git.top_level(source)
    assert caught.value.what == "git refuses the folder: it belongs to another user"
    assert caught.value.next_command == f"git config --global --add safe.directory {source}"
    plain_git(source, "config", "--file", str(Path(os.environ["HOME"]) / ".gitconfig"), "safe.directory", str(source))
    assert git.top_level(source) == source.resolve()
    assert git.rev_parse(source, "HEAD"), "our own environment trusts what the user's has let through"


def test_a_full_disk_is_told_by_what_git_says(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _wrapper(tmp_path / "bin", "echo 'fatal: write error: No space left on device' >&2; exit 128", monkeypatch)
    with pytest.raises(PatchesError) as caught:
        git.rev_parse(source, "HEAD")
        git.status(source)
    assert caught.value.what == "no space left on the device"
    assert caught.value.next_command == f"df -h {source}"


def test_top_level(source: Path, tmp_path: Path) -> None:
    assert git.top_level(source) == source.resolve()
    assert git.top_level(tmp_path) is None


def test_a_folder_inside_a_repository_is_not_its_part(source: Path) -> None:
    assert git.top_level(source / "vllm") is None


def test_a_link_to_a_checkout_is_the_checkout(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    assert git.top_level(tmp_path / "link") == source.resolve()


def test_status_shows_changed_untracked_and_ignored(source: Path) -> None:
    assert git.status(source) == []
    (source / ENGINE).write_bytes(b"changed\n")
    (source / "new").touch()
    (source / "built.so").touch()
    assert git.status(source) == [f" M {ENGINE}", "?? new"]
    assert git.status(source, ignored=True) == [f" M {ENGINE}", "?? new", "!! built.so"]


def test_status_writes_nothing(source: Path) -> None:
    os.utime(source / ENGINE)  # git would refresh its index for that
    before = snapshot(source)
    assert git.status(source) == []
    assert git.status(source, pinned=False) == []
    assert snapshot(source) == before


def test_revisions(source: Path) -> None:
    head = plain_git(source, "rev-parse", "HEAD")
    older = plain_git(source, "rev-parse", "HEAD~2")
    assert git.rev_parse(source, "HEAD") == head
    assert git.rev_parse(source, "refs/heads/none") is None
    assert git.commits_after(source, older, head) == [plain_git(source, "rev-parse", "HEAD~1"), head]
    assert git.is_ancestor(source, older, head)
    assert not git.is_ancestor(source, head, older)
    assert git.is_ancestor(source, head, head)


def test_blobs_are_those_of_files_only(source: Path) -> None:
    assert git.blobs(source, "HEAD", ["vllm"]) == {}
    found = git.blobs(source, "HEAD", [ENGINE, "none"])
    assert found == {ENGINE: plain_git(source, "rev-parse", f"HEAD:{ENGINE}")}
    assert git.read_blobs(source, found.values())[found[ENGINE]] == (source / ENGINE).read_bytes()


def test_a_missing_blob_is_named(source: Path) -> None:
    with pytest.raises(PatchesError) as caught:
        git.read_blobs(source, ["0" * 40])
    assert (caught.value.what, caught.value.expected) == ("a git object is missing", "0" * 40)


def test_git_path_of_a_linked_work_tree(source: Path, tmp_path: Path) -> None:
    plain_git(source, "worktree", "add", "--quiet", str(tmp_path / "linked"))
    assert git.git_path(source, "MERGE_HEAD") == source / ".git" / "MERGE_HEAD"
    assert git.git_path(tmp_path / "linked", "MERGE_HEAD") == source / ".git" / "worktrees" / "linked" / "MERGE_HEAD"
    assert git.top_level(tmp_path / "linked") == tmp_path / "linked"


def test_refs_and_switch(source: Path) -> None:
    older = plain_git(source, "rev-parse", "HEAD~1")
    git.update_ref(source, "refs/heads/other", older)
    git.switch(source, "other")
    assert plain_git(source, "rev-parse", "HEAD") == older
    assert plain_git(source, "symbolic-ref", "HEAD") == "refs/heads/other"
    assert plain_git(source, "status", "--porcelain") == ""
    git.delete_ref(source, "refs/heads/other")
    assert git.rev_parse(source, "refs/heads/other") is None


def test_no_hook_of_a_user_is_run(source: Path, tmp_path: Path) -> None:
    hook = source / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n", encoding="utf-8")
    hook.chmod(0o755)
    plain_git(source, "branch", "other", "HEAD~1")
    git.switch(source, "other")
    assert not (tmp_path / "ran").exists()
    plain_git(source, "switch", "--quiet", "main")
    assert (tmp_path / "ran").exists(), "the hook itself is sound"


def test_a_repository_of_ours_has_no_template_and_fixed_line_ends(tmp_path: Path) -> None:
    template = tmp_path / "template"
    (template / "hooks").mkdir(parents=True)
    (template / "hooks" / "post-checkout").touch()
    (Path(os.environ["HOME"]) / ".gitconfig").write_text(f"[init]\n\ttemplateDir = {template}\n", encoding="utf-8")
    git.init(tmp_path / "r", "some/branch")
    assert not (tmp_path / "r" / ".git" / "hooks").exists()
    assert plain_git(tmp_path / "r", "symbolic-ref", "HEAD") == "refs/heads/some/branch"
    assert plain_git(tmp_path / "r", "config", "core.autocrlf") == "false"


def test_an_import_is_one_pack(tmp_path: Path) -> None:
    git.init(tmp_path / "r", "main")
    git.fast_import(tmp_path / "r", pristine_stream(RELEASE, "refs/heads/main", ENTRIES))
    packs = sorted(path.suffix for path in (tmp_path / "r" / ".git" / "objects" / "pack").iterdir())
    assert packs == [".idx", ".pack"]
    plain_git(tmp_path / "r", "fsck", "--strict")


def test_a_stream_that_breaks_leaves_no_branch(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield from list(pristine_stream(RELEASE, "refs/heads/main", ENTRIES))[:-1]
        raise PatchesError("the sdist broke")

    git.init(tmp_path / "r", "main")
    with pytest.raises(PatchesError, match="the sdist broke"):
        git.fast_import(tmp_path / "r", broken())
    assert git.rev_parse(tmp_path / "r", "main") is None


def test_a_stream_that_git_refuses_is_quoted(tmp_path: Path) -> None:
    git.init(tmp_path / "r", "main")
    with pytest.raises(PatchesError) as caught:
        git.fast_import(tmp_path / "r", [b"nonsense\n"] * 100_000)  # more than a pipe holds: git dies while we write
    assert caught.value.what.startswith("git fast-import failed")
    assert "nonsense" in caught.value.found


# Settings of a user that change what a diff or a mail looks like.
DIFF_SETTINGS = [
    ("diff.noprefix", "true"),
    ("diff.mnemonicPrefix", "true"),
    ("diff.context", "9"),
    ("diff.interHunkContext", "30"),
    ("diff.algorithm", "patience"),
    ("diff.indentHeuristic", "false"),
    ("diff.suppressBlankEmpty", "true"),
    ("diff.renames", "copies"),
    ("core.abbrev", "7"),
    ("core.quotePath", "false"),
    ("format.signOff", "true"),
    ("format.from", "Other <o@other.invalid>"),
    ("format.headers", "X-Mine: yes\n"),
    ("format.to", "list@list.invalid"),
    ("format.cc", "list@list.invalid"),
    ("format.signature", "mine"),
    ("format.subjectPrefix", "MINE"),
    ("format.numbered", "true"),
    ("format.attach", "boundary"),
    ("format.useAutoBase", "true"),
    ("format.encodeEmailHeaders", "false"),
    ("format.outputDirectory", "elsewhere"),
    ("format.pretty", "oneline"),
    ("log.showSignature", "true"),
    ("color.ui", "always"),
    ("i18n.logOutputEncoding", "latin1"),
]


@pytest.mark.parametrize("place", ["--global", "--local"])
def test_a_patch_file_depends_on_the_commit_alone(world: World, source: Path, place: str) -> None:
    write_diffs(source)
    plain = git.format_patch(source, "HEAD")
    env = plain_env(HOME=os.environ["HOME"])
    del env["GIT_CONFIG_GLOBAL"]
    for key, value in DIFF_SETTINGS:
        plain_git(source, "config", place, key, value, env=env)
        assert git.format_patch(source, "HEAD") == plain, key
    assert plain_git(source, "config", "diff.noprefix", env=env) == "true", "the settings did reach git"


def write_diffs(source: Path) -> None:
    """A commit in which each of those settings would show: blank lines, two near hunks, an ambiguous block."""
    block = "def one():\n    pass\n\n"
    before = block + "\n".join(f"{number}\n" for number in range(30))
    path = source / ENGINE
    path.write_text(before, encoding="utf-8")
    plain_git(source, "commit", "--quiet", "-a", "-m", "before")
    after = block * 2 + before.removeprefix(block).replace("\n9\n", "\nnine\n").replace("\n18\n", "\neighteen\n")
    path.write_text(after, encoding="utf-8")
    plain_git(source, "commit", "--quiet", "-a", "-m", "engine: caf\u00e9 " + "long " * 20)


def test_checkout_writes_the_files_with_their_modes(tmp_path: Path) -> None:
    git.init(tmp_path / "r", "main")
    git.fast_import(tmp_path / "r", pristine_stream(RELEASE, "refs/heads/main", ENTRIES))
    git.checkout(tmp_path / "r", "main")
    for entry in ENTRIES:
        assert (tmp_path / "r" / entry.path).read_bytes() == entry.data
    assert (tmp_path / "r" / "tools/run.sh").stat().st_mode & stat.S_IXUSR
