"""The two sides on made site folders: each must be what its name says, and the patched copy leaves stock alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from gsm8k.sides import RunError, Side, fixes_of, patched_copy, side_of, site_of
from installs import ENGINE, make_catalog, put_in, walk
from vllm_patches import api


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stock vLLM 0.20.2 in a folder, and a catalogue with patches for it."""
    monkeypatch.setenv("VLLM_PATCHES_DIR", str(make_catalog(tmp_path / "patches").folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "site"
    put_in(folder, "0.20.2")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in walk(folder) if file.is_file()}


def test_a_folder_with_vllm_goes_in_front_of_the_interpreters_own(site: Path) -> None:
    side = side_of("stock", str(site), sys.executable)
    assert side == Side("stock", sys.executable, (site,))
    assert site_of(side) == site
    assert side.environment({"A": "b"})["A"] == "b"


def test_an_interpreter_is_taken_as_it_is_named(tmp_path: Path) -> None:
    link = tmp_path / "bin" / "python"
    link.parent.mkdir()
    link.symlink_to(sys.executable)
    assert side_of("patched", str(link), "unused") == Side("patched", str(link))


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_anything_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="neither an interpreter nor a folder"):
        side_of("stock", str(tmp_path / name), sys.executable)


def test_an_interpreter_without_vllm_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="finds no vllm"):
        site_of(Side("stock", sys.executable, (tmp_path,)))


def test_stock_is_stock(site: Path) -> None:
    found = fixes_of(side_of("stock", str(site), sys.executable))
    assert found["vllm"] == "0.20.2"
    assert found["0005"] == "missing"


def test_the_patched_copy_is_whole_and_stock_is_untouched(site: Path, tmp_path: Path) -> None:
    stock = side_of("stock", str(site), sys.executable)
    before = contents(site)
    patched = patched_copy(stock, tmp_path / "copy")
    assert fixes_of(patched)["0005"] == "present"
    assert fixes_of(stock)["0005"] == "missing"
    assert contents(site) == before
    assert contents(tmp_path / "copy")[ENGINE] != before[ENGINE]
    assert patched_copy(stock, tmp_path / "copy") == patched


def test_files_that_no_patch_touches_are_not_copied(site: Path, tmp_path: Path) -> None:
    patched_copy(side_of("stock", str(site), sys.executable), tmp_path / "copy")
    assert (site / "vllm/__init__.py").samefile(tmp_path / "copy/vllm/__init__.py")


def test_a_patched_vllm_is_not_taken_for_stock(site: Path) -> None:
    api.install(site)
    with pytest.raises(RunError, match="stock is not stock"):
        fixes_of(side_of("stock", str(site), sys.executable))


def test_a_stock_vllm_is_not_taken_for_patched(site: Path) -> None:
    with pytest.raises(RunError, match="patched is not patched"):
        fixes_of(side_of("patched", str(site), sys.executable))
