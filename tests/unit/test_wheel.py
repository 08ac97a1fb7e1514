"""`build` on synthetic wheels: what changes and what does not, what is refused, and that nothing half-made stays."""

from __future__ import annotations

import csv
import email
import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from durability import Disk
from hypothesis import given, settings
from hypothesis import strategies as st
from installs import become_nobody, killed_at, told_by_child
from vllm_patches.cli import main
from vllm_patches.errors import PatchesError
from vllm_patches.installed.install import install
from vllm_patches.installed.verify import verify
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.model import Artifact, Wheel
from vllm_patches.series.tables import dump_releases
from vllm_patches.wheels import outfile, wheelmeta
from vllm_patches.wheels.wheel import Built, build_wheel, release_of
from wheel.wheelfile import WheelFile
from wheelworld import (
    ENGINE,
    INFO,
    KERNEL,
    NAME,
    REPOSITORY,
    VERSION,
    WheelWorld,
    make_world,
    official_files,
    record_of,
    zipped,
)

LOCAL = "0.20.2+patches.3"
NEW_INFO = f"vllm-{LOCAL}.dist-info/"
MADE = NAME.replace(VERSION, LOCAL)


@pytest.fixture
def world(tmp_path: Path) -> WheelWorld:
    return make_world(tmp_path / "world")


def no_fetch(wanted: Artifact) -> Path:
    raise AssertionError(f"{wanted} must not be fetched")


def build(world: WheelWorld, out: Path, **options: object) -> Built:
    return build_wheel(
        world.catalog,
        world.release,
        no_fetch,
        out,
        lambda text: None,
        given=world.official,
        **options,  # type: ignore[arg-type]
    )


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {info.filename: archive.read(info) for info in archive.infolist()}


def test_exactly_the_touched_files_and_the_metadata_change(world: WheelWorld, tmp_path: Path) -> None:
    built = build(world, tmp_path / "dist")
    made, stock = contents(Path(built.wheel)), contents(world.official)
    assert Path(built.wheel) == tmp_path / "dist" / MADE
    assert built.sha256 == hashlib.sha256(Path(built.wheel).read_bytes()).hexdigest()
    renamed = {name.replace(INFO, NEW_INFO): data for name, data in stock.items()}
    added = {NEW_INFO + name for name in ("patches.json", "licenses/MODIFICATIONS", "licenses/NOTICE-vllm-patches")}
    assert made.keys() == renamed.keys() | added
    changed = {name for name in renamed if made[name] != renamed[name]}
    assert changed == {ENGINE, "vllm/_version.py", NEW_INFO + "METADATA", NEW_INFO + "RECORD"}
    assert made[ENGINE] == world.after[ENGINE]
    assert list(made)[-1] == NEW_INFO + "RECORD"
    assert built.files == (ENGINE,)


def test_untouched_members_keep_their_compressed_bytes_modes_and_dates(tmp_path: Path) -> None:
    modes = {"vllm/_C.abi3.so": 0o100755, ENGINE: 0o100600}
    world = make_world(tmp_path / "world", zipped(official_files(), streamed=True, modes=modes))
    built = build(world, tmp_path)
    raw, old = Path(built.wheel).read_bytes(), world.official.read_bytes()
    with zipfile.ZipFile(world.official) as a, zipfile.ZipFile(built.wheel) as b:
        for info in a.infolist():
            if info.filename in (ENGINE, "vllm/_version.py") or info.filename.startswith(INFO):
                continue
            copy = b.getinfo(info.filename)
            spans = [
                (i.header_offset, i.header_offset + 30 + len(i.filename.encode()) + i.compress_size)
                for i in (copy, info)
            ]
            assert raw[slice(*spans[0])] == old[slice(*spans[1])]
            assert (copy.external_attr, copy.date_time) == (info.external_attr, info.date_time)
        rewritten = b.getinfo(ENGINE)
        assert (rewritten.compress_type, rewritten.date_time) == (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
        assert rewritten.external_attr >> 16 == 0o100600


def test_record_lists_every_file_with_its_hash(world: WheelWorld, tmp_path: Path) -> None:
    made = contents(Path(build(world, tmp_path).wheel))
    rows = list(csv.reader(io.StringIO(made[NEW_INFO + "RECORD"].decode())))
    assert [path for path, _, _ in rows] == list(made)
    expected = record_of({n: d for n, d in made.items() if n != NEW_INFO + "RECORD"}, NEW_INFO)
    assert made[NEW_INFO + "RECORD"] == expected


PARTS = st.text(st.characters(blacklist_characters="/\\:\0\r\n", blacklist_categories=("Cs",)), min_size=1, max_size=8)
NAMES = (PARTS | st.sampled_from(['a,b"c', '"', ",", "\u00fc \U0001f600", "\u202e"])).filter(
    lambda name: name.strip(".")
)


@settings(max_examples=30, deadline=None)
@given(
    extra=st.dictionaries(NAMES, st.binary(max_size=50) | st.just(b""), max_size=6),
    streamed=st.booleans(),
    zip64=st.booleans(),
)
def test_any_other_file_is_carried_over(
    tmp_path_factory: pytest.TempPathFactory, extra: dict[str, bytes], streamed: bool, zip64: bool
) -> None:
    """Names with commas, quotes and letters of every script, empty files, data descriptors, zip64."""
    tmp = tmp_path_factory.mktemp("any")
    files = official_files() | {f"vllm/extra/{name}": data for name, data in extra.items()}
    world = make_world(tmp / "world", zipped(files, streamed=streamed, zip64=zip64))
    built = build(world, tmp / "dist", thorough=True)
    made = contents(Path(built.wheel))
    assert {name: data for name, data in made.items() if name.startswith("vllm/extra/")} == {
        name: data for name, data in files.items() if name.startswith("vllm/extra/")
    }
    expected = record_of({name: data for name, data in made.items() if name != NEW_INFO + "RECORD"}, NEW_INFO)
    assert made[NEW_INFO + "RECORD"] == expected
    assert verify(world.catalog, Path(built.wheel)).ok
    with WheelFile(built.wheel) as archive:  # compares every file with RECORD
        assert {name: archive.read(name) for name in archive.namelist()} == made


def test_every_place_of_the_version_carries_the_local_one(world: WheelWorld, tmp_path: Path) -> None:
    made = contents(Path(build(world, tmp_path).wheel))
    metadata = email.message_from_bytes(made[NEW_INFO + "METADATA"])
    assert metadata["Version"] == LOCAL
    assert metadata.get_all("License-File") == ["LICENSE", "MODIFICATIONS", "NOTICE-vllm-patches"]
    assert metadata.get_payload() == "Version: 0.20.2 of the description stays\n"
    scope: dict[str, object] = {}
    exec(made["vllm/_version.py"], scope)
    assert (scope["__version__"], scope["version_tuple"]) == (LOCAL, (0, 20, 2, "patches.3"))


def test_patches_json_says_what_was_done_to_every_file(world: WheelWorld, tmp_path: Path) -> None:
    made = contents(Path(build(world, tmp_path).wheel))
    record = json.loads(made[NEW_INFO + "patches.json"])
    assert (record["schema"], record["release"], record["version"], record["without"]) == (1, VERSION, LOCAL, [])
    assert {fix: entry["result"] for fix, entry in record["fixes"].items()} == {
        "0001": "applied", "0002": "fixed upstream", "0003": "applied", "0004": "fixed upstream",
        "0005": "absent in this release",
    }  # fmt: skip
    assert list(record["files"]) == [ENGINE]
    entry = record["files"][ENGINE]
    before, after = official_files()[ENGINE], world.after[ENGINE]
    assert entry["before"]["sha256"] == hashlib.sha256(before).hexdigest()
    assert entry["after"]["sha256"] == hashlib.sha256(after).hexdigest()
    assert entry["patches"] == ["0001-dsa-mtp-ima.patch", "0003-mla-flat-buffer.patch"]
    patch = world.folder / "patches" / "v0.20.2" / "0003-mla-flat-buffer.patch"
    assert record["fixes"]["0003"]["patch_sha256"] == hashlib.sha256(patch.read_bytes()).hexdigest()
    assert [entry["path"] for entry in record["not_of_the_series"]] == ["vllm/_version.py"]
    assert record["from_wheel"]["sha256"] == hashlib.sha256(world.official.read_bytes()).hexdigest()
    text = made[NEW_INFO + "licenses/MODIFICATIONS"].decode()
    for part in (
        ENGINE,
        "0003-mla-flat-buffer.patch: engine: skip a step",
        "vllm-project/vllm/pull/42135",
        "_version.py",
    ):
        assert part in text


def test_build_and_install_give_the_same_account(world: WheelWorld, tmp_path: Path) -> None:
    """One form of patches.json: but for where the package came from, both ways to patch it say the same of it."""
    made = json.loads(contents(Path(build(world, tmp_path).wheel))[NEW_INFO + "patches.json"])
    with zipfile.ZipFile(world.official) as archive:
        archive.extractall(tmp_path / "site")
    install(world.catalog, tmp_path / "site", (), lambda line: None)
    inplace = json.loads((tmp_path / "site" / INFO / "patches.json").read_bytes())
    assert list(inplace) == list(made)
    assert {key for key in made if made[key] != inplace[key]} == {"version", "from_wheel", "not_of_the_series"}
    assert (inplace["version"], inplace["from_wheel"], inplace["not_of_the_series"]) == (VERSION, None, [])


def test_the_same_input_gives_the_same_bytes(
    world: WheelWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(world, tmp_path / "a")
    monkeypatch.setattr(time, "time", lambda: 4e9)
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    moved = world.official.rename(tmp_path / "renamed.whl")
    second = build(replace(world, official=moved), tmp_path / "b", thorough=True)
    assert Path(first.wheel).read_bytes() == Path(second.wheel).read_bytes()
    assert Path(second.wheel).name == MADE  # the name is that of the pinned file, whatever the given one is called


def test_a_patched_wheel_is_refused(world: WheelWorld, tmp_path: Path) -> None:
    built = build(world, tmp_path / "a")
    again = replace(world, official=Path(built.wheel))
    with pytest.raises(PatchesError, match="patched already"):
        build(again, tmp_path / "b")
    assert not list((tmp_path / "b").glob("*")) if (tmp_path / "b").exists() else True


@pytest.mark.parametrize("thorough", [False, True])
def test_a_changed_byte_anywhere_is_refused(tmp_path: Path, thorough: bool) -> None:
    world = make_world(tmp_path / "world")
    good = world.official.read_bytes()
    for at in range(0, len(good), 97):
        world.official.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(PatchesError):
            build(world, tmp_path / "dist", thorough=thorough)
    world.official.write_bytes(good)
    assert not any((tmp_path / "dist").iterdir())
    build(world, tmp_path / "dist")


@pytest.mark.parametrize("cut", [1, 30, 2000])
def test_a_truncated_wheel_is_refused(world: WheelWorld, tmp_path: Path, cut: int) -> None:
    world.official.write_bytes(world.official.read_bytes()[:-cut])
    with pytest.raises(PatchesError) as caught:
        build(world, tmp_path / "dist")
    assert "truncated" in str(caught.value) or "directory" in str(caught.value)


def test_a_sound_wheel_that_is_not_pinned_is_refused(world: WheelWorld, tmp_path: Path) -> None:
    files = official_files() | {"vllm/extra.py": b"x"}
    world.official.write_bytes(zipped(files))
    with pytest.raises(PatchesError, match="not the recorded file") as caught:
        build(world, tmp_path)
    assert caught.value.expected.startswith(world.release.wheels[0].sha256)


def test_a_wheel_of_another_release_is_refused(world: WheelWorld, tmp_path: Path) -> None:
    other = {name.replace("0.20.2", "0.20.1"): data for name, data in official_files().items()}
    world.official.write_bytes(zipped(other, record=b""))
    with pytest.raises(PatchesError, match="not of this release"):
        build(world, tmp_path)


def _pinned(tmp_path: Path, data: bytes) -> WheelWorld:
    return make_world(tmp_path / "world", data)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (lambda f: zipped(f, record=record_of({k: v for k, v in f.items() if k != ENGINE})), f"{ENGINE}: no such row"),
        (lambda f: zipped(f, record=record_of(f | {"vllm/ghost.py": b""})), "vllm/ghost.py: no such file"),
        (lambda f: zipped(f, record=record_of(f | {INFO + "METADATA": b"?"})), "METADATA"),
        (lambda f: zipped(f | {INFO + "RECORD.jws": b"{}"}, record=record_of(f)), "RECORD.jws"),
        (lambda f: zipped({k: v for k, v in f.items() if k != INFO + "METADATA"}), "none"),
    ],
)
def test_a_wheel_that_contradicts_its_record_is_refused(
    tmp_path: Path, data: Callable[[dict[str, bytes]], bytes], found: str
) -> None:
    world = _pinned(tmp_path, data(official_files()))
    with pytest.raises(PatchesError) as caught:
        build(world, tmp_path / "dist")
    assert found in caught.value.found or found in caught.value.expected
    assert not any((tmp_path / "dist").glob("*"))


@pytest.mark.parametrize("other", [lambda data: b"other", lambda data: data[:-1] + b"?"], ids=["size", "hash"])
def test_thorough_finds_a_copied_file_that_is_not_what_record_says(
    tmp_path: Path, other: Callable[[bytes], bytes]
) -> None:
    files = official_files()
    data = zipped(files, record=record_of(files | {"vllm/_C.abi3.so": other(files["vllm/_C.abi3.so"])}))
    world = _pinned(tmp_path, data)
    build(world, tmp_path / "quick")  # the pin vouches for it
    with pytest.raises(PatchesError, match=r"what RECORD says: vllm/_C\.abi3\.so"):
        build(world, tmp_path / "dist", thorough=True)
    assert not any((tmp_path / "dist").iterdir())


def test_folder_entries_are_kept_and_not_recorded(tmp_path: Path) -> None:
    files = {"vllm/": b"", INFO: b""} | official_files()
    made = contents(Path(build(_pinned(tmp_path, zipped(files)), tmp_path).wheel))
    assert "vllm/" in made
    assert not any(name.startswith(INFO) for name in made)


def test_a_patched_file_that_differs_from_the_sdist_is_refused(tmp_path: Path) -> None:
    world = _pinned(tmp_path, zipped(official_files() | {ENGINE: b"other\n"}))
    with pytest.raises(PatchesError) as caught:
        build(world, tmp_path / "dist")
    assert (caught.value.file, caught.value.patch) == (ENGINE, "0001-dsa-mtp-ima.patch, 0003-mla-flat-buffer.patch")


def test_a_native_part_can_be_left_out_and_everything_says_so(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", native=True)
    built = build(world, tmp_path, without=("0001-native",))
    assert built.version == LOCAL + ".without.0001native"
    made = contents(Path(built.wheel))
    record = json.loads(made[f"vllm-{built.version}.dist-info/patches.json"])
    assert record["without"] == ["0001-native"]
    assert record["fixes"]["0001"]["left_out"] == [KERNEL]
    assert record["fixes"]["0001"]["result"] == "applied"  # its Python part is in
    assert made[ENGINE] == world.after[ENGINE]
    assert (
        f"Left out on request (0001): {KERNEL}"
        in made[f"vllm-{built.version}.dist-info/licenses/MODIFICATIONS"].decode()
    )


def test_only_a_native_part_that_is_there_can_be_left_out(world: WheelWorld, tmp_path: Path) -> None:
    with pytest.raises(PatchesError, match="nothing of that name"):
        build(world, tmp_path, without=("0001-native",))


@pytest.mark.parametrize(
    "metadata", [b"Name: vllm\n\n", b"Version: 0.20.2\nVersion: 0.20.2\n\n", b"Version: 0.20.1\n\n"]
)
def test_metadata_of_another_version_is_refused(metadata: bytes) -> None:
    with pytest.raises(PatchesError, match="no such line, or two"):
        wheelmeta.patched_metadata(metadata, VERSION, LOCAL, ())


@pytest.mark.parametrize("text", [b"", b"__version__ = version = '0.20.2'\n", b"__version__ = version = '0.20.1'\n"])
def test_a_version_file_of_another_form_is_refused(text: bytes) -> None:
    with pytest.raises(PatchesError, match="one assignment of version"):
        wheelmeta.patched_version_file(text, VERSION, LOCAL)


def test_versions_sort_and_a_series_that_is_not_recorded_has_none(world: WheelWorld) -> None:
    from packaging.version import Version

    release = world.release
    names = [wheelmeta.local_version(replace(release, revision=n)) for n in (1, 2, 10)]
    versions = [Version("0.20.2"), *map(Version, names), Version("0.20.3")]
    assert versions == sorted(versions)
    assert str(Version(wheelmeta.local_version(release, ("0001-native",)))) == LOCAL + ".without.0001native"
    with pytest.raises(PatchesError, match="make record"):
        wheelmeta.local_version(replace(release, revision=0))


def test_the_highest_build_number_is_chosen_and_its_tag_stays(world: WheelWorld) -> None:
    files = ["vllm-0.20.1-cp38-abi3-manylinux_2_35_x86_64.whl", "vllm-0.20.1-10-cp38-abi3-manylinux_2_35_x86_64.whl"]
    files += ["vllm-0.20.1-9-cp38-abi3-manylinux_2_35_x86_64.whl", "vllm-0.20.1-cp38-abi3-manylinux_2_35_aarch64.whl"]
    wheels = tuple(Wheel(file, str(n), n) for n, file in enumerate(files))
    release = replace(world.release, wheels=wheels)
    assert release.wheel_for("x86_64") is wheels[1]
    assert release.wheel_for("aarch64") is wheels[3]
    assert release.wheel_for("riscv64") is None
    assert wheelmeta.wheel_name(wheels[1], LOCAL) == f"vllm-{LOCAL}-10-cp38-abi3-manylinux_2_35_x86_64.whl"


@pytest.fixture
def twice(tmp_path: Path) -> WheelWorld:
    """A release whose wheel was built twice: the first one is pinned as well, and pip takes the second."""
    first = zipped(official_files() | {"vllm/first.py": b""})
    (tmp_path / NAME).write_bytes(first)
    world = make_world(tmp_path / "world", name=NAME.replace("-cp38", "-1-cp38"))
    both = (Wheel(NAME, hashlib.sha256(first).hexdigest(), len(first)), *world.release.wheels)
    table = world.folder / "patches" / "releases.toml"
    table.write_text(dump_releases({VERSION: replace(world.release, wheels=both)}), encoding="utf-8")
    return replace(world, catalog=Catalog(world.folder / "patches"))


def test_of_two_builds_the_one_that_pip_takes_is_fetched_and_its_tag_stays(twice: WheelWorld, tmp_path: Path) -> None:
    asked: list[str] = []

    def fetch(wanted: Artifact) -> Path:
        asked.append(wanted.name)
        return twice.official

    built = build_wheel(twice.catalog, twice.release, fetch, tmp_path / "dist", print, arch="x86_64")
    assert asked == [NAME.replace("-cp38", "-1-cp38")] == [built.from_wheel]
    assert Path(built.wheel).name == MADE.replace("-cp38", "-1-cp38")
    report = verify(twice.catalog, Path(built.wheel))
    assert report.origin == f"made from {asked[0]}" and report.ok, report


def test_the_other_build_is_known(twice: WheelWorld, tmp_path: Path) -> None:
    """To `build`, which keeps that it has no tag, and to `verify`, which says that pip takes another."""
    older = tmp_path / NAME
    note = f"{NAME} (pip takes build 1 of it)"
    assert verify(twice.catalog, older).origin == f"the official wheel {note}"
    assert verify(twice.catalog, twice.official).origin == f"the official wheel {twice.official.name}"
    built = build(replace(twice, official=older), tmp_path / "dist")
    assert Path(built.wheel).name == MADE
    report = verify(twice.catalog, Path(built.wheel))
    assert report.origin == f"made from {note}" and report.ok, report
    data = bytearray(older.read_bytes())
    data[data.rindex(b"PK\1\2") + 12] ^= 1  # the time of day of one member: a sound wheel of the recorded size
    older.write_bytes(data)
    assert verify(twice.catalog, older).origin == ""


def test_a_claim_to_come_from_an_unknown_wheel_is_a_problem(world: WheelWorld, tmp_path: Path) -> None:
    made = contents(Path(build(world, tmp_path).wheel))
    name = NEW_INFO + "patches.json"
    for change, words in (
        ({"from_wheel": {"file": NAME, "sha256": "0" * 64}}, f"made from {NAME}, which is no recorded file"),
        ({"from_wheel": {}}, "does not say which file"),
        ({"from_sdist": {"file": "vllm-0.20.2.tar.gz", "sha256": "0" * 64}}, "which is no recorded file"),
        ({"from_wheel": None}, ""),  # patched in place
    ):
        text = json.dumps(json.loads(made[name]) | change)
        with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
            for path, data in {**made, name: text}.items():
                archive.writestr(path, data)
        report = verify(world.catalog, tmp_path / "x.whl")
        assert report.origin == "" and report.ok is not bool(words), report
        assert [words in problem for problem in report.problems] == [True] * bool(words)


def test_the_release_is_told_by_the_wheels_name(world: WheelWorld) -> None:
    assert release_of(world.catalog, None, None).version == VERSION
    assert release_of(world.catalog, None, world.official).version == VERSION
    with pytest.raises(PatchesError, match="does not say which release"):
        release_of(world.catalog, None, Path("renamed.whl"))


def test_a_machine_without_a_wheel_is_told_which_there_are(world: WheelWorld, tmp_path: Path) -> None:
    with pytest.raises(PatchesError) as caught:
        build_wheel(world.catalog, world.release, no_fetch, tmp_path, print, arch="riscv64")
    assert (caught.value.expected, caught.value.found) == ("one of x86_64", "riscv64")


def test_the_command_prints_text_or_json(
    world: WheelWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PATCHES_DIR", str(world.folder / "patches"))
    command = ["build", "--wheel", str(world.official), "--out", str(tmp_path / "dist")]
    assert main(command) == 0
    assert f"wheel:  {tmp_path / 'dist' / MADE}" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == LOCAL
    assert main([*command, "--wheel", str(tmp_path / "none-1.whl"), "--pin", VERSION]) == 1
    assert "cannot read the wheel" in capsys.readouterr().err


# Faults


def _in_a_process(world: WheelWorld, out: Path, prelude: str, thorough: bool = False) -> subprocess.Popen[bytes]:
    code = f"import os, signal, sys\n{prelude}\nfrom vllm_patches.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "build", "--wheel", str(world.official), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY / "scripts"), "VLLM_PATCHES_DIR": str(world.folder / "patches")}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_killed_at_any_write_leaves_nothing(world: WheelWorld, tmp_path: Path) -> None:
    """The process kills itself at its n-th write: first nothing is there, then, past the last one, all of it."""
    prelude = (
        "real, left = os.write, [{n}]\n"
        "def write(file, data):\n"
        "    left[0] -= 1\n"
        "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(file, data[: max(1, len(data) // 2)])\n"
        "os.write = write"
    )
    for n in (0, 1, 5, 20, 60, 10_000):
        out = tmp_path / f"dist-{n}"
        process = _in_a_process(world, out, prelude.format(n=n))
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            assert not any(out.iterdir()), n
        else:
            assert n == 10_000
            assert [path.name for path in out.iterdir()] == [MADE]
    assert (tmp_path / "dist-10000" / MADE).read_bytes() == Path(build(world, tmp_path).wheel).read_bytes()


@pytest.mark.parametrize("nameless", [True, False])
def test_killed_before_any_change_on_disk_the_next_run_clears_up(
    world: WheelWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool
) -> None:
    """Also between the first name of the file and its own."""
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE")
    assert world.catalog.series_of(world.release).patches
    whole, step, left = Path(build(world, tmp_path / "whole").wheel).read_bytes(), 0, 0
    out = tmp_path / "dist"
    while killed_at(step := step + 1, lambda: build(world, out)):
        there = [path.name for path in out.iterdir()] if out.is_dir() else []
        assert not there or MADE in there or all(name.startswith(".") for name in there)
        left += bool(there)
        build(world, out)
        assert [path.name for path in out.iterdir()] == [MADE]
        assert (out / MADE).read_bytes() == whole
        (out / MADE).unlink()
    assert step > 3 and left


@pytest.mark.parametrize("size", [0, 1, 3000, 7000])  # the wheel has about 7,100 bytes
def test_a_full_disk_is_said_and_leaves_nothing(world: WheelWorld, tmp_path: Path, size: int) -> None:
    """No file may grow past *size*: the kernel takes a part of a write, and refuses the rest."""
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    process = _in_a_process(world, tmp_path / "dist", f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{limit}")
    error = process.communicate()[1].decode()
    assert process.returncode == 1
    assert "no space left" in error and "df -h" in error
    assert not any((tmp_path / "dist").iterdir())
    build(world, tmp_path / "big")
    assert (tmp_path / "big" / MADE).stat().st_size > 7000


def test_a_full_device_is_said_and_leaves_nothing(
    world: WheelWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's own ENOSPC: /dev/full in the place of the new file."""
    real = os.open

    def full(path: object, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            return real("/dev/full", os.O_RDWR)
        return real(path, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(PatchesError, match="no space left") as caught:
        build(world, tmp_path / "dist")
    assert os.strerror(errno.ENOSPC) in caught.value.found
    assert not any((tmp_path / "dist").iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_cannot_be_written_is_said(reachable: Path, there: bool) -> None:
    world, out = make_world(reachable / "world"), reachable / "dist"
    assert world.catalog.series_of(world.release).patches  # read now: the child may not
    for path in (world.folder, world.official):
        path.chmod(0o755 if path.is_dir() else 0o644)
    out.mkdir(mode=0o755)
    out.chmod(0o555)
    target = out if there else out / "new"
    code, message = told_by_child(lambda: build(world, target), become_nobody)
    assert code == 1, message
    assert "cannot be written" in message and f"ls -ld {target}    # another place" in message
    assert "DIST=" in message and "BUILD=" not in message
    assert not any(out.iterdir())


def test_a_power_cut_finds_the_whole_wheel_or_none(
    world: WheelWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for nameless in (True, False):
        if not nameless:
            monkeypatch.delattr(os, "O_TMPFILE")
        out = tmp_path / f"dist-{nameless}"
        with monkeypatch.context() as patched:
            disk = Disk(patched)
            build(world, out)
        disk.check()
        assert disk.named()[-1] == out / MADE


def test_an_error_keeps_the_wheel_that_was_there(world: WheelWorld, tmp_path: Path) -> None:
    built = build(world, tmp_path / "dist")
    good = Path(built.wheel).read_bytes()
    data = world.official.read_bytes()
    world.official.write_bytes(data[:100] + b"?" + data[101:])
    with pytest.raises(PatchesError):
        build(world, tmp_path / "dist")
    assert [path.read_bytes() for path in (tmp_path / "dist").iterdir()] == [good]


def test_two_at_once_make_the_same_file(world: WheelWorld, tmp_path: Path) -> None:
    processes = [_in_a_process(world, tmp_path / "dist", "") for _ in range(3)]
    assert [(process.communicate(), process.returncode)[1] for process in processes] == [0, 0, 0]
    assert [path.name for path in (tmp_path / "dist").iterdir()] == [MADE]


def test_without_nameless_files_an_error_still_leaves_nothing(
    world: WheelWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    built = build(world, tmp_path / "dist")
    assert Path(built.wheel).stat().st_mode & 0o777 == 0o644
    with pytest.raises(RuntimeError), outfile.unnamed(tmp_path / "dist") as made:
        os.write(made.file, b"half")
        raise RuntimeError
    assert [path.name for path in (tmp_path / "dist").iterdir()] == [MADE]


def test_peak_memory_does_not_grow_with_the_wheel(tmp_path: Path) -> None:
    files = official_files() | {"vllm/big.so": os.urandom(60 << 20), "vllm/zeros.so": b"\0" * (300 << 20)}
    world = make_world(tmp_path / "world", zipped(files))
    prelude = (
        "import atexit\n"  # not ru_maxrss: Linux hands that of the parent on
        "status = lambda: [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')]\n"
        "atexit.register(lambda: print('peak', *status(), file=sys.stderr))"
    )
    process = _in_a_process(world, tmp_path / "dist", prelude)
    error = process.communicate()[1].decode()
    assert process.returncode == 0, error
    assert int(error.rsplit("peak ", 1)[1]) < 100_000  # kB


def test_the_folder_that_cannot_be_written_is_named(world: WheelWorld, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((PatchesError, OSError)):
        build(world, tmp_path / "file" / "dist")
