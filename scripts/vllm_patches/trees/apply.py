"""`apply`: a patched work tree from an sdist, beside the target and renamed into place."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.outcome import Applied, ApplyOutcome, Say, fix_rows
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.model import Disposition, Release, Series
from vllm_patches.sources import cache
from vllm_patches.sources.store import FindSdist
from vllm_patches.trees import git
from vllm_patches.trees.tree import branch_name, build_tree, pristine_objects

_RECORD = "vllm-patches.json"  # in the tree's .git: which series it was made from


def apply_release(catalog: Catalog, release: Release, find_sdist: FindSdist, build: Path, say: Say) -> Applied:
    """Make ``<build>/vllm-<release>``, or find it made already; raises `PatchesError` and leaves no half tree."""
    series = catalog.series_of(release)
    if not series.patches:
        return _without_series(catalog, release)
    target = build / f"vllm-{release.version}"
    rows = fix_rows(release, catalog.fixes)
    with _locked(build, say):
        if _inspect(target, release, series) is Target.CURRENT:
            head = git.rev_parse(target, "HEAD") or ""
            return Applied(release.version, ApplyOutcome.ALREADY, rows, str(target), head)
        sdist = find_sdist(release)
        say(f"vLLM {release.version}: making {target}")
        head = _build_beside(release, series, sdist, target)
    recorded = "the recorded one" if release.head else "not recorded yet (make record)"
    notes = (f"HEAD is {recorded}",)
    return Applied(release.version, ApplyOutcome.APPLIED, rows, str(target), head, notes)


def make_tree(release: Release, sdist: Path, build: Path, say: Say) -> Path:
    """The pristine tree of a release that has no series yet; refuses to replace one."""
    target = build / f"vllm-{release.version}"
    with _locked(build, say):
        if target.exists():
            raise _not_ours(target, release, "no folder of that name", "one that exists")
        _build_beside(release, Series("", ()), sdist, target)
    return target


def states_only(catalog: Catalog, release: Release) -> Applied:
    """What is known of a release without a series, for ``PIN=all``."""
    return Applied(release.version, ApplyOutcome.ASSERTED, fix_rows(release, catalog.fixes))


def _without_series(catalog: Catalog, release: Release) -> Applied:
    """Nothing to do, or an error that says what is missing: never a quiet success."""
    if release.series:
        raise _empty_series(catalog, release)
    open_fixes = [i for i in catalog.fixes if release.disposition(i) is Disposition.NO_SERIES]
    if not open_fixes:
        return Applied(release.version, ApplyOutcome.NOTHING, fix_rows(release, catalog.fixes))
    states = "\n".join(f"{row.fix} {row.result}: {row.reason}" for row in fix_rows(release, catalog.fixes))
    raise PatchesError(
        f"there is no series for this release yet; it needs {', '.join(open_fixes)}",
        release=release.version,
        expected=f"a release with a series: {', '.join(r.version for r in catalog.pins)}",
        found=states,
        next_command=f"make apply PIN={catalog.pins[-1].version}" if catalog.pins else "",
    )


def _empty_series(catalog: Catalog, release: Release) -> PatchesError:
    path = catalog.folder / release.series / "series"
    carried = [i for i in catalog.fixes if release.disposition(i) is Disposition.APPLIED]
    return PatchesError(
        "the series is empty",
        release=release.version,
        file=str(path),
        expected=f"patches for {', '.join(carried)}",
        found="no line that names one",
        next_command=f"git checkout -- {path}",
    )


class Target(Enum):
    """What stands where the tree shall go."""

    MISSING = "missing"
    CURRENT = "current"  # made by apply from this very series, and not changed since
    STALE = "stale"  # made by apply from another state of the series, and nothing of the user's is in it


def _inspect(target: Path, release: Release, series: Series) -> Target:
    """Look at the target; raises `PatchesError` where something of the user's could be lost."""
    if not os.path.lexists(target):  # a dangling link is something of the user's too
        return Target.MISSING
    record = _read_record(target)
    head = git.rev_parse(target, "HEAD") if record else None
    if not record or not head:
        raise _not_ours(target, release, "a tree made by apply", "a folder that apply did not make")
    changed = git.status(target)
    tracked = [line for line in changed if not line.startswith("??")]
    if tracked:
        raise _not_ours(target, release, "no changes", "\n".join(tracked[:10]))
    if head != record["head"]:
        raise _moved(target, release, series, record["head"], head)
    if record["series_sha256"] == series_hash(series):
        return Target.CURRENT
    if untracked := git.status(target, ignored=True):
        raise _not_ours(target, release, "only files of the old series' tree", "\n".join(untracked[:10]))
    return Target.STALE


def _build_beside(release: Release, series: Series, sdist: Path, target: Path) -> str:
    build = target.parent
    with cache.disk_errors(build):
        pristine = pristine_objects(release, sdist)
        with cache.scratch(build, f".{target.name}.making-") as scratch:
            tree = scratch / "tree"
            head = build_tree(release, series, pristine, tree)
            check_head(release, head)
            record = {"release": release.version, "series": series.name, "head": head}
            record["series_sha256"] = series_hash(series)
            (tree / ".git" / _RECORD).write_text(json.dumps(record), encoding="utf-8")
            if target.exists():
                target.rename(scratch / "replaced")
            tree.rename(target)
    return head


def check_head(release: Release, head: str) -> None:
    """The same pin gives the same commit on every machine; anything else is drift."""
    if release.head and head != release.head:
        raise PatchesError(
            "the series does not end in the recorded commit",
            release=release.version,
            expected=release.head,
            found=head,
            next_command="git diff patches/    # was a patch edited? if it is meant: make record",
        )


def series_hash(series: Series) -> str:
    """One hash over the names and bytes of all patches, in order."""
    digest = hashlib.sha256()
    for patch in series.patches:
        digest.update(f"{patch.name} {len(patch.raw)}\n".encode() + patch.raw)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(build: Path, say: Say) -> Iterator[None]:
    """One `apply` at a time in a build folder; a second one waits and says so. Sweeps what a killed one left."""
    with cache.disk_errors(build):
        build.mkdir(parents=True, exist_ok=True)
        lock = (build / ".lock").open("a")  # not "w": a run that changes nothing leaves its time alone
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another apply in {build}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in build.glob(".vllm-*.making-*"):
            _sweep(left)
        yield


def _sweep(left: Path) -> None:
    """Remove a killed run's scratch folder, but first put back a tree that it had moved aside."""
    replaced, target = left / "replaced", left.parent / left.name[1:].split(".making-")[0]
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    cache.remove(left)


def _read_record(target: Path) -> dict[str, str] | None:
    try:
        record = json.loads((target / ".git" / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"head", "series_sha256"} <= record.keys() else None


def _moved(target: Path, release: Release, series: Series, made: str, head: str) -> PatchesError:
    """HEAD is not where apply left it: partly patched, or with commits of the user's own."""
    behind = git.commits_after(target, head, made) if git.is_ancestor(target, head, made) else []
    missing = [patch.name for patch in series.patches[-len(behind) :]] if behind else []
    found = f"partly patched: without {', '.join(missing)}" if behind else f"another commit: {head}"
    return PatchesError(
        "the tree is not at the commit that apply made",
        release=release.version,
        file=str(target),
        expected=f"{made} on {branch_name(release)}",
        found=found,
        next_command=_way_back(target, branch_name(release), made, bool(behind)),
    )


def _way_back(target: Path, branch: str, made: str, behind: bool) -> str:
    """The command that brings the tree back and loses nothing; a reset on another branch would move that one."""
    if git.rev_parse(target, f"refs/heads/{branch}") == made:
        return f"git -C {target} switch {branch}"
    if behind and git.current_branch(target) == branch:
        return f"git -C {target} reset --hard {made}"
    return f"mv {target} {target}.mine"


def _not_ours(target: Path, release: Release, expected: str, found: str) -> PatchesError:
    return PatchesError(
        "the target exists and is not an untouched tree of ours; nothing was changed",
        release=release.version,
        file=str(target),
        expected=expected,
        found=found,
        next_command=f"mv {target} {target}.mine    # keeps it; then run apply again",
    )
