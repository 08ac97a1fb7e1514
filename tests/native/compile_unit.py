"""The patched CUDA unit, compiled by the real nvcc from the patched tree's own file (`make test-native`).

NATIVE_CASES   words like 0.19.1:90, a release and an architecture; `newest` stands for the newest that nvcc knows
NATIVE_CUDA    the toolkit's folder
NATIVE_TORCH   the folder of the torch package whose headers are used
NATIVE_EXACT   1: that torch is the release's own CUDA build; then its libraries are looked into as well

Not run: the kernel. No GPU is needed here, and the library is never loaded.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from vllm_patches.series.catalog import open_catalog
from vllm_patches.series.hunks import blob_id
from vllm_patches.series.patchset import series_part
from vllm_patches.sources.index import fetch_sdist
from vllm_patches.wheels import native
from vllm_patches.wheels.fatbin import CudaLibrary, _Walker
from vllm_patches.wheels.native import UNITS, Unit
from vllm_patches.wheels.toolchain import Nvcc, Torch, choose_archs, find_nvcc, find_torch

HERE = Path(__file__).parent
CASES = os.environ["NATIVE_CASES"].split()
CUDA = Path(os.environ["NATIVE_CUDA"]).resolve()
TORCH = Path(os.environ["NATIVE_TORCH"]).resolve()
EXACT = os.environ.get("NATIVE_EXACT") == "1"
TORCH_RELEASE = "2.10.0"  # what 0.18.x and 0.19.x pin
# Where a symbol comes from that torch does not have: the versions that the C and C++ runtimes give to theirs.
RUNTIME = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def nvcc() -> Iterator[Nvcc]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_HOME", str(CUDA))
        patch.setenv("CPATH", os.pathsep.join([str(HERE / "headers"), *([] if EXACT else [str(HERE / "generated")])]))
        patch.delenv("CXX", raising=False)
        yield find_nvcc("0.19.1")


@pytest.fixture(scope="module")
def torch() -> Torch:
    if EXACT:
        return find_torch("0.19.1", TORCH_RELEASE, TORCH)
    text = (TORCH / "version.py").read_text(encoding="utf-8")
    assert f"__version__ = '{TORCH_RELEASE}'" in text
    return Torch(TORCH, TORCH_RELEASE, "12.8")


@dataclass(frozen=True)
class Sources:
    """The unit, the release's csrc/ with the unit patched, and the unit before and after."""

    unit: Unit
    files: dict[str, bytes]
    before: bytes
    after: bytes


def sources(pin: str) -> Sources:
    catalog = open_catalog()
    release = catalog.release(pin)
    parts = series_part(catalog.series_of(release), packaged=False).patches
    unit = UNITS["csrc/cache_kernels.cu"]
    return Sources(unit, *native._patched_sources(release, parts, unit, fetch_sdist))


@dataclass(frozen=True)
class Made:
    """A library, its architecture, and what nvcc said of the patched file and of upstream's own."""

    library: Path
    arch: int
    said: set[str]
    said_of_stock: set[str]


@pytest.fixture(scope="module", params=CASES)
def built(request: pytest.FixtureRequest, nvcc: Nvcc, torch: Torch, tmp_path_factory: pytest.TempPathFactory) -> Made:
    pin, _, word = request.param.partition(":")
    wanted = str(nvcc.archs[-1]) if word == "newest" else word
    (arch,), _ = choose_archs(pin, wanted, nvcc, CudaLibrary((80, 90), 12))
    found = sources(pin)
    folder = tmp_path_factory.mktemp("native")

    def compiled(files: dict[str, bytes], say: Callable[[str], None]) -> bytes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))  # compiled here and now
            return native._compiled(found.unit, files, nvcc, torch, (arch,), 0, say)

    said: list[str] = []
    stock: list[str] = []
    library = folder / found.unit.library
    library.write_bytes(compiled(found.files, said.append))
    if len(said) > 1:  # warnings: then upstream's file must have them too
        compiled(found.files | {found.unit.source: found.before}, stock.append)
    return Made(library, arch, warnings(said), warnings(stock))


def warnings(said: list[str]) -> set[str]:
    """What nvcc said, without the lines' numbers; the first line says what is compiled."""
    return {re.sub(r"\(\d+\)|:\d+", "", line) for line in said[1:]}


def test_it_compiles_for_the_architecture_with_no_warning_that_upstreams_file_has_not(built: Made) -> None:
    assert built.said <= built.said_of_stock
    walker = _Walker()
    walker.feed(built.library.read_bytes())
    assert (built.arch,) in walker.units  # beside those that NVIDIA's static runtime brings along


def test_no_symbol_is_exported_and_no_cuda_runtime_is_shared(built: Made) -> None:
    """The unit defines every kernel of the file: none of them may take the place of _C's own."""
    library = built.library
    assert run("nm", "-D", "--defined-only", library) == ""
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", library))
    torchs = {"libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so"}
    assert torchs <= set(needed)
    system = re.compile(r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so|ld-")
    assert not [name for name in set(needed) - torchs if not system.match(name)]


def test_it_binds_all_at_load_and_registers_the_one_operator(built: Made) -> None:
    library = built.library
    assert re.search(r"\(FLAGS(_1)?\).*\b(BIND_)?NOW\b", run("readelf", "-d", library))
    data = library.read_bytes()
    assert data.count(b"cp_gather_indexer_k_quant_cache\0") == 1  # m.impl's name; the mangled ones go on behind it
    assert b"_C_cache_ops\0" in data
    assert str(TORCH).encode() not in data


def undefined(library: Path) -> set[str]:
    """The symbols that the library takes from elsewhere, those of the C and C++ runtimes left out."""
    lines = run("nm", "-D", "--undefined-only", library).splitlines()
    strong = [line.split()[-1] for line in lines if line.split()[-2] == "U"]
    return {name for name in strong if not RUNTIME.search(name)}


def test_every_symbol_it_needs_is_one_of_torchs(built: Made) -> None:
    recorded = set((HERE / "torch-symbols.txt").read_text(encoding="utf-8").split())
    assert undefined(built.library) <= recorded
    if EXACT:
        assert recorded <= defined_by_torch()


@functools.cache
def defined_by_torch() -> frozenset[str]:
    libraries = [TORCH / "lib" / name for name in native._TORCH_LIBRARIES]
    return frozenset(
        line.split()[-1].partition("@")[0]
        for library in libraries
        for line in run("nm", "-D", "--defined-only", library).splitlines()
    )


@pytest.mark.parametrize("pin", sorted({case.partition(":")[0] for case in CASES}))
def test_the_unit_is_the_patched_trees_own_file(pin: str) -> None:
    catalog = open_catalog()
    series = catalog.series_of(catalog.release(pin))
    assert blob_id(sources(pin).after) == series.blob_chain("csrc/cache_kernels.cu")[-1]
