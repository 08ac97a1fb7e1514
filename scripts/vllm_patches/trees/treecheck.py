"""`check --tree`: how a series stands to somebody's own checkout or fork. Reads files, changes nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.series.catalog import DEFAULT_PIN, Catalog
from vllm_patches.series.hunks import blob_id, index_of, mismatch, reverse, split_lines
from vllm_patches.series.model import FilePatch, Hunk, Patch, Release, Series

_VERSION_FILES = (
    ("vllm/_version.py", r"__version__ = (?:version = )?['\"]([^'\"]+)"),
    ("PKG-INFO", r"\nVersion: (\S+)"),
)


class Fit(Enum):
    """How one patch stands to the tree."""

    APPLIES = "applies"  # at its stated lines
    OFFSET = "applies at an offset"  # its lines are all there, elsewhere; no context was ignored
    IN = "already in"
    PARTLY = "partly in"  # some hunks are in, others are not
    CONFLICT = "conflict"


@dataclass(frozen=True)
class HunkFit:
    """How one hunk stands to the tree; *offset* in lines, *expected* and *found* where it conflicts."""

    file: str
    hunk: int
    fit: Fit
    offset: int = 0
    line: int = 0
    expected: str = ""
    found: str = ""


@dataclass(frozen=True)
class PatchFit:
    """One patch against the tree."""

    patch: str
    fit: Fit
    hunks: tuple[HunkFit, ...]


@dataclass(frozen=True)
class TreeReport:
    """The result of ``check --tree``."""

    tree: str
    release: str
    chosen_by: str
    patches: tuple[PatchFit, ...]

    @property
    def ok(self) -> bool:
        """True when every patch is in or applies, if need be at an offset; never with fuzz."""
        return all(patch.fit in (Fit.APPLIES, Fit.OFFSET, Fit.IN) for patch in self.patches)

    @property
    def exact(self) -> bool:
        """True when every patch is in or applies at its stated lines."""
        return all(patch.fit in (Fit.APPLIES, Fit.IN) for patch in self.patches)


Files = dict[str, list[bytes]]


def check_tree(catalog: Catalog, tree: Path, release: Release | None = None) -> TreeReport:
    """Hold the series of *release* (or of the release that fits best) against the files of *tree*."""
    if not tree.is_dir():
        raise PatchesError("not a folder", file=str(tree), next_command=f"ls -ld {tree}")
    chosen_by = "--pin"
    if release is None:
        release, chosen_by = _choose(catalog, tree)
    catalog.need_series(release)
    series = catalog.series_of(release)
    return TreeReport(str(tree), release.version, chosen_by, fit_series(series, _read(tree, series)))


def fit_series(series: Series, files: Files) -> tuple[PatchFit, ...]:
    """Each patch of *series* against *files*; what is in is found by undoing from the last to the first.

    (Undoing each alone would miss a patch whose surroundings a later one has changed.)
    """
    there: dict[str, tuple[HunkFit, ...]] = {}
    for patch in reversed(series.patches):
        undone, found = _try([reverse(file) for file in patch.files], files)
        if undone is not None:
            files = undone
            there[patch.name] = tuple(replace(fit, fit=Fit.IN) for fit in found)
    fits: list[PatchFit] = []
    for patch in series.patches:
        fit, files = _fit_patch(patch, files, there.get(patch.name))
        fits.append(fit)
    return tuple(fits)


def _fit_patch(patch: Patch, files: Files, undone: tuple[HunkFit, ...] | None) -> tuple[PatchFit, Files]:
    """One patch against the tree without what is in, and the tree after it where it goes on."""
    applied, fits = _try(patch.files, files)
    if applied is not None and undone is not None:
        return PatchFit(patch.name, Fit.IN, undone), applied
    if applied is not None:
        moved = any(fit.offset for fit in fits)
        return PatchFit(patch.name, Fit.OFFSET if moved else Fit.APPLIES, fits), applied
    marked = tuple(_mark_in(fit, patch, files) for fit in fits)
    partly = any(fit.fit is Fit.IN for fit in marked)
    return PatchFit(patch.name, Fit.PARTLY if partly else Fit.CONFLICT, marked), files


def _mark_in(fit: HunkFit, patch: Patch, files: Files) -> HunkFit:
    """A hunk that conflicts but whose result stands in the file is in already."""
    if fit.fit is not Fit.CONFLICT or fit.file not in files:
        return fit
    section = next(file for file in patch.files if file.path == fit.file)
    hunk = section.hunks[fit.hunk - 1].reversed()
    at = _locate(hunk, files[fit.file], index_of(hunk.old_start, hunk.old_count))
    return fit if at is None else HunkFit(fit.file, fit.hunk, Fit.IN, line=at + 1)


def _try(sections: Sequence[FilePatch], files: Files) -> tuple[Files | None, tuple[HunkFit, ...]]:
    """Apply the sections with offsets but no fuzz; None and the hunks' fits where any conflicts."""
    result = dict(files)
    fits: list[HunkFit] = []
    for section in sections:
        lines = files.get(section.path)
        if lines is None:
            fits += [_absent(section.path, number) for number in range(1, len(section.hunks) + 1)]
            continue
        result[section.path], found = _try_file(section, lines)
        fits += found
    whole = all(fit.fit is not Fit.CONFLICT for fit in fits)
    return (result if whole else None), tuple(fits)


def _try_file(section: FilePatch, lines: list[bytes]) -> tuple[list[bytes], list[HunkFit]]:
    """Hunk by hunk; lines are counted as they stand before the first of them, where one looks for them."""
    fits: list[HunkFit] = []
    drift = 0  # how far earlier hunks of this file moved the later ones
    for number, hunk in enumerate(section.hunks, 1):
        stated = index_of(hunk.old_start, hunk.old_count)
        at = _locate(hunk, lines, stated + drift)
        if at is None:
            conflict = _conflict(section.path, number, hunk, lines, stated + drift)
            fits.append(replace(conflict, line=conflict.line - drift))
            continue
        offset = at - stated - drift
        fits.append(HunkFit(section.path, number, Fit.OFFSET if offset else Fit.APPLIES, offset, at + 1 - drift))
        lines = lines[:at] + hunk.new + lines[at + hunk.old_count :]
        drift += len(hunk.new) - hunk.old_count
    return lines, fits


def _locate(hunk: Hunk, lines: list[bytes], stated: int) -> int | None:
    """The index nearest to *stated* at which every old line of the hunk stands, or None."""
    if mismatch(hunk, lines, stated) is None:
        return stated
    first = hunk.old[0] if hunk.old else None
    candidates = [i for i, line in enumerate(lines) if line == first and mismatch(hunk, lines, i) is None]
    return min(candidates, key=lambda i: abs(i - stated), default=None)


def _conflict(path: str, number: int, hunk: Hunk, lines: list[bytes], stated: int) -> HunkFit:
    """Name the first differing line at the place where most of the hunk's lines still stand."""
    first = hunk.old[0] if hunk.old else b""
    places = [stated, *(i for i, line in enumerate(lines) if line == first)]

    def reach(at: int) -> int:
        wrong = mismatch(hunk, lines, at)
        return wrong.line - at if wrong else 0

    best = max(places, key=lambda at: (reach(at), -abs(at - stated)))
    wrong = mismatch(hunk, lines, best)
    assert wrong is not None
    expected = wrong.expected.decode("utf-8", "replace").rstrip("\n")
    found = "the end of the file" if wrong.found is None else wrong.found.decode("utf-8", "replace").rstrip("\n")
    if found == expected + "\r":
        found += "\\r    (CRLF line ends)"
    return HunkFit(path, number, Fit.CONFLICT, line=wrong.line, expected=expected, found=found.replace("\r", ""))


def _absent(path: str, number: int) -> HunkFit:
    return HunkFit(path, number, Fit.CONFLICT, expected="the file", found="no such file")


def _read(tree: Path, series: Series) -> Files:
    return {path: split_lines((tree / path).read_bytes()) for path in series.paths if (tree / path).is_file()}


def _choose(catalog: Catalog, tree: Path) -> tuple[Release, str]:
    """The release that the tree's own version file names, else the one whose files and patches fit best."""
    for name, pattern in _VERSION_FILES:
        path = tree / name
        match = re.search(pattern, path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
        version = re.match(r"\d+\.\d+\.\d+", match[1]) if match else None
        release = catalog.releases.get(version[0]) if version else None
        if release and release.series:
            return release, f"{name} says {match[1] if match else ''}"
    ranked = sorted((_likeness(catalog, tree, release), at) for at, release in enumerate(catalog.pins))
    if not ranked or not ranked[-1][0][1]:
        raise PatchesError(
            "no patch of any series fits this tree",
            file=str(tree),
            expected="a vLLM source tree near one of " + ", ".join(r.version for r in catalog.pins),
            found="none of its files",
            next_command=f"ls {tree}/vllm",
        )
    return catalog.pins[ranked[-1][1]], "its files and patches fit best"


def _likeness(catalog: Catalog, tree: Path, release: Release) -> tuple[float, int, bool]:
    """How near the tree is to a release: touched files that are its own byte for byte, then patches that fit.

    Patches alone will not do: another release's longer series may fit at offsets, more of them than of its own.
    """
    series = catalog.series_of(release)
    files = _read(tree, series)
    own = [path for path, lines in files.items() if blob_id(b"".join(lines)) in series.blob_chain(path)]
    fitting = [fit for fit in fit_series(series, files) if fit.fit in (Fit.APPLIES, Fit.OFFSET, Fit.IN)]
    return len(own) / max(len(series.paths), 1), len(fitting), release.version == DEFAULT_PIN
