"""What a compiled CUDA library was built for: its GPU architectures and its CUDA major, from a stream.

A translation unit of nvcc leaves one "fat binary" in the library: a header of 16 bytes (magic, version, header size,
size of all entries), then entries, each with a header of its own that holds kind, sizes and architecture in plain,
even where the code itself is compressed. cuobjdump prints the same, but is not there without the CUDA toolkit.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_MAGIC = b"\x50\xed\x55\xba"
_HEADER = struct.Struct("<4s2HQ")
_ENTRY = struct.Struct("<2HIQ12xI")  # kind, -, size of this header, size of the code, architecture
_ENTRY_HEADERS = range(_ENTRY.size, 4096)
_PTX, _ELF = 1, 2
_RUNTIME = re.compile(rb"libcudart\.so\.(\d{1,2})\0")


@dataclass(frozen=True)
class CudaLibrary:
    """*archs*: what most of its units were compiled for (90 is sm_90); *cuda_major*: the CUDA runtime that it needs."""

    archs: tuple[int, ...]
    cuda_major: int


def read_library(blocks: Iterable[bytes]) -> CudaLibrary:
    """Look through a library given in blocks; no more than one entry's header and one block are held."""
    walker = _Walker()
    major, tail = 0, b""
    for block in blocks:
        walker.feed(block)
        match = _RUNTIME.search(tail + block)
        major = int(match[1]) if match else major
        tail = (tail + block)[-32:]
    # Units for single architectures (an attention kernel for Hopper alone) are many kinds of few; the plain ones agree.
    several = Counter({archs: count for archs, count in walker.units.items() if len(archs) > 1}) or walker.units
    best = max(several.items(), key=lambda item: (item[1], len(item[0])), default=((), 0))
    return CudaLibrary(best[0], major)


class _Walker:
    """Finds fat binaries in a stream and notes the architectures of each."""

    def __init__(self) -> None:
        self.units: Counter[tuple[int, ...]] = Counter()
        self._buffer = b""
        self._skip = 0  # bytes of code still to pass over
        self._left = 0  # bytes of the current fat binary still to come, code to skip included
        self._archs: list[int] = []

    def feed(self, block: bytes) -> None:
        self._buffer += block
        while self._step():
            pass

    def _step(self) -> bool:
        """One move forward; False where more bytes are needed for it."""
        if self._skip:
            taken = min(self._skip, len(self._buffer))
            self._buffer, self._skip = self._buffer[taken:], self._skip - taken
            return self._skip == 0
        return self._entry() if self._left else self._find()

    def _find(self) -> bool:
        at = self._buffer.find(_MAGIC)
        if at < 0 or len(self._buffer) - at < _HEADER.size:
            self._buffer = self._buffer[at if at >= 0 else -3 :]
            return False
        _, version, header, size = _HEADER.unpack_from(self._buffer, at)
        sound = (version, header) == (1, _HEADER.size) and 0 < size < 1 << 40
        self._buffer = self._buffer[at + (_HEADER.size if sound else len(_MAGIC)) :]
        self._left = size if sound else 0
        return True

    def _entry(self) -> bool:
        if len(self._buffer) < _ENTRY.size:
            return False
        kind, _, header, size, arch = _ENTRY.unpack_from(self._buffer)
        sound = kind in (_PTX, _ELF) and header in _ENTRY_HEADERS and header + size <= self._left
        if sound:
            self._archs += [arch] if kind == _ELF else []
            self._skip, self._left = header + size, self._left - header - size
        if not sound or not self._left:  # padding, or the end: what was noted so far stands
            if self._archs:
                self.units[tuple(sorted(set(self._archs)))] += 1
            self._archs, self._left = [], 0
        return True
