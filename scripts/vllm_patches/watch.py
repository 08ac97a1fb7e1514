"""`watch`: what upstream's own code has of the five fixes, and whether a release came out that the table does not know.

`propose` turns the same findings into a new release's row for `new-pin`.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_patches.catalog import Catalog
from vllm_patches.errors import PatchesError
from vllm_patches.index import Offer, list_offers, version_key
from vllm_patches.model import FIX_IDS, FixState, Release, State
from vllm_patches.probes import PATHS, Finding, Site, agrees, probe
from vllm_patches.sdist import open_sdist, pick
from vllm_patches.store import FindSdist

_THERE = (Finding.PRESENT, Finding.ELSEWISE)


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
    """Probe the code of one release's sdist."""
    sites = probe_sdist(release, sdist)
    fixes = []
    for fix_id in FIX_IDS:
        mine = tuple(site for site in sites if site.fix == fix_id)
        recorded = release.states.get(fix_id)
        wrong = agrees(recorded.state.value, mine) if recorded else None
        fixes.append(FixWatch(fix_id, verdict(mine), mine, recorded.state.value if recorded else "", wrong or ""))
    return ReleaseWatch(release.version, release.version in catalog.releases, tuple(fixes))


def probe_sdist(release: Release, sdist: Path) -> tuple[Site, ...]:
    """The findings of all probes on the files of an sdist."""
    files = pick(open_sdist(sdist, release), PATHS, release)
    return probe(lambda path: files[path].decode("utf-8") if path in files else None)


def verdict(sites: Iterable[Site]) -> str:
    """What upstream has of one fix: whole, whole in another way, in part (which), nothing, or no such code."""
    all_sites = list(sites)
    code = [site for site in all_sites if site.finding is not Finding.GONE]
    there = [site for site in code if site.finding in _THERE]
    if not code:
        return "absent: the code is not there"
    if len(there) == len(code):
        elsewise = any(site.finding is Finding.ELSEWISE for site in there)
        return "fixed, in another way than ours" if elsewise else "fixed"
    missing = ", ".join(site.part for site in code if site not in there)
    return f"fixed but for {missing}" if there else f"not fixed: {missing}"


def propose(release: Release, sites: Iterable[Site], nearest: Release) -> dict[str, FixState]:
    """States for a release that nobody has judged: by code alone, and as in *nearest* where the code is defective."""
    states: dict[str, FixState] = {}
    for fix_id in FIX_IDS:
        state: State
        mine = [site for site in sites if site.fix == fix_id]
        wrong = [s for s in mine if s.finding not in _THERE and s.finding is not Finding.GONE]
        there = [s for s in mine if s.finding in _THERE]
        if wrong:
            before = nearest.states[fix_id].state
            state = State.LIVE if before in (State.FIXED, State.ABSENT) else before
        else:
            state = State.FIXED if there else State.ABSENT
        deciding = (wrong or there or mine)[0]
        evidence = f"{deciding.path}:{deciding.line}" if deciding.line else deciding.path
        states[fix_id] = FixState(state, evidence, f"proposed by watch: {verdict(mine)}")
    return states
