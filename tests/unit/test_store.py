"""Where the pristine contents come from: the cache, else the sdists, and each has to be the recorded one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from vllm_patches.errors import PatchesError
from vllm_patches.series.model import Release
from vllm_patches.sources import cache
from vllm_patches.sources.store import pristine_files, touched_files
from world import ENGINE, KERNEL, PINS, World, sdist_files


class Finder:
    """Hands out the world's sdists and remembers for which release it was asked."""

    def __init__(self, world: World) -> None:
        self.world, self.asked = world, list[str]()

    def __call__(self, release: Release) -> Path:
        self.asked.append(release.version)
        return self.world.sdist(release.version)


@pytest.fixture
def finder(world: World) -> Finder:
    return Finder(world)


def test_contents_by_blob(world: World, finder: Finder) -> None:
    release = world.release()
    contents = pristine_files([release], finder)
    files = sdist_files("0.20.2")
    assert contents == {blob: files[path] for path, blob in release.blobs.items()}
    assert finder.asked == ["0.20.2"]


def test_what_is_cached_needs_no_sdist(world: World, finder: Finder) -> None:
    first = pristine_files(world.catalog.pins, finder)
    assert finder.asked == list(PINS)
    finder.asked.clear()
    assert pristine_files(world.catalog.pins, finder) == first
    assert finder.asked == []


def test_a_damaged_blob_is_read_from_its_sdist_again(world: World, finder: Finder) -> None:
    first = pristine_files(world.catalog.pins, finder)
    finder.asked.clear()
    cache.blob_path(world.release("0.21.0").blobs[KERNEL]).write_bytes(b"damaged")
    assert pristine_files(world.catalog.pins, finder) == first
    assert finder.asked == ["0.21.0"]


def test_a_release_without_recorded_blobs_is_passed_over(world: World, finder: Finder) -> None:
    assert pristine_files([world.release("0.19.0"), replace(world.release(), blobs={})], finder) == {}
    assert finder.asked == []


def test_a_blob_that_the_sdist_does_not_have_is_named(world: World, finder: Finder) -> None:
    release = world.release()
    wrong = replace(release, blobs=release.blobs | {ENGINE: "0" * 40})
    with pytest.raises(PatchesError) as caught:
        pristine_files([wrong], finder)
    error = caught.value
    assert error.what == "a file of the sdist is not the one that releases.toml records"
    assert (error.release, error.file, error.expected) == ("0.20.2", ENGINE, "0" * 40)
    assert error.found == release.blobs[ENGINE]
    assert error.next_command.startswith("make record")


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_keeps_its_fields_across_processes(world: World, finder: Finder, count: int) -> None:
    """Two sdists or more are read in processes of their own."""
    shutil.copyfile(world.sdist("0.21.0"), world.sdist("0.20.2"))
    pins = [world.release("0.20.2"), world.release("0.20.1")][:count]
    with pytest.raises(PatchesError) as caught:
        pristine_files(pins, finder)
    assert caught.value.release == "0.20.2"
    assert world.release().sha256 in caught.value.expected
    assert caught.value.next_command


def test_a_touched_file_that_the_sdist_lacks(world: World) -> None:
    with pytest.raises(PatchesError) as caught:
        touched_files(world.release(), world.sdist(), [ENGINE, "vllm/none.py"])
    error = caught.value
    assert (error.release, error.file, error.found) == ("0.20.2", "vllm/none.py", "none")
    assert error.next_command == f"tar tzf {world.sdist()}"
