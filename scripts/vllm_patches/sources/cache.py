"""The cache: sdists and wheels by sha256, touched files by git blob id, pristine git packs by sdist.

Everything in it is content-addressed, checked when it is read, written beside and renamed into place, and can be
deleted at any time: nothing that `apply` makes links into it. What is being written is locked by its process, so that
the next one can tell, and remove, what a killed one has left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.series.hunks import blob_id


def root() -> Path:
    """``${XDG_CACHE_HOME:-~/.cache}/vllm-patches``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vllm-patches"


@contextlib.contextmanager
def disk_errors(where: Path, another: str = "another build folder: BUILD=/a/writable/folder") -> Iterator[None]:
    """Turn what a disk can refuse into our error, naming the place and what to type: *another* says what to choose."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise PatchesError(
                "no space left on the device",
                file=str(where),
                found=str(error),
                next_command=f"df -h {where}",
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise PatchesError(
                "the folder cannot be written",
                file=str(where),
                found=str(error),
                next_command=_elsewhere(where, another),
            ) from error
        raise


def _elsewhere(where: Path, another: str) -> str:
    """What to type where a folder cannot be written."""
    if where.is_relative_to(root()):
        return "XDG_CACHE_HOME=/a/writable/folder make apply"
    return f"ls -ld {where}    # {another}"


@contextlib.contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A new file beside *target* that replaces it when the block ends well, and is gone when it does not."""

    def make() -> str:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        return name

    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, f".{target.name}.*.tmp")
        with _held(make) as beside:
            yield beside
            beside.chmod(0o644)
            beside.replace(target)


@contextlib.contextmanager
def scratch(folder: Path, prefix: str) -> Iterator[Path]:
    """A new folder in *folder* that is gone when the block ends; sweeps what killed processes have left there."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, f"{prefix}*")
    with _held(lambda: tempfile.mkdtemp(prefix=prefix, dir=folder)) as path:
        try:
            yield path
        except PatchesError as error:  # it must not send anybody into a folder that is gone in a moment
            inside = re.compile(re.escape(str(path)) + r"\S*")
            error.file = inside.sub(str(folder), error.file)
            error.next_command = inside.sub(str(folder), error.next_command)
            raise


@contextlib.contextmanager
def _held(make: Callable[[], str]) -> Iterator[Path]:
    """What *make* makes, locked as long as this process lives, and removed at the end."""
    path, handle = _make_and_lock(make)
    try:
        yield path
    finally:
        remove(path)
        os.close(handle)


def _make_and_lock(make: Callable[[], str]) -> tuple[Path, int]:
    while True:
        path = Path(make())
        with contextlib.suppress(FileNotFoundError):  # a sweep took it in the moment before it was locked
            handle = os.open(path, os.O_RDONLY)
            lock(handle, wait=True)
            if path.exists():
                return path, handle
            os.close(handle)


def sweep(folder: Path, pattern: str) -> None:
    """Remove what matches *pattern* and is locked by no living process."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            handle = os.open(left, os.O_RDONLY)
            if lock(handle, wait=False):
                remove(left)
            os.close(handle)


def lock(handle: int, *, wait: bool) -> bool:
    """Lock a file or folder until *handle* is closed or its process dies; False where that cannot be had."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held; or a file system without locks: nothing is swept there
        return False
    return True


def remove(left: Path) -> None:
    """Remove a file or folder of a killed process, whose git may live on and write there for a moment."""
    for _ in range(100):
        if not left.is_dir():
            left.unlink(missing_ok=True)
        shutil.rmtree(left, ignore_errors=True)
        if not left.exists():
            return
        time.sleep(0.05)


def sdist_path(sha256: str, name: str) -> Path:
    """Where the sdist of that hash is kept."""
    return root() / "sdist" / sha256 / name


def wheel_path(sha256: str, name: str) -> Path:
    """Where the official wheel of that hash is kept."""
    return root() / "wheel" / sha256 / name


def pristine_path(sha256: str) -> Path:
    """The folder of the pristine git objects made from the sdist of that hash."""
    return root() / "pristine-v1" / sha256


def blob_path(blob: str) -> Path:
    """Where the file content of that git blob id is kept."""
    return root() / "blob" / blob[:2] / blob[2:]


def load_blob(blob: str) -> bytes | None:
    """The content of a blob, or None when it is not cached (or not sound: then it is forgotten)."""
    path = blob_path(blob)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if blob_id(data) == blob:
        return data
    path.unlink(missing_ok=True)
    return None


def store_blob(data: bytes) -> str:
    """Keep a file's content; returns its blob id."""
    blob = blob_id(data)
    with written_beside(blob_path(blob)) as beside:
        beside.write_bytes(data)
    return blob
