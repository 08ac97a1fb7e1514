"""What a power cut could undo: the calls that change a disk, in their order, held against three rules."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


class Disk:
    """Records, from here on, every file opened for writing, given a name, removed or made durable.

    A file system may keep names and contents in any order until it is told to sync. The rules of `check`:

    1. a file gets its name (rename or link) only when its content is durable;
    2. right after a name is given, before any other name is given or removed, the folder of that name is synced;
    3. the last thing done to a folder in which a name was removed is a sync, and a file is gone durably before a name
       is removed from another folder.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, Path, int]] = []
        for name in ("open", "replace", "link", "unlink", "fsync", "rmdir"):
            monkeypatch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _recorded(self, name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            path, inode = self._subject(name, arguments), 0
            if name in ("replace", "link"):
                inode = os.stat(arguments[0], dir_fd=options.get("src_dir_fd")).st_ino
            elif name == "fsync":
                inode = os.fstat(arguments[0]).st_ino
            result = real(*arguments, **options)
            if name == "open":
                inode = os.fstat(result).st_ino
            writes = name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR)
            if writes and "dir_fd" not in options:  # with it: inside a folder that is removed as a whole
                self.events.append((name, path, inode))
            return result

        return call

    @staticmethod
    def _subject(name: str, arguments: tuple[Any, ...]) -> Path:
        if name == "fsync":
            return Path(f"/proc/self/fd/{arguments[0]}").resolve()
        return Path(arguments[1] if name in ("replace", "link") else arguments[0])

    def named(self) -> list[Path]:
        """The names that were given, in order."""
        return [path for name, path, _ in self.events if name in ("replace", "link")]

    def removed(self) -> list[Path]:
        """The files that were removed, in order."""
        return [path for name, path, _ in self.events if name == "unlink"]

    def check(self) -> None:
        """Assert the rules; and that there is something to assert."""
        dirty: set[int] = set()
        unsynced: set[Path] = set()
        before = ("", Path(), 0)
        for name, path, inode in self.events:
            if name == "open":
                dirty.add(inode)
            elif name == "fsync":
                dirty.discard(inode)
                unsynced.discard(path)
            elif name in ("replace", "link"):
                assert inode not in dirty, f"{path} was named before its content was durable"
                second = name == "replace" and before[0] == "link" and before[2] == inode  # a nameless file's first
                assert second or not unsynced, f"{path} was named while {unsynced} waited for a sync"
                unsynced.add(path.parent.resolve())
            elif name == "unlink":
                waiting = unsynced - {path.parent.resolve()}
                assert not waiting, f"{path} was removed while {waiting} waited for a sync"
                unsynced.add(path.parent.resolve())
            elif name == "rmdir":
                unsynced.discard(path.resolve())
            before = (name, path, inode)
        assert not unsynced, f"{unsynced} were not synced at the end"
        assert self.named() and any(name == "fsync" for name, _, _ in self.events)
