"""`check`: does every patch still apply to every pin, forwards and backwards, at its stated lines?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vllm_patches.errors import PatchesError
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.headers import Problem
from vllm_patches.series.hunks import apply_patch, undo_patch
from vllm_patches.series.model import Release, Series
from vllm_patches.sources.store import FindSdist, pristine_files
from vllm_patches.upkeep.gpureqs import lint_gpu_requirements
from vllm_patches.upkeep.lint import lint_catalog
from vllm_patches.upkeep.matrix import lint_readme
from vllm_patches.upkeep.proofs import lint_proofs


@dataclass(frozen=True)
class PinReport:
    """What was done for one pin; *error* is None when every patch went in and came out again."""

    release: str
    series: str
    patches: int
    hunks: int
    files: int
    error: PatchesError | None


@dataclass(frozen=True)
class CheckReport:
    """The result of `check`."""

    pins: tuple[PinReport, ...]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """True when nothing drifted."""
        return not self.problems and all(pin.error is None for pin in self.pins)


def check_catalog(catalog: Catalog, pins: Iterable[Release], find_sdist: FindSdist) -> CheckReport:
    """Lint the catalogue, then apply and undo the series of each of *pins* on its touched files, in memory."""
    chosen = list(pins)
    for release in chosen:
        catalog.need_series(release)
    problems = (*lint_catalog(catalog), *lint_readme(catalog), *lint_proofs(catalog))
    readable = [release for release in chosen if _readable(catalog, release)]
    contents = pristine_files(readable, find_sdist)
    problems += tuple(lint_gpu_requirements(catalog, readable, find_sdist))
    return CheckReport(tuple(_check_pin(catalog, release, contents) for release in readable), problems)


def _readable(catalog: Catalog, release: Release) -> bool:
    """False where the series cannot even be read; the lint has said so already."""
    try:
        catalog.series_of(release)
    except PatchesError:
        return False
    return True


def _check_pin(catalog: Catalog, release: Release, contents: Mapping[str, bytes]) -> PinReport:
    series = catalog.series_of(release)
    error = None
    try:
        round_trip(release, series, contents)
    except PatchesError as caught:
        error = caught
    hunks = sum(len(file.hunks) for patch in series.patches for file in patch.files)
    return PinReport(release.version, series.name, len(series.patches), hunks, len(series.paths), error)


def round_trip(release: Release, series: Series, contents: Mapping[str, bytes]) -> None:
    """All patches in, in order, and out again, last to first; each step is checked by blob id."""
    files: dict[str, bytes] = {}
    for path in series.paths:
        if path not in release.blobs:
            raise PatchesError(
                "a touched file has no recorded blob",
                release=release.version,
                file=path,
                next_command="make record",
            )
        files[path] = contents[release.blobs[path]]
    pristine = files
    for patch in series.patches:
        files = apply_patch(patch, files, release=release.version)
    for patch in reversed(series.patches):
        files = undo_patch(patch, files, release=release.version)
    if files != pristine:
        raise PatchesError("undoing the series does not give the pristine files back", release=release.version)
