"""`pip install .`: the command with the patches in it, and the three lines of a Dockerfile in a plain environment."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from installs import KERNEL, make_catalog, make_wheel, patched, put_in, sources
from plainvenv import ROOT, make_environment, pip, project_copy, run, site_of
from vllm_patches import api, cli
from vllm_patches.series import catalog
from wheelworld import make_world
from world import World


def project_with_catalog(folder: Path) -> Path:
    """This project with the catalogue of these tests."""
    make_catalog(project_copy(folder) / "patches")
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain environment with this project's command in it, installed from its wheel out of its sdist."""
    folder = tmp_path_factory.mktemp("package")
    environment = make_environment(folder / "env")
    pip(environment, "install", project_with_catalog(folder / "project"))
    shutil.rmtree(folder / "project")  # the installed command needs no checkout
    return environment


def test_the_three_lines_of_a_dockerfile(environment: Path, tmp_path: Path) -> None:
    command = environment / "bin" / "vllm-patches"
    pip(environment, "install", "--no-deps", make_wheel(tmp_path, "0.20.2"))
    assert "NOT VERIFIED" in run(command, "verify", code=1)
    run(command, "install")
    assert "all fixes that this vLLM needs are in" in run(command, "verify")
    site = site_of(environment)
    assert (site / KERNEL).read_bytes() == patched("v0.20.2", sources("0.20.2"))[KERNEL]
    run(command, "verify", environment)

    # Every way in which pip changes the version under an installed patch set is told.
    pip(environment, "install", "--no-deps", "--force-reinstall", make_wheel(tmp_path, "0.20.2"))
    assert "NOT VERIFIED" in run(command, "verify", code=1)
    run(command, "install")
    pip(environment, "install", "--no-deps", make_wheel(tmp_path, "0.19.1"))
    assert "vLLM 0.19.1" in run(command, "verify", code=1)
    run(command, "install", "--without", "0001-native")
    run(command, "verify", code=1)
    run(command, "verify", "--without", "0001-native")
    pip(environment, "install", "--no-deps", "--ignore-installed", make_wheel(tmp_path, "0.20.2"))
    run(command, "verify", code=1)  # two versions are recorded now

    for _ in range(2):
        pip(environment, "uninstall", "--yes", "vllm")
    assert not [path for path in site.rglob("*") if "vllm" in path.name and not path.name.startswith("vllm_patches")]


def test_nothing_is_left_after_pip_uninstall(environment: Path, tmp_path: Path) -> None:
    pip(environment, "install", "--no-deps", make_wheel(tmp_path, "0.20.2"))
    run(environment / "bin" / "vllm-patches", "install")
    pip(environment, "uninstall", "--yes", "vllm")
    site = site_of(environment)
    assert not (site / "vllm").exists() and not list(site.glob("vllm-*"))


def test_it_brings_nothing_and_misses_nothing(environment: Path) -> None:
    """An image in which `pip check` was silent stays so."""
    listed = run(environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "list", "--format=freeze")
    assert {line.partition("==")[0] for line in listed.split()} <= {"pip", "setuptools", "vllm-patches"}
    pip(environment, "check")


def test_the_installed_command_has_its_own_catalogue(environment: Path) -> None:
    where = "from vllm_patches.series import catalog; print(catalog.patches_dir(), len(catalog.open_catalog().pins))"
    folder, pins = run(environment / "bin" / "python", "-c", where).split()
    assert Path(folder).is_relative_to(environment) and pins == "2"


def test_the_installed_command_makes_dist(environment: Path, world: World) -> None:
    """Its script's template and the licences are in the package; the fake sdist has no CMake files to read."""
    command = [environment / "bin" / "vllm-patches", "dist", "--pin", "0.20.2", "--sdist", world.sdist()]
    command += ["--channel", "dockerfile", "--out", world.root / "out"]
    env = {key: value for key, value in world.env.items() if key != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=world.root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = (world.root / "out").iterdir()
    assert (made / "NOTICE").read_bytes() == (ROOT / "NOTICE").read_bytes()
    assert (made / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (made / "0.20.2" / "vllm-0.20.2-patches.sh").read_text(encoding="utf-8").startswith("#!/bin/sh")


def test_archives_have_the_same_bytes_everywhere(tmp_path: Path) -> None:
    hashes = []
    for number, (mode, stamp) in enumerate(((0o644, 10**9), (0o600, 1.5 * 10**9))):
        project = project_with_catalog(tmp_path / str(number))
        for path in (path for path in project.rglob("*") if path.is_file()):
            path.chmod(mode)
            os.utime(path, (stamp, stamp))
        stale = project / "build" / "lib" / "vllm_patches" / "data" / "v0.1" / "retired.patch"
        if number:
            stale.parent.mkdir(parents=True)
            stale.write_text("left by an older build")
        run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist", ".", cwd=project)
        hashes.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((project / "dist").iterdir())])
    assert hashes[0] == hashes[1] and len(hashes[0]) == 2
    names = {path.suffix: path for path in (project / "dist").iterdir()}
    with zipfile.ZipFile(names[".whl"]) as wheel, tarfile.open(names[".gz"]) as sdist:
        packed = {name.partition("/")[2].removeprefix("data/") for name in wheel.namelist()}
        shipped = {name.partition("/")[2].removeprefix("patches/") for name in sdist.getnames()}
    tables = {path.relative_to(ROOT / "patches").as_posix() for path in (ROOT / "patches").glob("*.toml")}
    assert tables <= packed and tables <= shipped
    texts = {path.name for path in (ROOT / "scripts" / "vllm_patches").rglob("*.*") if path.suffix in (".py", ".txt")}
    assert texts <= {Path(name).name for name in packed} and texts <= {Path(name).name for name in shipped}
    assert "v0.20.2/series" in packed and "v0.20.2/series" in shipped


def test_every_package_is_listed() -> None:
    """setuptools finds packages by itself only where all of them lie below one folder, and patches/ does not."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(ROOT / "scripts").parts) for path in ROOT.glob("scripts/**/__init__.py")}
    assert set(listed) == there | {f"vllm_patches.{catalog.PACKAGED}"}


def test_a_checkout_uses_its_own_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PATCHES_DIR", raising=False)
    assert catalog.patches_dir() == ROOT / "patches"


def test_the_api_has_the_verbs_and_imports_nothing_early() -> None:
    loaded = "import sys; from vllm_patches import api; print([m for m in sys.modules if m.startswith('vllm_patches')])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    told = subprocess.run([sys.executable, "-c", loaded], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "['vllm_patches', 'vllm_patches.errors', 'vllm_patches.api']"
    for name in ("apply", "build", "check", "dist", "install", "uninstall", "verify"):
        assert callable(getattr(api, name)) and name in cli._parser().format_help()


@pytest.mark.parametrize("name", ["build", "install", "uninstall", "verify"])
def test_the_api_takes_the_options_of_the_command(name: str) -> None:
    (verbs,) = (action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction))
    options = {action.dest for action in verbs.choices[name]._actions} - {"help", "json"}
    taken = set(inspect.signature(getattr(api, name)).parameters) - {"say"}
    assert taken <= options
    of_a_source_build = {"mode", "target_device", "no_build_isolation", "python", "work"}
    assert options - taken <= of_a_source_build


def test_the_api_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path / "world", native=True)
    monkeypatch.setenv("VLLM_PATCHES_DIR", str(world.folder / "patches"))
    said: list[str] = []
    built = api.build(
        wheel=world.official,
        out=tmp_path / "dist",
        without=["0001-native"],
        arch="x86_64",
        thorough=True,
        say=said.append,
    )
    assert Path(built.wheel).is_file() and built.version in said[0]
    assert api.verify(Path(built.wheel), without=["0001-native"]).ok
    with pytest.raises(api.PatchesError, match="nothing of that name"):
        api.build(wheel=world.official, out=tmp_path / "dist", without=["0002-native"])
    with pytest.raises(api.PatchesError):  # no toolkit is chosen here, and none would fit
        api.build(wheel=world.official, out=tmp_path / "none", torch=tmp_path, cuda_archs="1.0", sdist=world.sdist)
    assert not any((tmp_path / "none").iterdir())


def test_the_api_does_what_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PATCHES_DIR", str(make_catalog(tmp_path / "patches").folder))
    put_in(tmp_path / "s", "0.20.2")
    assert not api.verify(tmp_path / "s").ok
    assert api.install(tmp_path / "s").files
    assert api.verify(tmp_path / "s").ok
    assert api.check_tree(tmp_path / "s", "0.20.2").ok
    assert api.uninstall(tmp_path / "s").files
    assert not api.verify(tmp_path / "s").ok
