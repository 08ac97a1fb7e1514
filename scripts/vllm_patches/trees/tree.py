"""Make a git work tree of a release: pristine commit, one commit per patch, every touched file checked by hash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vllm_patches.errors import PatchesError
from vllm_patches.hashing import file_sha256, sha256
from vllm_patches.series.hunks import apply_patch, blob_id
from vllm_patches.series.model import Patch, Release, Series
from vllm_patches.sources import cache
from vllm_patches.sources.sdist import Entry, entries, open_sdist
from vllm_patches.trees import git
from vllm_patches.trees.commits import pristine_stream, series_stream

PRISTINE = "pristine"
_RECORD = "pristine.json"


@dataclass(frozen=True)
class Pristine:
    """The git objects of one sdist: a folder with one pack and its index, and the root commit in it."""

    folder: Path
    commit: str
    pack_sha256: str


def branch_name(release: Release) -> str:
    """The branch that holds the applied series."""
    return f"vllm-patches/{release.version}"


def pristine_objects(release: Release, sdist: Path) -> Pristine:
    """The pristine objects of *release*, made from *sdist* the first time and kept in the cache."""
    folder = cache.pristine_path(release.sha256)
    cache.sweep(folder.parent, ".making-*")
    there = folder.exists()  # it appears whole, by a rename: where it is there and unsound, it was damaged
    if known := _load(folder):
        return known
    with cache.disk_errors(folder.parent):
        if there:
            shutil.rmtree(folder)
        with cache.scratch(folder.parent, ".making-") as scratch:
            made = _make_pristine(release, sdist, scratch)
            try:
                made.rename(folder)
            except OSError:  # another process was faster; its objects are the same
                if not folder.is_dir():
                    raise
    return _load(folder) or _unsound(release, folder)


def _load(folder: Path) -> Pristine | None:
    """The objects in *folder*; None where there are none, or where any byte is not as it was written."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record != _record(folder, str(record.get("commit"))):
        return None
    return Pristine(folder, record["commit"], record["objects.pack"])


def _record(folder: Path, commit: str) -> dict[str, str]:
    """What is noted of the objects: their commit, their hashes, and a hash over these."""
    noted = {"commit": commit} | {name: _file_hash(folder / name) for name in ("objects.pack", "objects.idx")}
    return noted | {"check": sha256(json.dumps(noted).encode())}


def _unsound(release: Release, folder: Path) -> NoReturn:
    raise PatchesError(
        "the cache does not keep what is written to it",
        release=release.version,
        file=str(folder),
        next_command=f"rm -rf {cache.root()} && make apply PIN={release.version}",
    )


def _make_pristine(release: Release, sdist: Path, scratch: Path) -> Path:
    repository, out = scratch / "repository", scratch / "out"
    git.init(repository, PRISTINE)
    git.fast_import(
        repository,
        pristine_stream(release, f"refs/heads/{PRISTINE}", entries(open_sdist(sdist, release), release)),
    )
    commit = git.rev_parse(repository, PRISTINE)
    out.mkdir()
    for file in (repository / ".git" / "objects" / "pack").iterdir():
        if file.suffix in (".pack", ".idx"):
            file.rename(out / f"objects{file.suffix}")
    (out / _RECORD).write_text(json.dumps(_record(out, str(commit))), encoding="utf-8")
    return out


def build_tree(release: Release, series: Series, pristine: Pristine, directory: Path) -> str:
    """Fill the new folder *directory*; returns the resulting HEAD. The caller renames it into place."""
    branch = branch_name(release)
    git.init(directory, branch)
    _copy_objects(pristine, directory)
    git.update_ref(directory, f"refs/heads/{PRISTINE}", pristine.commit)
    head = commit_series(directory, release, series.patches, pristine.commit, f"refs/heads/{branch}")
    git.checkout(directory, branch)
    check_files(directory, release, series)
    return head


def series_head(release: Release, series: Series, pristine: Pristine) -> str:
    """The commit that the series ends in, without writing any work tree."""
    with cache.scratch(pristine.folder.parent, ".head-") as repository:
        git.init(repository, branch_name(release))
        _copy_objects(pristine, repository)
        return commit_series(repository, release, series.patches, pristine.commit, "refs/heads/head")


def commit_series(directory: Path, release: Release, patches: Iterable[Patch], base: str, ref: str) -> str:
    """One commit per patch on *base*, as the new ref *ref*; returns the last commit."""
    chosen = list(patches)
    if not chosen:
        git.update_ref(directory, ref, base)
        return base
    paths = list(dict.fromkeys(file.path for patch in chosen for file in patch.files))
    blobs = git.blobs(directory, base, paths)
    contents = git.read_blobs(directory, blobs.values())
    files = {path: contents[blob] for path, blob in blobs.items()}
    steps: list[tuple[Patch, list[Entry]]] = []
    for patch in chosen:
        files = apply_patch(patch, files, release=release.version)
        steps.append((patch, [Entry(f.path, f.mode, files[f.path]) for f in patch.files]))
    git.fast_import(directory, series_stream(ref, base, steps))
    head = git.rev_parse(directory, ref)
    if head is None or git.blobs(directory, head, paths) != {p: blob_id(d) for p, d in files.items()}:
        raise PatchesError(
            "git did not record the patched files",
            release=release.version,
            file=str(directory),
            expected=f"{ref} with the patched blobs",
            found=str(head),
            next_command=f"git -C {directory} fsck",
        )
    return head


def check_files(directory: Path, release: Release, series: Series) -> None:
    """Every touched file on disk must have the bytes that the last patch on it promises."""
    for path in series.paths:
        expected = series.blob_chain(path)[-1]
        found = blob_id((directory / path).read_bytes())
        if found != expected:
            raise PatchesError(
                "a patched file on disk is not what the series promises",
                release=release.version,
                file=str(directory / path),
                expected=expected,
                found=found,
                next_command=f"rm -rf {cache.root()} && make apply PIN={release.version}",
            )


def _copy_objects(pristine: Pristine, directory: Path) -> None:
    """Copied, not linked: deleting or damaging the cache can never reach a tree that was made from it."""
    pack = directory / ".git" / "objects" / "pack"
    pack.mkdir(parents=True, exist_ok=True)
    for suffix in (".pack", ".idx"):
        target = pack / f"pack-{pristine.pack_sha256[:40]}{suffix}"
        shutil.copyfile(pristine.folder / f"objects{suffix}", target)
        target.chmod(0o444)


def _file_hash(path: Path) -> str:
    try:
        return file_sha256(path)
    except FileNotFoundError:
        return ""
