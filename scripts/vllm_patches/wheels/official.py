"""An official wheel, open: its members and its RECORD, which agree, or it is refused."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.series.model import Release
from vllm_patches.wheels import wheelmeta
from vllm_patches.wheels.record import Row, encoded, parse_record
from vllm_patches.wheels.wheelfile import Member, damaged, read_data, read_members

_UNSIGNED = ("RECORD.jws", "RECORD.p7s")  # not listed in RECORD, by the specification


@dataclass(frozen=True)
class Official:
    """An open official wheel: its members by name, and its RECORD, which agree about the files."""

    file: int
    release: Release
    name: str
    members: Mapping[str, Member]
    rows: Mapping[str, Row]

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, release: Release) -> Iterator[Official]:
        """Open and look through *path*; raises `PatchesError` for what is no untouched wheel of *release*."""
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise PatchesError(
                f"cannot read the wheel: {error.strerror}", file=str(path), next_command=f"ls -l {path}"
            ) from error
        try:
            members = {member.name: member for member in read_members(file, path.name)}
            _refuse_other(release, path, members)
            record = members[wheelmeta.dist_info(release.version) + "RECORD"]
            official = cls(
                file, release, path.name, members, parse_record(read_data(file, record, path.name), path.name)
            )
            official._compare_names()
            yield official
        finally:
            os.close(file)

    @property
    def info(self) -> str:
        """The metadata folder, with its slash."""
        return wheelmeta.dist_info(self.release.version)

    def read(self, name: str) -> bytes:
        """A small member's content, once it is what RECORD says."""
        if name not in self.members:
            raise damaged(self.name, f"a file {name}", "none")
        data = read_data(self.file, self.members[name], self.name)
        row = self.rows[name]
        self.compare(name, hashlib.new(row.algorithm, data).digest())
        return data

    def find(self, name: str) -> bytes | None:
        """The same of a file that need not be there."""
        return self.read(name) if name in self.members else None

    def compare(self, name: str, found: bytes) -> None:
        """Raise unless *found* is the digest that RECORD has for *name*, and the sizes agree."""
        row, size = self.rows[name], self.members[name].size
        if row.digest != encoded(found) or row.size not in (None, size):
            expected, has = f"{name} {row.digest}, {row.size} bytes", f"{encoded(found)}, {size} bytes"
            raise damaged(self.name, f"what RECORD says: {expected}", has)

    def _compare_names(self) -> None:
        free = {self.info + name for name in ("RECORD", *_UNSIGNED)}
        files = {name for name, member in self.members.items() if not member.is_folder} - free
        hashed = {path for path, row in self.rows.items() if row.algorithm}
        if signed := [name for name in _UNSIGNED if self.info + name in self.members]:
            raise damaged(self.name, "a wheel without a signature, for a changed one would break it", signed[0])
        for name in sorted(files ^ hashed):
            expected = "every file in RECORD with its hash" if name in files else "every file that RECORD lists"
            raise damaged(self.name, expected, f"{name}: {'no such row' if name in files else 'no such file'}")


def _refuse_other(release: Release, path: Path, members: Iterable[str]) -> None:
    """An already patched wheel, another package, or another release."""
    folders = {name.split("/")[0] for name in members if ".dist-info/" in name}
    if folders == {wheelmeta.dist_info(release.version).rstrip("/")}:
        if wheelmeta.dist_info(release.version) + "RECORD" in members:
            return
        raise damaged(path.name, "a RECORD", "none")
    patched = any(wheelmeta.MARK in folder for folder in folders)
    raise PatchesError(
        "the wheel is patched already; nothing was written" if patched else "the wheel is not of this release",
        release=release.version,
        file=str(path),
        expected=f"the metadata folder vllm-{release.version}.dist-info",
        found=", ".join(sorted(folders)) or "none",
        next_command=f"make build PIN={release.version}    # from the official wheel",
    )
