"""The pristine contents of the files that series touch: from the cache, else pulled out of the sdists."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.series.hunks import blob_id
from vllm_patches.series.model import Release
from vllm_patches.sources import cache
from vllm_patches.sources.sdist import open_sdist, pick

FindSdist = Callable[[Release], Path]


class OtherFile(PatchesError):
    """A file of the sdist is not the expected one: *expected* and *found* are blob ids."""


def pristine_files(releases: Iterable[Release], find_sdist: FindSdist) -> dict[str, bytes]:
    """Blob id to content for every recorded touched file of *releases*.

    Cached blobs are enough; for the rest *find_sdist* is asked for the release's sdist, and what it holds must have
    the recorded ids.
    """
    contents: dict[str, bytes] = {}
    pending: list[Release] = []
    for release in releases:
        for blob in release.blobs.values():
            if blob not in contents and (data := cache.load_blob(blob)) is not None:
                contents[blob] = data
        if not all(blob in contents for blob in release.blobs.values()):
            pending.append(release)
    for files in _extract([(release, find_sdist(release)) for release in pending]):
        contents |= {cache.store_blob(data): data for data in files.values()}
    return contents


def touched_files(release: Release, sdist: Path, paths: Iterable[str]) -> dict[str, bytes]:
    """The contents of *paths* in the sdist; a path that it lacks is an error."""
    wanted = list(paths)
    found = pick(open_sdist(sdist, release), wanted, release)
    for path in wanted:
        if path not in found:
            raise PatchesError(
                "the sdist lacks a file that the series touches",
                release=release.version,
                file=path,
                expected="a file",
                found="none",
                next_command=f"tar tzf {sdist}",
            )
    return found


def _recorded_files(release: Release, sdist: Path) -> dict[str, bytes]:
    """The recorded touched files, each with the recorded blob id."""
    files = touched_files(release, sdist, release.blobs)
    for path, data in files.items():
        if (found := blob_id(data)) != release.blobs[path]:
            raise OtherFile(
                "a file of the sdist is not the one that releases.toml records",
                release=release.version,
                file=path,
                expected=release.blobs[path],
                found=found,
                next_command="make record    # after a look at: git diff patches/releases.toml",
            )
    return files


def _extract(work: list[tuple[Release, Path]]) -> list[dict[str, bytes]]:
    """Inflating is what costs, so several sdists are read in processes side by side."""
    if len(work) < 2:
        return [_recorded_files(*item) for item in work]
    with ProcessPoolExecutor() as pool:
        return list(pool.map(_recorded_files, *zip(*work, strict=True)))
