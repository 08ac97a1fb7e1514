"""A small upstream with a setup.py of its own, for `build --mode source`: it reads what vLLM's reads, and can fail."""

from __future__ import annotations

import os
import zipfile
from dataclasses import replace
from pathlib import Path

from world import SCRIPTS, World, bare_release, recorded, sdist_files, write_sdist

# Upstream's rules in little: the version from the environment and a suffix for the device; FAKE says how to go wrong.
SETUP = b"""
import os, pathlib, sys, time
from setuptools import setup
device, fake = os.environ["VLLM_TARGET_DEVICE"], os.environ.get("FAKE", "")
version = os.environ["SETUPTOOLS_SCM_PRETEND_VERSION"]
pathlib.Path("vllm/_version.py").write_text(f"__version__ = version = '{version}'\\n")
if "bdist_wheel" in sys.argv:
    print("[1/2] Building CUDA object csrc/a.o", flush=True)
    pathlib.Path("build").mkdir(exist_ok=True)
    with open("build/runs", "a") as runs: runs.write("x")
    if fake == "sleep":
        pathlib.Path(os.environ["FAKE_STARTED"]).write_text(str(os.getpid())); time.sleep(30)
    if fake == "fail": sys.exit("kernel.cu(3): error: no such thing as a lane")
    if fake == "edit": pathlib.Path("vllm/engine.py").write_text("")
    if fake == "drop": pathlib.Path("vllm/engine.py").unlink()
    if device == "cpu": pathlib.Path("vllm/_C.abi3.so").write_bytes(b"compiled")
suffix = {"empty": ".empty", "cpu": ".cpu"}.get(device, "")
setup(name="vllm", version="1.0" if fake == "version" else version + suffix, packages=["vllm"],
      package_data={"vllm": ["*.so"]})
"""
PYPROJECT = b"""\
[build-system]
requires = [
    "setuptools>=77",
    "torch == 2.11.0",
]
build-backend = "setuptools.build_meta"
"""
TORCH = "__version__ = '2.13.0+cpu'\nclass version: cuda = None; hip = None\n"
LOCAL = "0.20.2+patches.1"


def make_source_world(template: Path, root: Path) -> World:
    """A world whose vLLM 0.20.2 can be built, and an interpreter that believes itself equipped for it."""
    world = World.copy_of(template, root)
    files = sdist_files("0.20.2") | {"setup.py": SETUP, "pyproject.toml": PYPROJECT}
    sdist = write_sdist(world.sdist(), files, "vllm-0.20.2")
    release = replace(bare_release("0.20.2", sdist), states=world.release().states)
    world.write_release(recorded(release, world.patches, sdist, root / "scratch"))
    modules = root / "modules"
    modules.mkdir()
    (modules / "torch.py").write_text(TORCH)
    (modules / "setuptools_scm.py").write_text("")
    tools = root / "tools"
    tools.mkdir()
    (tools / "cmake").write_text("#!/bin/sh\n")
    (tools / "cmake").chmod(0o755)
    world.extra["PYTHONPATH"] = f"{SCRIPTS}{os.pathsep}{modules}"
    world.extra["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
    return world


def build(world: World, device: str = "empty", *more: str) -> tuple[object, ...]:
    """The arguments of the build."""
    folders = ("--out", world.root / "dist", "--work", world.root / "work")
    return ("build", "--mode", "source", "--target-device", device, "--no-build-isolation", *folders,
            "--sdist", world.sdist(), *more)  # fmt: skip


def dist(world: World) -> list[str]:
    """What lies in dist/, hidden files too."""
    folder = world.root / "dist"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}
