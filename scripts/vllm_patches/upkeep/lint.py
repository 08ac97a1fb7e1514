"""Lint of the whole catalogue, in both directions: what is listed must be there, what is there must be listed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.series.catalog import Catalog, read_series, read_series_file
from vllm_patches.series.headers import Problem, lint_header
from vllm_patches.series.model import FIX_IDS, Patch, Release, Series, State
from vllm_patches.series.tables import dump_releases


def lint_catalog(catalog: Catalog) -> list[Problem]:
    """Every problem of the tables, the series files and the patch headers; the hunks are `check`'s own matter."""
    rules: tuple[Callable[[Catalog], Iterator[Problem]], ...] = (
        _fixes,
        _canonical_table,
        _directories,
        _series_files,
        _states_and_patches,
        _blobs,
        _headers,
    )
    problems: list[Problem] = []
    for rule in rules:
        try:
            problems += rule(catalog)
        except PatchesError as error:  # a table that cannot be read at all: one finding, the other rules go on
            if (found := _unreadable(error)) not in problems:
                problems.append(found)
    return problems


def _unreadable(error: PatchesError) -> Problem:
    where = error.patch or error.file
    return Problem("unreadable", where, error.expected or "a sound file", error.found or error.what, error.next_command)


def _readable(catalog: Catalog) -> Iterator[tuple[Release, Series]]:
    """The pins whose series can be read; `_headers` tells of the others."""
    for release in catalog.pins:
        with contextlib.suppress(PatchesError):
            yield release, catalog.series_of(release)


def _fixes(catalog: Catalog) -> Iterator[Problem]:
    ids = tuple(catalog.fixes)
    if ids != FIX_IDS:
        yield Problem("fixes", "patches/fixes.toml", ", ".join(FIX_IDS), ", ".join(ids))


def _canonical_table(catalog: Catalog) -> Iterator[Problem]:
    """The table reads back to the very text that is committed, so that a tool's edit is a small diff."""
    path = catalog.folder / "releases.toml"
    committed, canonical = path.read_text(encoding="utf-8"), dump_releases(catalog.releases)
    for number, (a, b) in enumerate(zip(committed.splitlines(), canonical.splitlines(), strict=False), 1):
        if a != b:
            yield Problem("table-form", f"patches/releases.toml:{number}", b, a, "make record")
            return
    if committed != canonical:
        yield Problem(
            "table-form", "patches/releases.toml", "the canonical end of the file", "more or less lines", "make record"
        )


def _directories(catalog: Catalog) -> Iterator[Problem]:
    """Series directories that are there against those that releases name."""
    there = {path.name for path in catalog.folder.iterdir() if path.is_dir()}
    named = {release.series for release in catalog.pins}
    for name in sorted(there - named):
        yield Problem("directory-unlisted", f"patches/{name}", "a release that names it in releases.toml", "none")
    for name in sorted(named - there):
        yield Problem("directory-missing", f"patches/{name}", "a directory", "none", f"git checkout -- patches/{name}")


def _series_files(catalog: Catalog) -> Iterator[Problem]:
    """Patch files against the series file, and the series against its order."""
    for folder in _folders(catalog):
        listed = read_series_file(folder / "series")
        there = sorted(path.name for path in folder.iterdir() if path.name != "series")
        where = f"patches/{folder.name}/series"
        for name in sorted(set(there) - set(listed)):
            yield Problem("patch-unlisted", where, f"a line '{name}'", "none", f"echo {name} >> {where}")
        for name in sorted(set(listed) - set(there)):
            yield Problem("patch-missing", where, f"the file {name}", "none", f"git checkout -- patches/{folder.name}")
        if listed != sorted(set(listed)):
            yield Problem("series-order", where, ", ".join(sorted(set(listed))), ", ".join(listed))


def _states_and_patches(catalog: Catalog) -> Iterator[Problem]:
    """A fix that a release needs is in its series; one that it does not need is not."""
    for release, series in _readable(catalog):
        carried = {patch.number for patch in series.patches}
        for fix_id in FIX_IDS:
            state = release.states[fix_id].state
            where = f"patches/releases.toml, release {release.version}, {fix_id}"
            if state.wants_patch and fix_id not in carried:
                yield Problem(
                    "patch-for-state", where, f"a patch {fix_id} in {release.series}, for it is {state.value}", "none"
                )
            if not state.wants_patch and fix_id in carried:
                yield Problem("state-for-patch", where, f"live or latent, for {release.series} carries it", state.value)
    for release in catalog.releases.values():
        yield from _evidence(release)


def _evidence(release: Release) -> Iterator[Problem]:
    for fix_id, fix_state in release.states.items():
        path, _, line = fix_state.evidence.rpartition(":")
        sound = (path and line.isdigit()) or (fix_state.state is State.ABSENT and fix_state.evidence)
        if not sound:
            where = f"patches/releases.toml, release {release.version}, {fix_id}"
            yield Problem("evidence", where, "file:line", fix_state.evidence or "none")


def _blobs(catalog: Catalog) -> Iterator[Problem]:
    """A directory serves a release only where every file it touches is the same, byte for byte: told by blob id."""
    for release, series in _readable(catalog):
        where = f"patches/releases.toml, release {release.version}, blobs"
        pristine = {path: series.blob_chain(path)[0] for path in series.paths}
        for path in sorted(pristine.keys() | release.blobs.keys()):
            expected, found = pristine.get(path, "no entry"), release.blobs.get(path, "none")
            if expected != found:
                yield Problem("blob", f"{where}, {path}", expected, found, "make record")
        if not release.head:
            yield Problem("head", f"patches/releases.toml, release {release.version}", "head", "none", "make record")
        if not release.revision:
            where = f"patches/releases.toml, release {release.version}"
            yield Problem("revision", where, "revision", "none", "make record")


def _headers(catalog: Catalog) -> Iterator[Problem]:
    for folder in _folders(catalog):
        try:
            series = read_series(folder)
        except PatchesError as error:
            yield _unreadable(error)
            continue
        for patch in series.patches:
            yield from _header(catalog, series.name, patch)
        yield from _requires(series.name, series)


def _header(catalog: Catalog, series: str, patch: Patch) -> Iterator[Problem]:
    fix = catalog.fixes.get(patch.number)
    if fix is None or fix.patch_name != patch.name:
        expected = fix.patch_name if fix else "a number from fixes.toml"
        yield Problem("patch-name", f"patches/{series}/{patch.name}", expected, patch.name)
    else:
        yield from lint_header(patch, fix, series, catalog.served_by(series))


def _requires(name: str, series: Series) -> Iterator[Problem]:
    """A required patch stands earlier in the same series."""
    seen: list[str] = []
    for patch in series.patches:
        required = patch.trailer("Requires")
        for number in required.split(", ") if required not in ("", "none") else []:
            if number not in seen:
                yield Problem(
                    "requires", f"patches/{name}/{patch.name}", f"{number} before it in the series", ", ".join(seen)
                )
        seen.append(patch.number)


def _folders(catalog: Catalog) -> list[Path]:
    return [catalog.folder / name for name in dict.fromkeys(release.series for release in catalog.pins)]
