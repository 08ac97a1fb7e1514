"""What the channels are made from: one release's patches in their order, and every touched file before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_patches.dist.unified import Section
from vllm_patches.series.model import Release
from vllm_patches.wheels.wheelmeta import local_version


@dataclass(frozen=True)
class Item:
    """One patch file as it goes out."""

    name: str  # the file's name
    number: int  # ascending in the order of application
    fix: str  # "0003"; empty for a third party's
    subject: str
    raw: bytes = field(repr=False)
    sections: tuple[Section, ...] = field(repr=False)
    refreshed: bool = False  # line numbers and blob ids are not those of the original file

    @property
    def paths(self) -> tuple[str, ...]:
        """The files that it touches."""
        return tuple(dict.fromkeys(section.path for section in self.sections))

    @property
    def is_mail(self) -> bool:
        """True for what ``git am`` takes."""
        return self.raw.startswith((b"From ", b"From: "))


@dataclass(frozen=True)
class Bundle:
    """The chosen patches of one release, proved to apply; *before* and *after* map paths to bytes (None: no file)."""

    release: Release
    series: str
    items: tuple[Item, ...]
    before: Mapping[str, bytes | None]
    after: Mapping[str, bytes | None]
    modes: Mapping[str, str]
    left_out: tuple[str, ...] = ()  # fixes of the series that were not chosen
    third_party: str = ""  # the name of the other series, if there is one

    @property
    def version(self) -> str:
        """The local version of what the patches make of the release: as a wheel's, and what was chosen of it."""
        parts = [local_version(self.release)]
        if self.left_out:
            parts += ["only", *(str(int(item.fix)) for item in self.items if item.fix)]
        if self.third_party:
            parts += ["with", _segment(self.third_party)]
        return ".".join(parts)

    @property
    def mails(self) -> bool:
        """True where ``git am`` takes every patch."""
        return all(item.is_mail for item in self.items)


def _segment(name: str) -> str:
    """A folder's name as part of a local version: letters and digits."""
    return "".join(c for c in name.lower() if c.isascii() and c.isalnum()) or "others"


@dataclass(frozen=True)
class Asset:
    """One file to write; *path* is relative to the release's folder, with forward slashes."""

    path: str
    data: bytes = field(repr=False)
    executable: bool = False
