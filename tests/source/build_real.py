"""`build --mode source` on the real releases (`make test-source`), with this interpreter's own packages.

`empty` is built to its end. For cpu, cuda and rocm the way is followed up to upstream's own configure step: it gets an
upstream that must not clone anything, and for cuda and rocm a CPU torch that calls itself one of theirs. Nothing is
compiled here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from vllm_patches.installed.verify import verify
from vllm_patches.series.catalog import open_catalog
from vllm_patches.sourcebuilds.buildenv import NOT_PASSED_ON
from vllm_patches.sourcebuilds.buildlog import LOCAL_COPY
from vllm_patches.sources.index import fetch_sdist
from vllm_patches.sources.sdist import entries, open_sdist
from vllm_patches.trees.apply import apply_release

ROOT = Path(__file__).resolve().parents[2]
PINS = os.environ.get("SOURCE_PINS", "0.19.1 0.20.2").split()  # 0.19.1 has a patch of C++
CATALOG = open_catalog()


def build(tmp_path: Path, pin: str, device: str, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_patches", "build", "--mode", "source", "--pin", pin, "--json"]
    command += ["--no-build-isolation", "--out", str(tmp_path / "dist"), "--work", str(tmp_path / "work")]
    paths = [str(tmp_path / "site"), str(ROOT / "scripts")]
    env = {**os.environ, "VLLM_TARGET_DEVICE": device, "PYTHONPATH": os.pathsep.join(paths), **extra}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("pin", PINS)
def test_empty_is_built_to_its_end(tmp_path: Path, pin: str) -> None:
    """That every file of the wheel is the patched tree's own, the build itself has compared."""
    done = build(tmp_path, pin, "empty")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    release = CATALOG.release(pin)
    assert made["version"] == f"{pin}+patches.{release.revision}.empty"
    wheel = Path(made["wheel"])
    assert wheel.name == f"vllm-{made['version']}-py3-none-any.whl"
    report = verify(CATALOG, wheel)
    assert report.ok, report
    python = tmp_path / "venv" / "bin" / "python"
    for command in (
        (sys.executable, "-m", "venv", tmp_path / "venv"),
        (python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel),
    ):
        subprocess.run([*map(str, command)], check=True)
    shown = subprocess.run([str(python), "-m", "pip", "show", "vllm"], capture_output=True, text=True, check=True)
    assert f"Version: {made['version']}\n" in shown.stdout
    assert verify(CATALOG, tmp_path / "venv").ok
    with zipfile.ZipFile(wheel) as archive:
        record = json.loads(archive.read(f"vllm-{made['version']}.dist-info/patches.json"))
    assert set(record["files"]) == {path for path in release.blobs if path.startswith("vllm/")}
    print(f"{pin}: {made['seconds']} s in upstream's build")


# The clone is sent to nowhere. Upstream's CPU build asks for g++ 12.3 before that: an older one may call itself newer,
# for nothing is compiled with it.
NOWHERE = {
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "url.file:///nonexistent/.insteadOf",
    "GIT_CONFIG_VALUE_0": "https://github.com/",
}
NEWER = '#!/bin/sh\nexec g++ -U__GNUC__ -D__GNUC__=13 "$@"\n'
DISGUISE = """
import os, torch, torch.utils.cpp_extension as extension
torch.version.{kind} = "{version}"
extension.CUDA_HOME = os.environ.get("CUDA_HOME")
"""


def error_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 1, done.stdout + done.stderr
    error: dict[str, str] = json.loads(done.stdout)["error"]
    return error


def test_cpu_reaches_the_clone_of_onednn_and_the_local_copy_is_named(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(NEWER)
    compiler.chmod(0o755)
    error = error_of(build(tmp_path, "0.20.2", "cpu", CXX=str(compiler), **NOWHERE))
    assert "upstream clones https://github.com/oneapi-src/oneDNN.git, and that failed" in error["what"]
    assert error["next_command"].startswith("FETCHCONTENT_SOURCE_DIR_ONEDNN=/path/to/a/checkout make build MODE=source")
    assert "-- Target device: cpu" in Path(error["file"]).read_text(encoding="utf-8")
    assert not list((tmp_path / "dist").glob("*")) if (tmp_path / "dist").is_dir() else True


@pytest.mark.parametrize(("device", "kind", "version"), [("cuda", "cuda", "13.0"), ("rocm", "hip", "7.0")])
def test_a_gpu_build_reaches_upstreams_cmake(tmp_path: Path, device: str, kind: str, version: str) -> None:
    """Its CMakeLists.txt then finds no CUDA or HIP in a CPU torch, and says so."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DISGUISE.format(kind=kind, version=version))
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    extra = {"CUDA_HOME": str(tmp_path / "cuda"), "MAX_JOBS": "3", "CMAKE_ARGS": "-DOURS=1"}
    error = error_of(build(tmp_path, "0.20.2", device, **extra))
    assert "Can't find CUDA or HIP installation." in error["found"]
    log = Path(error["file"]).read_text(encoding="utf-8")
    command = next(line for line in log.splitlines() if "Command '['cmake'" in line)
    for word in (f"-DVLLM_TARGET_DEVICE={device}", f"-DVLLM_PYTHON_EXECUTABLE={sys.executable}", "-DOURS=1"):
        assert word in command
    assert "compile=3" in command  # MAX_JOBS
    assert ("-DCMAKE_CUDA_COMPILER=" in command) == (device == "cuda")


KERNEL = re.compile(r"__global__ void cp_gather_indexer_k_quant_cache_kernel\(.*?^}$", re.S | re.M)


def test_upstreams_hipify_takes_the_patched_unit(tmp_path: Path) -> None:
    """The first half of the way to ROCm, by the release's own script; there is no hipcc here for the second."""
    release = CATALOG.release("0.19.1")
    tree = Path(apply_release(CATALOG, release, fetch_sdist, tmp_path / "src", print).tree).resolve()
    source, out = tree / "csrc" / "cache_kernels.cu", tmp_path / "build" / "csrc"
    command = [sys.executable, tree / "cmake" / "hipify.py", "-p", tree / "csrc", "-o", out, source]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    written = Path(done.stdout.splitlines()[-1])  # in csrc or in out: that is torch's choice
    made = written.read_text(encoding="utf-8")
    assert written.name == "cache_kernels.hip"
    assert "#include <c10/hip/HIPGuard.h>" in made
    before, after = KERNEL.search(source.read_text(encoding="utf-8")), KERNEL.search(made)
    assert before
    assert after
    assert after[0] == before[0]  # nothing in the patched kernel is CUDA's alone
    assert "batch_idx[threadIdx.y] = -1;" in after[0]


def upstream_files(pin: str, paths: str) -> dict[str, str]:
    """The release's files whose whole path matches *paths*, by path."""
    release = CATALOG.release(pin)
    tar = open_sdist(fetch_sdist(release), release)
    return {
        entry.path: entry.data.decode("utf-8") for entry in entries(tar, release) if re.fullmatch(paths, entry.path)
    }


@pytest.mark.parametrize("pin", PINS)
def test_every_source_that_upstream_clones_has_its_variable(pin: str) -> None:
    files = upstream_files(pin, r"CMakeLists\.txt|cmake/.*")
    found = 0
    for path, text in files.items():
        for url in re.findall(r"GIT_REPOSITORY\s+\S*?github\.com/(\S+)", text):
            name = url.removesuffix(".git").lower()
            assert name in LOCAL_COPY, f"{path}: {url}"
            assert LOCAL_COPY[name] in text, f"{path} does not read {LOCAL_COPY[name]}"
            found += 1
    assert found >= 6


@pytest.mark.parametrize("pin", PINS)
def test_every_variable_that_could_replace_version_or_code_is_known(pin: str) -> None:
    files = upstream_files(pin, r"setup\.py|vllm/envs\.py")
    read = set(re.findall(r"VLLM_[A-Z_]*(?:PRECOMPILED|VERSION_OVERRIDE|DOCKER_BUILD)[A-Z_]*", "".join(files.values())))
    assert read == set(NOT_PASSED_ON)
