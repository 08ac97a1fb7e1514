"""Find the vLLM that is installed in a site folder, and refuse what must not be patched in place."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.model import Release
from vllm_patches.wheels.modifications import MODIFICATIONS, PATCHES_JSON
from vllm_patches.wheels.record import listed_rows

STATE = "vllm-patches"  # the folder inside the dist-info that is ours: journal and original files
_DIST_INFO = re.compile(r"vllm-[^-]+\.dist-info")
_SITES = ("lib/python3*/site-packages", "lib/python3*/dist-packages", "lib64/python3*/site-packages")


@dataclass(frozen=True)
class Installation:
    """An installed vLLM; *version* is what its METADATA says."""

    site: Path
    dist_info: Path
    version: str

    @property
    def state(self) -> Path:
        """The folder that holds the journal and the original files."""
        return self.dist_info / STATE

    @property
    def manifest(self) -> Path:
        """Where ``patches.json`` is, or would be."""
        return self.dist_info / PATCHES_JSON

    @property
    def modifications(self) -> Path:
        """Where the notice of change is, or would be."""
        return self.dist_info / MODIFICATIONS

    @property
    def record(self) -> Path:
        """The package's RECORD."""
        return self.dist_info / "RECORD"

    def inside(self, path: Path) -> str:
        """*path* as RECORD spells it."""
        return path.relative_to(self.site).as_posix()


def default_site() -> Path:
    """The site folder of the current environment: where its vLLM is, else where pip would put it."""
    try:
        found = importlib.metadata.distribution("vllm")
        return Path(str(found.locate_file("")))
    except importlib.metadata.PackageNotFoundError:
        return Path(sysconfig.get_path("purelib"))


def find_installation(folder: Path) -> Installation:
    """The one vLLM in the site folder (or environment) *folder*, reached through links if need be."""
    site = _site(folder)
    infos = dist_infos(site)
    if len(infos) > 1:
        raise _several(site, infos)
    if not infos:
        raise _none(site)
    info = infos[0]
    version = metadata_version((info / "METADATA").read_text(encoding="utf-8", errors="replace"))
    if info.name != f"vllm-{version}.dist-info":
        raise _refused(
            site, "its METADATA and its dist-info disagree", info.name, f"METADATA: Version {version}", version
        )
    if _editable(info):
        raise _refused_editable(site, version)
    if not (info / "RECORD").is_file():
        raise _refused(site, "it has no RECORD, the list of its files", f"{info.name}/RECORD", "none", version)
    return Installation(site, info, version)


def dist_infos(site: Path) -> list[Path]:
    """The dist-info folders of vLLM that have a METADATA."""
    return [path for path in _info_folders(site) if (path / "METADATA").is_file()]


def remains(site: Path) -> list[Path]:
    """What is left of dist-infos whose package is gone, but whose patch set is still there."""
    return [
        path
        for path in _info_folders(site)
        if not (path / "METADATA").is_file() and ((path / STATE).is_dir() or (path / PATCHES_JSON).is_file())
    ]


def metadata_version(text: str) -> str:
    """The ``Version:`` field of METADATA or PKG-INFO; empty where there is none."""
    match = re.search(r"^Version: *(\S+)", text.partition("\n\n")[0], re.MULTILINE)
    return match[1] if match else ""


def base_version(version: str) -> str:
    """The release that a version with a local part (``0.20.2+cu129``, ``0.20.2+patches.3``) was built from."""
    return version.partition("+")[0]


def release_of(catalog: Catalog, found: Installation) -> Release:
    """The release that may be patched in place; refuses what is patched already and what is unknown."""
    if found.version.partition("+")[2].startswith("patches"):
        raise _refused(
            found.site,
            "it comes from a wheel that is patched already",
            base_version(found.version),
            found.version,
            found.version,
            f"vllm-patches verify {found.site}",
        )
    release = catalog.releases.get(base_version(found.version))
    if release is None:
        known = ", ".join(catalog.releases)
        raise _refused(
            found.site, "no release of this version is known", f"one of {known}", found.version, found.version
        )
    return release


def owners(found: Installation, paths: list[str]) -> dict[str, list[str]]:
    """Which of *paths* other packages of the site list in their RECORD, and which packages they are."""
    theirs: dict[str, list[str]] = {}
    for record in sorted(found.site.glob("*.dist-info/RECORD")):
        if record.parent == found.dist_info:
            continue
        data = record.read_bytes()
        suspects = [path for path in paths if path.encode() in data]  # parsing every RECORD would take seconds
        listed = listed_rows(data) if suspects else {}
        for path in suspects:
            if path in listed:
                theirs.setdefault(path, []).append(record.parent.name.removesuffix(".dist-info"))
    return theirs


def _info_folders(site: Path) -> list[Path]:
    return sorted(path for path in site.iterdir() if _DIST_INFO.fullmatch(path.name) and path.is_dir())


def _site(folder: Path) -> Path:
    """*folder*, or the site folder of the environment that *folder* is."""
    if not folder.is_dir():
        raise PatchesError("not a folder", file=str(folder), next_command=f"ls -ld {folder}")
    site = folder.resolve()
    if _info_folders(site):
        return site
    below = [path for pattern in _SITES for path in sorted(site.glob(pattern)) if _info_folders(path)]
    return below[0].resolve() if len({path.resolve() for path in below}) == 1 else site


def _editable(info: Path) -> bool:
    try:
        url = json.loads((info / "direct_url.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(isinstance(url, dict) and url.get("dir_info", {}).get("editable"))


def _several(site: Path, infos: list[Path]) -> PatchesError:
    patched = [path.name for path in infos if (path / STATE).is_dir() or (path / PATCHES_JSON).is_file()]
    note = f"; a patch set is in {', '.join(patched)}" if patched else ""
    return PatchesError(
        "several versions of vLLM are recorded in one site folder, whose files are mixed",
        file=str(site),
        expected="one vllm-*.dist-info",
        found=", ".join(path.name for path in infos) + note,
        next_command="pip uninstall vllm    # until it finds none, then install the one that you want",
    )


def _none(site: Path) -> PatchesError:
    if any(site.glob("__editable__*vllm-*")) or any(site.glob("vllm.egg-link")):
        return _refused_editable(site, "")
    left = remains(site)
    return PatchesError(
        "no vLLM is installed there" + (", but a patch set is left over" if left else ""),
        file=str(site),
        expected="a folder vllm-VERSION.dist-info with METADATA",
        found=", ".join(f"{path.name} without METADATA" for path in left) or "none",
        next_command="pip show vllm    # Location is the folder to give with --site",
    )


def _refused_editable(site: Path, version: str) -> PatchesError:
    return _refused(
        site,
        "it is an editable install: its files are a source tree",
        "a regular install",
        "editable",
        version,
        "vllm-patches apply --src CHECKOUT",
    )


def _refused(
    site: Path, why: str, expected: str, found: str, version: str, next_command: str = "pip show --files vllm"
) -> PatchesError:
    return PatchesError(
        f"this vLLM is not one to patch in place: {why}",
        release=version,
        file=str(site),
        expected=expected,
        found=found,
        next_command=next_command,
    )
