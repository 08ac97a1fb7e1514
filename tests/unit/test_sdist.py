"""Sdists: the recorded hash or nothing, and no member that could land anywhere but in the tree."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from vllm_patches.errors import PatchesError
from vllm_patches.series.model import Release
from vllm_patches.sources.sdist import Entry, entries, open_sdist, pick
from world import ENGINE, KERNEL, SCRIPT, World, sdist_files


def test_every_file_of_an_sdist_with_its_mode(world: World) -> None:
    tar = open_sdist(world.sdist(), world.release())
    expected = [
        Entry(path, "100755" if path == SCRIPT else "100644", data) for path, data in sdist_files("0.20.2").items()
    ]
    assert list(entries(tar, world.release())) == expected


def test_single_files_are_picked(world: World) -> None:
    tar = open_sdist(world.sdist(), world.release())
    files = sdist_files("0.20.2")
    assert pick(tar, [ENGINE, KERNEL, "none"], world.release()) == {ENGINE: files[ENGINE], KERNEL: files[KERNEL]}


def test_picking_stops_when_it_has_all(world: World) -> None:
    tar = open_sdist(world.sdist(), world.release())
    end = tar.index(sdist_files("0.20.2")[ENGINE]) + len(sdist_files("0.20.2")[ENGINE])
    assert ENGINE in pick(tar[:end] + b"\xff" * 4096, [ENGINE], world.release())


def _damaged(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def test_a_truncated_sdist_is_told_by_its_size(world: World) -> None:
    release, data = world.release(), world.sdist().read_bytes()
    found = _damaged(world.sdist(), data[:-20])
    with pytest.raises(PatchesError) as caught:
        open_sdist(world.sdist(), release)
    error = caught.value
    assert error.what == "the sdist is truncated: its sha256 is wrong"
    assert (error.release, error.file) == ("0.20.2", str(world.sdist()))
    assert error.expected == f"{release.sha256} ({len(data)} bytes)"
    assert error.found == f"{found} ({len(data) - 20} bytes)"
    assert error.next_command.startswith("make apply PIN=0.20.2")


def test_another_file_of_that_name_is_refused(world: World) -> None:
    found = _damaged(world.sdist(), world.sdist("0.20.1").read_bytes() + bytes(10000))
    with pytest.raises(PatchesError) as caught:
        open_sdist(world.sdist(), world.release())
    assert caught.value.what == "the sdist is not the recorded file: its sha256 is wrong"
    assert found in caught.value.found


def test_a_missing_sdist_is_named(world: World) -> None:
    with pytest.raises(PatchesError) as caught:
        open_sdist(world.root / "none.tar.gz", world.release())
    assert caught.value.what == "cannot read the sdist: No such file or directory"
    assert caught.value.next_command == f"ls -l {world.root / 'none.tar.gz'}"


def _tar(*members: tuple[str, Callable[[tarfile.TarInfo], None]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, change in members:
            info = tarfile.TarInfo(name)
            change(info)
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return buffer.getvalue()


def _file(info: tarfile.TarInfo) -> None:
    info.size = 3


def _folder(info: tarfile.TarInfo) -> None:
    info.type = tarfile.DIRTYPE


def _kind(kind: bytes, target: str = "") -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = kind, target

    return change


TOP = "vllm-0.20.2"

# name of the member, its kind, what is said of it
UNSAFE = {
    "parent": (f"{TOP}/../../x", _file, "'..'"),
    "parent of the top": ("../x", _file, "'..'"),
    "parent within the tar": (f"{TOP}/../x", _file, "'..'"),
    "parent of a folder": (f"{TOP}/a/../../../etc", _folder, "'..'"),
    "absolute": ("/etc/passwd", _file, "absolute"),
    "absolute below": (f"/{TOP}/a", _file, "absolute"),
    "dot": (f"{TOP}/./a", _file, "'.'"),
    "empty part": (f"{TOP}//a", _file, "''"),
    "symlink out": (f"{TOP}/a", _kind(tarfile.SYMTYPE, "/etc/passwd"), "a link"),
    "symlink within": (f"{TOP}/a", _kind(tarfile.SYMTYPE, "b"), "a link"),
    "hard link": (f"{TOP}/a", _kind(tarfile.LNKTYPE, f"{TOP}/b"), "a link"),
    "fifo": (f"{TOP}/a", _kind(tarfile.FIFOTYPE), "neither a file nor a folder"),
    "device": (f"{TOP}/a", _kind(tarfile.CHRTYPE), "neither a file nor a folder"),
    "git folder": (f"{TOP}/.git/config", _file, "'.git'"),
    "git folder below": (f"{TOP}/sub/.GIT/hooks/x", _file, "'.GIT'"),
    "another top": ("other/a", _file, f"not below {TOP}/"),
    "no top": ("setup.py", _file, f"not below {TOP}/"),
    "file as top": (TOP, _file, f"not below {TOP}/"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_a_member_that_must_not_be_extracted(world: World, case: str) -> None:
    name, change, why = UNSAFE[case]
    with pytest.raises(PatchesError) as caught:
        list(entries(_tar((f"{TOP}/sound", _file), (name, change)), world.release()))
    error = caught.value
    assert error.what == "the sdist holds a member that must not be extracted"
    assert (error.release, error.file) == ("0.20.2", name)
    assert why in error.found
    assert error.next_command == "tar tzvf vllm-0.20.2.tar.gz"


def test_a_link_is_not_picked_either(world: World) -> None:
    with pytest.raises(PatchesError):
        pick(_tar((f"{TOP}/a", _kind(tarfile.SYMTYPE, "/etc/passwd"))), ["a"], world.release())


def test_a_folder_of_that_name_is_not_the_file(world: World) -> None:
    assert pick(_tar((f"{TOP}/a", _folder)), ["a"], world.release()) == {}


def test_folders_are_passed_over(world: World) -> None:
    tar = _tar((TOP, _folder), (f"{TOP}/a", _folder), (f"{TOP}/a/b", _file))
    assert [entry.path for entry in entries(tar, world.release())] == ["a/b"]


def test_the_folder_that_one_works_in_does_not_matter(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A symlink there of the top folder's name is none of the tar's business."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / TOP).symlink_to("/usr")
    assert list(entries(_tar((f"{TOP}/a", _file)), world.release()))


def test_the_top_folder_is_told_by_the_release(world: World) -> None:
    release: Release = replace(world.release(), sdist="vllm-1.2.3.tar.gz")
    with pytest.raises(PatchesError):
        list(entries(_tar((f"{TOP}/a", _file)), release))


@pytest.mark.parametrize(
    ("mode", "expected"), [(0o755, "100755"), (0o700, "100755"), (0o644, "100644"), (0o4600, "100644")]
)
def test_only_the_owners_execute_bit_counts(world: World, mode: int, expected: str) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.mode = mode

    assert [entry.mode for entry in entries(_tar((f"{TOP}/a", change)), world.release())] == [expected]
