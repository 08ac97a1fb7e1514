"""The verbs of the command line as functions of the same names: ``from vllm_patches import api``.

They return the frozen values that the command prints, and raise `PatchesError`. (The names cannot stand in
``vllm_patches`` itself, where `dist` is a package.) Nothing is imported before it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_patches.errors import PatchesError

if TYPE_CHECKING:
    from vllm_patches.dist.make import Dist, Order
    from vllm_patches.installed.install import Installed
    from vllm_patches.installed.verify import Verified
    from vllm_patches.outcome import Applied, Say
    from vllm_patches.series.model import Artifact, Release
    from vllm_patches.sourcebuilds.sourcebuild import SourceBuilt
    from vllm_patches.sources.store import FindSdist
    from vllm_patches.trees.treecheck import TreeReport
    from vllm_patches.upkeep.check import CheckReport
    from vllm_patches.wheels.wheel import Built

__all__ = [
    "PatchesError",
    "apply",
    "build",
    "build_source",
    "check",
    "check_tree",
    "dist",
    "install",
    "uninstall",
    "verify",
]


def _quiet(line: str) -> None:
    """Progress that nobody wants to see."""


def apply(
    pin: str = "",
    *,
    src: Path | None = None,
    sdist: Path | None = None,
    build: Path = Path("build/src"),
    say: Say = _quiet,
) -> Applied:
    """A patched work tree of the release *pin* under *build*, or the patches on a new branch of the checkout *src*."""
    from vllm_patches.series.catalog import DEFAULT_PIN, open_catalog
    from vllm_patches.trees.apply import apply_release
    from vllm_patches.trees.checkout import apply_checkout

    catalog = open_catalog()
    if src is not None:
        return apply_checkout(catalog, src, catalog.release(pin) if pin else None)
    return apply_release(catalog, catalog.release(pin or DEFAULT_PIN), _finder(sdist), build, say)


def build(
    pin: str = "",
    *,
    wheel: Path | None = None,
    arch: str = "",
    out: Path = Path("dist"),
    without: Iterable[str] = (),
    cuda_archs: str = "",
    torch: Path | None = None,
    sdist: Path | None = None,
    thorough: bool = False,
    say: Say = _quiet,
) -> Built:
    """A patched wheel of the release *pin* in *out*, from the official *wheel* or the one that pip would take.

    *arch* is a machine as `uname -m` names it. For a compiled part that is not among *without*: *cuda_archs* such as
    "8.0 9.0" (default: the official list), *torch* the package with the headers, *sdist* the sources. *thorough*
    compares every copied file with RECORD.
    """
    from vllm_patches.series.catalog import open_catalog
    from vllm_patches.wheels.native import NativeOptions
    from vllm_patches.wheels.wheel import build_wheel, release_of

    def find(wanted: Artifact) -> Path:
        from vllm_patches.sources.index import fetch_wheel

        return fetch_wheel(wanted)

    catalog = open_catalog()
    return build_wheel(
        catalog, release_of(catalog, pin or None, wheel), find, out, say,
        given=wheel, arch=arch, without=without, thorough=thorough,
        find_sdist=_finder(sdist), native=NativeOptions(cuda_archs, torch),
    )  # fmt: skip


def build_source(
    pin: str = "",
    *,
    device: str = "",
    python: Path | None = None,
    isolated: bool = True,
    work: Path = Path("build/source"),
    out: Path = Path("dist"),
    sdist: Path | None = None,
    say: Say = _quiet,
) -> SourceBuilt:
    """``build --mode source``: upstream's own full build of the patched release *pin*, a wheel in *out*."""
    import sys

    from vllm_patches.series.catalog import DEFAULT_PIN, open_catalog
    from vllm_patches.sourcebuilds.buildenv import device_named
    from vllm_patches.sourcebuilds.sourcebuild import SourceOptions
    from vllm_patches.sourcebuilds.sourcebuild import build_source as run

    catalog = open_catalog()
    options = SourceOptions(device_named(device), python or Path(sys.executable), isolated)
    return run(catalog, catalog.release(pin or DEFAULT_PIN), _finder(sdist), work, out, say, options)


def check(pins: Iterable[str] = (), *, sdist: Path | None = None) -> CheckReport:
    """Every patch on every pin (or on *pins*), in and out again."""
    from vllm_patches.series.catalog import open_catalog
    from vllm_patches.upkeep.check import check_catalog

    catalog = open_catalog()
    return check_catalog(catalog, [catalog.release(pin) for pin in pins] or catalog.pins, _finder(sdist))


def check_tree(tree: Path, pin: str = "") -> TreeReport:
    """How a series stands to a source tree of your own (``check --tree``)."""
    from vllm_patches.series.catalog import open_catalog
    from vllm_patches.trees.treecheck import check_tree as against

    catalog = open_catalog()
    return against(catalog, tree, catalog.release(pin) if pin else None)


def dist(
    pins: Iterable[str] = (),
    *,
    order: Order | None = None,
    sdist: Path | None = None,
    out: Path = Path("dist"),
    say: Say = _quiet,
) -> Dist:
    """Release assets of *pins* (all) below *out*; *order* says which channels and fixes, and what goes along."""
    from dataclasses import replace

    from vllm_patches.dist.make import Order, make_dist
    from vllm_patches.series.catalog import open_catalog

    catalog, names = open_catalog(), list(pins)
    releases = [catalog.release(pin) for pin in names] or list(catalog.pins)
    return make_dist(catalog, releases, _finder(sdist), out, replace(order or Order(), all_releases=not names), say)


def install(site: Path | None = None, *, without: Iterable[str] = (), say: Say = _quiet) -> Installed:
    """Patch an installed vLLM in place; on any error it is as it was."""
    from vllm_patches.installed.install import install as put_in
    from vllm_patches.series.catalog import open_catalog

    return put_in(open_catalog(), site, without, say)


def uninstall(site: Path | None = None, *, say: Say = _quiet) -> Installed:
    """Put back every byte that `install` changed."""
    from vllm_patches.installed.install import uninstall as take_out

    return take_out(site, say)


def verify(path: Path | None = None, *, without: Iterable[str] = ()) -> Verified:
    """Which of the five fixes an installed package, wheel, sdist or source tree has; look at its ``ok``.

    *path* defaults to the current environment, *without* names parts whose absence is accepted.
    """
    from vllm_patches.installed.verify import verify as look
    from vllm_patches.series.catalog import open_catalog

    return look(open_catalog(), path, without)


def _finder(sdist: Path | None) -> FindSdist:
    if sdist is not None:
        return lambda release: sdist

    def fetch(release: Release) -> Path:
        from vllm_patches.sources.index import fetch_sdist

        return fetch_sdist(release)

    return fetch
