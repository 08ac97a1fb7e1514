"""`verify`: which of the five fixes does this vLLM have? By hashes first, and by code where a hash is unknown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from vllm_patches import swap
from vllm_patches.errors import PatchesError
from vllm_patches.installed.artifact import Artifact, Kind, open_artifact, text_reader
from vllm_patches.installed.claims import (
    Claims,
    changed_files,
    claim_problems,
    hidden_problems,
    native_blobs,
    read_claims,
    state_problems,
)
from vllm_patches.installed.installation import base_version, default_site
from vllm_patches.installed.origin import claimed_origin, wheel_origin
from vllm_patches.probes import PATHS, PROBES, Finding, ProbeError, Site, dsa_mtp_ima
from vllm_patches.series.catalog import DEFAULT_PIN, Catalog
from vllm_patches.series.hunks import blob_id
from vllm_patches.series.model import Disposition, Patch, Release, Series
from vllm_patches.series.patchset import is_packaged
from vllm_patches.trees.checkout import matching_releases


class Status(Enum):
    """What a vLLM has of one fix."""

    PRESENT = "present"
    FIXED = "fixed upstream"
    ABSENT = "absent in this release"  # the code that could be wrong is not there
    BROKEN = "broken upstream"  # dead for another reason; there is nothing to carry
    LEFT_OUT = "present but for what was left out"  # and the caller has said that this is meant
    MISSING = "missing"
    PARTLY = "partly applied"
    MODIFIED = "modified"  # a file is not what it should be, or has a form that nobody can judge

    @property
    def fine(self) -> bool:
        """True where nothing is left to be patched."""
        return self not in (Status.MISSING, Status.PARTLY, Status.MODIFIED)


@dataclass(frozen=True)
class FixStatus:
    """One fix; *by* is what it was told by: hash, code, or table."""

    fix: str
    name: str
    status: Status
    by: str
    detail: str = ""


@dataclass(frozen=True)
class Verified:
    """The result of `verify`; *problems* are what makes it fail whatever the fixes say.

    *origin* says which official wheel it is or was made from, where that is known.
    """

    where: str
    kind: str
    version: str
    release: str
    fixes: tuple[FixStatus, ...]
    problems: tuple[str, ...]
    origin: str = ""

    @property
    def ok(self) -> bool:
        """True when every fix that the release needs is there, and all claims hold."""
        return not self.problems and all(fix.status.fine for fix in self.fixes)


@dataclass(frozen=True)
class _Look:
    """All that one verification needs."""

    catalog: Catalog
    artifact: Artifact
    release: Release | None
    series: Series
    claims: Claims | None
    changed: frozenset[str]
    without: tuple[str, ...]


def verify(catalog: Catalog, path: Path | None = None, without: Iterable[str] = ()) -> Verified:
    """Look at the vLLM at *path* (default: the current environment); nothing is written.

    *without* names native parts (``0001-native``) whose absence the caller accepts.
    """
    touched = {name for series in catalog.series.values() for name in series.paths}
    artifact = open_artifact(path or default_site(), sorted({*PATHS, *touched}))
    if artifact.installation is None:
        return _verify(catalog, artifact, tuple(without))
    with swap.locked(artifact.installation.dist_info, lambda: None, shared=True):  # an install may be under way
        return _verify(catalog, artifact, tuple(without))


def _verify(catalog: Catalog, artifact: Artifact, without: tuple[str, ...]) -> Verified:
    release = _release(catalog, artifact)
    series = catalog.series_of(release) if release else Series("", ())
    claims, problems = read_claims(artifact)
    changed = frozenset(changed_files(artifact, claims))
    look = _Look(catalog, artifact, release, series, claims, changed, without)
    problems += claim_problems(artifact, claims) if claims else ()
    origin, problem = _origin(artifact, release, claims)
    problems += [problem] if problem else []
    problems += [*state_problems(artifact), *hidden_problems(artifact, [p for p in series.paths if is_packaged(p)])]
    fixes = tuple(_status(look, fix_id) for fix_id in catalog.fixes)
    named = release.version if release else ""
    return Verified(artifact.where, artifact.kind.value, artifact.version, named, fixes, tuple(problems), origin)


def _origin(artifact: Artifact, release: Release | None, claims: Claims | None) -> tuple[str, str]:
    """Which official wheel this is or was made from, and what is wrong with what it says of that."""
    if release is None:
        return "", ""
    if claims is None:
        return (wheel_origin(release, Path(artifact.where)) if artifact.kind is Kind.WHEEL else ""), ""
    return claimed_origin(release, claims)


def _release(catalog: Catalog, artifact: Artifact) -> Release | None:
    """By the version it calls itself; a tree that names none, by its blobs. None: a release that nobody has judged."""
    if artifact.version:
        return catalog.releases.get(base_version(artifact.version))
    paths = {name for series in catalog.series.values() for name in series.paths}
    blobs = {name: blob_id(data) for name in paths if (data := artifact.read(name)) is not None}
    exact = [release for release, hits, total in matching_releases(catalog, blobs) if hits == total]
    return next((release for release in exact if release.version == DEFAULT_PIN), exact[-1] if exact else None)


def _status(look: _Look, fix_id: str) -> FixStatus:
    disposition = look.release.disposition(fix_id) if look.release else None
    patch = next((patch for patch in look.series.patches if patch.number == fix_id), None)
    if disposition is Disposition.APPLIED and patch is not None:
        return _native(look, fix_id, patch, _carried(look, fix_id, patch))
    return _uncarried(look, fix_id, disposition)


def _carried(look: _Look, fix_id: str, patch: Patch) -> FixStatus:
    """A fix that the series carries: where each of its files stands in its chain of blobs."""
    inside: list[str] = []
    outside: list[str] = []
    strange: list[str] = []
    for file in patch.files:
        if look.artifact.kind.compiled and not is_packaged(file.path):
            continue
        data = look.artifact.read(file.path)
        chain = look.series.blob_chain(file.path)
        blob = "" if data is None else blob_id(data)
        if blob not in chain:
            strange.append(file.path)
        else:
            (inside if chain.index(blob) >= chain.index(file.new_blob) else outside).append(file.path)
    if strange:
        return _strange(look, fix_id, strange)
    if inside and outside:
        return _row(look, fix_id, Status.PARTLY, "hash", f"not patched: {', '.join(outside)}")
    return _row(look, fix_id, Status.MISSING if outside else Status.PRESENT, "hash")


def _strange(look: _Look, fix_id: str, strange: list[str]) -> FixStatus:
    """Files with hashes that no step of the series has: a broken promise, or somebody's own code to look at."""
    if broken := sorted(look.changed.intersection(strange)):
        return _row(look, fix_id, Status.MODIFIED, "hash", f"changed after patching: {', '.join(broken)}")
    status = _by_code(look, fix_id)
    return _row(look, fix_id, status.status, status.by, f"{status.detail}; unknown hash: {', '.join(strange)}")


def _uncarried(look: _Look, fix_id: str, disposition: Disposition | None) -> FixStatus:
    """A fix that no patch brings: the table's word, unless the code contradicts it; without one, the code's."""
    recorded = {
        Disposition.FIXED: Status.FIXED,
        Disposition.ABSENT: Status.ABSENT,
        Disposition.BROKEN: Status.BROKEN,
    }
    seen = _by_code(look, fix_id)
    if disposition not in recorded:
        note = "no series for this release" if look.release else "an unknown release"
        return _row(look, fix_id, seen.status, seen.by, f"{seen.detail} ({note})")
    if seen.status in (Status.MISSING, Status.PARTLY):
        return _row(look, fix_id, seen.status, seen.by, f"{seen.detail}; recorded as {recorded[disposition].value}")
    return _row(look, fix_id, recorded[disposition], "table" if seen.status is Status.MODIFIED else "table and code")


def _by_code(look: _Look, fix_id: str) -> FixStatus:
    compiled = look.artifact.kind.compiled
    probe = dsa_mtp_ima.probe_python if compiled and fix_id == dsa_mtp_ima.FIX else PROBES[fix_id]
    try:
        sites = probe(text_reader(look.artifact.read))
    except ProbeError as error:
        return _row(look, fix_id, Status.MODIFIED, "code", str(error))
    return _row(
        look, fix_id, _judged(sites), "code", "; ".join(_shown(site) for site in sites if not site.finding.fixed)
    )


def _judged(sites: tuple[Site, ...]) -> Status:
    """The fix by the findings of its parts, those that are not in this code left aside."""
    findings = [site.finding for site in sites if site.finding is not Finding.GONE]
    if not findings:
        return Status.ABSENT
    if Finding.MISSING not in findings:
        return Status.BROKEN if Finding.BROKEN in findings else Status.PRESENT
    return Status.PARTLY if any(finding.fixed for finding in findings) else Status.MISSING


def _native(look: _Look, fix_id: str, patch: Patch, seen: FixStatus) -> FixStatus:
    """The C++ part of a fix in a package, where it can only be a rebuilt extension."""
    sources = {file.path: file.new_blob for file in patch.files if not is_packaged(file.path)}
    rebuilt = native_blobs(look.claims)
    if not look.artifact.kind.compiled or all(_reaches(look, path, rebuilt.get(path, ""), sources) for path in sources):
        return seen
    name = f"{fix_id}-native"
    note = f"the compiled part of {', '.join(sources)} is upstream's"
    if seen.status is not Status.PRESENT:
        return _row(look, fix_id, seen.status, seen.by, "; ".join(part for part in (seen.detail, note) if part))
    if name in look.without:
        return _row(look, fix_id, Status.LEFT_OUT, seen.by, note)
    return _row(look, fix_id, Status.PARTLY, seen.by, f"{note} (accept that with --without {name})")


def _reaches(look: _Look, path: str, blob: str, wanted: Mapping[str, str]) -> bool:
    """Whether *blob* is the file's content after the patch, or after a later one."""
    chain = look.series.blob_chain(path)
    return blob in chain and chain.index(blob) >= chain.index(wanted[path])


def _row(look: _Look, fix_id: str, status: Status, by: str, detail: str = "") -> FixStatus:
    return FixStatus(fix_id, look.catalog.fixes[fix_id].slug, status, by, detail)


def _shown(site: Site) -> str:
    return f"{site.part} {site.finding.value} ({site.path}:{site.line})"


def require_fixed(report: Verified) -> Verified:
    """*report*, or the error that it deserves: for callers that want an exception."""
    if report.ok:
        return report
    missing = [f"{fix.fix} {fix.status.value}" for fix in report.fixes if not fix.status.fine]
    raise PatchesError(
        "this vLLM does not have all the fixes that it needs",
        release=report.version,
        file=report.where,
        found="\n".join([*missing, *report.problems]),
        next_command="vllm-patches install",
    )
