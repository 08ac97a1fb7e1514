"""`build` on real official wheels, in plain virtual environments: pip, `wheel` and zipfile must take the result.

They come out of the cache or from pip's index (250 to 430 MB each): 0.20.2 alone here, four of them in
`make test-wheels`, or those of WHEEL_PINS.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest
from vllm_patches.catalog import open_catalog
from vllm_patches.index import fetch_wheel
from vllm_patches.model import Wheel
from vllm_patches.patchset import native_parts
from vllm_patches.wheel import Built, build_wheel

CATALOG = open_catalog()
PINS = os.environ.get("WHEEL_PINS", "0.20.2").split()


@cache
def official(pin: str) -> tuple[Wheel, Path]:
    release = CATALOG.release(pin)
    wheel = release.wheel_for("x86_64")
    assert wheel is not None
    return wheel, fetch_wheel(release.wheel_file(wheel))


@pytest.fixture(scope="module", params=PINS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    release = CATALOG.release(request.param)
    if not release.revision:
        pytest.fail("the series is not recorded: make record")
    without = tuple(native_parts(CATALOG.series_of(release)))
    _, path = official(request.param)
    return build_wheel(
        CATALOG, release, lambda wanted: path, tmp_path_factory.mktemp("dist"), print,
        given=path, without=without, thorough=True,
    )  # fmt: skip


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_only_what_the_series_touches_differs(built: Built) -> None:
    """By CRC and size of every member; `thorough` has compared the copied ones with RECORD already."""
    old, new = f"vllm-{built.release}.dist-info/", f"vllm-{built.version}.dist-info/"
    _, path = official(built.release)
    with zipfile.ZipFile(path) as stock, zipfile.ZipFile(built.wheel) as made:
        before = {i.filename.replace(old, new): (i.CRC, i.file_size, i.external_attr) for i in stock.infolist()}
        after = {i.filename: (i.CRC, i.file_size, i.external_attr) for i in made.infolist()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {*built.files, "vllm/_version.py", new + "METADATA", new + "RECORD"}
    added = {new + name for name in ("patches.json", "licenses/MODIFICATIONS", "licenses/NOTICE-vllm-patches")}
    assert after.keys() - before.keys() == added
    assert not before.keys() - after.keys()


def test_pip_installs_it_and_it_says_what_it_is(built: Built, tmp_path: Path) -> None:
    """`pip check` says the same of stock and patched, but for the version."""
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    install = (python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--no-compile")
    run(*install, official(built.release)[1])
    stock = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True, check=False).stdout
    run(*install, built.wheel)  # an upgrade, for the local version is the higher one
    patched = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True, check=False).stdout
    assert stock.replace(f"vllm {built.release} ", f"vllm {built.version} ") == patched
    assert f"Version: {built.version}\n" in run(python, "-m", "pip", "show", "vllm")
    code = "import importlib.util as u, sys; s = u.find_spec('vllm'); print(s.submodule_search_locations[0])"
    package = Path(run(python, "-c", code).strip())
    code = f"import runpy; print(runpy.run_path({str(package / '_version.py')!r})['__version__'])"
    assert run(python, "-c", code).strip() == built.version
    infos = [path.name for path in package.parent.glob("vllm-*.dist-info")]
    assert infos == [f"vllm-{built.version}.dist-info"]
    record = json.loads((package.parent / infos[0] / "patches.json").read_text(encoding="utf-8"))
    assert record["version"] == built.version


def test_wheel_unpacks_it(built: Built, tmp_path: Path) -> None:
    """`wheel unpack` compares every file with RECORD."""
    run(sys.executable, "-m", "wheel", "unpack", "--dest", tmp_path, built.wheel)
    assert (tmp_path / f"vllm-{built.version}" / "vllm" / "_version.py").is_file()
