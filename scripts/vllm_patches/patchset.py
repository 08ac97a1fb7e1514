"""What a series does to a package without its sources: the files before and after, and ``patches.json`` about them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from vllm_patches import __version__
from vllm_patches.catalog import Catalog
from vllm_patches.errors import PatchesError
from vllm_patches.hunks import apply_patch, blob_id
from vllm_patches.model import Disposition, Patch, Release, Series

SCHEMA = 1
PACKAGE = "vllm/"  # what a wheel holds of the source tree
ReadBytes = Callable[[str], bytes | None]


@dataclass(frozen=True)
class Change:
    """One file of the package, before and after the series."""

    path: str
    before: bytes
    after: bytes
    patches: tuple[str, ...]


@dataclass(frozen=True)
class PatchSet:
    """What a series changes in a package; *left_out* are the source files that only a build could bring in."""

    release: Release
    series: Series
    changes: tuple[Change, ...]
    without: tuple[str, ...]
    left_out: tuple[str, ...]


def is_packaged(path: str) -> bool:
    """True for a source file that stands in the package as it is."""
    return path.startswith(PACKAGE)


def native_parts(series: Series) -> dict[str, tuple[str, ...]]:
    """The name of each native part (``0001-native``) and the sources it changes, which a package holds compiled."""
    parts = {f"{p.number}-native": tuple(f.path for f in p.files if not is_packaged(f.path)) for p in series.patches}
    return {name: paths for name, paths in parts.items() if paths}


def packaged_series(series: Series) -> Series:
    """The series less everything that is not a file of the package."""
    trimmed = (replace(p, files=tuple(f for f in p.files if is_packaged(f.path))) for p in series.patches)
    return Series(series.name, tuple(patch for patch in trimmed if patch.files))


def plan(catalog: Catalog, release: Release, read: ReadBytes, without: Iterable[str]) -> PatchSet:
    """The changes for the package that *read* reads; every file must be the release's own, told by its blob."""
    series = catalog.series_of(release)
    chosen = tuple(dict.fromkeys(without))
    native = native_parts(series)
    check_without(release, series, chosen)
    python = packaged_series(series)
    before = pristine(release, python, read)
    after = dict(before)
    for patch in python.patches:
        after = apply_patch(patch, after, release=release.version)
    changes = tuple(Change(path, before[path], after[path], _touching(python, path)) for path in python.paths)
    left_out = tuple(path for paths in native.values() for path in paths)
    return PatchSet(release, series, changes, chosen, left_out)


def pristine(release: Release, series: Series, read: ReadBytes) -> dict[str, bytes]:
    """The touched files, each with the recorded blob; anything else is refused, all of them named at once."""
    files: dict[str, bytes] = {}
    wrong: list[str] = []
    for path in series.paths:
        data = read(path)
        if data is not None and blob_id(data) == release.blobs.get(path):
            files[path] = data
        else:
            wrong.append(f"{path}: {_stand(series, path, data)}")
    if wrong:
        raise PatchesError(
            "files are not the release's own; nothing was changed",
            release=release.version,
            file=", ".join(line.partition(":")[0] for line in wrong),
            expected="the pristine file, told by its git blob id",
            found="\n".join(wrong),
            next_command="vllm-patches verify    # which fixes are in; or reinstall: pip install --force-reinstall "
            f"--no-deps vllm=={release.version}",
        )
    return files


def manifest(catalog: Catalog, patch_set: PatchSet, version: str) -> dict[str, Any]:
    """The content of ``patches.json``."""
    return {
        "schema": SCHEMA,
        "tool": f"vllm-patches {__version__}",
        "release": patch_set.release.version,
        "version": version,
        "series": patch_set.series.name,
        "without": list(patch_set.without),
        "fixes": {fix_id: _fix_entry(catalog, patch_set, fix_id) for fix_id in catalog.fixes},
        "files": {change.path: _file_entry(change) for change in patch_set.changes},
        "not_of_the_series": [],
    }


def modifications(catalog: Catalog, patch_set: PatchSet, version: str) -> str:
    """The notice of change that Apache-2.0, section 4(b) asks for: an image with the package in it is passed on."""
    lines = [
        f"vLLM {version}, modified in place by vllm-patches {__version__}, series {patch_set.series.name}.",
        "vllm-patches is not affiliated with the vLLM project. These files were changed:",
    ]
    for change in patch_set.changes:
        lines += ["", change.path, *(f"  {_origin(catalog, patch_set, name)}" for name in change.patches)]
    lines += [f"\nLeft out on request: {', '.join(patch_set.left_out)}"] if patch_set.left_out else []
    return "\n".join([*lines, "", "All other files are as they were installed.", ""])


def _origin(catalog: Catalog, patch_set: PatchSet, name: str) -> str:
    patch = next(patch for patch in patch_set.series.patches if patch.name == name)
    pulls = ", ".join(f"#{number}" for number in catalog.fixes[patch.number].upstream_pr)
    return f"{name}: {patch.subject} (upstream: {pulls})"


def _fix_entry(catalog: Catalog, patch_set: PatchSet, fix_id: str) -> dict[str, Any]:
    disposition = patch_set.release.disposition(fix_id)
    if disposition is not Disposition.APPLIED:
        return {"result": disposition.value}
    patch = next(p for p in patch_set.series.patches if p.number == fix_id)
    here = [file.path for file in patch.files if is_packaged(file.path)]
    entry = {
        "result": "applied" if here else "left out",
        "patch": patch.name,
        "patch_sha256": hashlib.sha256(patch.raw).hexdigest(),
    }
    left_out = [file.path for file in patch.files if file.path in patch_set.left_out]
    return {**entry, "left_out": left_out} if left_out else entry


def _file_entry(change: Change) -> dict[str, Any]:
    return {"before": _hashes(change.before), "after": _hashes(change.after), "patches": list(change.patches)}


def _hashes(data: bytes) -> dict[str, str]:
    return {"blob": blob_id(data), "sha256": hashlib.sha256(data).hexdigest()}


def _touching(series: Series, path: str) -> tuple[str, ...]:
    return tuple(patch.name for patch in series.patches if path in _paths(patch))


def _paths(patch: Patch) -> list[str]:
    return [file.path for file in patch.files]


def _stand(series: Series, path: str, data: bytes | None) -> str:
    """In words, what a file is that is not pristine."""
    if data is None:
        return "not there"
    chain = series.blob_chain(path)
    blob = blob_id(data)
    if blob not in chain:
        return f"changed by somebody (blob {blob})"
    return "patched already" if blob == chain[-1] else "patched in part"


def check_without(release: Release, series: Series, without: Iterable[str]) -> None:
    """What cannot be done to compiled code is refused unless it was given up by name."""
    native = native_parts(series)
    unknown = [name for name in without if name not in native]
    if unknown:
        raise PatchesError(
            "nothing of that name can be left out",
            release=release.version,
            expected=f"--without one of {', '.join(native)}" if native else "no --without: all files are Python",
            found=", ".join(unknown),
            next_command="vllm-patches install" + "".join(f" --without {name}" for name in native),
        )
    for name, paths in native.items():
        if name not in without:
            raise PatchesError(
                "a patch changes C++ code, which an installed package holds only compiled; nothing was changed",
                release=release.version,
                patch=name.partition("-")[0],
                file=", ".join(paths),
                expected=f"a wheel with the part rebuilt (make build PIN={release.version}), or --without {name}",
                found="an install in place",
                next_command=f"vllm-patches install --without {name}    # keeps the fix's Python part",
            )
