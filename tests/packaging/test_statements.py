"""The statements for scanners against what is published about their form."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from packkit import PIN, Assets, dist
from vllm_patches.series.catalog import open_catalog
from vllm_patches.upkeep.proofrun import Proof, Side


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """All five, proved on paper: the form is looked at here, a real proof run in test_document."""
    release = open_catalog().release(PIN)
    stock = Side(PIN, "stock", {"a": "fail: x"}, {"a": "file.py:1"}, {"a": "x"}, "", 0.0)
    patched = replace(stock, side="patched", outcomes={"a": "pass"}, where={})
    proofs = [Proof(fix, PIN, "live", stock, patched) for fix in release.states]
    rows = [asdict(proof) | {"head": release.head} for proof in proofs]
    folder = tmp_path_factory.mktemp("statements")
    (folder / "proof.json").write_text(json.dumps(rows), encoding="utf-8")
    return Assets(dist(folder / "out", "--pin", PIN, "--proof", str(folder / "proof.json")))


def read(made: Assets, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made.folder / name).read_text(encoding="utf-8"))
    return found


def test_cyclonedx_by_its_published_schema(made: Assets) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    document = read(made, "cyclonedx.json")
    assert validator.validate_str(json.dumps(document)) is None
    assert len(document["metadata"]["component"]["pedigree"]["patches"]) == 5
    spoiled = copy.deepcopy(document)
    spoiled["metadata"]["component"]["pedigree"]["patches"][0]["type"] = "own"
    assert validator.validate_str(json.dumps(spoiled)) is not None, "the validator must be able to fail"


WORDS = {
    "": {"@context", "@id", "author", "role", "timestamp", "last_updated", "version", "tooling", "statements"},
    "statement": {"@id", "version", "vulnerability", "timestamp", "last_updated", "products", "status", "supplier",
                  "status_notes", "justification", "impact_statement", "action_statement",
                  "action_statement_timestamp"},
    "vulnerability": {"@id", "name", "description", "aliases"},
    "product": {"@id", "identifiers", "hashes", "subcomponents"},
}  # fmt: skip


def complaints(document: dict[str, Any]) -> list[str]:
    """What is wrong by OpenVEX 0.2.0: unknown words, required ones that are missing, values of another type."""
    found = _words("", document, {"@context", "@id", "author", "timestamp", "version", "statements"})
    if document.get("@context") != "https://openvex.dev/ns/v0.2.0":
        found.append("@context")
    if not isinstance(document.get("version"), int) or document["version"] < 1:
        found.append("version")
    if datetime.fromisoformat(document["timestamp"]).tzinfo is None:
        found.append("timestamp")
    for statement in document["statements"]:
        found += _words("statement", statement, {"vulnerability", "status", "products"})
        found += _words("vulnerability", statement["vulnerability"], {"name"})
        found += [line for one in statement["products"] for line in _words("product", one, {"@id"})]
        if statement["status"] != "fixed":  # the one of the four that needs no justification and no action
            found.append("status")
        found += [one["@id"] for one in statement["products"] if not re.fullmatch(r"pkg:pypi/vllm@[\w.%]+", one["@id"])]
    return found


def _words(kind: str, record: dict[str, Any], required: set[str]) -> list[str]:
    unknown, missing = set(record) - WORDS[kind], required - set(record)
    return [f"{kind} has {word}" for word in unknown] + [f"{kind} lacks {word}" for word in missing]


def test_openvex_by_its_specification(made: Assets) -> None:
    document = read(made, "openvex.json")
    assert len(document["statements"]) == 5
    assert complaints(document) == []
    for spoil in ({"context": "x"}, {"version": 0}, {"timestamp": "2026-11-21T00:00:00"}):
        assert complaints(document | spoil), spoil


def test_the_product_is_the_version_that_a_build_has(made: Assets) -> None:
    """purl's own reader gives the version back, and packaging sorts it as a wheel's."""
    from packageurl import PackageURL
    from packaging.version import Version

    (product,) = {one["products"][0]["@id"] for one in read(made, "openvex.json")["statements"]}
    found = PackageURL.from_string(product)
    assert (found.type, found.name, found.version) == ("pypi", "vllm", made.manifest["version"])
    assert found.to_string() == product
    assert Version(PIN) < Version(found.version or "") < Version("0.20.3")


def test_no_statement_without_a_proof(assets: Assets) -> None:
    assert not [name for name in ("openvex.json", "cyclonedx.json") if Path(assets.folder, name).exists()]
    assert set(assets.manifest["statements"].values()) == {"no results of a proof run were given (--proof FILE)"}
