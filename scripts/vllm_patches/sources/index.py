"""The package index: find a release's sdist and wheels and fetch them. The only module that uses the network."""

from __future__ import annotations

import datetime
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from vllm_patches.errors import PatchesError
from vllm_patches.hashing import file_sha256
from vllm_patches.series.model import Wheel
from vllm_patches.sources import cache
from vllm_patches.sources.pipconf import PipSettings, read_settings
from vllm_patches.sources.sdist import check_hash

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage, ProgressTracker, PyPISimple

    from vllm_patches.series.model import Artifact, Release

PROJECT = "vllm"
_FINAL = re.compile(r"\d+(\.\d+)+")


Progress = Callable[[int | None], "ProgressTracker"]


def fetch_sdist(release: Release, progress: Progress | None = None) -> Path:
    """The release's sdist from the cache, or from wherever pip would look; its sha256 is the recorded one."""
    target = cache.sdist_path(release.sha256, release.sdist)
    if target.is_file() and file_sha256(target) == release.sha256:
        return target
    return _fetch(release.sdist_file, target, progress)


def fetch_wheel(wanted: Artifact, progress: Progress | None = None) -> Path:
    """An official wheel, likewise; a cached one is told by its size alone, for who reads it hashes it anyway."""
    target = cache.wheel_path(wanted.sha256, wanted.name)
    if target.is_file() and target.stat().st_size == wanted.size:
        return target
    return _fetch(wanted, target, progress)


def _fetch(wanted: Artifact, target: Path, progress: Progress | None) -> Path:
    settings = read_settings()
    with cache.written_beside(target) as beside:
        _obtain(wanted, settings, beside, progress)
        found = file_sha256(beside)
        if found != wanted.sha256:
            _keep_aside(wanted, beside, target, found)
    return target


@dataclass(frozen=True)
class Offer:
    """An sdist that an index offers; *sha256* is the index's own word, empty if it gives none."""

    version: str
    filename: str
    sha256: str
    date: datetime.date | None


def list_offers() -> dict[str, Offer]:
    """Every final release of vLLM whose sdist the user's indexes offer and have not yanked, oldest first."""
    settings = read_settings()
    found: dict[str, Offer] = {}
    for client in _clients(settings):
        for package in _packages(client, settings):
            version = package.version or ""
            final = _FINAL.fullmatch(version) and package.package_type == "sdist" and not package.is_yanked
            if final and version not in found:
                day = package.upload_time.date() if package.upload_time else None
                found[version] = Offer(version, package.filename, package.digests.get("sha256", ""), day)
    return dict(sorted(found.items(), key=lambda item: version_key(item[0])))


def version_key(version: str) -> tuple[int, ...]:
    """The order of final releases."""
    return tuple(int(part) for part in version.split("."))


def list_wheels(version: str) -> tuple[Wheel, ...]:
    """Every wheel of a release that the user's indexes offer with a hash and have not yanked, by name."""
    settings = read_settings()
    found: dict[str, Wheel] = {}
    for client in _clients(settings):
        for package in _packages(client, settings):
            sha256 = package.digests.get("sha256", "")
            wanted = package.version == version and package.package_type == "wheel" and not package.is_yanked
            if wanted and sha256 and package.filename not in found:
                size = package.size or _content_length(client, package, settings)
                found[package.filename] = Wheel(package.filename, sha256, size)
    return tuple(found[name] for name in sorted(found))


def _content_length(client: PyPISimple, package: DistributionPackage, settings: PipSettings) -> int:
    """The size of a file whose index page does not state it."""
    from requests import RequestException

    try:
        reply = client.s.head(package.url, allow_redirects=True, timeout=settings.timeout)
        reply.raise_for_status()
    except RequestException as error:
        raise _unreachable(client, error) from error
    return int(reply.headers["Content-Length"])


def _obtain(wanted: Artifact, settings: PipSettings, target: Path, progress: Progress | None) -> None:
    """Put the file at *target*: from a local folder of pip's, else from the first index that has it."""
    for folder in settings.local_folders:
        for candidate in (folder / wanted.name, folder / PROJECT / wanted.name):
            if candidate.is_file():
                shutil.copyfile(candidate, target)
                return
    for client in _clients(settings):
        for package in _packages(client, settings):
            if package.filename == wanted.name:
                _download(client, package, target, settings, progress)
                return
    verb = "apply" if wanted.kind == "sdist" else "build"
    raise PatchesError(
        f"no configured package index offers the {wanted.kind}",
        release=wanted.release,
        expected=wanted.name,
        found=f"nothing of that name at: {_places(settings)}",
        next_command=f"pip config list    # or: make {verb} PIN={wanted.release} {wanted.kind.upper()}=FILE",
    )


def _clients(settings: PipSettings) -> Iterator[PyPISimple]:
    for index in settings.remote_indexes:
        yield _client(settings, index)


def _client(settings: PipSettings, index: str) -> PyPISimple:
    """A client of one index with the user's certificates and proxy; an empty *index* is the library's default."""
    try:
        from pypi_simple import PyPISimple
    except ImportError as error:
        raise PatchesError(
            "the library that talks to the package index is missing",
            expected="pypi-simple",
            found=str(error),
            next_command="make venv    # or: pip install pypi-simple; or give the sdist: make apply SDIST=FILE",
        ) from error
    client = PyPISimple(index) if index else PyPISimple()
    host = urlsplit(client.endpoint).hostname or ""
    netloc = urlsplit(client.endpoint).netloc
    trusted = {host, netloc} & set(settings.trusted_hosts)
    client.s.verify = False if trusted else settings.cert or True
    if settings.client_cert:
        client.s.cert = settings.client_cert
    if settings.proxy:
        client.s.proxies = {"http": settings.proxy, "https": settings.proxy}
    return client


def _packages(client: PyPISimple, settings: PipSettings) -> list[DistributionPackage]:
    """What one index offers of vLLM; an index that does not know the project offers nothing."""
    from pypi_simple import NoSuchProjectError, UnsupportedRepoVersionError
    from requests import RequestException

    try:
        return client.get_project_page(PROJECT, timeout=settings.timeout).packages
    except NoSuchProjectError:
        return []
    except RequestException as error:
        raise _unreachable(client, error) from error
    except (ValueError, UnsupportedRepoVersionError) as error:  # a login page, a portal, another protocol
        raise _unreachable(client, error, "the package index does not answer as one") from error


def _download(
    client: PyPISimple,
    package: DistributionPackage,
    target: Path,
    settings: PipSettings,
    progress: Progress | None,
) -> None:
    """Fetch without the library's own digest check: ours is against the recorded hash and keeps the file aside."""
    from requests import RequestException

    try:
        client.download_package(package, target, verify=False, progress=progress, timeout=settings.timeout)
    except RequestException as error:
        raise _unreachable(client, error) from error


def _keep_aside(wanted: Artifact, beside: Path, target: Path, found: str) -> None:
    """Keep a download with the wrong hash where it can be looked at, and raise the error that names it."""
    aside = target.with_name(f"{target.name}.rejected-{found[:12]}")
    size = beside.stat().st_size
    beside.replace(aside)
    check_hash(aside, found, size, wanted)


def _places(settings: PipSettings) -> str:
    """Where was looked, without credentials."""
    remote = [urlsplit(index).hostname or "the default index" for index in settings.remote_indexes]
    return ", ".join([*remote, *map(str, settings.local_folders)]) or "nowhere (pip's no-index is set)"


def _unreachable(
    client: PyPISimple, error: Exception, what: str = "the package index cannot be reached"
) -> PatchesError:
    return PatchesError(
        what,
        file=urlsplit(client.endpoint).hostname or "",
        found=f"{type(error).__name__}: {without_credentials(str(error))[:300]}",
        next_command="pip download --no-deps pypi-simple    # does pip get through? offline: make apply SDIST=FILE",
    )


def without_credentials(text: str) -> str:
    """*text* with the user and password of every URL in it left out."""
    return re.sub(r"://[^/\s]*@", "://", text)
