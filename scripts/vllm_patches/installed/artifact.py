"""What `verify` looks at, whatever its form: files by their source path, and the version it calls itself."""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.installed.installation import Installation, dist_infos, find_installation, metadata_version, remains
from vllm_patches.series.patchset import ReadBytes
from vllm_patches.wheels.modifications import PATCHES_JSON

_VERSION = re.compile(r"__version__ = (?:version = )?['\"]([^'\"]+)")


class Kind(Enum):
    """The forms in which vLLM comes."""

    SITE = "installed package"
    WHEEL = "wheel"
    SDIST = "sdist"
    TREE = "source tree"

    @property
    def compiled(self) -> bool:
        """True where C++ sources are there only as what they were compiled to."""
        return self in (Kind.SITE, Kind.WHEEL)


@dataclass(frozen=True)
class Artifact:
    """One vLLM; *version* is empty where nothing in it says one."""

    kind: Kind
    where: str
    version: str
    read: ReadBytes = field(compare=False, repr=False)
    dist_info: str = ""  # the folder's name, of a package
    installation: Installation | None = None
    remains: tuple[str, ...] = ()  # dist-infos whose package is gone, but whose patch set is not

    @property
    def manifest(self) -> bytes | None:
        """``patches.json``, of a package that claims to be patched."""
        return self.read(f"{self.dist_info}/{PATCHES_JSON}") if self.dist_info else None


def open_artifact(path: Path, wanted: list[str]) -> Artifact:
    """The vLLM at *path*; *wanted* are the source files that will be asked for."""
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise PatchesError("no such file or folder", file=str(path), next_command=f"ls -ld {path}")
    if path.name.endswith(".whl"):
        return _open_wheel(path)
    if path.name.endswith(".tar.gz"):
        return _open_sdist(path, wanted)
    raise _unknown(path, "a file of another kind")


def _open_folder(path: Path) -> Artifact:
    if (path / "vllm").is_dir() and not dist_infos(path) and not remains(path):
        read = _file_reader(path)
        return Artifact(Kind.TREE, str(path), _source_version(read), read)
    if path.name == "vllm" and (path / "_version.py").is_file():
        raise _unknown(path, "the package's own folder", f"vllm-patches verify {path.parent}")
    try:
        found = find_installation(path)
    except PatchesError as error:
        if "vllm-" not in error.found and not (path / "lib").is_dir() and "editable" not in error.what:
            raise _unknown(path, "none of these") from error
        raise
    left = tuple(info.name for info in remains(found.site))
    read = _file_reader(found.site)
    return Artifact(Kind.SITE, str(found.site), found.version, read, found.dist_info.name, found, left)


def _open_wheel(path: Path) -> Artifact:
    try:
        archive = zipfile.ZipFile(path)
        names = set(archive.namelist())
    except (zipfile.BadZipFile, OSError) as error:
        raise _damaged(path, error) from error
    infos = sorted({name.partition("/")[0] for name in names if re.match(r"vllm-[^-/]+\.dist-info/", name)})
    if len(infos) != 1 or f"{infos[0]}/METADATA" not in names:
        raise _unknown(path, f"a wheel with {len(infos)} dist-info folders of vLLM")

    def read(name: str) -> bytes | None:
        try:
            return archive.read(name) if name in names else None
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            raise _damaged(path, error) from error

    metadata = read(f"{infos[0]}/METADATA") or b""
    return Artifact(Kind.WHEEL, str(path), metadata_version(metadata.decode("utf-8", "replace")), read, infos[0])


def _open_sdist(path: Path, wanted: list[str]) -> Artifact:
    files: dict[str, bytes] = {}
    names = {*wanted, "PKG-INFO", "vllm/_version.py"}
    try:
        with tarfile.open(path, mode="r:gz") as archive:
            for member in archive:
                inside = member.name.partition("/")[2]
                if inside in names and member.isfile() and (data := archive.extractfile(member)) is not None:
                    files[inside] = data.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _damaged(path, error) from error
    if not any(name.startswith("vllm/") for name in files):
        raise _unknown(path, "an archive without a file of vLLM")
    return Artifact(Kind.SDIST, str(path), _source_version(files.get), files.get)


def _source_version(read: Callable[[str], bytes | None]) -> str:
    version = _VERSION.search((read("vllm/_version.py") or b"").decode("utf-8", "replace"))
    return metadata_version((read("PKG-INFO") or b"").decode("utf-8", "replace")) or (version[1] if version else "")


def _file_reader(folder: Path) -> ReadBytes:
    def read(name: str) -> bytes | None:
        path = folder / name
        return path.read_bytes() if path.is_file() else None

    return read


def text_reader(read: ReadBytes) -> Callable[[str], str | None]:
    """The same files as text, for the probes; bytes that are no UTF-8 are no code that a probe could know."""

    def text(name: str) -> str | None:
        data = read(name)
        return None if data is None else data.decode("utf-8", "replace")

    return text


def _damaged(path: Path, error: BaseException) -> PatchesError:
    return PatchesError(
        "the file is damaged or cut short", file=str(path), found=str(error), next_command=f"ls -l {path}"
    )


def _unknown(path: Path, found: str, command: str = "") -> PatchesError:
    return PatchesError(
        "not a vLLM that can be verified",
        file=str(path),
        expected="a site folder or environment with vLLM, a wheel, an sdist or a source tree",
        found=found,
        next_command=command or f"ls {path}",
    )
