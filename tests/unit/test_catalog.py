"""The catalogue's folder: which one it is, and what is read from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_patches.errors import PatchesError
from vllm_patches.series.catalog import DEFAULT_PIN, open_catalog, patches_dir, read_series, read_series_file
from world import SCRIPTS, World


def test_the_environment_names_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PATCHES_DIR", "/elsewhere")
    assert (patches_dir(), open_catalog().folder) == (Path("/elsewhere"), Path("/elsewhere"))


@pytest.mark.parametrize("value", [None, ""])
def test_without_it_the_checkouts_own_is_taken(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("VLLM_PATCHES_DIR")
    if value is not None:
        monkeypatch.setenv("VLLM_PATCHES_DIR", value)
    assert patches_dir() == SCRIPTS.parent / "patches"


def test_pins_are_the_releases_with_a_series(world: World) -> None:
    catalog = world.catalog
    assert [release.version for release in catalog.pins] == ["0.20.1", "0.20.2", "0.21.0"]
    assert list(catalog.series) == ["v0.20.2", "v0.21.0"]
    assert catalog.served_by("v0.20.2") == ["0.20.1", "0.20.2"]
    assert DEFAULT_PIN in catalog.releases


def test_a_series_is_read_in_the_order_of_its_file(world: World) -> None:
    series = world.catalog.series_of(world.release("0.20.1"))
    assert series.name == "v0.20.2"
    assert [patch.number for patch in series.patches] == ["0001", "0003", "0005"]


def test_a_release_without_a_series_has_an_empty_one(world: World) -> None:
    assert world.catalog.series_of(world.release("0.19.0")).patches == ()


def test_a_release_may_be_asked_to_have_one(world: World) -> None:
    world.catalog.need_series(world.release())
    with pytest.raises(PatchesError) as caught:
        world.catalog.need_series(world.release("0.22.0"))
    assert (caught.value.release, caught.value.expected) == ("0.22.0", "one of 0.20.1, 0.20.2, 0.21.0")


def test_one_damaged_series_does_not_stop_another(world: World) -> None:
    world.patch("0003", "v0.21.0").write_bytes(b"not a patch")
    catalog = world.catalog
    assert len(catalog.series_of(world.release("0.20.2")).patches) == 3
    with pytest.raises(PatchesError):
        catalog.series_of(world.release("0.21.0"))


@pytest.mark.parametrize("text", ["0.20.2", "v0.20.2"])
def test_a_release_is_found_with_or_without_v(world: World, text: str) -> None:
    assert world.catalog.release(text).version == "0.20.2"


@pytest.mark.parametrize(("wrong", "near"), [("0.20.3", "0.20"), ("0.21", "0.21.0"), ("v22.0", "0.22.0")])
def test_an_unknown_release_names_the_nearest(world: World, wrong: str, near: str) -> None:
    with pytest.raises(PatchesError) as caught:
        world.catalog.release(wrong)
    assert caught.value.release == wrong
    assert caught.value.expected == "one of 0.19.0, 0.20.1, 0.20.2, 0.21.0, 0.22.0"
    assert caught.value.found.startswith(f"{wrong}; nearest: {near}")
    assert caught.value.found.count(", ") == 2, "three of them"
    assert caught.value.next_command.startswith(f"make apply PIN={near}")


def test_comments_and_blank_lines_of_a_series_file(tmp_path: Path) -> None:
    path = tmp_path / "series"
    path.write_text("# first\n\n0001-x.patch\n  # second\n 0002-y.patch \n", encoding="utf-8")
    assert read_series_file(path) == ["0001-x.patch", "0002-y.patch"]


def test_a_missing_series_file_says_how_to_get_it_back(tmp_path: Path) -> None:
    with pytest.raises(PatchesError) as caught:
        read_series(tmp_path)
    assert "No such file" in caught.value.what
    assert caught.value.next_command == f"git checkout -- {tmp_path / 'series'}"
