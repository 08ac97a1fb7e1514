"""For whoever changes a patch: `export` writes patch files from a tree's commits, `record` writes heads and blobs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.hunks import blob_id
from vllm_patches.series.model import Release
from vllm_patches.series.patchfile import parse_patch
from vllm_patches.series.tables import dump_releases
from vllm_patches.sources import cache
from vllm_patches.sources.store import FindSdist, touched_files
from vllm_patches.trees import git
from vllm_patches.trees.tree import PRISTINE, pristine_objects, series_head


def export_series(catalog: Catalog, release: Release, tree: Path) -> dict[str, bool]:
    """Write the commits of *tree* since its pristine one to the release's series directory.

    Returns patch name to "changed". Importing (`apply`) and exporting are a round trip: an untouched tree changes
    nothing.
    """
    base, head = git.rev_parse(tree, f"refs/heads/{PRISTINE}"), git.rev_parse(tree, "HEAD")
    if not base or not head or git.status(tree):
        raise PatchesError(
            "not a clean tree made by apply",
            release=release.version,
            file=str(tree),
            expected=f"a branch {PRISTINE}, and every change committed",
            found="\n".join(git.status(tree)) or "no such branch",
            next_command=f"make apply PIN={release.version}",
        )
    files: dict[str, bytes] = {}
    for commit in git.commits_after(tree, base, head):
        raw = git.format_patch(tree, commit)
        name = _file_name(catalog, commit, raw)
        _expect_later(release, tree, files, name, commit)
        files[name] = raw
    if not files:
        raise PatchesError(
            f"the tree has no commit after its branch {PRISTINE}; nothing was changed",
            release=release.version,
            file=str(tree),
            expected="a commit per patch",
            found=f"{PRISTINE} at HEAD, {head}",
            next_command=f"make apply PIN={release.version}",
        )
    if not release.series:
        release = replace(release, series=f"v{release.version}")
        write_releases(catalog, {**catalog.releases, release.version: release})
    return _write_series(catalog.folder / release.series, files)


def _expect_later(release: Release, tree: Path, files: dict[str, bytes], name: str, commit: str) -> None:
    """A series is applied in the order of its numbers, so its commits have to stand in that order, one of each."""
    last = max(files, default="")
    if name <= last:
        raise PatchesError(
            "two commits for one fix" if name in files else "the commits are not in the order of their fixes",
            release=release.version,
            patch=name,
            file=str(tree),
            expected=f"a commit of a fix after {last}",
            found=f"{name} in commit {commit}",
            next_command=f"git -C {tree} rebase --interactive {PRISTINE}    # squash or move it",
        )


def _file_name(catalog: Catalog, commit: str, raw: bytes) -> str:
    """The patch's file name, told by the fix number in its Test trailer."""
    patch = parse_patch(f"commit {commit[:12]}", raw)
    match = re.search(r"\[(\d{4})-", patch.trailer("Test"))
    fix = catalog.fixes.get(match[1]) if match else None
    if fix is None:
        raise PatchesError(
            "a commit does not say which fix it is",
            patch=commit,
            expected="a trailer 'Test: tests/repro/test_proof.py::test_proof[NNNN-RELEASE]'",
            found=patch.trailer("Test") or "none",
            next_command="git rebase --interactive pristine    # in the tree: reword it",
        )
    return fix.patch_name


def _write_series(folder: Path, files: dict[str, bytes]) -> dict[str, bool]:
    contents = {**files, "series": "".join(f"{name}\n" for name in sorted(files)).encode()}
    changed: dict[str, bool] = {}
    for name, raw in contents.items():
        path = folder / name
        changed[name] = not path.is_file() or path.read_bytes() != raw
        if changed[name]:
            with cache.written_beside(path) as beside:
                beside.write_bytes(raw)
    for path in folder.iterdir():
        if path.name not in contents:  # a retired patch
            path.unlink()
            changed[path.name] = True
    return changed


def record_pins(catalog: Catalog, find_sdist: FindSdist) -> dict[str, bool]:
    """Write head and blobs of every release with a series to ``releases.toml``; returns version to "changed"."""
    updated = dict(catalog.releases)
    for release in catalog.pins:
        series = catalog.series_of(release)
        sdist = find_sdist(release)
        files = touched_files(release, sdist, series.paths)
        blobs = {path: blob_id(data) for path, data in files.items()}
        head = series_head(release, series, pristine_objects(release, sdist))
        # The revision is a version that users see: it must never stand for two states of the series.
        revision = release.revision if release.revision and head == release.head else release.revision + 1
        updated[release.version] = replace(release, head=head, blobs=blobs, revision=revision)
    changed = {version: updated[version] != catalog.releases[version] for version in updated}
    write_releases(catalog, updated)
    return changed


def write_releases(catalog: Catalog, releases: dict[str, Release]) -> None:
    """Replace ``releases.toml`` by the canonical text of *releases*, where it is another."""
    path, text = catalog.folder / "releases.toml", dump_releases(releases)
    if path.read_text(encoding="utf-8") != text:
        with cache.written_beside(path) as beside:
            beside.write_text(text, encoding="utf-8")
