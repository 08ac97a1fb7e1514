"""What scanners read: OpenVEX 0.2.0 and CycloneDX 1.6, about our own product identifiers only.

A statement is made where three things hold: the patches that go out make the files that were proved (told by git blob
id), the series is the recorded one, and the repro fails on the stock tree and passes on the patched one. The defects
have no CVE numbers; they are named by ours, with upstream's pull requests as aliases.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from urllib.parse import quote

from vllm_patches import __version__
from vllm_patches.dist.bundle import Asset, Bundle, Item
from vllm_patches.dist.proofs import Proofs
from vllm_patches.series.headers import REPOSITORY, pull_requests
from vllm_patches.series.hunks import blob_id
from vllm_patches.series.model import IDENT_EMAIL, IDENT_NAME, Fix, Release, Series

CONTEXT = "https://openvex.dev/ns/v0.2.0"


@dataclass(frozen=True)
class Evidence:
    """What a statement is made from. *epoch*: seconds since 1970, UTC."""

    bundle: Bundle
    series: Series  # the whole of it, which was proved
    fixes: Mapping[str, Fix]
    proofs: Proofs | None
    epoch: int

    @cached_property
    def withheld(self) -> dict[str, str]:
        """For each fix of the bundle about which no statement can be made, why."""
        return {item.fix: why for item in self.bundle.items if item.fix and (why := _why_not(self, item))}

    @property
    def timestamp(self) -> str:
        """The moment of the statements, RFC 3339."""
        return datetime.fromtimestamp(self.epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def purl(version: str) -> str:
    """The package URL of a vLLM of that version; the local version's plus sign is percent-encoded."""
    return f"pkg:pypi/vllm@{quote(version, safe='')}"


def _why_not(evidence: Evidence, item: Item) -> str:
    bundle = evidence.bundle
    if evidence.proofs is None:
        return "no results of a proof run were given (--proof FILE)"
    if bundle.third_party:
        return f"no repro was run on a tree with the series {bundle.third_party} in it"
    for path in item.paths:
        data, proved = bundle.after[path], evidence.series.blob_chain(path)[-1]
        if data is None or blob_id(data) != proved:
            return f"{path} is not the file that was proved, as other patches change it too"
    return evidence.proofs.trouble(bundle.release, item.fix)


def assets(evidence: Evidence) -> list[Asset]:
    """``openvex.json`` and ``cyclonedx.json``; none where nothing can be stated."""
    proved = [item for item in evidence.bundle.items if item.fix and item.fix not in evidence.withheld]
    if not proved:
        return []
    return [
        Asset("openvex.json", _json(_openvex(evidence, proved))),
        Asset("cyclonedx.json", _json(_cyclonedx(evidence, proved))),
    ]


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _uuid(evidence: Evidence, kind: str, content: object) -> str:
    """A name for the document that depends on nothing but what it says."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{kind} {json.dumps(content, sort_keys=True)}"))


def _openvex(evidence: Evidence, proved: list[Item]) -> dict[str, object]:
    product = purl(evidence.bundle.version)
    statements = [
        {
            "vulnerability": {
                "name": _defect(item.fix),
                "description": evidence.fixes[item.fix].defect,
                "aliases": pull_requests(evidence.fixes[item.fix]),
            },
            "products": [{"@id": product, "identifiers": {"purl": product}}],
            "status": "fixed",
            "status_notes": _notes(evidence, item),
        }
        for item in proved
    ]
    body = {
        "author": f"{IDENT_NAME} <{IDENT_EMAIL}>",
        "timestamp": evidence.timestamp,
        "version": 1,
        "tooling": f"vllm-patches {__version__}",
        "statements": statements,
    }
    return {"@context": CONTEXT, "@id": f"urn:uuid:{_uuid(evidence, 'openvex', body)}", **body}


def _notes(evidence: Evidence, item: Item) -> str:
    release = evidence.bundle.release
    return (
        f"{item.name} is in: its files are the proved ones by git blob id. Its repro fails on vLLM {release.version} "
        f"as released and passes on the patched tree {release.head[:12]}. In that release: "
        f"{release.states[item.fix].state.value}."
    )


def _cyclonedx(evidence: Evidence, proved: list[Item]) -> dict[str, object]:
    bundle = evidence.bundle
    release, product = bundle.release, purl(bundle.version)
    component = {
        "type": "library",
        "bom-ref": product,
        "name": "vllm",
        "version": bundle.version,
        "purl": product,
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "pedigree": {
            "ancestors": [_ancestor(release)],
            "patches": [_patch(evidence, item, item in proved) for item in bundle.items],
        },
    }
    body = {
        "version": 1,
        "metadata": {
            "timestamp": evidence.timestamp,
            "tools": {"components": [{"type": "application", "name": "vllm-patches", "version": __version__}]},
            "component": component,
        },
    }
    schema = "http://cyclonedx.org/schema/bom-1.6.schema.json"
    head = {"$schema": schema, "bomFormat": "CycloneDX", "specVersion": "1.6"}
    return {**head, "serialNumber": f"urn:uuid:{_uuid(evidence, 'cyclonedx', body)}", **body}


def _ancestor(release: Release) -> dict[str, object]:
    """What was patched: upstream's release, by its sdist."""
    product = purl(release.version)
    names = {"type": "library", "bom-ref": product, "name": "vllm", "version": release.version, "purl": product}
    return {**names, "hashes": [{"alg": "SHA-256", "content": release.sha256}]}


def _patch(evidence: Evidence, item: Item, proved: bool) -> dict[str, object]:
    """One patch of the pedigree; it resolves something only where that is proved."""
    backport = b"\nUpstream-Status: Backport " in item.raw
    entry: dict[str, object] = {
        "type": "backport" if backport else "unofficial",
        "diff": {"text": {"contentType": "text/x-diff", "content": item.raw.decode("utf-8", "replace")}},
    }
    if proved:
        fix = evidence.fixes[item.fix]
        entry["resolves"] = [
            {
                "type": "defect",
                "id": _defect(item.fix),
                "name": fix.title,
                "description": fix.symptom,
                "source": {"name": "vLLM pull requests", "url": f"{REPOSITORY}/pulls"},
                "references": pull_requests(fix),
            }
        ]
    return entry


def _defect(fix: str) -> str:
    return f"VLLM-PATCHES-{fix}"
