"""The cache: sdists and wheels by sha256, touched files by git blob id, pristine git packs by sdist.

Everything in it is content-addressed, checked when it is read, written beside and renamed into place, and can be
deleted at any time: nothing that `apply` makes links into it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.hunks import blob_id


def root() -> Path:
    """``${XDG_CACHE_HOME:-~/.cache}/vllm-patches``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vllm-patches"


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn what a disk can refuse into our error, naming the place and what to type."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
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
                next_command="XDG_CACHE_HOME=/a/writable/folder make apply    # or BUILD=/a/writable/folder",
            ) from error
        raise


@contextlib.contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A new file beside *target* that replaces it when the block ends well, and is gone when it does not."""
    with disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        beside = Path(name)
        try:
            yield beside
            beside.chmod(0o644)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


def sweep(now: float) -> None:
    """Forget what killed runs left in the cache more than a day ago; *now* is in seconds since the epoch."""
    for left in (*root().glob("*/.*"), *root().glob("*/*/.*")):
        made_by_us = left.name.endswith(".tmp") or left.name.startswith((".making-", ".head-"))
        if made_by_us and left.lstat().st_mtime < now - 86400:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


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
