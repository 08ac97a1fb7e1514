"""The build backend: setuptools, with archives whose bytes depend on nothing but the files in them.

Dates, owners, modes and the order of members come from here and not from the machine, and members are stored:
deflate differs between builds of zlib.
"""

from __future__ import annotations

import gzip
import io
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_DATE = (1980, 1, 1, 0, 0, 0)  # the oldest that a zip can say
_REGULAR = (stat.S_IFREG | 0o644) << 16


def build_wheel(directory: str, settings: Any = None, metadata_directory: str | None = None) -> str:
    """PEP 517."""
    # setuptools copies into build/lib and never removes what is gone: a retired patch would go along for ever.
    shutil.rmtree(Path("build/lib"), ignore_errors=True)
    name: str = build_meta.build_wheel(directory, settings, metadata_directory)
    _normalise_wheel(Path(directory) / name)
    return name


def build_sdist(directory: str, settings: Any = None) -> str:
    """PEP 517."""
    name: str = build_meta.build_sdist(directory, settings)
    _normalise_sdist(Path(directory) / name)
    return name


def _normalise_wheel(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files, key=lambda name: (".dist-info/" in name, name)):  # dist-info last, as PEP 427 asks
            info = zipfile.ZipInfo(name, _DATE)
            info.create_system, info.external_attr = 3, _REGULAR
            archive.writestr(info, files[name])


def _normalise_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        members = {m.name: (m.mode, archive.extractfile(m)) for m in archive.getmembers() if m.isfile()}
        files = {name: (mode, file.read()) for name, (mode, file) in members.items() if file}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in sorted(files):
            mode, data = files[name]
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755 if mode & 0o100 else 0o644
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes(gzip.compress(buffer.getvalue(), compresslevel=0, mtime=0))
