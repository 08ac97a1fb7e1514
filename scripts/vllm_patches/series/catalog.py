"""``patches/`` read into the model: the fixes, the releases, and the series of each directory."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.series.model import Fix, Release, Series
from vllm_patches.series.patchfile import read_patch
from vllm_patches.series.tables import load_fixes, load_releases

DEFAULT_PIN = "0.20.2"
PACKAGED = "data"  # `patches/` under the name that pyproject.toml gives it inside the installed package


def patches_dir() -> Path:
    """The catalogue's folder: ``$VLLM_PATCHES_DIR``, else the installed package's own, else this checkout's."""
    given = os.environ.get("VLLM_PATCHES_DIR")
    if given:
        return Path(given)
    package = Path(__file__).resolve().parents[1]
    installed = package / PACKAGED
    return installed if installed.is_dir() else package.parents[1] / "patches"


@dataclass(frozen=True)
class Catalog:
    """Everything under ``patches/``; tables are read once, series when they are asked for."""

    folder: Path

    @cached_property
    def fixes(self) -> dict[str, Fix]:
        """The five fixes by id."""
        return load_fixes(self.folder / "fixes.toml")

    @cached_property
    def releases(self) -> dict[str, Release]:
        """All known upstream releases by version, oldest first."""
        return load_releases(self.folder / "releases.toml")

    @cached_property
    def series(self) -> dict[str, Series]:
        """The series by directory name, for every directory that some release names."""
        return {release.series: self.series_of(release) for release in self.pins}

    @cached_property
    def _read(self) -> dict[str, Series]:
        """The series that were asked for; each alone, so that a damaged one does not stop the others."""
        return {}

    @property
    def pins(self) -> tuple[Release, ...]:
        """The releases that have a series."""
        return tuple(release for release in self.releases.values() if release.series)

    def release(self, version: str) -> Release:
        """The release *version*; an unknown one is an error that names the nearest."""
        wanted = version.removeprefix("v")
        if wanted in self.releases:
            return self.releases[wanted]
        near = difflib.get_close_matches(wanted, self.releases, n=3, cutoff=0.0)
        raise PatchesError(
            "unknown release",
            release=version,
            expected=f"one of {', '.join(self.releases)}",
            found=f"{version}; nearest: {', '.join(near)}",
            next_command=f"make apply PIN={near[0]}    # or make new-pin VERSION={wanted}",
        )

    def series_of(self, release: Release) -> Series:
        """The series that *release* names; an empty one where it has none."""
        if not release.series:
            return Series("", ())
        if release.series not in self._read:
            self._read[release.series] = read_series(self.folder / release.series)
        return self._read[release.series]

    def need_series(self, release: Release) -> None:
        """Raise where *release* has no series: there is nothing that could be checked or applied."""
        if not release.series:
            raise PatchesError(
                "there is no series for this release",
                release=release.version,
                expected=f"one of {', '.join(pin.version for pin in self.pins)}",
                found=release.version,
                next_command="make matrix",
            )

    def served_by(self, series: str) -> list[str]:
        """The releases that the series directory *series* is exact for."""
        return [release.version for release in self.pins if release.series == series]


def open_catalog() -> Catalog:
    """The catalogue of this checkout (or of ``$VLLM_PATCHES_DIR``)."""
    return Catalog(patches_dir())


def read_series(folder: Path) -> Series:
    """The patches that ``<folder>/series`` lists, in its order."""
    names = read_series_file(folder / "series")
    return Series(folder.name, tuple(read_patch(folder / name) for name in names))


def read_series_file(path: Path) -> list[str]:
    """The patch names in a quilt series file: one a line, no options; comments and blank lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PatchesError(
            f"cannot read the series file: {error.strerror}",
            file=str(path),
            next_command=f"git checkout -- {path}",
        ) from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
