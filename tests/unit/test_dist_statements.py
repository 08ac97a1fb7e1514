"""OpenVEX and CycloneDX: what is stated, and everything that keeps a statement from being made."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm_patches.dist.compose import Wish, compose
from vllm_patches.dist.proofs import from_rows, read_proofs
from vllm_patches.dist.statements import Evidence, assets, purl
from vllm_patches.errors import PatchesError
from vllm_patches.sources.store import pristine_files
from world import ENGINE, World

PRODUCT = "pkg:pypi/vllm@0.20.2%2Bpatches.1"


def row(fix: str, head: str) -> dict[str, Any]:
    """One proof as the proof run prints it."""
    side = {"release": "0.20.2", "where": {"a": "x.py:1"}, "trouble": "", "seconds": 1.0}
    stock = {**side, "side": "stock", "outcomes": {"a": "fail: rows", "b": "pass"}, "stock_fails": {"a": "rows"}}
    patched = {**side, "side": "patched", "outcomes": {"a": "pass", "b": "pass"}, "stock_fails": {"a": "rows"}}
    return {"fix": fix, "release": "0.20.2", "state": "live", "head": head, "stock": stock, "patched": patched}


@pytest.fixture
def rows(world: World) -> list[dict[str, Any]]:
    return [row(fix, world.release().head) for fix in ("0001", "0003", "0005")]


def evidence(world: World, rows: list[dict[str, Any]] | None, *fixes: str) -> Evidence:
    release = world.release()
    series = world.catalog.series_of(release)
    contents = pristine_files([release], lambda _: world.sdist())
    bundle = compose(
        release, series, Wish(fixes), lambda p: {x: contents[release.blobs[x]] for x in p if x in release.blobs}
    )
    proofs = None if rows is None else from_rows(rows)
    return Evidence(bundle, series, world.catalog.fixes, proofs, 1_700_000_000)


def documents(found: Evidence) -> dict[str, Any]:
    return {asset.path: json.loads(asset.data) for asset in assets(found)}


def test_all_three_are_stated(world: World, rows: list[dict[str, Any]]) -> None:
    found = evidence(world, rows)
    assert found.withheld == {}
    vex = documents(found)["openvex.json"]
    assert (vex["@context"], vex["version"], vex["timestamp"]) == (
        "https://openvex.dev/ns/v0.2.0",
        1,
        "2023-11-14T22:13:20Z",
    )
    assert [one["vulnerability"]["name"] for one in vex["statements"]] == [
        f"VLLM-PATCHES-{n}" for n in ("0001", "0003", "0005")
    ]
    assert {one["status"] for one in vex["statements"]} == {"fixed"}
    assert all(one["products"] == [{"@id": PRODUCT, "identifiers": {"purl": PRODUCT}}] for one in vex["statements"])
    component = documents(found)["cyclonedx.json"]["metadata"]["component"]
    assert (component["version"], component["purl"]) == ("0.20.2+patches.1", PRODUCT)
    ancestor = component["pedigree"]["ancestors"][0]
    assert ancestor["hashes"] == [{"alg": "SHA-256", "content": world.release().sha256}]
    patches = component["pedigree"]["patches"]
    assert [p["resolves"][0]["id"] for p in patches] == [f"VLLM-PATCHES-{n}" for n in ("0001", "0003", "0005")]
    assert [p["diff"]["text"]["content"].encode() for p in patches] == [item.raw for item in found.bundle.items]
    assert {p["type"] for p in patches} == {"unofficial"}  # Upstream-Status: Pending


def test_the_same_evidence_gives_the_same_bytes(world: World, rows: list[dict[str, Any]]) -> None:
    found = evidence(world, rows)
    assert assets(found) == assets(evidence(world, copy.deepcopy(rows)))
    later = assets(replace(found, epoch=1_700_000_001))
    assert [a.data != b.data for a, b in zip(assets(found), later, strict=True)] == [True, True]


def test_a_backport_is_called_one(world: World, rows: list[dict[str, Any]]) -> None:
    found = evidence(world, rows)
    first = replace(found.bundle.items[0], raw=b"Subject: x\n\nUpstream-Status: Backport [x]\n")
    other = replace(found, bundle=replace(found.bundle, items=(first, *found.bundle.items[1:])))
    patches = documents(other)["cyclonedx.json"]["metadata"]["component"]["pedigree"]["patches"]
    assert [p["type"] for p in patches] == ["backport", "unofficial", "unofficial"]


def test_without_proofs_nothing_is_stated(world: World) -> None:
    found = evidence(world, None)
    assert assets(found) == []
    assert found.withheld == dict.fromkeys(
        ("0001", "0003", "0005"), "no results of a proof run were given (--proof FILE)"
    )


def _no_row(row: dict[str, Any]) -> None:
    row["fix"] = "0002"


def _stock_passes(row: dict[str, Any]) -> None:
    row["stock"]["outcomes"]["a"] = "pass"


def _stock_errs(row: dict[str, Any]) -> None:
    row["stock"]["outcomes"]["a"] = "error: ImportError"


def _other_assertion(row: dict[str, Any]) -> None:
    row["stock"]["outcomes"]["a"] = "fail: others"


def _no_place(row: dict[str, Any]) -> None:
    row["stock"]["where"] = {}


def _patched_fails(row: dict[str, Any]) -> None:
    row["patched"]["outcomes"]["b"] = "fail: rows"


def _check_not_run(row: dict[str, Any]) -> None:
    del row["stock"]["outcomes"]["a"]


def _nothing_run(row: dict[str, Any]) -> None:
    row["patched"]["outcomes"] = {}


def _trouble(row: dict[str, Any]) -> None:
    row["patched"]["trouble"] = "time-out"


def _no_patch(row: dict[str, Any]) -> None:
    row["patched"] = None


def _no_defect(row: dict[str, Any]) -> None:
    row["stock"]["stock_fails"] = {}


def _other_head(row: dict[str, Any]) -> None:
    row["head"] = "1" * 40


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_no_row, "the proof run has no result for it"),
        (_stock_passes, "stock: a: expected 'fail: rows', got 'pass'"),
        (_stock_errs, "stock: a: expected 'fail: rows', got 'error: ImportError'"),
        (_other_assertion, "stock: a: expected 'fail: rows', got 'fail: others'"),
        (_no_place, "stock: a: failed as expected, but named no file:line"),
        (_patched_fails, "patched: b: expected 'pass', got 'fail: rows'"),
        (_check_not_run, "stock: a is expected to fail but was not run"),
        (_nothing_run, "patched: no check was run"),
        (_trouble, "patched: time-out"),
        (_no_patch, "the repro is not one that fails on the stock tree and passes on the patched one"),
        (_no_defect, "the repro is not one that fails on the stock tree and passes on the patched one"),
        (_other_head, f"the proof run was of another state of the series: HEAD {'1' * 40}"),
    ],
)
def test_a_repro_that_does_not_flip(
    world: World, rows: list[dict[str, Any]], spoil: Callable[[dict[str, Any]], None], why: str
) -> None:
    spoil(rows[1])
    found = evidence(world, rows)
    assert found.withheld == {"0003": why}
    made = documents(found)
    assert [s["vulnerability"]["name"] for s in made["openvex.json"]["statements"]] == [
        "VLLM-PATCHES-0001",
        "VLLM-PATCHES-0005",
    ]
    patches = made["cyclonedx.json"]["metadata"]["component"]["pedigree"]["patches"]
    assert ["resolves" in patch for patch in patches] == [True, False, True]  # it is in, that much is sure


def test_a_file_that_is_not_the_proved_one(world: World, rows: list[dict[str, Any]]) -> None:
    """0001 alone leaves an engine that no proof has seen: 0003 changes it too. The script of 0005 is the proved one."""
    found = evidence(world, rows, "0001", "0005")
    assert found.withheld == {"0001": f"{ENGINE} is not the file that was proved, as other patches change it too"}
    product = "pkg:pypi/vllm@0.20.2%2Bpatches.1.only.1.5"
    assert documents(found)["openvex.json"]["statements"][0]["products"][0]["@id"] == product


def test_no_tree_with_another_series_was_proved(world: World, rows: list[dict[str, Any]]) -> None:
    found = evidence(world, rows)
    other = replace(found, bundle=replace(found.bundle, third_party="own"))
    assert set(other.withheld.values()) == {"no repro was run on a tree with the series own in it"}
    assert assets(other) == []


def test_a_purl_has_no_bare_plus() -> None:
    assert purl("0.20.2+patches.1") == PRODUCT
    assert purl("0.20.2") == "pkg:pypi/vllm@0.20.2"


@pytest.mark.parametrize("text", ["", "{}x", "[1]", '[{"fix": "0001", "release": "0.20.2"}]', '{"a": 1}'])
def test_what_is_not_a_proof_run(tmp_path: Path, text: str) -> None:
    path = tmp_path / "proof.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PatchesError) as caught:
        read_proofs(path)
    assert caught.value.file == str(path) and "make --silent prove" in caught.value.next_command


def test_a_proof_run_is_read(tmp_path: Path, world: World, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "proof.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert read_proofs(path).trouble(world.release(), "0003") == ""


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(PatchesError):
        read_proofs(tmp_path / "none")
