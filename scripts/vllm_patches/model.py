"""What the project is about, as frozen values: fixes, releases, patches, series. No input or output here."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from enum import Enum

FIX_IDS = ("0001", "0002", "0003", "0004", "0005")

IDENT_NAME = "vllm-patches maintainers"
IDENT_EMAIL = "maintainers@vllm-patches.invalid"


class State(Enum):
    """What a release's own code does about one of the five defects."""

    LIVE = "live"  # the engine of that release reaches the defect
    LATENT = "latent"  # the code is unsafe, no caller of that release triggers it
    FIXED = "fixed"  # upstream's own code is sound
    ABSENT = "absent"  # the code that could be wrong is not there
    BROKEN = "broken"  # the feature is dead for another reason; a patch here would not revive it

    @property
    def wants_patch(self) -> bool:
        """True where a complete series has to carry the fix."""
        return self in (State.LIVE, State.LATENT)


class Disposition(Enum):
    """What a user of one release gets for one fix; shown by `apply` and in the README's matrix."""

    APPLIED = "applied"  # the series of this release carries the patch
    FIXED = "fixed upstream"  # nothing to carry
    ABSENT = "absent in this release"  # nothing to carry
    BROKEN = "broken upstream"  # dead for another reason; nothing is carried
    NO_SERIES = "not patched"  # the defect stands there, and this project has no series for the release


@dataclass(frozen=True)
class Hunk:
    """One hunk of a unified diff; *lines* keep their leading blank, ``-`` or ``+`` and their line end."""

    old_start: int
    old_count: int
    new_start: int
    new_count: int
    lines: tuple[bytes, ...]

    @property
    def old(self) -> list[bytes]:
        """The lines the hunk expects before it is applied."""
        return [line[1:] for line in self.lines if line[:1] in b" -"]

    @property
    def new(self) -> list[bytes]:
        """The lines it leaves behind."""
        return [line[1:] for line in self.lines if line[:1] in b" +"]

    def reversed(self) -> Hunk:
        """The hunk that undoes this one."""
        swap = {b"-": b"+", b"+": b"-"}
        lines = tuple(swap.get(line[:1], line[:1]) + line[1:] for line in self.lines)
        return Hunk(self.new_start, self.new_count, self.old_start, self.old_count, lines)


@dataclass(frozen=True)
class FilePatch:
    """What one patch does to one file: git blob ids (SHA-1, 40 hex digits) before and after, and the hunks."""

    path: str
    old_blob: str
    new_blob: str
    mode: str
    hunks: tuple[Hunk, ...]


@dataclass(frozen=True)
class Patch:
    """One patch file of a series."""

    number: str  # "0003"
    name: str  # "0003-mla-flat-buffer.patch"
    author: str  # "Name <address>", as the From: line has it
    date: str  # the Date: line, RFC 2822
    subject: str  # without [PATCH]
    body: str  # prose and trailers, as the commit message has them
    trailers: tuple[tuple[str, str], ...]
    files: tuple[FilePatch, ...]
    raw: bytes = field(repr=False)

    def trailer(self, key: str) -> str:
        """The value of a trailer, or an empty string."""
        return next((value for name, value in self.trailers if name == key), "")


@dataclass(frozen=True)
class Series:
    """The ordered patches of one directory ``patches/<name>/``."""

    name: str
    patches: tuple[Patch, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """Every file that the series touches, in the order of first touch."""
        return tuple(dict.fromkeys(f.path for p in self.patches for f in p.files))

    def blob_chain(self, path: str) -> list[str]:
        """The blob ids of *path*: pristine, then after each patch that touches it."""
        touching = [f for p in self.patches for f in p.files if f.path == path]
        return [touching[0].old_blob, *(f.new_blob for f in touching)] if touching else []


@dataclass(frozen=True)
class Fix:
    """One of the five fixes, as ``patches/fixes.toml`` describes it."""

    id: str
    slug: str
    title: str
    defect: str
    symptom: str
    upstream_pr: tuple[int, ...]
    introduced_by: str
    first_fixed: str
    severity: str
    removal: str
    parts: tuple[str, ...]
    upstream_commit: str = ""

    @property
    def patch_name(self) -> str:
        """The file name of this fix's patch in every series."""
        return f"{self.id}-{self.slug}.patch"


@dataclass(frozen=True)
class FixState:
    """The state of one fix in one release; *evidence* is ``file:line`` in that release's sdist."""

    state: State
    evidence: str
    note: str = ""


@dataclass(frozen=True)
class Release:
    """One upstream release. *size* is in bytes; *head* and *blobs* are recorded where there is a series."""

    version: str
    date: datetime.date
    sdist: str
    sha256: str
    size: int
    states: dict[str, FixState]
    series: str = ""
    head: str = ""  # the commit that `apply` ends in
    blobs: dict[str, str] = field(default_factory=dict)  # touched file -> pristine git blob id

    def disposition(self, fix_id: str) -> Disposition:
        """What this release gets for *fix_id*."""
        state = self.states[fix_id].state
        if state.wants_patch:
            return Disposition.APPLIED if self.series else Disposition.NO_SERIES
        return {
            State.FIXED: Disposition.FIXED,
            State.ABSENT: Disposition.ABSENT,
            State.BROKEN: Disposition.BROKEN,
        }[state]
