"""From an sdist to a git work tree: the same commits as the plain way, and every touched file checked."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
from vllm_patches.errors import PatchesError
from vllm_patches.series.hunks import blob_id
from vllm_patches.sources import cache
from vllm_patches.trees.tree import build_tree, check_files, commit_series, pristine_objects, series_head
from world import ENGINE, PINS, SCRIPT, World, plain_git, scratch_left, sdist_files, snapshot


def _pristine_folder(world: World) -> Path:
    return cache.pristine_path(world.release().sha256)


def test_pristine_objects_are_made_once(world: World) -> None:
    made = pristine_objects(world.release(), world.sdist())
    before = snapshot(made.folder)
    world.sdist().unlink()
    assert pristine_objects(world.release(), world.sdist()) == made
    assert snapshot(made.folder) == before
    assert sorted(before) == ["objects.idx", "objects.pack", "pristine.json"]
    assert scratch_left(world.cache) == []


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def _flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink])
@pytest.mark.parametrize("name", ["objects.pack", "objects.idx", "pristine.json"])
def test_a_damaged_pack_is_made_again(world: World, name: str, damage: object) -> None:
    made = pristine_objects(world.release(), world.sdist())
    before = {path: path.read_bytes() for path in made.folder.iterdir()}
    damage(made.folder / name)  # type: ignore[operator]
    assert pristine_objects(world.release(), world.sdist()) == made
    assert {path: path.read_bytes() for path in made.folder.iterdir()} == before


@pytest.mark.parametrize("record", ["", "[]", "{}", '"text"', '{"commit": 1}'])
def test_a_damaged_record_is_made_again(world: World, record: str) -> None:
    made = pristine_objects(world.release(), world.sdist())
    (made.folder / "pristine.json").write_text(record, encoding="utf-8")
    assert pristine_objects(world.release(), world.sdist()) == made


def test_a_bad_sdist_leaves_nothing_in_the_cache(world: World) -> None:
    world.sdist().write_bytes(b"not an sdist")
    with pytest.raises(PatchesError):
        pristine_objects(world.release(), world.sdist())
    assert not _pristine_folder(world).exists()
    assert list(_pristine_folder(world).parent.iterdir()) == []


@pytest.mark.parametrize("version", PINS)
def test_a_tree_is_the_plain_ways(world: World, version: str) -> None:
    """The recorded head was made by tar, git init and git am (world.py)."""
    release, folder = world.release(version), world.root / "tree"
    series = world.catalog.series_of(release)
    head = build_tree(release, series, pristine_objects(release, world.sdist(version)), folder)
    assert head == release.head == world.head(folder)
    assert plain_git(folder, "status", "--porcelain", "--ignored") == ""
    assert plain_git(folder, "symbolic-ref", "HEAD") == f"refs/heads/vllm-patches/{version}"
    assert plain_git(folder, "rev-list", "--count", "pristine..HEAD") == str(len(series.patches))
    plain_git(folder, "fsck", "--strict")


def test_every_file_is_on_disk(world: World) -> None:
    release, folder = world.release(), world.root / "tree"
    build_tree(release, world.catalog.series_of(release), pristine_objects(release, world.sdist()), folder)
    for path, data in sdist_files("0.20.2").items():
        assert (folder / path).is_file()
        if path not in release.blobs:
            assert (folder / path).read_bytes() == data
    assert (folder / SCRIPT).stat().st_mode & stat.S_IXUSR
    assert not (folder / ENGINE).stat().st_mode & stat.S_IXUSR
    assert b"step = 20.5\n" in (folder / ENGINE).read_bytes()


def test_a_tree_outlives_the_cache(world: World) -> None:
    release, folder = world.release(), world.root / "tree"
    build_tree(release, world.catalog.series_of(release), pristine_objects(release, world.sdist()), folder)
    for path in _pristine_folder(world).iterdir():
        path.write_bytes(b"damaged")
    shutil.rmtree(world.cache)
    plain_git(folder, "fsck", "--strict")


def test_the_head_without_a_tree(world: World) -> None:
    release = world.release()
    pristine = pristine_objects(release, world.sdist())
    assert series_head(release, world.catalog.series_of(release), pristine) == release.head
    assert scratch_left(world.cache) == []


def test_a_file_that_was_changed_on_disk_is_named(world: World) -> None:
    release, folder = world.release(), world.root / "tree"
    series = world.catalog.series_of(release)
    build_tree(release, series, pristine_objects(release, world.sdist()), folder)
    check_files(folder, release, series)
    (folder / ENGINE).write_bytes(b"other\n")
    with pytest.raises(PatchesError) as caught:
        check_files(folder, release, series)
    error = caught.value
    assert (error.release, error.file) == ("0.20.2", str(folder / ENGINE))
    assert (error.expected, error.found) == (series.blob_chain(ENGINE)[-1], blob_id(b"other\n"))
    assert error.next_command.endswith("make apply PIN=0.20.2")


def test_a_patch_that_does_not_fit_makes_no_commit(world: World) -> None:
    source = world.checkout("0.21.0")
    series = world.catalog.series_of(world.release())
    head = world.head(source)
    with pytest.raises(PatchesError) as caught:
        commit_series(source, world.release(), series.patches, head, "refs/x/y")
    assert (caught.value.patch, caught.value.file, caught.value.hunk) == ("0001-dsa-mtp-ima.patch", ENGINE, 1)
    assert plain_git(source, "for-each-ref") == f"{head} commit\trefs/heads/main"
