"""Read an sdist: check its hash, list its files safely, pull single files out of it. Nothing is extracted to disk."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from vllm_patches.commits import Entry
from vllm_patches.errors import PatchesError
from vllm_patches.model import Artifact, Release


def open_sdist(path: Path, release: Release) -> bytes:
    """The inflated tar of *path*; raises `PatchesError` unless its sha256 is the recorded one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PatchesError(
            f"cannot read the sdist: {error.strerror}",
            release=release.version,
            file=str(path),
            next_command=f"ls -l {path}",
        ) from error
    check_hash(path, hashlib.sha256(data).hexdigest(), len(data), release.sdist_file)
    # zlib.decompress in one go is about twice as fast as gzip.GzipFile, which reads in small steps.
    return zlib.decompress(data, wbits=31, bufsize=4 * len(data))


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
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        for member in archive:
            safe = _safe(member, release)
            if safe.isfile():
                data = tar[member.offset_data : member.offset_data + member.size]
                yield Entry(_inside(safe.name), "100755" if member.mode & 0o100 else "100644", data)


def pick(tar: bytes, paths: Iterable[str], release: Release) -> dict[str, bytes]:
    """The contents of those *paths* that the tar holds; stops when it has them all."""
    wanted = set(paths)
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
        for member in archive:
            name = _inside(member.name)
            if name in wanted and _safe(member, release).isfile():
                found[name] = tar[member.offset_data : member.offset_data + member.size]
                wanted.discard(name)
                if not wanted:
                    break
    return found


def _inside(name: str) -> str:
    """A member's path below the sdist's one top folder."""
    return name.partition("/")[2]


def _safe(member: tarfile.TarInfo, release: Release) -> tarfile.TarInfo:
    """The member as tarfile's data filter lets it through; anything else is refused."""
    try:
        safe = tarfile.data_filter(member, ".")
    except tarfile.FilterError as error:
        raise _refused(member, release, str(error)) from error
    if not (safe.isfile() or safe.isdir()):
        raise _refused(member, release, "a link; a vLLM sdist has none")
    return safe


def _refused(member: tarfile.TarInfo, release: Release, why: str) -> PatchesError:
    return PatchesError(
        "the sdist holds a member that must not be extracted",
        release=release.version,
        file=member.name,
        expected="a file or folder inside the tree",
        found=why,
        next_command=f"tar tzvf {release.sdist}",
    )
