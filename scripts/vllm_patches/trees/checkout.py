"""`apply` on a user's own git checkout: new commits on a new branch, or nothing touched at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.outcome import Applied, ApplyOutcome, fix_rows
from vllm_patches.series.catalog import DEFAULT_PIN, Catalog
from vllm_patches.series.hunks import blob_id
from vllm_patches.series.model import FilePatch, Patch, Release, Series
from vllm_patches.trees import git
from vllm_patches.trees.tree import branch_name, commit_series

_UNFINISHED = ("rebase-apply", "rebase-merge", "MERGE_HEAD", "CHERRY_PICK_HEAD", "REVERT_HEAD", "BISECT_LOG")

_SCRATCH = "refs/vllm-patches/applying"

JUDGED = "judged by the git blobs of the files that the series touches; the rest of the tree was not looked at"


class Presence(Enum):
    """Whether a patch is in a tree, told by its files' blobs alone."""

    IN = "in"
    OUT = "out"
    PARTLY = "partly in"  # some of its files are patched, others are pristine
    DRIFTED = "drifted"  # a file is neither pristine nor at any step of the series


def apply_checkout(catalog: Catalog, source: Path, release: Release | None) -> Applied:
    """Commit the missing patches on a new branch of *source* and switch to it.

    *release* None means: find it by the blobs. On any error the checkout, its branch and its index are as they were.
    """
    _check_root(source)
    with _alone(source):
        _check_clean(source)
        return _apply_missing(catalog, source, release)


def _apply_missing(catalog: Catalog, source: Path, release: Release | None) -> Applied:
    base = git.rev_parse(source, "HEAD")
    if base is None:
        raise PatchesError("the checkout has no commit", file=str(source), next_command=f"git -C {source} log -1")
    paths = {path for series in catalog.series.values() for path in series.paths}
    blobs = git.blobs(source, base, sorted(paths))
    release = _recognise(catalog, source, blobs, release)
    series = catalog.series_of(release)
    presence = {patch.name: patch_presence(series, patch, blobs) for patch in series.patches}
    _refuse_partly(source, release, series, presence, blobs)
    missing = [patch for patch in series.patches if presence[patch.name] is Presence.OUT]
    already = tuple(p.number for p in series.patches if presence[p.name] is Presence.IN)
    rows = fix_rows(release, catalog.fixes, already)
    if not missing:
        return Applied(release.version, ApplyOutcome.ALREADY, rows, str(source), base, (JUDGED,))
    head = _commit_and_switch(source, release, missing, base)
    return Applied(release.version, ApplyOutcome.APPLIED, rows, str(source), head, (JUDGED,))


@contextlib.contextmanager
def _alone(source: Path) -> Iterator[None]:
    """One `apply` at a time in a repository; a scratch ref that is there then was left by a killed one."""
    handle = os.open(git.git_path(source, "objects"), os.O_RDONLY)  # one folder for all its work trees
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for ref in git.refs(source, _SCRATCH):
            git.delete_ref(source, ref)
        yield
    finally:
        os.close(handle)


def patch_presence(series: Series, patch: Patch, blobs: Mapping[str, str]) -> Presence:
    """Where *patch* stands in a tree with these *blobs* (path to id)."""
    if any(blobs.get(file.path) not in series.blob_chain(file.path) for file in patch.files):
        return Presence.DRIFTED
    seen = {Presence.IN if _reached(series, file, blobs) else Presence.OUT for file in patch.files}
    return seen.pop() if len(seen) == 1 else Presence.PARTLY


def _reached(series: Series, file: FilePatch, blobs: Mapping[str, str]) -> bool:
    """True if the tree's file is as this patch left it, or as a later one did."""
    chain = series.blob_chain(file.path)
    return chain.index(blobs[file.path]) >= chain.index(file.new_blob)


def matching_releases(catalog: Catalog, blobs: Mapping[str, str]) -> list[tuple[Release, int, int]]:
    """For each pin: how many of its touched files have a blob of its series, and how many there are; best first.

    Of equals, the default pin comes first.
    """
    rows = []
    for release in catalog.pins:
        series = catalog.series_of(release)
        hits = sum(blobs.get(path) in series.blob_chain(path) for path in series.paths)
        rows.append((release, hits, len(series.paths)))
    return sorted(rows, key=lambda row: (row[1] / row[2], row[0].version == DEFAULT_PIN), reverse=True)


def _check_root(source: Path) -> None:
    """A git checkout's own root."""
    if not source.is_dir():
        raise PatchesError("SRC is not a folder", file=str(source), next_command=f"ls -ld {source}")
    if git.top_level(source) != source.resolve():
        raise PatchesError(
            "SRC is not the root of a git checkout",
            file=str(source),
            expected="a folder with its own .git",
            found="none here",
            next_command=f"git -C {source} rev-parse --show-toplevel    # plain sources: patch -p1 -F0",
        )


def _check_clean(source: Path) -> None:
    """No change, and no operation under way."""
    for name in _UNFINISHED:
        if git.git_path(source, name).exists():
            raise PatchesError(
                "the checkout is in the middle of something",
                file=str(source),
                found=name,
                next_command=f"git -C {source} status",
            )
    if changed := git.status(source, pinned=False):
        raise PatchesError(
            "the checkout is not clean; nothing was changed",
            file=str(source),
            expected="no changed and no untracked files",
            found="\n".join(changed[:10]),
            next_command=f"git -C {source} stash --include-untracked",
        )


def _recognise(catalog: Catalog, source: Path, blobs: Mapping[str, str], wanted: Release | None) -> Release:
    """The release that the blobs say this is; raises unless it is *wanted* (or any pin, where that is None)."""
    if wanted is not None:
        catalog.need_series(wanted)
    ranked = matching_releases(catalog, blobs)
    exact = [release for release, hits, total in ranked if hits == total]
    if wanted in exact:
        return wanted
    if wanted is None and exact:  # several pins share their files: the default one, else the newest
        return next((r for r in exact if r.version == DEFAULT_PIN), exact[-1])
    if crlf := _crlf_files(catalog, source, blobs):
        raise _with_crlf(source, wanted, crlf)
    raise _unrecognised(source, blobs, wanted, ranked, exact)


def _crlf_files(catalog: Catalog, source: Path, blobs: Mapping[str, str]) -> list[str]:
    """The touched files that are committed with CRLF, where their line ends alone keep them from being a release's."""
    contents = git.read_blobs(source, blobs.values())
    as_lf = {path: blob_id(contents[blob].replace(b"\r\n", b"\n")) for path, blob in blobs.items()}
    if not any(hits == total for _, hits, total in matching_releases(catalog, as_lf)):
        return []
    return [path for path, blob in blobs.items() if as_lf[path] != blob]


def _with_crlf(source: Path, wanted: Release | None, files: list[str]) -> PatchesError:
    return PatchesError(
        "the checkout has CRLF line ends in its commits; nothing was changed",
        release=wanted.version if wanted else "",
        file=str(source),
        expected="LF, as in the release",
        found=f"CRLF in {', '.join(files)}",
        next_command=f"git -C {source} -c core.autocrlf=input add --renormalize .    # and commit it",
    )


def _unrecognised(
    source: Path,
    blobs: Mapping[str, str],
    wanted: Release | None,
    ranked: list[tuple[Release, int, int]],
    exact: list[Release],
) -> PatchesError:
    best, hits, total = ranked[0]
    found = f"nearest is {best.version}: {hits} of {total} touched files are its own"
    command = f"vllm-patches check --tree {source} --pin {(wanted or best).version}"
    what = "the checkout is not a release with a series, as far as the touched files tell"
    if not blobs:
        what, found = (
            "the checkout is not vLLM: it has none of the files that the series touch",
            "none of them",
        )
        command = f"ls {source}"
    elif exact and wanted:
        what = f"the checkout is vLLM {exact[0].version}, not {wanted.version}"
        command = f"make apply PIN={exact[0].version} SRC={source}"
    return PatchesError(
        what,
        release=wanted.version if wanted else "",
        file=str(source),
        expected=f"the files of {wanted.version}" if wanted else "the files of one of the pins",
        found=found,
        next_command=command,
    )


def _refuse_partly(
    source: Path,
    release: Release,
    series: Series,
    presence: Mapping[str, Presence],
    blobs: Mapping[str, str],
) -> None:
    """A patch of which only some files are in can be neither applied nor called applied."""
    for patch in series.patches:
        if presence[patch.name] is Presence.PARTLY:
            missing = [f.path for f in patch.files if not _reached(series, f, blobs)]
            raise PatchesError(
                "a patch is only partly in the checkout; nothing was changed",
                release=release.version,
                patch=patch.name,
                file=", ".join(missing),
                expected="all of its files patched, or none",
                found=f"pristine: {', '.join(missing)}",
                next_command=f"vllm-patches check --tree {source} --pin {release.version}",
            )


def _commit_and_switch(source: Path, release: Release, missing: list[Patch], base: str) -> str:
    """Make the commits without touching the work tree, then let git switch; undo the branch if it refuses."""
    branch = branch_name(release)
    head = commit_series(source, release, missing, base, _SCRATCH)
    git.delete_ref(source, _SCRATCH)
    existing = git.rev_parse(source, f"refs/heads/{branch}")
    if existing not in (None, head):
        raise PatchesError(
            "a branch of that name is in the way; nothing was changed",
            release=release.version,
            file=str(source),
            expected=f"no branch {branch}, or one at {head}",
            found=f"{branch} at {existing}",
            next_command=f"git -C {source} branch -m {branch} {branch}-old",
        )
    try:
        git.update_ref(source, f"refs/heads/{branch}", head)
        _switch(source, branch, base)
    except BaseException:  # Ctrl-C too
        if existing is None and git.rev_parse(source, f"refs/heads/{branch}"):
            git.delete_ref(source, f"refs/heads/{branch}")
        raise
    return head


def _switch(source: Path, branch: str, base: str) -> None:
    """Switch, or be back where it began; Ctrl-C waits, for after half of it the files would be neither."""
    begun_on = git.current_branch(source) or base
    with git.no_interrupt():
        try:
            git.switch(source, branch)
        except PatchesError:
            if git.rev_parse(source, "HEAD") != base or git.status(source, pinned=False):
                with contextlib.suppress(PatchesError):  # the file that stopped it may stop this too; it is as it was
                    git.switch(source, begun_on, force=True)
            raise
