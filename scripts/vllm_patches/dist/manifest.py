"""``manifest.json`` for machines and MODIFICATIONS for people: what goes out for one release."""

from __future__ import annotations

import json
from collections.abc import Mapping

from vllm_patches import __version__
from vllm_patches.dist.bundle import Asset, Bundle
from vllm_patches.dist.links import banner
from vllm_patches.hashing import sha256, sri
from vllm_patches.series.headers import pull_requests
from vllm_patches.series.model import Fix
from vllm_patches.wheels.modifications import hashes

SCHEMA = 1


def manifest(bundle: Bundle, withheld: Mapping[str, str]) -> Asset:
    """``manifest.json``; *withheld* says for which fixes no scanner statement is made, and why."""
    release = bundle.release
    record = {
        "schema": SCHEMA,
        "tool": f"vllm-patches {__version__}",
        "release": release.version,
        "sdist": {"file": release.sdist, "sha256": release.sha256, "size": release.size},
        "version": bundle.version,
        "series": bundle.series,
        "left_out": list(bundle.left_out),
        "third_party": bundle.third_party,
        "git_am": bundle.mails,
        "patches": [
            {
                "name": item.name,
                "fix": item.fix,
                "subject": item.subject,
                "sha256": sha256(item.raw),
                "sri": sri(item.raw),
                "refreshed": item.refreshed,
                "files": list(item.paths),
            }
            for item in bundle.items
        ],
        "files": {path: _file(bundle.before[path], bundle.after[path]) for path in sorted(bundle.after)},
        "statements": {item.fix: withheld.get(item.fix, "fixed") for item in bundle.items if item.fix},
    }
    return Asset("manifest.json", (json.dumps(record, indent=1) + "\n").encode())


def _file(before: bytes | None, after: bytes | None) -> dict[str, object]:
    return {"before": None if before is None else hashes(before), "after": None if after is None else hashes(after)}


def modifications(bundle: Bundle, fixes: Mapping[str, Fix]) -> Asset:
    """MODIFICATIONS: the notice of change that Apache-2.0, section 4(b) asks of whoever passes a patched vLLM on."""
    what = f"A vLLM {bundle.release.version} with these patches differs from the release in these files:"
    lines = [banner(bundle), "", what]
    for path in sorted(bundle.after):
        lines += ["", path]
        for item in bundle.items:
            if path in item.paths:
                pulls = pull_requests(fixes[item.fix]) if item.fix else []
                origin = "".join(f"\n    upstream: {address}" for address in pulls)
                lines.append(f"  {item.name}: {item.subject}{origin}")
    lines += ["", "vllm-patches is not affiliated with the vLLM project.", ""]
    return Asset("MODIFICATIONS", "\n".join(lines).encode())
