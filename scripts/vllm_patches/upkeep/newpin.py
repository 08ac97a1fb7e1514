"""`new-pin`: take a release into the table, try the nearest series on it, and say what is left to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.outcome import Say
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.hunks import split_lines
from vllm_patches.series.model import Release
from vllm_patches.sources.index import list_offers, list_wheels, version_key
from vllm_patches.sources.sdist import open_sdist, pick
from vllm_patches.sources.store import FindSdist
from vllm_patches.trees.apply import make_tree
from vllm_patches.trees.treecheck import PatchFit, fit_series
from vllm_patches.upkeep.maintain import write_releases
from vllm_patches.upkeep.watch import propose, provisional


@dataclass(frozen=True)
class NewPin:
    """What was added, how the nearest series stands to it, and the commands that are left to type."""

    release: Release
    nearest: str
    patches: tuple[PatchFit, ...]
    tree: str
    todo: tuple[str, ...]


def new_pin(catalog: Catalog, version: str, find_sdist: FindSdist, build: Path, say: Say) -> NewPin:
    """Add *version* to ``releases.toml`` without a series, and make its pristine tree to rebase the nearest one on."""
    version = version.removeprefix("v")
    if version in catalog.releases:
        raise PatchesError(
            "the release is in the table already",
            release=version,
            file="patches/releases.toml",
            next_command=f"make watch VERSION={version}",
        )
    release = provisional(version, list_offers())
    sdist = find_sdist(release)
    release = replace(release, size=sdist.stat().st_size, wheels=list_wheels(version))
    nearest = min(catalog.pins, key=lambda pin: _distance(pin.version, version))
    neighbour = min(catalog.releases.values(), key=lambda known: _distance(known.version, version))
    release = replace(release, states=propose(release, sdist, neighbour))
    series = catalog.series_of(nearest)
    files = pick(open_sdist(sdist, release), series.paths, release)
    fits = fit_series(series, {path: split_lines(data) for path, data in files.items()})
    tree = make_tree(release, sdist, build, say)
    known = {**catalog.releases, version: release}
    write_releases(catalog, dict(sorted(known.items(), key=lambda item: version_key(item[0]))))
    return NewPin(release, series.name, fits, str(tree), _todo(version, series.name, tree))


def _distance(a: str, b: str) -> tuple[int, ...]:
    return tuple(abs(x - y) for x, y in zip(version_key(a), version_key(b), strict=False))


def _todo(version: str, series: str, tree: Path) -> tuple[str, ...]:
    depth = "/".join([".."] * len(tree.parts)) if not tree.is_absolute() else "PATH"
    return (
        f"read the proposed states and their evidence: make watch VERSION={version}; edit patches/releases.toml",
        f"rebase: git -C {tree} am --reject {depth}/patches/{series}/*.patch    # --skip what upstream has",
        f"mend the trailers Applies-To and Test: git -C {tree} rebase --interactive pristine",
        f"make export PIN={version}",
        "make record",
        "make matrix",
        f"make check PIN={version} && make test",
    )
