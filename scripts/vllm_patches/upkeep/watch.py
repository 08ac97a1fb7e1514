"""`watch`: what upstream's own code has of the five fixes, and whether a release came out that the table does not know.

`propose` turns the same findings into a new release's row for `new-pin`.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.probes import PATHS, PROBES, Finding, ProbeError, ReadFile, Site, agrees
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.model import FIX_IDS, FixState, Release, State
from vllm_patches.sources.index import Offer, list_offers, version_key
from vllm_patches.sources.sdist import open_sdist, pick
from vllm_patches.sources.store import FindSdist


@dataclass(frozen=True)
class FixWatch:
    """One fix in one release: the verdict in words, the code sites behind it, and what contradicts the table."""

    fix: str
    verdict: str
    sites: tuple[Site, ...]
    recorded: str = ""
    contradiction: str = ""


@dataclass(frozen=True)
class ReleaseWatch:
    """One release; *known* is whether ``releases.toml`` has it."""

    release: str
    known: bool
    fixes: tuple[FixWatch, ...]


@dataclass(frozen=True)
class WatchReport:
    """The result of `watch`; *unknown* are releases of the index that the table lacks."""

    newest: str
    unknown: tuple[str, ...]
    releases: tuple[ReleaseWatch, ...]

    @property
    def ok(self) -> bool:
        """True when the table knows every release, and the code looked at is as recorded."""
        fine = all(not fix.contradiction for release in self.releases for fix in release.fixes)
        return fine and not self.unknown


def watch(catalog: Catalog, wanted: str, find_sdist: FindSdist) -> WatchReport:
    """Look at release *wanted*: a version, ``all`` that are recorded, or empty for the newest on the index."""
    offers = list_offers()
    oldest = min(map(version_key, catalog.releases))
    unknown = tuple(v for v in offers if v not in catalog.releases and version_key(v) > oldest)
    newest = max([*offers, *catalog.releases], key=version_key)
    chosen = list(catalog.releases) if wanted == "all" else [wanted.removeprefix("v") or newest]
    reports = []
    for version in chosen:
        release = catalog.releases.get(version) or provisional(version, offers)
        reports.append(look_at(catalog, release, find_sdist(release)))
    return WatchReport(newest, unknown, tuple(reports))


def provisional(version: str, offers: dict[str, Offer]) -> Release:
    """A release that the table does not know, as far as the index tells: no states, size 0."""
    offer = offers.get(version)
    if offer is None or not offer.sha256:
        raise PatchesError(
            "the index offers no such release" if offer is None else "the index gives no sha256 for the sdist",
            release=version,
            expected=f"one of {', '.join(list(offers)[-5:])} ..." if offer is None else "a sha256 in the file's link",
            found="none",
            next_command="pip index versions vllm",
        )
    # An index without upload times: the day it was first seen here is what can be said.
    return Release(version, offer.date or datetime.date.today(), offer.filename, offer.sha256, 0, {})


def look_at(catalog: Catalog, release: Release, sdist: Path) -> ReleaseWatch:
    """Probe the code of one release's sdist; code that a probe does not know is said to be, and is never agreement."""
    read = _reader(release, sdist)
    fixes = tuple(_look(fix_id, release.states.get(fix_id), read) for fix_id in FIX_IDS)
    return ReleaseWatch(release.version, release.version in catalog.releases, fixes)


def _look(fix_id: str, recorded: FixState | None, read: ReadFile) -> FixWatch:
    known = recorded.state.value if recorded else ""
    try:
        sites = PROBES[fix_id](read)
    except ProbeError as error:
        return FixWatch(fix_id, "unknown: the code has a form that no probe knows", (), known, str(error))
    wrong = (agrees(known, sites) or _evidence_missing(recorded, read)) if recorded else None
    return FixWatch(fix_id, verdict(sites), sites, known, wrong or "")


def _evidence_missing(recorded: FixState, read: ReadFile) -> str | None:
    """Why the recorded ``file:line`` is not in the release, or None where it is."""
    path, _, line = recorded.evidence.rpartition(":")
    if not path:  # code that is absent need not have a line
        return None
    text = read(path)
    if text is not None and int(line) <= text.count("\n"):
        return None
    return f"the recorded evidence {recorded.evidence} is not in the release"


def _reader(release: Release, sdist: Path) -> ReadFile:
    evidence = [state.evidence.rpartition(":")[0] for state in release.states.values()]
    files = pick(open_sdist(sdist, release), {*PATHS, *evidence}, release)
    return lambda path: files[path].decode("utf-8") if path in files else None


def verdict(sites: Iterable[Site]) -> str:
    """What upstream has of one fix: whole, whole in another way, in part (which), nothing, or no such code."""
    all_sites = list(sites)
    code = [site for site in all_sites if site.finding is not Finding.GONE]
    there = [site for site in code if site.finding.fixed]
    if not code:
        return "absent: the code is not there"
    if len(there) == len(code):
        elsewise = any(site.finding is Finding.ELSEWISE for site in there)
        return "fixed, in another way than ours" if elsewise else "fixed"
    missing = ", ".join(site.part for site in code if site not in there)
    return f"fixed but for {missing}" if there else f"not fixed: {missing}"


def propose(release: Release, sdist: Path, nearest: Release) -> dict[str, FixState]:
    """States for a release that nobody has judged: by its code alone, and as in *nearest* where that is defective."""
    read = _reader(release, sdist)
    return {fix_id: _propose(fix_id, read, nearest) for fix_id in FIX_IDS}


def _propose(fix_id: str, read: ReadFile, nearest: Release) -> FixState:
    before = nearest.states[fix_id]
    try:
        sites = PROBES[fix_id](read)
    except ProbeError as error:
        return FixState(State.LIVE, before.evidence, f"proposed blindly, look yourself: {error}")
    wrong = [site for site in sites if not site.finding.fixed and site.finding is not Finding.GONE]
    there = [site for site in sites if site.finding.fixed]
    deciding = (wrong or there or list(sites))[0]
    evidence = f"{deciding.path}:{deciding.line}" if deciding.line else deciding.path
    note = f"proposed by watch: {verdict(sites)}"
    if not wrong:
        return FixState(State.FIXED if there else State.ABSENT, evidence, note)
    unjudged = before.state in (State.FIXED, State.ABSENT)
    return FixState(State.LIVE if unjudged else before.state, evidence, note)
