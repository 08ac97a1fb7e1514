"""`build --mode source` on a small upstream: real trees, real pip, real setuptools; only the project is a small one."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sourceworld import LOCAL, build, dist, make_source_world, members
from test_disk import obey_permissions, read_only
from vllm_patches.installed.verify import verify
from world import ENGINE, FIRST, KERNEL, SECOND, World, edited, sdist_files

EMPTY = f"vllm-{LOCAL}.empty-py3-none-any.whl"
INFO = f"vllm-{LOCAL}.empty.dist-info/"


@pytest.fixture
def world(template: Path, tmp_path: Path) -> World:
    return make_source_world(template, tmp_path / "world")


def test_the_wheel_holds_the_patched_tree_and_says_so(world: World) -> None:
    ran = world.run(*build(world), "--json")
    assert ran.status == 0, ran.err
    made = json.loads(ran.out)
    assert dist(world) == [EMPTY]
    files = members(world.root / "dist" / EMPTY)
    assert files[ENGINE] == edited(SECOND, edited(FIRST, sdist_files("0.20.2")))[ENGINE]
    assert f"Version: {LOCAL}.empty\n".encode() in files[INFO + "METADATA"]
    assert b"License-File: MODIFICATIONS\n" in files[INFO + "METADATA"]
    assert f"version = '{LOCAL}'".encode() in files["vllm/_version.py"]
    record = json.loads(files[INFO + "patches.json"])
    assert (record["release"], record["version"], record["target_device"]) == ("0.20.2", f"{LOCAL}.empty", "empty")
    assert list(record["files"]) == [ENGINE]
    assert set(record["native"]["source"]) == {KERNEL, "tools/run.sh"}
    assert b"\n" + KERNEL.encode() in files[INFO + "licenses/MODIFICATIONS"]
    assert made["sha256"] == hashlib.sha256((world.root / "dist" / EMPTY).read_bytes()).hexdigest()
    assert Path(made["log"]).read_text(encoding="utf-8").count("Building CUDA object") == 1
    assert [path.name for path in (world.root / "work").iterdir() if path.is_dir()] == []
    report = verify(world.catalog, world.root / "dist" / EMPTY)
    assert report.ok and report.origin == f"built from {world.catalog.release(report.release).sdist}"


def test_record_lists_every_file_with_its_hash(world: World) -> None:
    assert world.run(*build(world)).status == 0
    files = members(world.root / "dist" / EMPTY)
    rows = {row[0]: row for row in csv.reader(io.StringIO(files[INFO + "RECORD"].decode()))}
    assert rows.keys() == files.keys()
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        assert name.endswith("/RECORD") or rows[name][1:] == [f"sha256={digest}", str(len(data))]


def test_the_same_bytes_each_time_and_a_wheel_is_replaced(world: World) -> None:
    first = json.loads(world.run(*build(world), "--json").out)
    assert json.loads(world.run(*build(world), "--json").out)["sha256"] == first["sha256"]
    assert dist(world) == [EMPTY]


def test_compiled_code_is_claimed_by_its_hash_and_a_foreign_torch_is_said(world: World) -> None:
    ran = world.run(*build(world, "cpu"))
    assert ran.status == 0, ran.err
    ran.says("compiled against torch 2.13.0+cpu, the release pins 2.11.0")
    (name,) = dist(world)
    assert name.startswith(f"vllm-{LOCAL}.cpu-")
    files = members(world.root / "dist" / name)
    record = json.loads(files[f"vllm-{LOCAL}.cpu.dist-info/patches.json"])
    assert record["native"]["files"] == {"vllm/_C.abi3.so": {"sha256": hashlib.sha256(b"compiled").hexdigest()}}
    assert record["torch"] == "2.13.0+cpu"


def test_what_would_falsify_the_build_is_not_passed_on_and_that_is_said(world: World) -> None:
    ran = world.run(*build(world), env={"VLLM_USE_PRECOMPILED": "1", "VLLM_VERSION_OVERRIDE": "9.9"})
    assert ran.status == 0, ran.err
    assert ran.says("note: not passed on to the build: VLLM_USE_PRECOMPILED=1", "VLLM_VERSION_OVERRIDE=9.9", LOCAL)


def test_a_failure_shows_why_keeps_the_log_and_the_next_run_goes_on(world: World) -> None:
    ran = world.run(*build(world), env={"FAKE": "fail"})
    assert ran.status == 1
    ran.says("upstream's build failed", "kernel.cu(3): error: no such thing as a lane", "vllm-0.20.2-empty.log")
    ran.says("make build MODE=source PIN=0.20.2 VLLM_TARGET_DEVICE=empty NO_ISOLATION=1")
    assert dist(world) == []
    kept = world.root / "work" / "vllm-0.20.2-empty" / "tree" / "build"
    half = kept / "lib" / ENGINE
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_text("half of a ")  # as a killed setuptools leaves it: newer than its source
    (kept / "runs").write_text("y")  # what was compiled
    stale = ("CMakeCache.txt", "CMakeFiles/3.26.1/CMakeCXXCompiler.cmake")
    for name in (*stale, "CMakeFiles/_C.dir/a.o"):
        (kept / "temp.x" / name).parent.mkdir(parents=True, exist_ok=True)
        (kept / "temp.x" / name).write_text("x")
    ran = world.run(*build(world), env={"FAKE": "fail"})
    assert (kept / "runs").read_text() == "yx"
    assert (kept / "temp.x" / "CMakeFiles" / "_C.dir" / "a.o").is_file()
    assert not [name for name in stale if (kept / "temp.x" / name).exists()]  # else a new CXX would not be looked at
    assert world.run(*build(world)).says("going on in")
    assert dist(world) == [EMPTY]


@pytest.mark.parametrize(
    ("fake", "said"),
    [
        ("version", "made a wheel of another version"),
        ("edit", f"{ENGINE} is e69de29"),
        ("drop", f"{ENGINE} is not in it"),
    ],
)
def test_a_wheel_that_is_not_the_patched_tree_is_not_published(world: World, fake: str, said: str) -> None:
    ran = world.run(*build(world), env={"FAKE": fake})
    assert ran.status == 1
    ran.says(said, "nothing was published")
    assert dist(world) == []


def test_a_kept_tree_that_somebody_changed_is_neither_built_nor_lost(world: World) -> None:
    world.run(*build(world), env={"FAKE": "fail"})
    changed = world.root / "work" / "vllm-0.20.2-empty" / "tree" / KERNEL
    changed.write_text("mine")
    ran = world.run(*build(world))
    assert ran.status == 1
    ran.says("changed by hand", KERNEL, ".mine")
    assert changed.read_text() == "mine"
    assert dist(world) == []


def test_the_apply_tree_is_not_touched(world: World) -> None:
    assert world.apply("--sdist", world.sdist()).status == 0
    head = world.head()
    assert world.run(*build(world)).status == 0
    assert world.head() == head
    assert subprocess.run(["git", "-C", world.tree(), "status", "--porcelain"], capture_output=True).stdout == b""


def started(world: World, name: str = "started") -> tuple[subprocess.Popen[str], int]:
    """A build that sleeps in its compiler, and the compiler's process id."""
    mark = world.root / name
    process = world.start(*build(world), env={"FAKE": "sleep", "FAKE_STARTED": str(mark)})
    for _ in range(1200):
        if mark.is_file() and mark.read_text():
            return process, int(mark.read_text())
        time.sleep(0.1)
    raise AssertionError("the build did not start")


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_compilers_too(world: World, number: signal.Signals, status: int) -> None:
    process, compiler = started(world)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status, err
    assert gone(compiler)
    assert dist(world) == []


def test_after_a_kill_the_next_run_waits_for_its_compilers_and_goes_on(world: World) -> None:
    process, compiler = started(world)
    process.kill()
    process.communicate(timeout=30)
    assert not gone_now(compiler)
    waiting = world.start(*build(world))
    time.sleep(2)
    assert waiting.poll() is None
    os.kill(compiler, signal.SIGKILL)
    out, err = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, out + err
    assert "waiting for another build" in err
    assert dist(world) == [EMPTY]


def gone_now(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def bare_python(world: World) -> Path:
    """An interpreter with the standard library alone, whatever this environment holds."""
    path = world.root / "bare-python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    path.chmod(0o755)
    return path


def test_what_the_interpreter_lacks_is_named(world: World) -> None:
    (world.root / "modules" / "setuptools_scm.py").unlink()
    (world.root / "tools" / "cmake").unlink()
    arguments = build(world, "cpu", "--python", str(bare_python(world)))
    ran = world.run(*arguments, env={"PATH": f"{world.root / 'tools'}:{git_only(world)}"})
    assert ran.status == 1
    ran.says(
        "lacks what upstream's build needs", "no pip, packaging, setuptools, setuptools_scm, cmake", "-m ensurepip"
    )
    for name in ("pip", "packaging", "setuptools"):
        (world.root / "modules" / f"{name}.py").write_text("")
    ran = world.run(*arguments, env={"PATH": f"{world.root / 'tools'}:{git_only(world)}"})
    ran.says("no setuptools_scm, cmake", "-m pip install setuptools-scm cmake && make build MODE=source")


def git_only(world: World) -> Path:
    """A folder for PATH in which only git and a shell are found."""
    folder = world.root / "git-only"
    folder.mkdir(exist_ok=True)
    for name in ("git", "sh"):
        found = shutil.which(name)
        assert found
        if not (folder / name).exists():
            (folder / name).symlink_to(found)
    return folder


@pytest.mark.parametrize(
    ("device", "values", "found"),
    [
        ("cuda", "cuda = None; hip = None", "for neither"),
        ("cuda", "cuda = '12.8'; hip = '7.0'", "for ROCm"),
        ("rocm", "cuda = '12.8'; hip = None", "for CUDA"),
    ],
)
def test_a_torch_of_another_kind_is_refused_before_anything_is_built(
    world: World, device: str, values: str, found: str
) -> None:
    (world.root / "modules" / "torch.py").write_text(f"__version__ = '2.11.0'\nclass version: {values}\n")
    (world.root / "modules" / "jinja2.py").write_text("")
    ran = world.run(*build(world, device))
    assert ran.status == 1
    ran.says("needs a torch of that kind", found)
    assert not (world.root / "work").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--mode", "source", "--without", "0001-native"),
        ("--mode", "source", "--wheel", "x.whl"),
        ("--target-device", "cpu"),
        ("--no-build-isolation",),
    ],
)
def test_an_option_of_the_other_mode_is_refused(world: World, arguments: tuple[str, ...]) -> None:
    ran = world.run("build", *arguments)
    assert ran.status == 1
    ran.says("is of no use with --mode")


def test_a_device_that_is_not_built_for_is_refused(world: World) -> None:
    arguments = [str(word) for word in build(world) if word not in ("--target-device", "empty")]
    ran = world.run(*arguments, env={"VLLM_TARGET_DEVICE": "tpu"})
    assert ran.status == 1
    ran.says("names a device that is not built for", "cuda, rocm, cpu, empty", "tpu")


def test_an_interpreter_that_does_not_start_is_named(world: World) -> None:
    ran = world.run(*build(world), "--python", sys.executable + "-none")
    assert ran.status == 1
    ran.says("cannot be asked", "-none")


@pytest.mark.parametrize(("place", "another"), [("dist", "DIST=DIR"), ("work", "WORK=DIR")])
def test_a_folder_that_cannot_be_written_is_said_with_its_own_option(world: World, place: str, another: str) -> None:
    folder = world.root / place
    folder.mkdir()
    with read_only(folder):
        ran = world.run(*build(world), preexec_fn=obey_permissions)
    assert ran.status == 1
    assert ran.says("error: the folder cannot be written", f"next:     ls -ld {folder}    # another", another)
    assert "BUILD=" not in ran.err
