"""`dist` as a command: what lies in the folder, what its name says, and bad input that leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from vllm_patches import __version__, api
from vllm_patches.dist.make import Order
from world import ENGINE, Ran, World, plain_git, scratch_left, sdist_files, snapshot

TOP = f"vllm-patches-{__version__}"
CHANNELS = ("quilt", "rpm", "nix", "conda", "spack", "aur", "combined", "dockerfile", "statements")
EACH = tuple(word for name in CHANNELS for word in ("--channel", name))  # the fake sdists have no CMake files
NAME = "-".join((TOP, "0.20.2"))


def dist(world: World, *arguments: object, env: dict[str, str] | None = None) -> Ran:
    return world.run("dist", "--out", world.root / "out", *arguments, env=env)


def folder(world: World) -> Path:
    (found,) = (world.root / "out").iterdir()
    return found


def one_pin(world: World, *arguments: object, env: dict[str, str] | None = None) -> Path:
    ran = dist(world, "--pin", "0.20.2", "--channel", "quilt", *arguments, env=env)
    assert ran.status == 0, ran.err
    return folder(world)


def test_every_pin_and_channel(world: World) -> None:
    ran = dist(world, *EACH)
    assert ran.status == 0, ran.err
    assert folder(world).name == "-".join((TOP, *CHANNELS))
    assert sorted(path.name for path in folder(world).iterdir() if path.is_dir()) == ["0.20.1", "0.20.2", "0.21.0"]
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder(world), check=True)
    files = {str(p.relative_to(folder(world))) for p in folder(world).rglob("*") if p.is_file()}
    listed = {line.split("  ")[1] for line in (folder(world) / "SHA256SUMS").read_text(encoding="utf-8").splitlines()}
    assert files - listed == {"SHA256SUMS", "SHA256SUMS.sri"}
    assert ran.says("no statement for scanners: no results of a proof run were given", "0.21.0+patches.1")


def test_the_tarball_has_all_of_it(world: World, tmp_path: Path) -> None:
    top = one_pin(world)
    with tarfile.open(top / f"{top.name}.tar.gz") as archive:
        archive.extractall(tmp_path / "x", filter="data")
    inner = tmp_path / "x" / top.name
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=inner, check=True)
    outside = {str(p.relative_to(top)): p.read_bytes() for p in top.rglob("*") if p.is_file()}
    inside = {str(p.relative_to(inner)): p.read_bytes() for p in inner.rglob("*") if p.is_file()}
    extra = {f"{top.name}.tar", f"{top.name}.tar.gz", "SHA256SUMS", "SHA256SUMS.sri"}
    assert {k: v for k, v in inside.items() if k != "SHA256SUMS"} == {
        k: v for k, v in outside.items() if k not in extra
    }
    assert {"LICENSE", "NOTICE", "0.20.2/MODIFICATIONS", "fixes.toml", "releases.toml"} <= set(inside)


def test_the_bytes_do_not_depend_on_where_and_when(world: World) -> None:
    """Another folder, zone, locale, umask and hash seed: the same hashes."""
    first = json.loads(dist(world, "--pin", "0.20.2", *EACH, "--json").out)
    odd = {"TZ": "Asia/Kathmandu", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    ran = world.run(
        "dist", "--out", world.root / "else" / "where", "--pin", "0.20.2", *EACH, "--json", env=odd, umask=0o077
    )
    second = json.loads(ran.out)
    assert [first[key] for key in ("tar_sha256", "gz_sha256")] == [second[key] for key in ("tar_sha256", "gz_sha256")]
    mine, other = Path(first["folder"]), world.root / "else" / "where"
    assert subprocess.run(["diff", "-r", world.root / mine, other / mine.name], check=False).returncode == 0


def test_the_newest_patch_is_the_date(world: World) -> None:
    top = one_pin(world)
    with tarfile.open(top / f"{top.name}.tar") as archive:
        assert {member.mtime for member in archive} == {1795219200}  # 2026-11-21 00:00:00 UTC


def test_source_date_epoch_is_the_date(world: World) -> None:
    top = one_pin(world, env={"SOURCE_DATE_EPOCH": "1700000000"})
    with tarfile.open(top / f"{top.name}.tar") as archive:
        assert {member.mtime for member in archive} == {1700000000}


def test_no_network_with_an_sdist_at_hand(world: World) -> None:
    env = {"XDG_CACHE_HOME": str(world.root / "empty")}
    assert one_pin(world, "--sdist", world.sdist(), env=env).is_dir()


def test_a_choice_is_in_the_name_and_in_every_file(world: World) -> None:
    ran = dist(world, "--pin", "0.20.2", *EACH, "--fixes", "0005, 0001", "--base-url", "https://example.invalid/x")
    assert ran.status == 0, ran.err
    assert folder(world).name == "-".join((NAME, "only", "0005", "0001", *CHANNELS))
    for path in (folder(world) / "0.20.2").rglob("*"):
        if path.is_file() and path.name not in ("0001-dsa-mtp-ima.patch", "0005-mrv2-wake-up.patch"):
            text = path.read_text(encoding="utf-8")
            assert "0003" not in text.replace('"left_out": [\n  "0003"\n ]', ""), path
            if path.suffix not in (".patch",) and path.name != "MODIFICATIONS":
                assert "0001" in text or path.name.endswith(".sh"), path


def test_some_fixes_of_all_releases(world: World) -> None:
    """0.21.0's series has neither of the two: it is named, and has no folder."""
    ran = dist(world, "--channel", "quilt", "--fixes", "0001 0005")
    assert ran.status == 0 and ran.says("vLLM 0.21.0: its series has none of 0001, 0005")
    assert sorted(path.name for path in folder(world).iterdir() if path.is_dir()) == ["0.20.1", "0.20.2"]


def own_series(world: World, raw: bytes) -> Path:
    own = world.root / "own"
    own.mkdir()
    (own / "series").write_text("theirs.patch\n", encoding="utf-8")
    (own / "theirs.patch").write_bytes(raw)
    return own


def theirs(old: str, new: str) -> bytes:
    """A patch with one line of context on each side of a step of the fake engine."""
    lines = sdist_files("0.20.2")[ENGINE].decode().splitlines()
    at = lines.index(old)
    body = f" {lines[at - 1]}\n-{old}\n+{new}\n {lines[at + 1]}\n"
    return f"--- a/{ENGINE}\n+++ b/{ENGINE}\n@@ -{at},3 +{at},3 @@\n{body}".encode()


@pytest.mark.parametrize(("option", "order"), [("--below", [0, 1, 2, 3]), ("--above", [1, 2, 3, 0])])
def test_another_series_goes_along(world: World, option: str, order: list[int]) -> None:
    own = own_series(world, theirs("step = 35", "step = 35 # theirs"))
    ran = dist(world, "--pin", "0.20.2", *EACH, "--with-series", own, option)
    assert ran.status == 0, ran.err
    names = (folder(world) / "0.20.2" / "patches" / "series").read_text(encoding="utf-8").split()
    ours = (world.patches / "v0.20.2" / "series").read_text(encoding="utf-8").split()
    assert names == [["theirs.patch", *ours][at] for at in order]
    tree = world.checkout()
    for name in names:
        patch = folder(world) / "0.20.2" / "patches" / name
        plain_git(tree, "apply", "--verbose", str(patch))
    script = (folder(world) / "0.20.2" / "vllm-0.20.2-patches.sh").read_text(encoding="utf-8")
    assert "step = 35 # theirs" in script and "0.20.2+patches.1.with.own" in script


def refused(world: World, *arguments: object, said: tuple[str, ...], env: dict[str, str] | None = None) -> None:
    """A clear error, and not a byte of output or scratch."""
    before = snapshot(world.root, skip=("cache",))
    ran = dist(world, *arguments, env=env)
    assert ran.status == 1 and ran.says(*said, "next:")
    assert snapshot(world.root, skip=("cache",)) == before


def test_a_conflict_names_both_sides_and_leaves_nothing(world: World) -> None:
    own = own_series(world, theirs("step = 20", "step = 20 # theirs"))
    said = ("theirs.patch conflicts with 0001-dsa-mtp-ima.patch", ENGINE, "0.20.2")
    refused(world, "--pin", "0.20.2", "--channel", "quilt", "--with-series", own, said=said)


def test_crlf(world: World) -> None:
    own = own_series(world, theirs("step = 35", "theirs").replace(b"\n", b"\r\n"))
    refused(world, "--pin", "0.20.2", "--with-series", own, said=("theirs.patch", "CRLF in line 1", "LF line ends"))


def test_an_unknown_channel_lists_them(world: World) -> None:
    refused(world, "--channel", "flatpak", said=("unknown channel", "flatpak", "quilt, rpm, nix", "native, statements"))


def test_an_existing_folder_is_left_alone(world: World) -> None:
    top = one_pin(world)
    (top / "mine").write_text("mine", encoding="utf-8")
    refused(
        world, "--pin", "0.20.2", "--channel", "quilt", said=("the output folder exists; nothing was written", str(top))
    )


def test_a_file_in_the_place_of_the_folder(world: World) -> None:
    (world.root / "out").write_text("mine", encoding="utf-8")
    refused(world, "--pin", "0.20.2", "--channel", "quilt", said=("the output folder cannot be made", "--out DIR"))


def test_a_place_that_cannot_be_written(world: World) -> None:
    """/proc takes no folder from anybody, root included."""
    ran = world.run("dist", "--out", "/proc/vllm-patches", "--pin", "0.20.2", "--channel", "quilt")
    assert ran.status == 1 and ran.says("/proc", "next:")


def test_a_base_without_cmake_files_is_told(world: World) -> None:
    refused(world, "--pin", "0.20.2", "--channel", "native", said=("no native dependency was found", "0.20.2"))


def test_a_proof_run_is_for_the_statements(world: World) -> None:
    (world.root / "proof.json").write_text("[]", encoding="utf-8")
    said = ("--proof is for the statements", "--channel statements")
    refused(world, "--pin", "0.20.2", "--channel", "quilt", "--proof", world.root / "proof.json", said=said)


def test_the_manifest_says_that_statements_were_not_asked_for(world: World) -> None:
    record = json.loads((one_pin(world) / "0.20.2" / "manifest.json").read_text(encoding="utf-8"))
    assert set(record["statements"].values()) == {"the channel was not asked for"}


def test_a_release_without_a_series(world: World) -> None:
    refused(world, "--pin", "0.22.0", said=("there is no series for this release", "0.22.0"))


def test_a_position_needs_a_series(world: World) -> None:
    refused(world, "--below", said=("--with-series DIR",))


def test_one_sdist_is_of_one_pin(world: World) -> None:
    refused(world, "--sdist", world.sdist(), said=("the one release", "dist --pin 0.20.2"))


def test_a_source_date_epoch_that_is_none(world: World) -> None:
    env = {"SOURCE_DATE_EPOCH": "today"}
    refused(world, "--pin", "0.20.2", "--channel", "quilt", said=("SOURCE_DATE_EPOCH", "today"), env=env)


def test_a_kill_leaves_no_folder(world: World) -> None:
    process = world.start("dist", "--out", world.root / "out", "--pin", "0.20.2", "--channel", "quilt")
    process.terminate()
    process.communicate()
    if process.returncode != 0:
        assert not (world.root / "out" / f"{NAME}-quilt").exists()
    assert one_pin(world).is_dir()  # and the next run finds its way, and sweeps
    assert scratch_left(world.root / "out") == []
    assert [path.name for path in (world.root / "out").iterdir()] == [f"{NAME}-quilt"]


def test_the_api_does_what_the_command_does(world: World) -> None:
    order = Order(channels=("quilt",))
    made = api.dist(["0.20.2"], order=order, sdist=world.sdist(), out=world.root / "api")
    top = one_pin(world)
    assert Path(made.folder).name == top.name
    assert made.gz_sha256 == hashlib.sha256((top / made.gz).read_bytes()).hexdigest()
    assert [one.version for one in made.releases] == ["0.20.2+patches.1"]
