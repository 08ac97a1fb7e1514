"""The compiler and the headers for the native part: found, and compared with what the official wheel was built with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.wheels.fatbin import CudaLibrary

# The oldest Linux driver of each CUDA major (NVIDIA's minor-version compatibility): code for a GPU, no PTX.
DRIVER_FLOOR = {12: "525.60.13", 13: "580.65.06"}
ALLOW = "ALLOW_CUDA_MAJOR"


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler; *archs* are the GPU codes that it can make (90 is sm_90)."""

    path: str
    version: str
    archs: tuple[int, ...]

    @property
    def major(self) -> int:
        """Its CUDA major."""
        return int(self.version.split(".")[0])


@dataclass(frozen=True)
class Torch:
    """A torch package whose headers are compiled against; only its files are read, it is never imported."""

    folder: Path
    version: str  # without the local part
    cuda: str


def find_nvcc(release: str) -> Nvcc:
    """``$CUDA_HOME/bin/nvcc``, else the one on the path; raises `PatchesError` with the two ways out."""
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if not path:
        raise two_ways(release, "nvcc, the CUDA compiler", f"none in {home}/bin" if home else "none on the path")
    version = re.search(r"release [\d.]+, V([\d.]+)", _output(path, "--version"))
    archs = re.findall(r"sm_(\d+)\b", _output(path, "--list-gpu-code"))
    if not version or not archs:
        raise two_ways(release, "an nvcc that tells its version and GPU codes", path)
    return Nvcc(path, version[1], tuple(sorted(map(int, archs))))


def find_torch(release: str, wanted: str, folder: Path | None) -> Torch:
    """The torch at *folder* (the package's own, which holds ``include``), else this interpreter's."""
    places = [folder] if folder else [Path(place) / "torch" for place in sys.path if place]
    found = next((place for place in places if (place / "version.py").is_file()), None)
    expected = f"the headers of torch {wanted}, a CUDA build"
    if found is None:
        raise two_ways(release, expected, f"no torch at {folder}" if folder else "this Python has no torch")
    text = (found / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '([^'+]+)", text, re.M)
    cuda = re.search(r"^cuda\b[^=]*= '([^']+)'", text, re.M)
    headers = (found / "include" / "torch" / "library.h").is_file()
    if rocm := re.search(r"^hip\b[^=]*= '([^']+)'", text, re.M):
        raise _for_rocm(release, expected, f"ROCm {rocm[1]} at {found}")
    if not version or version[1] != wanted or not cuda or not headers:
        has = f"torch {version[1] if version else '?'}, CUDA {cuda[1] if cuda else 'none'}"
        raise two_ways(release, expected, f"{has}{'' if headers else ', no headers'} at {found}")
    return Torch(found, version[1], cuda[1])


def _for_rocm(release: str, expected: str, found: str) -> PatchesError:
    """There is no official ROCm wheel that a library could go into; upstream's own build compiles the patched file."""
    error = two_ways(release, expected, found)
    error.next_command = (
        f"make build MODE=source PIN={release} VLLM_TARGET_DEVICE=rocm    # hipify and hipcc, all of it"
    )
    return error


def check_major(release: str, nvcc: Nvcc, official: CudaLibrary) -> None:
    """The wheel's CUDA major, unless the user takes another one on himself."""
    if nvcc.major == official.cuda_major or os.environ.get(ALLOW) == "1":
        return
    error = two_ways(release, f"nvcc of CUDA {official.cuda_major}, as in the official wheel", f"CUDA {nvcc.version}")
    error.next_command += (
        f"\n            {ALLOW}=1 make build PIN={release}    # its own CUDA runtime, at your own risk"
    )
    raise error


def choose_archs(
    release: str, wanted: str, nvcc: Nvcc, official: CudaLibrary
) -> tuple[tuple[int, ...], dict[str, str]]:
    """The architectures to build, and why each other one of the official list is dropped.

    *wanted* names them (``9.0``, ``90`` or ``sm_90``, with blanks, commas or semicolons between); then one that nvcc
    cannot build is an error, and those of the official list that were not asked for are dropped.
    """
    asked = tuple(dict.fromkeys(_arch(release, word) for word in re.split(r"[\s,;]+", wanted.strip()) if word))
    cannot = [arch for arch in asked if arch not in nvcc.archs]
    chosen = tuple(sorted(asked or (arch for arch in official.archs if arch in nvcc.archs)))
    if cannot or not chosen:
        known = ", ".join(f"sm_{arch}" for arch in nvcc.archs)
        named = ", ".join(f"sm_{arch}" for arch in cannot or official.archs)
        raise two_ways(release, f"architectures that nvcc {nvcc.version} can build: {known}", named or "none")
    reasons = {
        f"sm_{arch}": "not asked for" if arch in nvcc.archs else f"nvcc {nvcc.version} cannot build it"
        for arch in official.archs
        if arch not in chosen
    }
    return chosen, reasons


def _arch(release: str, word: str) -> int:
    match = re.fullmatch(r"(?:sm_)?(\d+)(?:\.(\d))?", word)
    if not match:
        raise two_ways(release, "architectures such as 8.0 or sm_90", word)
    return int(match[1] + (match[2] or ""))


def two_ways(release: str, expected: str, found: str) -> PatchesError:
    """The error for a missing tool: install it, or do without the native part."""
    return PatchesError(
        "the series has a compiled part, and it cannot be built here",
        release=release,
        expected=expected,
        found=found,
        next_command=f"make build PIN={release} TORCH=/path/to/torch    # with the CUDA toolkit on the path\n"
        f"            make build PIN={release} WITHOUT=0001-native    # its Python part alone, and it says so",
    )


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
