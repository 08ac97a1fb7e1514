"""Every fix on every series directory's release: fails before, passes after. The patches' Test: trailers name these."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
from proof import Side, prove, sides
from vllm_patches.series.catalog import open_catalog

CATALOG = open_catalog()
RELEASES = [CATALOG.release(name.removeprefix("v")) for name in CATALOG.series]


def shared_sides(version: str, side: str) -> dict[str, Side]:
    """`proof.sides`, run once per test run: all fixes of a tree share its imports, on whichever worker comes first."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return sides(version, side)
    folder = Path(tempfile.gettempdir()) / f"vllm-patches-proof-{run}"
    folder.mkdir(exist_ok=True)
    with (folder / f"{version}-{side}.json").open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if known := file.read():
            return {fix: Side(**answer) for fix, answer in json.loads(known).items()}
        answers = sides(version, side)
        json.dump({fix: asdict(answer) for fix, answer in answers.items()}, file)
        return answers


# By fix first: the workers then begin with different releases, and find the other fixes answered when they get there.
@pytest.mark.parametrize(
    ("fix", "release"),
    [
        pytest.param(fix, release, id=f"{fix.id}-{release.version}")
        for fix in CATALOG.fixes.values()
        for release in RELEASES
    ],
)
def test_proof(fix, release):
    """Stock fails on the named assertions (or has the fix), patched passes every check."""
    proof = prove(CATALOG, fix, release, shared_sides)
    assert proof.complaints == [], "\n".join([f"{fix.id} on {release.version} ({proof.state})", *proof.complaints])


def test_every_patch_names_its_proof_and_every_proof_its_patch():
    """The trailers' ids are those of this file's tests, for every fix that a series carries."""
    named = {patch.trailer("Test") for series in CATALOG.series.values() for patch in series.patches}
    there = {f"tests/repro/test_proof.py::test_proof[{fix}-{r.version}]" for r in RELEASES for fix in CATALOG.fixes}
    carried = {
        f"tests/repro/test_proof.py::test_proof[{patch.number}-{name.removeprefix('v')}]"
        for name, series in CATALOG.series.items()
        for patch in series.patches
    }
    assert named == carried
    assert carried <= there
