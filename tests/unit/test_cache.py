"""The cache: nothing in it is believed unseen, and nothing half-written is ever found in it."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from vllm_patches import cache
from vllm_patches.errors import PatchesError
from vllm_patches.hunks import blob_id


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
        (errno.EROFS, "the folder cannot be written", "XDG_CACHE_HOME="),
        (errno.EACCES, "the folder cannot be written", "XDG_CACHE_HOME="),
        (errno.EPERM, "the folder cannot be written", "XDG_CACHE_HOME="),
    ],
)
def test_what_a_disk_refuses_is_named(number: int, what: str, command: str) -> None:
    with pytest.raises(PatchesError) as caught, cache.disk_errors(Path("/where")):
        raise OSError(number, os.strerror(number), "/where/file")
    assert (caught.value.what, caught.value.file) == (what, "/where")
    assert os.strerror(number) in caught.value.found
    assert caught.value.next_command.startswith(command)


def test_any_other_error_of_the_system_passes_through() -> None:
    with pytest.raises(IsADirectoryError), cache.disk_errors(Path("/where")):
        raise OSError(errno.EISDIR, "is a directory")


def _aged(path: Path, folder: bool, age: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if folder:
        (path / "repository").mkdir(parents=True)
    else:
        path.touch()
    then = time.time() - age
    os.utime(path, (then, then))
    return path


def test_a_sweep_takes_what_killed_runs_left_and_nothing_else() -> None:
    root, day = cache.root(), 86400
    old = [
        _aged(root / "pristine-v1" / ".making-x", True, day + 60),
        _aged(root / "pristine-v1" / ".head-x", True, day + 60),
        _aged(root / "sdist" / "abc" / ".vllm.tar.gz.x.tmp", False, day + 60),
        _aged(root / "blob" / "ab" / ".cdef.x.tmp", False, day + 60),
    ]
    kept = [
        _aged(root / "pristine-v1" / ".making-now", True, 60),
        _aged(root / "sdist" / "abc" / ".vllm.tar.gz.now.tmp", False, 60),
        _aged(root / "pristine-v1" / "abc", True, day + 60),
        _aged(root / "sdist" / "abc" / "vllm.tar.gz", False, day + 60),
        _aged(root / "sdist" / ".mine", False, day + 60),
    ]
    cache.sweep(time.time())
    assert [path for path in old if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []


def test_a_sweep_of_no_cache_does_nothing() -> None:
    cache.sweep(time.time())
    assert not cache.root().exists()
