"""What a patched package says of itself, in the three ways in which one gets patched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from installs import CUDA, ENGINE, make_catalog, patched, sources
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.hunks import blob_id
from vllm_patches.series.model import Artifact, Wheel
from vllm_patches.series.patchset import PatchSet, plan
from vllm_patches.wheels.modifications import (
    Addition,
    Modifications,
    fix_result,
    modifications_text,
    notice_text,
    patches_json,
)

WHEEL = Wheel("vllm-0.19.1-cp38-abi3-linux_x86_64.whl", "a" * 64, 5)
SDIST = Artifact("sdist", "0.19.1", "vllm-0.19.1.tar.gz", "b" * 64, 6)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return make_catalog(tmp_path / "patches")


def made(catalog: Catalog, without: tuple[str, ...] = ()) -> PatchSet:
    return plan(catalog, catalog.release("0.19.1"), sources("0.19.1").get, without, "")


def account(catalog: Catalog, mods: Modifications) -> tuple[dict[str, object], str]:
    return json.loads(patches_json(mods)), modifications_text(mods).decode()


def test_one_form_whatever_it_was_made_from(catalog: Catalog) -> None:
    base = Modifications(made(catalog), "0.19.1", catalog.fixes)
    inplace, text = account(catalog, base)
    assert (inplace["from_wheel"], inplace["from_sdist"]) == (None, None)
    assert "in place" in text and "as they were installed" in text
    wheel, text = account(catalog, replace(base, wheel=WHEEL, version="0.19.1+patches.1"))
    assert wheel["from_wheel"] == {"file": WHEEL.file, "sha256": WHEEL.sha256}
    assert WHEEL.sha256 in text and "byte for byte" in text and CUDA not in text
    source, text = account(catalog, replace(base, sdist=SDIST, extra={"target_device": "cuda"}))
    assert source["from_sdist"] == {"file": SDIST.name, "sha256": SDIST.sha256}
    assert source["target_device"] == "cuda" and SDIST.sha256 in text
    assert list(wheel) == list(inplace) == [key for key in source if key != "target_device"]


def test_a_build_from_source_names_the_compiled_sources_too(catalog: Catalog) -> None:
    """They are no files of the package, so patches.json does not list them among those."""
    source, text = account(catalog, Modifications(made(catalog), "0.19.1", catalog.fixes, sdist=SDIST))
    assert f"\n{CUDA}\n  0001-dsa-mtp-ima.patch" in text and f"\n{ENGINE}\n  0001-dsa-mtp-ima.patch" in text
    assert CUDA not in source["files"] and ENGINE in source["files"]


def test_hashes_before_and_after(catalog: Catalog) -> None:
    claims, _ = account(catalog, Modifications(made(catalog), "0.19.1", catalog.fixes))
    files = claims["files"]
    assert isinstance(files, dict)
    before, after = sources("0.19.1")[ENGINE], patched("v0.19.1", sources("0.19.1"))[ENGINE]
    assert (files[ENGINE]["before"]["blob"], files[ENGINE]["after"]["blob"]) == (blob_id(before), blob_id(after))


def test_what_is_left_out_and_what_is_added_is_said(catalog: Catalog) -> None:
    added = Addition("vllm/_version.py", b"x", "the local version")
    mods = Modifications(made(catalog, ("0001-native",)), "0.19.1", catalog.fixes, WHEEL, additions=(added,))
    claims, text = account(catalog, mods)
    assert claims["without"] == ["0001-native"]
    assert f"Left out on request (0001): {CUDA}" in text and "  vllm/_version.py: the local version" in text
    assert [entry["path"] for entry in claims["not_of_the_series"]] == ["vllm/_version.py"]  # type: ignore[attr-defined]
    assert fix_result(mods, "0001") == "applied"  # its Python part is in
    assert [fix_result(mods, fix) for fix in ("0002", "0005")] == ["fixed upstream", "applied"]


def test_a_fix_whose_whole_patch_is_left_out_is_not_applied(catalog: Catalog) -> None:
    patch_set = made(catalog, ("0001-native",))
    first, second = patch_set.series.patches
    alone = replace(first, files=tuple(file for file in first.files if file.path == CUDA))
    patch_set = replace(patch_set, series=replace(patch_set.series, patches=(alone, second)))
    assert fix_result(Modifications(patch_set, "0.19.1", catalog.fixes), "0001") == "left out"


def test_the_notice_says_whose_it_is(catalog: Catalog) -> None:
    text = notice_text(Modifications(made(catalog), "0.19.1+patches.1", catalog.fixes)).decode()
    assert "vllm 0.19.1+patches.1\n" in text and "not affiliated" in text and "MODIFICATIONS" in text


def test_the_parts_that_are_to_be_compiled(catalog: Catalog) -> None:
    assert [[file.path for file in patch.files] for patch in made(catalog).compiled] == [[CUDA]]
    assert made(catalog, ("0001-native",)).compiled == ()
    assert made(catalog, ("0001-native",)).left_out == {"0001": (CUDA,)}
