"""A tarball whose bytes depend on nothing but the files in it: names sorted, owners, modes and times fixed.

The .tar is the reproducible object. The .gz holds it in stored blocks, which are written here: what a compressor makes
of the same bytes differs between builds of zlib, at level 0 too (where a block ends is its own choice).
"""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable, Mapping

from vllm_patches.dist.bundle import Asset
from vllm_patches.errors import PatchesError
from vllm_patches.hashing import sha256, sri

_BLOCK = 0xFFFF  # bytes: the most that a stored block holds
LAST_SECOND = 8**11 - 1  # the latest time that a ustar header can say


def tar(top: str, files: Iterable[Asset], epoch: int) -> bytes:
    """A ustar archive of *files* below the folder *top*, every time *epoch* (seconds since 1970)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for asset in sorted(files, key=lambda asset: asset.path):
            info = tarfile.TarInfo(f"{top}/{asset.path}")
            info.size, info.mtime = len(asset.data), epoch
            info.mode = 0o755 if asset.executable else 0o644
            archive.addfile(info, io.BytesIO(asset.data))
    return buffer.getvalue()


def gzip_stored(data: bytes) -> bytes:
    """*data* as a gzip file of stored blocks (RFC 1952, RFC 1951 3.2.4), without name and time."""
    blocks = [data[at : at + _BLOCK] for at in range(0, len(data), _BLOCK)] or [b""]
    out = [b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"]  # deflate, no flags, no time, no hint, unknown system
    for number, block in enumerate(blocks, 1):
        out += [struct.pack("<BHH", number == len(blocks), len(block), len(block) ^ 0xFFFF), block]
    out.append(struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF))
    return b"".join(out)


def sums(files: Iterable[Asset]) -> Asset:
    """``SHA256SUMS`` of *files*, for ``sha256sum --check``."""
    lines = [f"{sha256(asset.data)}  {asset.path}\n" for asset in sorted(files, key=lambda asset: asset.path)]
    return Asset("SHA256SUMS", "".join(lines).encode())


def sri_sums(files: Iterable[Asset]) -> Asset:
    """``SHA256SUMS.sri``: the same hashes as Nix writes them."""
    lines = [f"{sri(asset.data)}  {asset.path}\n" for asset in sorted(files, key=lambda asset: asset.path)]
    return Asset("SHA256SUMS.sri", "".join(lines).encode())


def source_date_epoch(default: int, env: Mapping[str, str] = os.environ) -> int:
    """``$SOURCE_DATE_EPOCH``, or *default* where it is not set."""
    text = env.get("SOURCE_DATE_EPOCH", "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) > LAST_SECOND:
        raise PatchesError(
            "SOURCE_DATE_EPOCH is not a time",
            expected=f"whole seconds since 1970, 0 to {LAST_SECOND}",
            found=text,
            next_command="export SOURCE_DATE_EPOCH=$(date +%s)",
        )
    return int(text)
