"""The compiled part: what is read from a library, what is found and refused, what is asked of nvcc, and the loader."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_patches.errors import PatchesError
from vllm_patches.wheels import native
from vllm_patches.wheels.fatbin import CudaLibrary, read_library
from vllm_patches.wheels.native import NativeOptions, overlay_source
from vllm_patches.wheels.toolchain import Nvcc, choose_archs
from vllm_patches.wheels.wheel import Built, build_wheel
from wheelworld import KERNEL, OPS, WheelWorld, cuda_bytes, fatbin, make_world, official_files

LOCAL = "0.20.2+patches.3"
OFFICIAL = CudaLibrary((70, 80, 90), 12)


def blocks(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


@given(size=st.integers(1, 400), before=st.binary(max_size=200), after=st.binary(max_size=200))
def test_architectures_are_read_in_blocks_of_any_size(size: int, before: bytes, after: bytes) -> None:
    assert read_library(blocks(before + cuda_bytes() + after, size)) == OFFICIAL


@pytest.mark.parametrize(
    ("data", "archs"),
    [
        (b"", ()),
        (fatbin(90), (90,)),
        (b"\x50\xed\x55\xba" + b"\0" * 40 + fatbin(80, 90), (80, 90)),  # the magic by chance
        (fatbin(80, 90)[:100], ()),  # cut off
        (fatbin(80)[:8] + struct.pack("<Q", 100) + fatbin(80, 90)[16:], ()),  # entries that run over the end
        (fatbin(75, 80) + fatbin(80, 90) * 2, (80, 90)),
    ],
)
def test_odd_libraries(data: bytes, archs: tuple[int, ...]) -> None:
    assert read_library([data]) == CudaLibrary(archs, 0)


NVCC = Nvcc("nvcc", "13.0.88", (75, 80, 90, 120))


def test_the_official_list_less_what_nvcc_cannot_build() -> None:
    chosen, dropped = choose_archs("0.19.1", "", NVCC, OFFICIAL)
    assert chosen == (80, 90)
    assert dropped == {"sm_70": "nvcc 13.0.88 cannot build it"}


@pytest.mark.parametrize("wanted", ["9.0", "90", "sm_90", " 9.0; "])
def test_architectures_can_be_chosen(wanted: str) -> None:
    chosen, dropped = choose_archs("0.19.1", wanted, NVCC, OFFICIAL)
    assert chosen == (90,)
    assert dropped == {"sm_70": "nvcc 13.0.88 cannot build it", "sm_80": "not asked for"}


@pytest.mark.parametrize(("wanted", "found"), [("7.0", "sm_70"), ("hopper", "hopper"), ("9.0 7.0", "sm_70")])
def test_an_architecture_that_cannot_be_built_is_refused(wanted: str, found: str) -> None:
    with pytest.raises(PatchesError) as caught:
        choose_archs("0.19.1", wanted, NVCC, OFFICIAL)
    assert caught.value.found == found


def test_the_newest_glibc_that_is_named_counts() -> None:
    assert native.glibc_floor(b"x\0GLIBC_2.9\0GLIBC_2.34\0GLIBC_2.4\0GLIBCXX_3.5\0") == "2.34"
    assert native.glibc_floor(b"") == "not stated"


# With a compiler of straw: what it is asked, and what becomes of its output


@pytest.fixture
def world(tmp_path: Path) -> WheelWorld:
    return make_world(tmp_path / "world", native=True)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an nvcc and a g++ that write down how they were called; torch's files are below it."""
    folder = tmp_path / "tools"
    (folder / "torch" / "include" / "torch").mkdir(parents=True)
    (folder / "torch" / "include" / "torch" / "library.h").write_text("")
    (folder / "torch" / "version.py").write_text("__version__ = '2.10.0+cu128'\ncuda: Optional[str] = '12.8'\n")
    write_tool(folder, "nvcc", "12.8.93")
    write_tool(folder, "g++", "")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CUDA_HOME", "ALLOW_CUDA_MAJOR", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return folder


def write_tool(folder: Path, name: str, version: str, fail: str = "") -> None:
    script = f"""#!{sys.executable}
import pathlib, sys
if "--version" in sys.argv: print("Cuda compilation tools, release 12.8, V{version}"); sys.exit()
if "--list-gpu-code" in sys.argv: print("sm_80\\nsm_90"); sys.exit()
with open({str(folder / "calls")!r}, "a") as log: print({name!r}, *sys.argv[1:], file=log)
if {fail!r}: print({fail!r}, file=sys.stderr); sys.exit(2)
unit = pathlib.Path("overlay.cu").read_text() + pathlib.Path("csrc/cache_kernels.cu").read_text()
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text(unit)
"""
    path = folder / name
    path.write_text(script)
    path.chmod(0o755)


def build(world: WheelWorld, tools: Path, out: Path, **options: object) -> Built:
    return build_wheel(
        world.catalog,
        world.release,
        lambda wanted: world.official,
        out,
        lambda text: None,
        given=world.official,
        find_sdist=lambda release: world.sdist,
        native=NativeOptions(torch=tools / "torch", **options),  # type: ignore[arg-type]
    )


def test_the_patched_unit_is_compiled_and_the_wheel_holds_library_loader_and_hook(
    world: WheelWorld, tools: Path, tmp_path: Path
) -> None:
    built = build(world, tools, tmp_path / "dist")
    with zipfile.ZipFile(built.wheel) as archive:
        made = {name: archive.read(name) for name in archive.namelist()}
    library = made["vllm/_patches_native/libcache_kernels_patches.so"].decode()
    assert "int c;" in library  # the patched source
    assert library.count("m.impl") == 1
    stock = official_files()[OPS]
    hooked = made[OPS]
    assert [line for line in hooked.splitlines() if line not in stock.splitlines()] == [native._HOOK.rstrip()]
    assert hooked.index(b"import_kernels()") < hooked.index(b"_patches_native")
    record = json.loads(made[f"vllm-{LOCAL}.dist-info/patches.json"])
    assert record["native"]["archs"] == ["sm_80", "sm_90"]
    assert record["native"]["dropped"] == {"sm_70": "nvcc 12.8.93 cannot build it"}
    assert record["native"]["driver_floor"] == "525.60.13"
    assert record["native"]["cuda_runtime"] == "shared with torch"
    assert {entry["path"] for entry in record["not_of_the_series"]} == {
        "vllm/_version.py", OPS, "vllm/_patches_native/__init__.py", "vllm/_patches_native/libcache_kernels_patches.so",
    }  # fmt: skip
    assert list(record["native"]["source"]) == [KERNEL]
    assert any("sm_70 is left out" in note for note in built.notes)
    calls = (tools / "calls").read_text()
    assert "-gencode=arch=compute_90,code=sm_90" in calls
    assert "-l:libcudart.so.12" in calls
    assert "--cudart=none" in calls
    assert str(tmp_path) not in library
    compile(made["vllm/_patches_native/__init__.py"], "loader", "exec")


def test_what_was_compiled_is_kept(world: WheelWorld, tools: Path, tmp_path: Path) -> None:
    first = build(world, tools, tmp_path / "a")
    calls = (tools / "calls").read_text()
    second = build(world, tools, tmp_path / "b")
    assert (tools / "calls").read_text() == calls
    assert first.sha256 == second.sha256
    build(world, tools, tmp_path / "c", archs="9.0")
    assert (tools / "calls").read_text() != calls


def test_another_cuda_major_needs_to_be_allowed(
    world: WheelWorld, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tool(tools, "nvcc", "13.0.88")
    with pytest.raises(PatchesError) as caught:
        build(world, tools, tmp_path / "dist")
    assert caught.value.found == "CUDA 13.0.88"
    assert "ALLOW_CUDA_MAJOR=1" in caught.value.next_command
    monkeypatch.setenv("ALLOW_CUDA_MAJOR", "1")
    build(world, tools, tmp_path / "dist")
    assert "--cudart=static" in (tools / "calls").read_text()


@pytest.mark.parametrize("missing", ["nvcc", "torch", "headers", "version", "cuda", "home"])
def test_what_is_missing_is_said_with_the_two_ways_out(
    world: WheelWorld, tools: Path, tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = tools / "torch" / "version.py"
    if missing == "nvcc":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif missing == "home":
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    elif missing == "torch":
        version.unlink()
    elif missing == "headers":
        (tools / "torch" / "include" / "torch" / "library.h").unlink()
    elif missing == "version":
        version.write_text("__version__ = '2.11.0+cu128'\ncuda: Optional[str] = '12.8'\n")
    else:
        version.write_text("__version__ = '2.10.0+cpu'\ncuda: Optional[str] = None\n")
    with pytest.raises(PatchesError, match="cannot be built here") as caught:
        build(world, tools, tmp_path / "dist")
    assert "TORCH=/path/to/torch" in caught.value.next_command
    assert "WITHOUT=0001-native" in caught.value.next_command
    assert not any((tmp_path / "dist").iterdir())


def test_for_rocm_the_way_is_upstreams_own_build(world: WheelWorld, tools: Path, tmp_path: Path) -> None:
    (tools / "torch" / "version.py").write_text(
        "__version__ = '2.10.0+rocm7.0'\ncuda: Optional[str] = None\nhip: Optional[str] = '7.0.51831'\n"
    )
    with pytest.raises(PatchesError) as caught:
        build(world, tools, tmp_path / "dist")
    assert caught.value.found.startswith("ROCm 7.0.51831 at ")
    assert "MODE=source PIN=0.20.2 VLLM_TARGET_DEVICE=rocm" in caught.value.next_command


def test_what_nvcc_warns_of_is_passed_on(world: WheelWorld, tools: Path, tmp_path: Path) -> None:
    script = (tools / "nvcc").read_text()
    (tools / "nvcc").write_text(
        script.replace("unit = ", 'print("cache.cu(3): warning: lanes", file=sys.stderr)\nunit = ', 1)
    )
    said: list[str] = []
    build_wheel(
        world.catalog, world.release, lambda wanted: world.official, tmp_path / "dist", said.append,
        given=world.official, find_sdist=lambda release: world.sdist, native=NativeOptions(torch=tools / "torch"),
    )  # fmt: skip
    assert "nvcc: cache.cu(3): warning: lanes" in said


def test_a_compile_error_is_shown_and_leaves_nothing(world: WheelWorld, tools: Path, tmp_path: Path) -> None:
    write_tool(tools, "nvcc", "12.8.93", fail="fatal error: cusparse.h: No such file")
    with pytest.raises(PatchesError) as caught:
        build(world, tools, tmp_path / "dist")
    assert "cusparse.h" in caught.value.found
    assert "WITHOUT=0001-native" in caught.value.next_command
    assert not any((tmp_path / "dist").iterdir())
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_wheel_for_another_machine_is_not_compiled_for(
    world: WheelWorld, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(PatchesError) as caught:
        build(world, tools, tmp_path / "dist")
    assert caught.value.expected == "a machine as the wheel is for (x86_64)"


def test_the_registration_names_upstreams_function_and_nothing_else() -> None:
    text = overlay_source(native.UNITS[KERNEL]).decode()
    assert text.startswith('#include "csrc/cache_kernels.cu"\n')
    assert 'TORCH_LIBRARY_IMPL(_C_cache_ops, CUDA, m) {\n  m.impl("cp_gather_indexer_k_quant_cache", &cp_' in text


# The loader, with a torch and a vLLM of straw

STRAW = """
import sys, types
def module(name, **values):
    made = types.ModuleType(name); made.__dict__.update(values); sys.modules[name] = made; return made
class Ops:
    def load_library(self, path):
        if {broken!r}: raise OSError({broken!r})
        print("loaded", path.rpartition("/")[2])
torch = module("torch", __version__={torch!r}, ops=Ops(), version=types.SimpleNamespace(cuda={cuda!r}))
torch._C = types.SimpleNamespace(_dispatch_has_kernel_for_dispatch_key=lambda name, key: {kernel!r})
class Platform:
    def is_cuda(self): return {is_cuda!r}
    def device_count(self): return len({devices!r})
    def get_device_capability(self, i): return types.SimpleNamespace(**dict(zip(("major", "minor"), {devices!r}[i])))
class Logger:
    def warning(self, text, *args): print("warning", text % args)
module("vllm"); module("vllm.platforms", current_platform=Platform())
module("vllm.logger", init_logger=lambda name: Logger())
import runpy
print("status", runpy.run_path({loader!r})["status"])
"""


def load(tmp_path: Path, **given: object) -> tuple[str, str]:
    torch = native.Torch(tmp_path, "2.10.0", "12.8")
    (tmp_path / "loader.py").write_bytes(native._loader(native.UNITS[KERNEL], torch, (80, 90)))
    values: dict[str, object] = {
        "torch": "2.10.0+cu128", "cuda": "12.8", "kernel": True, "is_cuda": True, "devices": [(9, 0), (8, 6)],
        "broken": "", "loader": str(tmp_path / "loader.py"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", STRAW.format(**{**values, **given})], capture_output=True, text=True, check=False
    )
    return done.stdout, done.stderr


def test_the_loader_loads_where_all_fits(tmp_path: Path) -> None:
    out, err = load(tmp_path)
    assert out == "loaded libcache_kernels_patches.so\nstatus loaded\n", err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"torch": "2.11.0+cu128"}, "built for torch 2.10.0, and this is torch 2.11.0"),
        ({"cuda": "13.0"}, "a torch of CUDA 12, and this torch has 13.0"),
        ({"cuda": None}, "this torch has none"),
        ({"broken": "undefined symbol: _ZN2at"}, "undefined symbol: _ZN2at"),
    ],
)
def test_a_mismatch_is_a_clear_error_at_import(tmp_path: Path, given: dict[str, object], said: str) -> None:
    out, err = load(tmp_path, **given)
    assert "ImportError: vllm-patches: libcache_kernels_patches.so cannot be used" in err
    assert said in err
    assert "loaded" not in out


@pytest.mark.parametrize("devices", [[(7, 5)], [(9, 0), (10, 0)], [(12, 0)]])
def test_a_gpu_without_a_kernel_keeps_upstreams_and_it_is_said(tmp_path: Path, devices: list[tuple[int, int]]) -> None:
    out, _ = load(tmp_path, devices=devices)
    assert "warning vllm-patches: no kernel of" in out
    assert f"{devices[-1][0]}.{devices[-1][1]}: upstream's stay" in out
    assert "loaded" not in out


def test_elsewhere_the_loader_does_nothing(tmp_path: Path) -> None:
    assert load(tmp_path, is_cuda=False)[0] == "status not on this platform\n"
    assert load(tmp_path, kernel=False)[0] == "status vLLM's own _C is not loaded\n"
