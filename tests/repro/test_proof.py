"""Every fix on every series directory's release: fails before, passes after. The patches' Test: trailers name these."""

from __future__ import annotations

import pytest
from proof import prove
from vllm_patches.catalog import open_catalog

CATALOG = open_catalog()
RELEASES = [CATALOG.release(name.removeprefix("v")) for name in CATALOG.series]


@pytest.mark.parametrize(
    ("fix", "release"),
    [
        # one worker per release: the fixes of a tree are run together and share its imports
        pytest.param(fix, release, id=f"{fix.id}-{release.version}", marks=pytest.mark.xdist_group(release.version))
        for release in RELEASES
        for fix in CATALOG.fixes.values()
    ],
)
def test_proof(fix, release):
    """Stock fails on the named assertions (or has the fix), patched passes every check."""
    proof = prove(CATALOG, fix, release)
    assert proof.complaints == [], "\n".join([f"{fix.id} on {release.version} ({proof.state})", *proof.complaints])
