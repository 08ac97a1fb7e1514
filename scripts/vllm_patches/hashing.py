"""sha256 of contents and files, and beside the work that brings the bytes: it takes as long, and cores are several."""

from __future__ import annotations

import base64
import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

_BATCH = 1 << 20  # small pieces are gathered: handing one over costs more than hashing it
_AHEAD = 8  # batches that may wait, so that memory stays small


def sha256(data: bytes) -> str:
    """The hash of a content, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sri(data: bytes) -> str:
    """``sha256-`` and base64, as Nix and browsers write it (W3C Subresource Integrity)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(data).digest()).decode()


def file_sha256(path: Path) -> str:
    """The hash of a file's content, read in pieces; raises what opening the file raises."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class BackgroundHash:
    """The sha256 of everything given to `update`, in that order, computed in a thread of its own."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[Future[None]] = deque()
        self._batch: list[bytes] = []
        self._size = 0

    def update(self, data: bytes) -> None:
        """Take *data*; waits only where the thread is far behind."""
        self._batch.append(data)
        self._size += len(data)
        if self._size >= _BATCH:
            self._hand_over()

    def hexdigest(self) -> str:
        """The digest of all that came; nothing may come after it."""
        self._hand_over()
        self._pool.shutdown()
        for done in self._waiting:
            done.result()
        return self._hash.hexdigest()

    def _hand_over(self) -> None:
        while len(self._waiting) >= _AHEAD:
            self._waiting.popleft().result()
        data = self._batch[0] if len(self._batch) == 1 else b"".join(self._batch)
        self._waiting.append(self._pool.submit(self._hash.update, data))
        self._batch, self._size = [], 0
