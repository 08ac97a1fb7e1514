"""What a series does to a package, wheel or installed: which files it changes, before and after, and what is left out.

A package holds the Python files of the source tree as they are, below ``vllm/``. All else that a patch touches is in
it only as what it was compiled to: a native part, called ``0001-native`` after its patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from vllm_patches.errors import PatchesError
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.hunks import apply_patch, blob_id
from vllm_patches.series.model import FilePatch, Patch, Release, Series

PACKAGE = "vllm/"
ReadBytes = Callable[[str], bytes | None]


@dataclass(frozen=True)
class Change:
    """One file of the package, before and after the series; *patches* are the names of those that touch it."""

    path: str
    before: bytes
    after: bytes
    patches: tuple[str, ...]


@dataclass(frozen=True)
class PatchSet:
    """What a series changes in a package; *left_out* has the sources, by fix, of the native parts in *without*."""

    release: Release
    series: Series
    changes: tuple[Change, ...]
    without: tuple[str, ...]
    left_out: Mapping[str, tuple[str, ...]]

    @property
    def compiled(self) -> tuple[Patch, ...]:
        """What of the patches is still to be compiled: their native parts less those that are left out."""
        kept = Series("", tuple(p for p in self.series.patches if p.number not in self.left_out))
        return series_part(kept, packaged=False).patches


def is_packaged(path: str) -> bool:
    """True for a source file that stands in the package as it is."""
    return path.startswith(PACKAGE)


def native_parts(series: Series) -> dict[str, tuple[str, ...]]:
    """The name of each native part (``0001-native``) and the sources it changes, which a package holds compiled."""
    return {f"{p.number}-native": tuple(f.path for f in p.files) for p in series_part(series, packaged=False).patches}


def series_part(series: Series, *, packaged: bool) -> Series:
    """The patches with those of their files alone that stand in the package, or that do not."""

    def chosen(patch: Patch) -> tuple[FilePatch, ...]:
        return tuple(file for file in patch.files if is_packaged(file.path) is packaged)

    return Series(series.name, tuple(replace(p, files=chosen(p)) for p in series.patches if chosen(p)))


def check_names(release: Release, series: Series, without: Iterable[str], verb: str) -> None:
    """Refuse to leave out what is not there; *verb* is the command to name."""
    native = native_parts(series)
    unknown = [name for name in without if name not in native]
    if unknown:
        raise PatchesError(
            "nothing of that name can be left out",
            release=release.version,
            expected=f"--without one of {', '.join(native)}" if native else "no --without: all files are Python",
            found=", ".join(unknown),
            next_command=f"vllm-patches {verb}" + "".join(f" --without {name}" for name in native),
        )


def plan(catalog: Catalog, release: Release, read: ReadBytes, without: tuple[str, ...], ways_out: str) -> PatchSet:
    """The changes for the package that *read* reads; every file must be the release's own, told by its blob.

    *ways_out* is what to type where one is not.
    """
    series = catalog.series_of(release)
    python = series_part(series, packaged=True)
    before = _pristine(release, python, read, ways_out)
    after = dict(before)
    for patch in python.patches:
        after = apply_patch(patch, after, release=release.version)
    changes = tuple(Change(path, before[path], after[path], touching(python, path)) for path in python.paths)
    left_out = {name.partition("-")[0]: paths for name, paths in native_parts(series).items() if name in without}
    return PatchSet(release, series, changes, without, left_out)


def _pristine(release: Release, series: Series, read: ReadBytes, ways_out: str) -> dict[str, bytes]:
    """The touched files, each with the recorded blob; anything else is refused, all of them named at once."""
    files: dict[str, bytes] = {}
    wrong: dict[str, str] = {}
    for path in series.paths:
        data = read(path)
        if data is not None and blob_id(data) == release.blobs.get(path):
            files[path] = data
        else:
            wrong[path] = _stand(series, path, data)
    if wrong:
        raise PatchesError(
            "files are not the release's own; nothing was changed",
            release=release.version,
            patch=", ".join(dict.fromkeys(name for path in wrong for name in touching(series, path))),
            file=", ".join(wrong),
            expected="the pristine file, told by its git blob id",
            found="\n".join(f"{path}: {stand}" for path, stand in wrong.items()),
            next_command=ways_out,
        )
    return files


def touching(series: Series, path: str) -> tuple[str, ...]:
    """The names of the patches that touch *path*."""
    return tuple(patch.name for patch in series.patches if any(file.path == path for file in patch.files))


def _stand(series: Series, path: str, data: bytes | None) -> str:
    """In words, what a file is that is not pristine."""
    if data is None:
        return "not there"
    chain = series.blob_chain(path)
    blob = blob_id(data)
    if blob not in chain:
        return f"changed by somebody (blob {blob})"
    return "patched already" if blob == chain[-1] else "patched in part"


def refuse_native(release: Release, series: Series, without: Iterable[str]) -> None:
    """What cannot be done to compiled code in place is refused unless it was given up by name."""
    given_up = set(without)
    for name, paths in native_parts(series).items():
        if name not in given_up:
            raise PatchesError(
                "a patch changes C++ code, which an installed package holds only compiled; nothing was changed",
                release=release.version,
                patch=name.partition("-")[0],
                file=", ".join(paths),
                expected=f"a wheel with the part rebuilt (make build PIN={release.version}), or --without {name}",
                found="an install in place",
                next_command=f"vllm-patches install --without {name}    # keeps the fix's Python part",
            )
