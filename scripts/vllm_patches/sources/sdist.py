"""Read an sdist: check its hash, list its files safely, pull single files out of it. Nothing is extracted to disk."""

from __future__ import annotations

import contextlib
import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.hashing import sha256
from vllm_patches.series.model import Artifact, Release


@dataclass(frozen=True)
class Entry:
    """One file of a tree: path relative to its root, git mode (100644 or 100755), bytes."""

    path: str
    mode: str
    data: bytes


def open_sdist(path: Path, release: Release) -> bytes:
    """The inflated tar of *path*; raises `PatchesError` unless its sha256 is the recorded one."""
    data = _read(path, release)
    # zlib.decompress in one go is about twice as fast as gzip.GzipFile, which reads in small steps.
    try:
        return zlib.decompress(data, wbits=31, bufsize=4 * len(data) + 1)
    except zlib.error as error:
        raise _no_tarball(release, error) from error


def verified(path: Path, release: Release) -> Path:
    """*path* itself, once its sha256 is the recorded one: a wrong file is told even where the cache needs none."""
    _read(path, release)
    return path


def _read(path: Path, release: Release) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PatchesError(
            f"cannot read the sdist: {error.strerror}",
            release=release.version,
            file=str(path),
            next_command=f"ls -l {path}",
        ) from error
    check_hash(path, sha256(data), len(data), release.sdist_file)
    return data


def check_hash(path: Path, found: str, size: int, wanted: Artifact) -> None:
    """Raise the error that names both hashes unless *found* is the recorded one."""
    if found == wanted.sha256:
        return
    kind = "truncated" if size < wanted.size else "not the recorded file"
    verb = "apply" if wanted.kind == "sdist" else "build"
    raise PatchesError(
        f"the {wanted.kind} is {kind}: its sha256 is wrong",
        release=wanted.release,
        file=str(path),
        expected=f"{wanted.sha256} ({wanted.size} bytes)",
        found=f"{found} ({size} bytes)",
        next_command=f"make {verb} PIN={wanted.release}    "
        f"# fetches it again; or {wanted.kind.upper()}=FILE for a good copy",
    )


def entries(tar: bytes, release: Release) -> Iterator[Entry]:
    """Every file of the tar, its top folder removed; refuses links and paths that leave the tree."""
    with _opened(tar, release) as archive:
        for member in archive:
            _check_member(member, release)
            if member.isfile():
                data = tar[member.offset_data : member.offset_data + member.size]
                yield Entry(_inside(member.name), "100755" if member.mode & 0o100 else "100644", data)


def pick(tar: bytes, paths: Iterable[str], release: Release) -> dict[str, bytes]:
    """The contents of those *paths* that the tar holds; stops when it has them all."""
    wanted = set(paths)
    found: dict[str, bytes] = {}
    with _opened(tar, release) as archive:
        for member in archive:
            name = _inside(member.name)
            if name not in wanted or member.isdir():
                continue
            _check_member(member, release)
            found[name] = tar[member.offset_data : member.offset_data + member.size]
            wanted.discard(name)
            if not wanted:
                break
    return found


@contextlib.contextmanager
def _opened(tar: bytes, release: Release) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
            yield archive
    except tarfile.TarError as error:
        raise _no_tarball(release, error) from error


def _no_tarball(release: Release, error: Exception) -> PatchesError:
    return PatchesError(
        "the sdist is not a .tar.gz, although its hash is the recorded one",
        release=release.version,
        file=release.sdist,
        expected="a gzip-compressed tar",
        found=str(error),
        next_command="git diff patches/releases.toml    # was the hash of another file recorded?",
    )


def _inside(name: str) -> str:
    """A member's path below the sdist's one top folder."""
    return name.partition("/")[2]


def _check_member(member: tarfile.TarInfo, release: Release) -> None:
    """Raise unless the member is a plain file or folder in the sdist's one top folder.

    Stricter than tarfile's data filter, which lets ``TOP/../x`` pass, strips a leading slash, and looks at the
    symlinks of whatever folder one happens to work in.
    """
    if why := _unsafe(member, release.sdist.removesuffix(".tar.gz")):
        raise _refused(member, release, why)


def _unsafe(member: tarfile.TarInfo, top: str) -> str:
    """Why the member must not be extracted; an empty string for a sound one."""
    parts = member.name.split("/")
    if member.name.startswith("/"):
        return "an absolute path"
    if wrong := [part for part in parts if part.lower() in ("", ".", "..", ".git")]:
        return f"a part {wrong[0]!r} of its path"
    if parts[0] != top or (len(parts) == 1 and not member.isdir()):
        return f"not below {top}/"
    if member.issym() or member.islnk():
        return "a link; a vLLM sdist has none"
    plain = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
    return "" if member.type in plain else "neither a file nor a folder"


def _refused(member: tarfile.TarInfo, release: Release, why: str) -> PatchesError:
    return PatchesError(
        "the sdist holds a member that must not be extracted",
        release=release.version,
        file=member.name,
        expected="a file or folder inside the tree",
        found=why,
        next_command=f"tar tzvf {release.sdist}",
    )
