"""The compiled part of 0.19.1 against upstream's full build, as far as one can say without one (`make bench-native`).

Measured: CPU seconds of nvcc for the overlay's unit and for a sample of upstream's other units, each for sm_90, stock
files, the overlay's flags. Counted: the CUDA files of csrc/ that upstream's CMakeLists.txt names. Extrapolated, and
printed as such: the sample's mean times the count. It leaves out all that upstream generates or clones (Marlin,
Machete and CUTLASS kernels, FlashAttention, FlashMLA, DeepGEMM), the other architectures, C++ files and linking.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import tempfile
from pathlib import Path

from vllm_patches.series.catalog import open_catalog
from vllm_patches.sources.index import fetch_sdist
from vllm_patches.sources.sdist import entries, open_sdist
from vllm_patches.wheels import native
from vllm_patches.wheels.toolchain import find_nvcc

ROOT = Path(__file__).resolve().parents[1]
PIN, ARCHS = "0.19.1", (90,)
UNIT = "csrc/cache_kernels.cu"
# Chosen by hand: small and large ones, none that needs a cloned source.
SAMPLE = (
    "csrc/activation_kernels.cu",
    "csrc/cuda_view.cu",
    "csrc/layernorm_quant_kernels.cu",
    "csrc/moe/topk_softmax_kernels.cu",
    "csrc/pos_encoding_kernels.cu",
)


def main() -> None:
    """Unpack, count, compile one by one, print."""
    cuda, torch = (Path(os.environ[name]).resolve() for name in ("NATIVE_CUDA", "NATIVE_TORCH"))
    stubs = [ROOT / "tests" / "native" / name for name in ("headers", "generated")]
    os.environ |= {"CUDA_HOME": str(cuda), "CPATH": os.pathsep.join(map(str, stubs))}
    release = open_catalog().release(PIN)
    with tempfile.TemporaryDirectory(prefix="bench-native-") as name:
        work = Path(name)
        for entry in entries(open_sdist(fetch_sdist(release), release), release):
            if entry.path == "CMakeLists.txt" or entry.path.startswith("csrc/"):
                (work / entry.path).parent.mkdir(parents=True, exist_ok=True)
                (work / entry.path).write_bytes(entry.data)
        (work / "torch").symlink_to(torch)
        named = set(re.findall(r"csrc/[\w/.-]+\.cu\b", (work / "CMakeLists.txt").read_text(encoding="utf-8")))
        ours = seconds(work, native.overlay_source(native.UNITS[UNIT]))
        print(f"overlay, {UNIT}: {ours:.0f} s of CPU for sm_{ARCHS[0]}")
        sample = {unit: seconds(work, f'#include "{unit}"\n'.encode()) for unit in SAMPLE}
    for unit, taken in sample.items():
        print(f"upstream, {unit}: {taken:.0f} s")
    mean = sum(sample.values()) / len(sample)
    print(f"upstream names {len(named)} CUDA files; the sample of {len(sample)} sums to {sum(sample.values()):.0f} s")
    whole = mean * len(named)
    print(f"extrapolated, not measured: {whole:.0f} s of CPU, {whole / ours:.0f} times the overlay")


def seconds(work: Path, source: bytes) -> float:
    """CPU seconds of nvcc and all that it starts."""
    (work / "overlay.cu").write_bytes(source)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(native._compile_command(find_nvcc(PIN), ARCHS), cwd=work, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
