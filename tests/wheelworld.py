"""Synthetic official wheels and a catalogue with a series for them, all made the plain way: zipfile, csv, difflib."""

from __future__ import annotations

import base64
import csv
import datetime
import difflib
import hashlib
import io
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_patches.series.catalog import Catalog
from vllm_patches.series.model import FIX_IDS, FixState, Release, State, Wheel
from vllm_patches.series.tables import dump_releases

VERSION = "0.20.2"
INFO = f"vllm-{VERSION}.dist-info/"
NAME = f"vllm-{VERSION}-cp38-abi3-manylinux_2_35_x86_64.whl"
REPOSITORY = Path(__file__).resolve().parents[1]
ENGINE, OPS, KERNEL = "vllm/engine.py", "vllm/_custom_ops.py", "csrc/cache_kernels.cu"

Files = dict[str, bytes]


def numbered(count: int = 30) -> bytes:
    return b"".join(b"step = %d\n" % n for n in range(count))


def fatbin(*archs: int, code: int = 100) -> bytes:
    """A fat binary as nvcc leaves it: a header, and an entry with *code* bytes for each architecture."""
    entries = b"".join(
        struct.pack("<2HIQ12xI32x", 2, 0x101, 64, code, arch) + bytes([arch % 251]) * code for arch in archs
    )
    return struct.pack("<4s2HQ", b"\x50\xed\x55\xba", 1, 16, len(entries)) + entries


def cuda_bytes() -> bytes:
    """Two units for sm_70, sm_80 and sm_90, three for Hopper alone, and the name of CUDA 12's runtime."""
    return fatbin(70, 80, 90) * 2 + b"padding" + fatbin(90) * 3 + b"\0libcudart.so.12\0"


def official_files() -> Files:
    """The content of a small vLLM; RECORD is added when it is zipped."""
    return {
        "vllm/_C.abi3.so": bytes(range(256)) * 40 + cuda_bytes(),
        "vllm/__init__.py": b"",
        OPS: b"import torch\n\ncurrent_platform.import_kernels()\n\nx = 1\n",
        "vllm/_version.py": b"__version__ = version = '0.20.2'\n__version_tuple__ = version_tuple = (0, 20, 2)\n",
        ENGINE: numbered(),
        'vllm/data/caf\u00e9, "quoted".txt': "caf\u00e9\n".encode(),
        INFO + "licenses/LICENSE": b"Apache\n",
        INFO + "METADATA": b"Metadata-Version: 2.4\nName: vllm\nVersion: 0.20.2\nLicense-File: LICENSE\n"
        b"Requires-Dist: torch==2.10.0\n\nVersion: 0.20.2 of the description stays\n",
        INFO + "WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: cp38-abi3-linux_x86_64\n",
        INFO + "entry_points.txt": b"[console_scripts]\nvllm = vllm:main\n",
    }


def record_of(files: Files, info: str = INFO) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for name, data in files.items():
        if not name.endswith("/"):
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            writer.writerow((name, f"sha256={digest}", len(data)))
    writer.writerow((info + "RECORD", "", ""))
    return out.getvalue().encode()


class _Stream(io.RawIOBase):
    """A file that cannot be rewound: zipfile then writes data descriptors."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += data
        return len(data)


def zipped(
    files: Files,
    *,
    record: bytes | None = None,
    streamed: bool = False,
    zip64: bool = False,
    stored: Iterable[str] = (),
    modes: dict[str, int] | None = None,
) -> bytes:
    """The bytes of a wheel with these files and a RECORD."""
    out: Any = _Stream() if streamed else io.BytesIO()
    members = {**files, INFO + "RECORD": record_of(files) if record is None else record}
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, (2026, 5, 8, 20, 25, 40))
            info.external_attr = (modes or {}).get(name, 0o100644) << 16
            info.compress_type = zipfile.ZIP_STORED if name in stored else zipfile.ZIP_DEFLATED
            with archive.open(info, "w", force_zip64=zip64) as member:
                member.write(data)
    return bytes(out.data) if streamed else out.getvalue()


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def patch_bytes(subject: str, changes: dict[str, tuple[bytes, bytes]]) -> bytes:
    """A patch in the form of `git format-patch` that turns each first content into the second."""
    text = (
        "From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001\n"
        "From: a <a@b.invalid>\nDate: Sat, 21 Nov 2026 00:00:00 +0000\n"
        f"Subject: [PATCH] {subject}\n\nWhy: a test.\n\nRequires: none\n\n"
    )
    for path, (old, new) in changes.items():
        text += f"diff --git a/{path} b/{path}\nindex {blob(old)}..{blob(new)} 100644\n"
        lines = [part.decode().splitlines(keepends=True) for part in (old, new)]
        text += "".join(difflib.unified_diff(*lines, f"a/{path}", f"b/{path}"))
    return text.encode()


def make_sdist(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(f"vllm-{VERSION}/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@dataclass(frozen=True)
class WheelWorld:
    """A catalogue whose 0.20.2 has two patches, and the official wheel that it pins."""

    folder: Path
    catalog: Catalog
    official: Path
    after: Files  # the touched files of the wheel, patched

    @property
    def sdist(self) -> Path:
        return self.folder / f"vllm-{VERSION}.tar.gz"

    @property
    def release(self) -> Release:
        return self.catalog.release(VERSION)


def make_world(folder: Path, data: bytes | None = None, *, native: bool = False, name: str = NAME) -> WheelWorld:
    """Write wheel and catalogue below *folder*; the wheel's bytes are pinned as they are."""
    files = official_files()
    data = zipped(files) if data is None else data
    folder.mkdir(parents=True, exist_ok=True)
    official = folder / name
    official.write_bytes(data)
    once = files[ENGINE].replace(b"step = 3\n", b"step = 3.5\n")
    twice = once.replace(b"step = 20\n", b"")
    kernel = b"int a;\nint b;\n"
    first = {ENGINE: (files[ENGINE], once)} | ({KERNEL: (kernel, kernel + b"int c;\n")} if native else {})
    patches = folder / "patches"
    series = patches / "v0.20.2"
    series.mkdir(parents=True)
    names = ["0001-dsa-mtp-ima.patch", "0003-mla-flat-buffer.patch"]
    (series / names[0]).write_bytes(patch_bytes("engine: half a step", first))
    (series / names[1]).write_bytes(patch_bytes("engine: skip a step", {ENGINE: (once, twice)}))
    (series / "series").write_text("".join(f"{name}\n" for name in names))
    shutil.copy(REPOSITORY / "patches" / "fixes.toml", patches)
    states = dict.fromkeys(FIX_IDS, FixState(State.FIXED, "vllm/engine.py:1"))
    states |= {"0001": FixState(State.LIVE, "vllm/engine.py:4"), "0005": FixState(State.ABSENT, "no such code")}
    states |= {"0003": FixState(State.LIVE, "vllm/engine.py:21")}
    sdist = make_sdist(folder / f"vllm-{VERSION}.tar.gz", {KERNEL: kernel, "csrc/cache.h": b"", ENGINE: files[ENGINE]})
    release = Release(
        VERSION, datetime.date(2026, 5, 10), sdist.name, hashlib.sha256(sdist.read_bytes()).hexdigest(),
        sdist.stat().st_size, states, "v0.20.2",
        blobs={path: blob(old) for path, (old, _) in first.items()},
        revision=3, wheels=(Wheel(name, hashlib.sha256(data).hexdigest(), len(data)),),
    )  # fmt: skip
    (patches / "releases.toml").write_text(dump_releases({VERSION: release}), encoding="utf-8")
    return WheelWorld(folder, Catalog(patches), official, {ENGINE: twice})
