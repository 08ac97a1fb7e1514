"""`dist`: the assets of the chosen releases and the tarball of them, made beside and put into place in one step."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from vllm_patches import __version__
from vllm_patches.dist import aur, combined, conda, dockerfile, nativedeps, nix, quilt, rpm, spack, statements, tarball
from vllm_patches.dist.bundle import Asset, Bundle
from vllm_patches.dist.compose import Wish, compose
from vllm_patches.dist.licences import licences
from vllm_patches.dist.links import Links
from vllm_patches.dist.manifest import manifest, modifications
from vllm_patches.dist.proofs import Proofs
from vllm_patches.errors import PatchesError
from vllm_patches.hashing import sha256
from vllm_patches.outcome import Say
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.model import Release
from vllm_patches.sources import cache
from vllm_patches.sources.sdist import entries, open_sdist
from vllm_patches.sources.store import FindSdist
from vllm_patches.wheels.outfile import OUT

# What can be asked for by name; the patches themselves, manifest.json and MODIFICATIONS always go along.
CHANNELS: Mapping[str, Callable[[Bundle, Links], list[Asset]]] = {
    "quilt": quilt.assets,
    "rpm": rpm.assets,
    "nix": nix.assets,
    "conda": conda.assets,
    "spack": spack.assets,
    "aur": aur.assets,
    "combined": combined.assets,
    "dockerfile": dockerfile.assets,
}
NATIVE, STATEMENTS = "native", "statements"  # these are made from more than the patches
ALL_CHANNELS = (*CHANNELS, NATIVE, STATEMENTS)


@dataclass(frozen=True)
class Order:
    """What was asked for; no *channels*: all of them."""

    wish: Wish = field(default_factory=Wish)
    channels: tuple[str, ...] = ()
    links: Links = field(default_factory=Links)
    proofs: Proofs | None = None
    all_releases: bool = True

    def wants(self, channel: str) -> bool:
        """True where *channel* was asked for, by name or because none was named."""
        return not self.channels or channel in self.channels


@dataclass(frozen=True)
class ReleaseDist:
    """What was made for one release; scanners are told of *stated*, and not of *withheld*: fix to the reason."""

    release: str
    version: str
    patches: tuple[str, ...]
    refreshed: tuple[str, ...]
    stated: tuple[str, ...]
    withheld: Mapping[str, str]


@dataclass(frozen=True)
class Dist:
    """The result of `dist`; the hashes are sha256."""

    folder: str
    files: int
    tar: str
    tar_sha256: str
    gz: str
    gz_sha256: str
    releases: tuple[ReleaseDist, ...]


def make_dist(
    catalog: Catalog, releases: Sequence[Release], find_sdist: FindSdist, out: Path, order: Order, say: Say
) -> Dist:
    """Make ``<out>/vllm-patches-<version>…``; raises `PatchesError` and leaves nothing half-written."""
    _check_channels(order)
    for release in releases:
        catalog.need_series(release)
    releases = _concerned(catalog, releases, order, say)
    top = _name(releases, order)
    target = out / top
    _refuse_existing(target)
    epoch = tarball.source_date_epoch(_newest_patch(catalog, releases))
    made: list[ReleaseDist] = []
    files: list[Asset] = licences() + [Asset(name, (catalog.folder / name).read_bytes()) for name in _TABLES]
    for release in releases:
        say(f"vLLM {release.version}")
        assets, one = _release(catalog, release, find_sdist(release), order, epoch)
        files += [Asset(f"{release.version}/{a.path}", a.data, a.executable) for a in assets]
        made.append(one)
    archive = tarball.tar(top, [*files, tarball.sums(files)], epoch)
    packed = [Asset(f"{top}.tar", archive), Asset(f"{top}.tar.gz", tarball.gzip_stored(archive))]
    everything = files + packed
    _write(target, [*everything, tarball.sums(everything), tarball.sri_sums(everything)])
    hashes = [sha256(asset.data) for asset in packed]
    return Dist(str(target), len(everything) + 2, packed[0].path, hashes[0], packed[1].path, hashes[1], tuple(made))


def _concerned(catalog: Catalog, releases: Sequence[Release], order: Order, say: Say) -> Sequence[Release]:
    """Asked for some fixes of all releases, those that carry one of them; the others are named."""
    if not order.all_releases or not order.wish.fixes:
        return releases
    carried = {r.version: {p.number for p in catalog.series_of(r).patches} & set(order.wish.fixes) for r in releases}
    for release in releases:
        if not carried[release.version]:
            say(f"vLLM {release.version}: its series has none of {', '.join(order.wish.fixes)}")
    return [release for release in releases if carried[release.version]] or releases


_TABLES = ("fixes.toml", "releases.toml")


def _check_channels(order: Order) -> None:
    """Every channel is known, and no option is passed over in silence."""
    if unknown := [name for name in order.channels if name not in ALL_CHANNELS]:
        raise PatchesError(
            "unknown channel",
            expected=f"some of {', '.join(ALL_CHANNELS)}",
            found=", ".join(unknown),
            next_command="vllm-patches dist --help",
        )
    if order.proofs is not None and not order.wants(STATEMENTS):
        raise PatchesError(
            "--proof is for the statements, which are not among the channels",
            expected=f"--channel {STATEMENTS}, or no --channel",
            found=", ".join(order.channels),
            next_command=f"vllm-patches dist --channel {STATEMENTS} --proof FILE",
        )


def _name(releases: Sequence[Release], order: Order) -> str:
    """The tarball's name: what is only a part of everything says which part."""
    parts = [f"vllm-patches-{__version__}"]
    if not order.all_releases:
        parts += [release.version for release in releases]
    if order.wish.fixes:
        parts += ["only", *order.wish.fixes]
    if order.wish.third:
        parts += [order.wish.position.value, re.sub(r"[^A-Za-z0-9._-]+", "_", order.wish.third.name)]
    return "-".join([*parts, *order.channels])


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise PatchesError(
            "the output folder exists; nothing was written",
            file=str(target),
            expected="no file or folder of that name",
            found="one that exists",
            next_command=f"rm -r {target}    # or {OUT}",
        )


def _newest_patch(catalog: Catalog, releases: Iterable[Release]) -> int:
    """The newest Date: of the patches that go out: it moves when they do, and needs no git."""
    dates = [patch.date for release in releases for patch in catalog.series_of(release).patches]
    moments = (parsedate_to_datetime(date) for date in dates)
    return int(max(moments, default=datetime.fromtimestamp(0, UTC)).timestamp())


def _release(
    catalog: Catalog, release: Release, sdist: Path, order: Order, epoch: int
) -> tuple[list[Asset], ReleaseDist]:
    """Everything for one release, from one reading of its sdist."""
    tree = {entry.path: entry.data for entry in entries(open_sdist(sdist, release), release)}
    series = catalog.series_of(release)

    def read(paths: Iterable[str]) -> dict[str, bytes]:
        return {path: bytes(tree[path]) for path in paths if path in tree}

    tops = {path.partition("/")[0] for path in tree if "/" in path}
    bundle = compose(release, series, order.wish, read, tops)
    assets = _channels(bundle, order)
    if order.wants(NATIVE):
        texts = {path: data.decode("utf-8") for path, data in read(filter(nativedeps.is_cmake, tree)).items()}
        assets.append(nativedeps.asset(release, texts))
    withheld = dict.fromkeys((item.fix for item in bundle.items if item.fix), "the channel was not asked for")
    if order.wants(STATEMENTS):
        evidence = statements.Evidence(bundle, series, catalog.fixes, order.proofs, epoch)
        withheld = evidence.withheld
        assets += statements.assets(evidence)
    assets += [manifest(bundle, withheld), modifications(bundle, catalog.fixes)]
    return assets, _result(bundle, withheld)


def _channels(bundle: Bundle, order: Order) -> list[Asset]:
    """The patches themselves, which the others refer to, and the channels that were asked for."""
    assets = quilt.assets(bundle, order.links)
    for name, channel in CHANNELS.items():
        if order.wants(name) and channel is not quilt.assets:
            assets += channel(bundle, order.links)
    return assets


def _result(bundle: Bundle, withheld: Mapping[str, str]) -> ReleaseDist:
    return ReleaseDist(
        release=bundle.release.version,
        version=bundle.version,
        patches=tuple(item.name for item in bundle.items),
        refreshed=tuple(item.name for item in bundle.items if item.refreshed),
        stated=tuple(item.fix for item in bundle.items if item.fix and item.fix not in withheld),
        withheld=withheld,
    )


def _write(target: Path, files: Iterable[Asset]) -> None:
    """All files into a folder beside *target*, which then gets the name."""
    with _folder_errors(target), cache.disk_errors(target.parent, OUT):
        target.parent.mkdir(parents=True, exist_ok=True)
        with cache.scratch(target.parent, ".dist-") as scratch:
            folder = scratch / target.name
            for asset in files:
                path = folder / asset.path
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(asset.data)
                path.chmod(0o755 if asset.executable else 0o644)
            _refuse_existing(target)  # somebody else's, meanwhile: rename would take an empty folder's place
            folder.rename(target)


@contextlib.contextmanager
def _folder_errors(target: Path) -> Iterator[None]:
    """A file where a folder should be, told as being about the output folder."""
    try:
        yield
    except (NotADirectoryError, FileExistsError) as error:
        raise PatchesError(
            "the output folder cannot be made",
            file=str(target.parent),
            expected="a folder, or a name that is free",
            found=error.strerror or str(error),
            next_command=f"ls -ld {target.parent}    # {OUT}",
        ) from error
