"""A big file that appears under its name only when it is whole, and leaves nothing behind when its writer is killed."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_patches import swap
from vllm_patches.sources import cache

OUT = "another place: --out DIR, with make DIST=DIR"  # what to choose where an output folder cannot be written


@dataclass
class OutFile:
    """An open file of *folder* without its final name; *beside* is its name until then, if it has one."""

    folder: Path
    file: int
    beside: Path | None

    def publish(self, name: str) -> Path:
        """Give the file its name; whatever had that name is replaced in one step, and only by what is on the disk."""
        target = self.folder / name
        os.fchmod(self.file, 0o644)
        os.fsync(self.file)  # before the name: else a power cut could leave the name with half a file
        cache.sweep(self.folder, f".{name}.*.tmp")
        if self.beside is None:
            self.beside = self.folder / f".{name}.{secrets.token_hex(4)}.tmp"
            _link(self.file, self.beside)
        swap.rename(self.beside, target)
        return target


@contextlib.contextmanager
def unnamed(folder: Path, another: str = OUT) -> Iterator[OutFile]:
    """A new file in *folder* for reading and writing, gone at the end unless it was published.

    Linux can open a file that has no name at all: then even SIGKILL leaves nothing, but in the moment between its first
    name and its own. Where the file system cannot, it is called ``.vllm-patches-….tmp`` from the start. What a killed
    process has left so, the next one sweeps; the file is locked for that as long as this process lives. *another* is
    what an error advises to choose in place of *folder*.
    """
    with cache.disk_errors(folder, another):
        folder.mkdir(parents=True, exist_ok=True)
        cache.sweep(folder, ".vllm-patches-*.tmp")
        out = OutFile(folder, *_open(folder))
        try:
            yield out
        finally:
            os.close(out.file)
            if out.beside is not None:
                out.beside.unlink(missing_ok=True)


def _open(folder: Path) -> tuple[int, Path | None]:
    if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir():
        with contextlib.suppress(OSError):  # no such thing on this file system; a real trouble shows again below
            file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            cache.lock(file, wait=True)
            return file, None
    while True:
        file, name = tempfile.mkstemp(prefix=".vllm-patches-", suffix=".tmp", dir=folder)
        cache.lock(file, wait=True)
        if Path(name).exists():  # else a sweep took it in the moment before it was locked
            return file, Path(name)
        os.close(file)


def _link(file: int, path: Path) -> None:
    """Name a file that has none. os.link follows the link in /proc only when it is given a folder's descriptor."""
    links = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.link(str(file), path, src_dir_fd=links, follow_symlinks=True)
    finally:
        os.close(links)
