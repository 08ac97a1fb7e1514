"""The cache: nothing in it is believed unseen, and nothing half-written is ever found in it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_patches.errors import PatchesError
from vllm_patches.series.hunks import blob_id
from vllm_patches.sources import cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    made.mkdir()
    return made


def test_the_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert cache.root() == Path("/some/where/vllm-patches")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/of-a-user")
    assert cache.root() == Path("/home/of-a-user/.cache/vllm-patches")


def test_a_blob_comes_back() -> None:
    blob = cache.store_blob(b"content")
    assert blob == blob_id(b"content")
    assert cache.load_blob(blob) == b"content"
    assert cache.load_blob("0" * 40) is None


def test_a_damaged_blob_is_forgotten() -> None:
    blob = cache.store_blob(b"content")
    cache.blob_path(blob).write_bytes(b"conten")
    assert cache.load_blob(blob) is None
    assert not cache.blob_path(blob).exists()
    cache.store_blob(b"content")
    assert cache.load_blob(blob) == b"content"


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    with cache.written_beside(target) as beside:
        beside.write_bytes(b"half")
        assert not target.exists()
        assert beside.parent == target.parent, "a rename across devices would not be one step"
    assert target.read_bytes() == b"half"
    assert target.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_goes_wrong_while_writing_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(error), cache.written_beside(target) as beside:
        beside.write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.glob("*file*")] == ["file"]


@pytest.mark.parametrize(
    ("number", "what", "command"),
    [
        (errno.ENOSPC, "no space left on the device", "df -h /where"),
        (errno.EDQUOT, "no space left on the device", "df -h /where"),
        (errno.EROFS, "the folder cannot be written", "ls -ld /where "),
        (errno.EACCES, "the folder cannot be written", "ls -ld /where "),
        (errno.EPERM, "the folder cannot be written", "ls -ld /where "),
    ],
)
def test_what_a_disk_refuses_is_named(number: int, what: str, command: str) -> None:
    with pytest.raises(PatchesError) as caught, cache.disk_errors(Path("/where")):
        raise OSError(number, os.strerror(number), "/where/file")
    assert (caught.value.what, caught.value.file) == (what, "/where")
    assert os.strerror(number) in caught.value.found
    assert caught.value.next_command.startswith(command)


def test_a_cache_that_cannot_be_written_may_be_elsewhere() -> None:
    with pytest.raises(PatchesError) as caught, cache.disk_errors(cache.root() / "sdist"):
        raise PermissionError(errno.EACCES, "no")
    assert caught.value.next_command.startswith("XDG_CACHE_HOME=")


def test_an_error_does_not_send_anybody_into_a_folder_that_is_gone(folder: Path) -> None:
    with pytest.raises(PatchesError) as caught, cache.scratch(folder, ".making-") as gone:
        raise PatchesError("full", file=str(gone / "tree"), next_command=f"df -h {gone}/tree    # and look")
    assert (caught.value.file, caught.value.next_command) == (str(folder), f"df -h {folder}    # and look")


def test_any_other_error_of_the_system_passes_through() -> None:
    with pytest.raises(IsADirectoryError), cache.disk_errors(Path("/where")):
        raise OSError(errno.EISDIR, "is a directory")


def test_a_scratch_folder_is_gone_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broke"), cache.scratch(tmp_path / "new", ".making-") as folder:
        assert folder.parent == tmp_path / "new"
        assert folder.name.startswith(".making-")
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
        raise ValueError("broke")
    assert list((tmp_path / "new").iterdir()) == []


def _leave(path: Path, *, folder: bool) -> Path:
    """What a killed process leaves: nobody holds it."""
    if folder:
        (path / "repository").mkdir(parents=True)
        (path / "repository" / "file").touch()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return path


def test_the_next_scratch_folder_sweeps_what_a_killed_one_left(folder: Path) -> None:
    dead = _leave(folder / ".making-dead", folder=True)
    others = [_leave(folder / name, folder=True) for name in ("abc", ".head-x", "making-x")]
    with cache.scratch(folder, ".making-") as living, cache.scratch(folder, ".making-") as second:
        assert not dead.exists()
        assert living.exists(), "the second one's sweep leaves what a living process holds"
        assert second.exists()
    assert sorted(folder.iterdir()) == sorted(others)


def test_the_next_file_sweeps_what_a_killed_one_left(folder: Path) -> None:
    target = folder / "file"
    dead = _leave(folder / ".file.dead.tmp", folder=False)
    others = [_leave(folder / name, folder=False) for name in (".other.x.tmp", ".file.mine", "file.x.tmp")]
    with cache.written_beside(target) as first, cache.written_beside(target) as second:
        assert not dead.exists()
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert target.read_bytes() == b"first", "the last to end wins"
    assert sorted(folder.iterdir()) == sorted([*others, target])


def test_a_sweep_waits_for_nobody(tmp_path: Path) -> None:
    """Held by another process: it is passed over at once."""
    left = _leave(tmp_path / ".making-x", folder=True)
    code = "import fcntl, os, sys; h = os.open(sys.argv[1], 0); fcntl.flock(h, 2); print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(left)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        cache.sweep(tmp_path, ".making-*")
        assert left.exists()
        process.kill()
    cache.sweep(tmp_path, ".making-*")
    assert not left.exists()


def test_a_sweep_of_nothing_does_nothing(tmp_path: Path) -> None:
    cache.sweep(tmp_path / "none", "*")
    assert not (tmp_path / "none").exists()


def test_what_is_still_being_written_to_is_removed_in_the_end(tmp_path: Path) -> None:
    """The git of a killed process lives a moment longer."""
    left = _leave(tmp_path / ".making-x", folder=True)
    code = 'i=0; while [ $i -lt 300 ]; do mkdir -p "$1/d$i" && : > "$1/d$i/f"; i=$((i+1)); done'
    with subprocess.Popen(["sh", "-c", code, "sh", str(left)]) as process:
        while not (left / "d5").exists():
            assert process.poll() is None
        cache.remove(left)
        process.wait()
    cache.remove(left)
    assert not left.exists()
