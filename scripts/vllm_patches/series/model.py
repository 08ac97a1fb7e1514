"""What the project is about, as frozen values: fixes, releases, patches, series. No input or output here."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from enum import Enum

ARCHS = ("x86_64", "aarch64")
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
class Artifact:
    """One file that upstream released, pinned: *kind* is "sdist" or "wheel", *size* is in bytes."""

    kind: str
    release: str
    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Wheel:
    """One official wheel of a release; *size* is in bytes."""

    file: str
    sha256: str
    size: int

    @property
    def tags(self) -> list[str]:
        """Build tag (where there is one), Python, ABI and platform tag: what stands behind the version."""
        return self.file.removesuffix(".whl").split("-")[2:]

    @property
    def build(self) -> int:
        """The number of the build tag, by which pip chooses among equals; 0 without one."""
        return int(self.tags[0]) if len(self.tags) == 4 else 0

    @property
    def arch(self) -> str:
        """The machine it is for, as `uname -m` prints it."""
        return next((arch for arch in ARCHS if self.file.endswith(f"_{arch}.whl")), "")


@dataclass(frozen=True)
class Release:
    """One upstream release. *size* is in bytes; *head*, *revision* and *blobs* are recorded where there is a series.

    *revision* counts the states of the series that were recorded for this release: `make record` raises it by one
    when the head changes, so it is data and grows; it is the N of a patched wheel's version ``+patches.N``.
    """

    version: str
    date: datetime.date
    sdist: str
    sha256: str
    size: int
    states: dict[str, FixState]
    series: str = ""
    head: str = ""  # the commit that `apply` ends in
    blobs: dict[str, str] = field(default_factory=dict)  # touched file -> pristine git blob id
    revision: int = 0  # 0: not recorded
    wheels: tuple[Wheel, ...] = ()  # all official ones, by name

    @property
    def sdist_file(self) -> Artifact:
        """The sdist as what is fetched."""
        return Artifact("sdist", self.version, self.sdist, self.sha256, self.size)

    def wheel_file(self, wheel: Wheel) -> Artifact:
        """One of the wheels as what is fetched."""
        return Artifact("wheel", self.version, wheel.file, wheel.sha256, wheel.size)

    def wheel_for(self, arch: str) -> Wheel | None:
        """The wheel that pip would choose on that machine: the highest build number."""
        return max((w for w in self.wheels if w.arch == arch), key=lambda w: w.build, default=None)

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
