"""The compiled part of a series: the one touched CUDA unit, built from the patched tree into a small library.

vLLM's own ``_C`` stays as it is. The library holds upstream's whole unit, patched, with every symbol hidden, and one
registration: it replaces the kernel of the operator in torch's dispatcher. The operator's schema stays upstream's.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_patches.errors import PatchesError
from vllm_patches.hashing import sha256
from vllm_patches.outcome import Say
from vllm_patches.series.hunks import apply_patch
from vllm_patches.series.model import Patch, Release
from vllm_patches.sources import cache
from vllm_patches.sources.sdist import entries, open_sdist
from vllm_patches.sources.store import FindSdist
from vllm_patches.wheels.fatbin import read_library
from vllm_patches.wheels.modifications import Addition, hashes
from vllm_patches.wheels.toolchain import (
    DRIVER_FLOOR,
    Nvcc,
    Torch,
    check_major,
    choose_archs,
    find_nvcc,
    find_torch,
    two_ways,
)
from vllm_patches.wheels.wheelfile import content

if TYPE_CHECKING:
    from vllm_patches.wheels.official import Official

PACKAGE = "vllm/_patches_native/"
HOOK_FILE = "vllm/_custom_ops.py"
_HOOK_AFTER = b"\ncurrent_platform.import_kernels()\n"
_HOOK = (
    b"import vllm._patches_native  # noqa: E402, F401  (added by vllm-patches: the patched kernels, after vLLM's own)\n"
)

# What upstream's CMakeLists gives the unit, without debug information, and with every symbol hidden: the unit defines
# all kernels of the file, and those of _C must stay the ones that the rest of vLLM calls.
FLAGS = (
    "-std=c++17", "-O2", "-DNDEBUG", "-DENABLE_FP8", "-D_GLIBCXX_USE_CXX11_ABI=1", "--expt-relaxed-constexpr",
    "--expt-extended-lambda", "-Xcompiler=-fPIC,-fvisibility=hidden",
)  # fmt: skip
_TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")


@dataclass(frozen=True)
class Unit:
    """A CUDA source that this tool knows to rebuild: whose operators its patches change, by torch's names."""

    source: str
    namespace: str
    operators: tuple[str, ...]

    @property
    def library(self) -> str:
        """The file name of the library built from it."""
        return f"lib{Path(self.source).stem}_patches.so"


UNITS = {
    "csrc/cache_kernels.cu": Unit("csrc/cache_kernels.cu", "_C_cache_ops", ("cp_gather_indexer_k_quant_cache",)),
}


@dataclass(frozen=True)
class NativeOptions:
    """What the user may choose: architectures (empty: the official list), and where torch's headers are."""

    archs: str = ""
    torch: Path | None = None


@dataclass(frozen=True)
class Overlay:
    """What the wheel gets: files that are not of the series, and the account of them for patches.json."""

    additions: tuple[Addition, ...]
    info: Mapping[str, object]
    notes: tuple[str, ...]


def build_overlay(
    official: Official, arch: str, patches: tuple[Patch, ...], find_sdist: FindSdist, options: NativeOptions, say: Say
) -> Overlay:
    """Build the library for *patches* (their compiled parts alone) of the official wheel's release, for *arch*."""
    release = official.release
    unit = _unit(release, patches)
    if arch != platform.machine():
        raise two_ways(release.version, f"a machine as the wheel is for ({arch})", platform.machine())
    library = read_library(content(official.file, official.members["vllm/_C.abi3.so"], official.name))
    nvcc = find_nvcc(release.version)
    torch = find_torch(release.version, _required_torch(official), options.torch)
    check_major(release.version, nvcc, library)
    archs, dropped = choose_archs(release.version, options.archs, nvcc, library)
    sources, before, after = _patched_sources(release, patches, unit, find_sdist)
    same_cuda = nvcc.major == library.cuda_major
    built = _compiled(unit, sources, nvcc, torch, archs, library.cuda_major if same_cuda else 0, say)
    info = {
        "operators": [f"{unit.namespace}::{name}" for name in unit.operators],
        "source": {unit.source: {"before": hashes(before), "after": hashes(after)}},
        "library": PACKAGE + unit.library,
        "library_sha256": sha256(built),
        "archs": [f"sm_{arch}" for arch in archs],
        "dropped": dropped,
        "nvcc": nvcc.version,
        "cuda_of_the_wheel": library.cuda_major,
        "cuda_runtime": "shared with torch" if same_cuda else f"its own, {nvcc.version}",
        "torch": torch.version,
        "torch_cuda": torch.cuda,
        "glibc_floor": glibc_floor(built),
        "driver_floor": DRIVER_FLOOR.get(nvcc.major, f"that of CUDA {nvcc.major}"),
    }
    loader = _loader(unit, torch, archs)
    notes = [f"native: {unit.source} for {', '.join(f'sm_{a}' for a in archs)}, by nvcc {nvcc.version}"]
    notes += [f"native: {arch} is left out: {why}; there upstream's kernel stays" for arch, why in dropped.items()]
    notes.append(f"native: needs glibc {info['glibc_floor']} and driver {info['driver_floor']} or newer")
    return Overlay((*_additions(unit, built, loader), _hook(official)), info, tuple(notes))


def glibc_floor(library: bytes) -> str:
    """The newest glibc that the library names; built on a new system it is above what the wheel's tag promises."""
    found = {(int(major), int(minor)) for major, minor in re.findall(rb"\0GLIBC_(\d+)\.(\d+)\b", library)}
    return ".".join(map(str, max(found))) if found else "not stated"


def _unit(release: Release, patches: tuple[Patch, ...]) -> Unit:
    paths = sorted({file.path for patch in patches for file in patch.files})
    if len(paths) == 1 and paths[0] in UNITS:
        return UNITS[paths[0]]
    raise two_ways(release.version, f"patches of {' or '.join(UNITS)} alone", ", ".join(paths))


def _required_torch(official: Official) -> str:
    """The torch that the official wheel pins in its metadata."""
    metadata = official.read(official.info + "METADATA").decode("utf-8")
    pinned = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: torch==")]
    if len(pinned) != 1:
        raise two_ways(official.release.version, "one line 'Requires-Dist: torch==…'", f"{len(pinned)} of them")
    return pinned[0].partition("==")[2].split(";")[0].strip()


def _patched_sources(
    release: Release, patches: tuple[Patch, ...], unit: Unit, find_sdist: FindSdist
) -> tuple[dict[str, bytes], bytes, bytes]:
    """The release's csrc/ with the unit patched, and the unit before and after; checked by blob id."""
    tar = open_sdist(find_sdist(release), release)
    sources = {entry.path: entry.data for entry in entries(tar, release) if entry.path.startswith("csrc/")}
    files = {unit.source: sources[unit.source]}
    for patch in patches:
        files = apply_patch(patch, files, release=release.version)
    return sources | files, sources[unit.source], files[unit.source]


def overlay_source(unit: Unit) -> bytes:
    """The translation unit: upstream's own, whole, and the registration. Nothing of a kernel is copied by hand."""
    impls = "".join(f'  m.impl("{name}", &{name});\n' for name in unit.operators)
    text = f'#include "{unit.source}"\n#include <torch/library.h>\n\n'
    return f"{text}TORCH_LIBRARY_IMPL({unit.namespace}, CUDA, m) {{\n{impls}}}\n".encode()


def _compiled(
    unit: Unit, sources: Mapping[str, bytes], nvcc: Nvcc, torch: Torch, archs: tuple[int, ...], runtime: int, say: Say
) -> bytes:
    """The library, from the cache where the same inputs were built before; *runtime* 0: its own CUDA runtime."""
    host = os.environ.get("CXX", "g++")
    compiler = subprocess.run([host, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
    inputs = {
        "sources": {path: sha256(data) for path, data in sorted(sources.items())},
        "overlay": overlay_source(unit).decode(),
        "flags": [FLAGS, archs, runtime, nvcc.version, torch.version, torch.cuda, compiler, platform.machine()],
    }
    kept = cache.root() / "native" / sha256(json.dumps(inputs).encode()) / unit.library
    if kept.is_file():
        return kept.read_bytes()
    say(f"compiling {unit.source} for {', '.join(f'sm_{a}' for a in archs)} with nvcc {nvcc.version}: minutes")
    with tempfile.TemporaryDirectory(prefix="vllm-patches-native-") as name, cache.written_beside(kept) as beside:
        work = Path(name)
        for path, data in {**sources, "overlay.cu": overlay_source(unit)}.items():
            (work / path).parent.mkdir(parents=True, exist_ok=True)
            (work / path).write_bytes(data)
        (work / "torch").symlink_to(torch.folder.resolve())  # headers' __FILE__ then names no folder of this machine
        for line in _run(work, _compile_command(nvcc, archs)).splitlines():
            say(f"nvcc: {line}")  # its warnings
        _link(work, nvcc, host, runtime)
        shutil.copyfile(work / "overlay.so", beside)
    return kept.read_bytes()


def _compile_command(nvcc: Nvcc, archs: tuple[int, ...]) -> list[str]:
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    includes = ["-Icsrc", "-isystem=torch/include", "-isystem=torch/include/torch/csrc/api/include"]
    return [nvcc.path, *FLAGS, *codes, "--threads=0", *includes, "-c", "overlay.cu", "-o", "overlay.o"]


def _link(work: Path, nvcc: Nvcc, host: str, runtime: int) -> None:
    """Link against names alone: at run time the libraries of the torch that is loaded already are taken."""
    shared = [*_TORCH_LIBRARIES, *([f"libcudart.so.{runtime}"] if runtime else [])]
    (work / "hidden.map").write_text("{ local: *; };\n")
    (work / "empty.c").write_text("")
    for name in shared:
        _run(work, [host, "-shared", "-x", "c", "empty.c", f"-Wl,-soname,{name}", "-o", name])
    # -z now: a symbol that torch lacks is an error when the library is loaded, never a crash when it is called.
    options = ["-z", "now", "--no-as-needed", "--version-script=hidden.map", "-s", "--build-id=none"]
    options += [f"-l:{name}" for name in shared]
    linker = [word for option in options for word in ("-Xlinker", option)]
    cudart = "none" if runtime else "static"
    # NVIDIA's pip packages keep it in lib/, where their own nvcc does not look.
    folders = ["-L.", f"-L{Path(nvcc.path).resolve().parents[1] / 'lib'}"]
    _run(work, [nvcc.path, "-shared", f"--cudart={cudart}", "overlay.o", "-o", "overlay.so", *folders, *linker])


def _run(work: Path, command: list[str]) -> str:
    """What the command says; raises `PatchesError` where it fails."""
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [
            line for line in (done.stdout + done.stderr).splitlines() if re.search("error|cannot find", line, re.I)
        ]
        raise PatchesError(
            "the compiled part cannot be built",
            file=" ".join(command[:1]),
            expected="a toolkit and torch headers that fit each other; CPATH may name further folders of headers",
            found="\n".join(lines[:5]) or done.stderr[-500:],
            next_command="make build WITHOUT=0001-native    # its Python part alone, and it says so",
        )
    return done.stdout + done.stderr


def _loader(unit: Unit, torch: Torch, archs: tuple[int, ...]) -> bytes:
    text = Path(__file__).with_name("native_loader.txt").read_text(encoding="utf-8")
    values = {
        "OPERATORS": repr(tuple(f"{unit.namespace}::{name}" for name in unit.operators)).replace("'", '"'),
        "TORCH": f'"{torch.version}"',
        "CUDA_MAJOR": torch.cuda.split(".")[0],
        "ARCHS": repr(archs),
        "LIBRARY": unit.library,
    }
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text.encode("utf-8")


def _additions(unit: Unit, library: bytes, loader: bytes) -> tuple[Addition, Addition]:
    return (
        Addition(PACKAGE + "__init__.py", loader, "loads the library, once torch and GPU are what it was built for"),
        Addition(PACKAGE + unit.library, library, f"the patched {unit.source}, compiled"),
    )


def _hook(official: Official) -> Addition:
    """One line in the module through which vLLM calls its operators, behind the one that loads them."""
    data = official.read(HOOK_FILE)
    if data.count(_HOOK_AFTER) != 1:
        raise two_ways(official.release.version, f"one line {_HOOK_AFTER.decode().strip()}", HOOK_FILE)
    return Addition(HOOK_FILE, data.replace(_HOOK_AFTER, _HOOK_AFTER + _HOOK), "imports vllm._patches_native")
