"""The tarball: the same bytes everywhere, and what other people's tools make of them."""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
from vllm_patches.dist.bundle import Asset
from vllm_patches.dist.tarball import LAST_SECOND, gzip_stored, source_date_epoch, sri_sums, sums, tar
from vllm_patches.errors import PatchesError
from vllm_patches.hashing import sha256, sri

FILES = [Asset("b/run.sh", b"#!/bin/sh\n", executable=True), Asset("a.txt", b"a\n"), Asset("b/a.txt", b"")]


def test_a_tar_says_nothing_of_the_machine() -> None:
    with tarfile.open(fileobj=io.BytesIO(tar("top", FILES, 1_700_000_000))) as archive:
        members = archive.getmembers()
    assert [m.name for m in members] == ["top/a.txt", "top/b/a.txt", "top/b/run.sh"]
    assert [m.mode for m in members] == [0o644, 0o644, 0o755]
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {(0, 0, "", "", 1_700_000_000)}


def test_its_bytes_are_these() -> None:
    """Recorded: a change of them is a change of every published hash."""
    assert tar("top", FILES, 0) == tar("top", reversed(FILES), 0)
    assert sha256(tar("top", FILES, 0)) == "cf510721c8de5109dfa7880fff1019a0dba949581c8f658bb0b53113cdf0bcb1"


@pytest.mark.parametrize("size", [0, 1, 65534, 65535, 65536, 131070, 200_001])
def test_stored_blocks_are_a_gzip_file(size: int, tmp_path: Path) -> None:
    data = random.Random(size).randbytes(size)
    packed = gzip_stored(data)
    assert gzip.decompress(packed) == data
    (tmp_path / "x.gz").write_bytes(packed)
    assert subprocess.run(["gzip", "-dc", str(tmp_path / "x.gz")], capture_output=True, check=True).stdout == data
    blocks = max(1, -(-size // 65535))
    assert len(packed) == 10 + size + 5 * blocks + 8


def test_the_gzip_header_names_no_time_and_no_system() -> None:
    assert gzip_stored(b"x").hex() == "1f8b08000000000000ff" + "010100feff78" + "8316dc8c" + "01000000"


def test_sums_are_what_sha256sum_reads(tmp_path: Path) -> None:
    for asset in FILES:
        path = tmp_path / asset.path
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(asset.data)
    (tmp_path / "SHA256SUMS").write_bytes(sums(FILES).data)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["a.txt:", "OK", "b/a.txt:", "OK", "b/run.sh:", "OK"]


def test_sri_is_the_same_hash() -> None:
    assert sri(b"a\n") == "sha256-h0KPxSKAPTEGXnvOPPA/5HUJZjHl4Hu9eg/eYMTPJcc="
    assert sri_sums(FILES[1:2]).data.decode() == f"{sri(FILES[1].data)}  a.txt\n"
    assert hashlib.sha256(b"a\n").hexdigest() == sha256(b"a\n")


def test_source_date_epoch() -> None:
    assert source_date_epoch(5, {}) == 5
    assert source_date_epoch(5, {"SOURCE_DATE_EPOCH": "7"}) == 7


@pytest.mark.parametrize("text", ["now", "-1", "1.5", " 1", str(LAST_SECOND + 1), "\u0661"])
def test_a_source_date_epoch_that_is_none(text: str) -> None:
    with pytest.raises(PatchesError) as caught:
        source_date_epoch(5, {"SOURCE_DATE_EPOCH": text})
    assert caught.value.found == text
