"""Single steps on files that a crash leaves either done or not done; none of them writes into an existing file.

(An installer may have hard-linked a package's file from its cache: writing into it would damage every other
environment on the machine. A rename only replaces the name.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.hashing import file_sha256


def sha256(path: Path) -> str:
    """The hash of a file's content; empty where there is none."""
    try:
        return file_sha256(path)
    except FileNotFoundError:
        return ""


def beside(target: Path) -> Path:
    """Where the new content of *target* waits: in its folder, under a name that Python does not import."""
    return target.with_name(f".{target.name}.vllm-patches-new")


def stage(target: Path, data: bytes, like: os.stat_result | None = None) -> Path:
    """Write *data* beside *target*, durably, with the mode and owner that *like* has."""
    path = beside(target)
    path.unlink(missing_ok=True)  # what a killed run left
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fchmod(handle, stat.S_IMODE(like.st_mode) if like else 0o644)
        if like and (like.st_uid, like.st_gid) != (os.geteuid(), os.getegid()):
            with contextlib.suppress(PermissionError):  # only root can give files away
                os.fchown(handle, like.st_uid, like.st_gid)
        os.fsync(handle)
    return path


def rename(source: Path, target: Path) -> None:
    """Replace *target* by *source* in one step, durably."""
    source.replace(target)
    sync_folder(target.parent)
    if source.parent != target.parent:
        sync_folder(source.parent)


def write_file(target: Path, data: bytes) -> None:
    """*target* holds *data*, or is what it was."""
    rename(stage(target, data), target)


def keep(live: Path, kept: Path) -> None:
    """A second name for the file *live*, with its bytes, mode, owner and times; a copy where links are not possible."""
    make_folder(kept.parent)
    kept.unlink(missing_ok=True)
    try:
        os.link(live, kept, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        shutil.copy2(live, kept, follow_symlinks=False)
        if not kept.is_symlink():
            _sync(kept)
    sync_folder(kept.parent)


def make_folder(path: Path) -> None:
    """The folder *path*, readable by everybody whatever the umask."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir()
        folder.chmod(0o755)
        sync_folder(folder.parent)


def remove(path: Path) -> None:
    """Remove a file, durably, where there is one."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder of ours, whole, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)


def sync_folder(folder: Path) -> None:
    """Make the names in *folder* durable."""
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path, waiting: Callable[[], None], *, shared: bool = False) -> Iterator[None]:
    """Hold a lock on *folder* itself: no lock file for RECORD to list, and it works where none can be made.

    A *shared* one is for who only reads. Where the file system has no locks, writers are refused, so readers need none.
    """
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, mode)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if not shared:
                raise _without_locks(folder, error) from error
        yield
    finally:
        os.close(handle)


_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def _without_locks(folder: Path, error: OSError) -> PatchesError:
    return PatchesError(
        "the file system of the site folder has no locks, so two runs at once could damage it; nothing was changed",
        file=str(folder),
        expected="a file system with flock",
        found=str(error),
        next_command=f"findmnt --target {folder}    # copy the environment to a local disk, or build a patched wheel",
    )


@contextlib.contextmanager
def site_errors(folder: Path, left: str) -> Iterator[None]:
    """Turn what a disk can refuse into our error, with what to type; *left* says how the package was left."""
    try:
        yield
    except OSError as error:
        where = Path(error.filename) if isinstance(error.filename, str) else folder
        for numbers, what, command in (
            ((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "no space left for the patched files", f"df -h {folder}"),
            ((errno.EROFS,), "the site folder is on a read-only file system", f"findmnt --target {folder}"),
            ((errno.EACCES, errno.EPERM), "the site folder cannot be written by this user", f"ls -ld {where.parent}"),
        ):
            if error.errno in numbers:
                raise PatchesError(
                    f"{what}; {left}", file=str(where), found=str(error), next_command=command
                ) from error
        raise
