"""What upstream's build is given: jobs, memory, environment; and what its log is read for."""

from __future__ import annotations

import datetime
import io
import re
from pathlib import Path

import pytest
from vllm_patches.sourcebuilds import buildlog
from vllm_patches.sourcebuilds.buildenv import (
    GIB,
    NOT_PASSED_ON,
    Device,
    compiler_cache,
    environment,
    free_memory,
    jobs,
    pinned_torch,
)
from vllm_patches.sourcebuilds.buildlog import Progress, advice, clock, last_words
from world import SCRIPTS, bare_release


@pytest.mark.parametrize(
    ("device", "environ", "cores", "memory", "expected"),
    [
        (Device.CUDA, {}, 16, 64 * GIB, 16),
        (Device.CUDA, {}, 16, 15 * GIB, 3),
        (Device.ROCM, {}, 4, 64 * GIB, 4),
        (Device.CPU, {}, 16, 15 * GIB, 7),
        (Device.CUDA, {}, 16, 1 * GIB, 1),
        (Device.CUDA, {"MAX_JOBS": "40"}, 2, 1 * GIB, 40),
        (Device.CUDA, {"MAX_JOBS": " "}, 2, 64 * GIB, 2),
        (Device.CUDA, {"MAX_JOBS": "many"}, 2, 64 * GIB, 0),
        (Device.CUDA, {"MAX_JOBS": "0"}, 2, 64 * GIB, 0),
    ],
)
def test_jobs_by_cores_and_memory_unless_the_user_says(
    device: Device, environ: dict[str, str], cores: int, memory: int, expected: int
) -> None:
    assert jobs(device, environ, cores, memory) == expected


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("max", 8 * GIB), (str(6 * GIB), 4 * GIB), (str(GIB), 0), (str(64 * GIB), 8 * GIB), ("", 8 * GIB)],
)
def test_memory_is_what_the_machine_and_the_container_leave(tmp_path: Path, limit: str, expected: int) -> None:
    proc = tmp_path / "meminfo"
    proc.write_text(f"MemTotal: 1 kB\nMemAvailable:   {8 * GIB // 1024} kB\n")
    if limit:
        (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(f"{2 * GIB}\n")
    assert free_memory(proc, tmp_path) == expected


def made(**environ: str) -> dict[str, str]:
    release = bare_release("0.20.2", None)
    return environment(release, "0.20.2+patches.7", Device.CPU, 3, Path("/opt/py/bin/python"), environ)


def test_the_environment_decides_version_device_jobs_and_date() -> None:
    env = made(PATH="/bin", HOME="/home/me", CMAKE_ARGS="-DX=1")
    assert env["SETUPTOOLS_SCM_PRETEND_VERSION"] == env["SETUPTOOLS_SCM_PRETEND_VERSION_FOR_VLLM"] == "0.20.2+patches.7"
    assert (env["VLLM_TARGET_DEVICE"], env["MAX_JOBS"], env["HOME"], env["CMAKE_ARGS"]) == (
        "cpu", "3", "/home/me", "-DX=1",
    )  # fmt: skip
    assert env["PATH"] == "/opt/py/bin:/bin"
    date = bare_release("0.20.2", None).date
    assert (
        int(env["SOURCE_DATE_EPOCH"])
        == datetime.datetime(date.year, date.month, date.day, tzinfo=datetime.UTC).timestamp()
    )
    assert made(SOURCE_DATE_EPOCH="5")["SOURCE_DATE_EPOCH"] == "5"


def test_nothing_that_would_replace_version_or_code_is_passed_on() -> None:
    given = dict.fromkeys(
        [*NOT_PASSED_ON, "SETUPTOOLS_SCM_PRETEND_VERSION_FOR_VLLM", "SETUPTOOLS_SCM_PRETEND_VERSION"], "9.9"
    )
    assert "9.9" not in made(**given).values()


def test_our_own_folder_is_taken_out_of_the_python_path() -> None:
    assert "PYTHONPATH" not in made(PYTHONPATH=str(SCRIPTS))
    assert made(PYTHONPATH=f"/mine:{SCRIPTS}")["PYTHONPATH"] == "/mine"


def test_the_compiler_cache_is_the_one_that_upstream_takes(tmp_path: Path) -> None:
    assert compiler_cache({"PATH": str(tmp_path)}) == "none"
    for name in ("ccache", "sccache"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        assert compiler_cache({"PATH": str(tmp_path)}) == name
    assert compiler_cache({"PATH": str(tmp_path), "VLLM_DISABLE_SCCACHE": "1"}) == "ccache"


def test_the_pinned_torch_is_read() -> None:
    assert pinned_torch('requires = [\n    "torch == 2.11.0",\n]') == "2.11.0"
    assert pinned_torch("requires = []") == ""


CMAKE = """\
  -- Found Torch: libtorch.so
  CMake Warning at TorchConfig.cmake:22 (message):
    library kineto not found.
  Call Stack (most recent call first):
    CMakeLists.txt:91 (find_package)


  CMake Error at onednn-populate-gitclone.cmake:55 (message):
    Failed to clone repository:

      'https://github.com/oneapi-src/oneDNN.git'


  -- Configuring incomplete, errors occurred!
  Traceback (most recent call last):
    File "<string>", line 280, in configure
      raise CalledProcessError(retcode, cmd)
  subprocess.CalledProcessError: Command '['cmake', '.']' returned non-zero exit status 1.
  error: subprocess-exited-with-error

  note: This error originates from a subprocess, and is likely not a problem with pip.
ERROR: Failed building wheel for vllm
"""


def test_the_telling_lines_are_found_among_pips_own() -> None:
    assert last_words(CMAKE) == [
        "CMake Error at onednn-populate-gitclone.cmake:55 (message):",
        "Failed to clone repository:",
        "'https://github.com/oneapi-src/oneDNN.git'",
    ]
    assert last_words("a.cu(3): error: no lane\n1 error detected\nninja: build stopped\n") == [
        "a.cu(3): error: no lane", "1 error detected",
    ]  # fmt: skip
    assert last_words("first\n\nlast\n") == ["first", "last"]
    assert len(last_words("\n".join(f"error {n}" for n in range(99)))) == 10


def test_a_failed_clone_names_the_variable_for_a_local_copy() -> None:
    found = advice(CMAKE, 4)
    assert found is not None
    assert found.command == "FETCHCONTENT_SOURCE_DIR_ONEDNN=/path/to/a/checkout"
    assert "oneDNN" in found.what
    other = advice("Failed to clone repository: 'https://example.org/a/b.git'", 4)
    assert other is not None
    assert other.command.startswith("git ls-remote https://example.org/a/b.git")


@pytest.mark.parametrize("text", ["g++: fatal error: Killed signal terminated program cc1plus", "nvcc\nKilled\n"])
def test_a_killed_compiler_asks_for_fewer_jobs(text: str) -> None:
    found = advice(text, 8)
    assert found is not None
    assert found.command == "MAX_JOBS=4"
    assert advice(text, 1) is None
    assert advice("error: expected ';'", 8) is None


@pytest.mark.parametrize(
    ("device", "good", "bad"),
    [
        (Device.CUDA, ("", ".cu128"), (".cpu", ".empty", ".cu128.precompiled")),
        (Device.ROCM, (".rocm700", ".rocm70"), ("", ".cu128")),
        (Device.CPU, (".cpu",), ("", ".empty")),
        (Device.EMPTY, (".empty",), ("", "xempty")),
    ],
)
def test_upstreams_suffix_for_the_device_and_no_other(
    device: Device, good: tuple[str, ...], bad: tuple[str, ...]
) -> None:
    assert all(re.fullmatch(device.suffix, word) for word in good)
    assert not any(re.fullmatch(device.suffix, word) for word in bad)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("out", [io.StringIO(), Terminal()])
def test_progress_says_step_and_time_after_two_seconds(out: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(buildlog.time, "monotonic", lambda: now[0])
    progress = Progress(out, started=100.0)
    progress.feed(b"[3/57] Building CUDA object CMakeFiles/_C.dir/csrc/cache_kernels.cu.o\n")
    progress.tick()
    assert out.getvalue() == ""
    now[0] = 165.0
    progress.tick()
    assert "0:01:05 [3/57] cache_kernels.cu.o" in out.getvalue()
    now[0] = 165.5  # too soon for another
    length = len(out.getvalue())
    progress.tick()
    assert len(out.getvalue()) == length
    progress.close()
    assert ("\r" in out.getvalue()) == out.isatty()
    assert out.getvalue().endswith("\n")


def test_hours_are_shown() -> None:
    assert clock(3 * 3600 + 62) == "3:01:02"
