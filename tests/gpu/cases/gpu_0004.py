"""0004: the ROCm file's Triton kernels, run as CUDA kernels. Nothing here runs on AMD hardware."""

from __future__ import annotations

from typing import Any

from gpu_case import Context, case
from proof_on_cuda import run_checks

LAYOUTS = ("contiguous", "interleaved", "own-strides")


@case(
    "0004-kernels",
    "0004",
    ("0.18.1", "0.19.1", "0.20.2", "0.21.0"),
    stock=r"failed as named: .*shuffle-\w+-interleaved",
)
def kernels(context: Context) -> dict[str, Any]:
    """Gather (NHD, SHUFFLE) and writer on contiguous and interleaved caches, compiled by Triton for CUDA."""
    kinds = ("nhd-gather", "shuffle-gather", "shuffle-write")
    names = tuple(f"{kind}-{layout}" for kind in kinds for layout in LAYOUTS)
    refusals = ("shuffle-gather-refuses-sparse-blocks", "shuffle-write-refuses-sparse-blocks")
    return run_checks(context, "rocm_kv_strides", names + refusals) | {"amd_hardware": "not run"}
