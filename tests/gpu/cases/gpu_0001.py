"""0001: the indexer's K gather leaves rows past the end of its sequences alone, in C++ and in Triton."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import native_unit
from gpu_case import Context, case, expect
from proof_on_cuda import run_checks

NATIVE = ("0.18.1", "0.19.1")
TWIN = ("0.18.1", "0.19.1", "0.20.2", "0.21.0")
STRAY = r"rows past the end were written"
CRASH = r"CUDA error|illegal|[Mm]isaligned|InvalidAddressSpace"
LENGTHS, ROWS = (50, 0, 70), 4096


def operator(context: Context) -> Any:
    """The kernel of the tree under test."""
    library = native_unit.build(context.target, context.shared, "_C_cache_ops")
    return native_unit.operator(library, "_C_cache_ops")


def gather(context: Context, value: int | None) -> dict[str, Any]:
    """Rows without a source, with *value* in shared memory (None: what a matrix product leaves)."""
    call = operator(context)
    batch = native_unit.Batch(LENGTHS, ROWS)
    if value is None:
        native_unit.leftovers()
    else:
        native_unit.poison(context.shared, value)
    call(*batch.arguments)
    batch.check()
    return {"rows": ROWS, "tokens": batch.live}


@case("0001-cxx-exact-rows", "0001", NATIVE)
def exact_rows(context: Context) -> dict[str, Any]:
    """C++ kernel, as many rows as tokens: a control."""
    call = operator(context)
    for lengths in ((50, 0, 70), (1,), (4096, 1, 0, 900), tuple(range(300))):
        batch = native_unit.Batch(lengths, sum(lengths))
        native_unit.poison(context.shared, 0x7F7F7F7F)
        call(*batch.arguments)
        batch.check()
    return {}


@case("0001-cxx-poison-0", "0001", NATIVE, stock=STRAY)
def poison_zero(context: Context) -> dict[str, Any]:
    """C++ kernel, rows past the end, 0 in shared memory: an index of the batch."""
    return gather(context, 0)


@case("0001-cxx-poison-1", "0001", NATIVE, stock=STRAY)
def poison_one(context: Context) -> dict[str, Any]:
    """The same with 1."""
    return gather(context, 1)


@case("0001-cxx-poison-large", "0001", NATIVE, stock=f"{CRASH}|{STRAY}")
def poison_large(context: Context) -> dict[str, Any]:
    """The same with 0x7f7f7f7f: no index of anything."""
    return gather(context, 0x7F7F7F7F)


@case("0001-cxx-leftovers", "0001", NATIVE, stock=f"{CRASH}|{STRAY}")
def poison_leftovers(context: Context) -> dict[str, Any]:
    """The same with what a bf16 matrix product leaves in shared memory."""
    return gather(context, None)


@case("0001-cxx-memcheck", "0001", NATIVE, stock=r"[1-9]\d* errors of compute-sanitizer", limit=400.0)
def memcheck(context: Context) -> dict[str, Any]:
    """C++ kernel under compute-sanitizer's memcheck, each tensor an allocation of its own."""
    library = native_unit.build(context.target, context.shared, "_C_cache_ops")
    native_unit.poison(context.shared, 0)  # builds the helper outside the sanitizer
    script = Path(native_unit.__file__).with_name("gather_once.py")
    sanitizer = [native_unit.tool("compute-sanitizer"), "--tool", "memcheck", "--print-limit", "2"]
    command = [*sanitizer, sys.executable, str(script), str(library), str(context.shared), str(0x7F7F7F7F)]
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    found = re.search(r"ERROR SUMMARY: (\d+) error", text)
    if found is None or "gathered" not in text:
        raise RuntimeError(f"no gather under compute-sanitizer: {text[-1500:]}")
    kinds = sorted(set(re.findall(r"(Invalid __\w+__ \w+ of size \d+ bytes)", text)))
    expect(found[1] == "0", f"{found[1]} errors of compute-sanitizer: {kinds}")
    return {"errors": int(found[1])}


@case("0001-native-overlay", "0001", NATIVE, stock=STRAY)
def overlay(context: Context) -> dict[str, Any]:
    """The tool's overlay over a compiled vLLM's own operator, as a patched wheel loads it behind _C."""
    import torch

    if context.operators is None:
        raise RuntimeError("--operators DIR is needed: an installed vLLM whose _C has the operator")
    torch.ops.load_library(str(context.operators / "vllm" / "_C.abi3.so"))
    name = f"_C_cache_ops::{native_unit.OPERATOR}"
    call = getattr(torch.ops._C_cache_ops, native_unit.OPERATOR)
    schema = str(call.default._schema)
    own = native_unit.Batch(LENGTHS, ROWS)
    native_unit.poison(context.shared, 0)
    call(*own.arguments)
    own.check()  # the compiled vLLM's kernel has upstream's fix
    before = torch._C._dispatch_dump(name)
    torch.ops.load_library(str(native_unit.build(context.target, context.shared, "_C_cache_ops")))
    after = torch._C._dispatch_dump(name)
    expect("CUDA (inactive)" in after and "CUDA (inactive)" not in before, f"no second kernel is registered: {after}")
    batch = native_unit.Batch(LENGTHS, ROWS)
    native_unit.poison(context.shared, 0)
    kernels = profiled(lambda: call(*batch.arguments))
    lines = [line.strip() for line in after.splitlines() if line.startswith("CUDA")]
    batch.check()
    return {"schema": schema, "registered": lines, "kernels": kernels}


def profiled(run: Any) -> list[str]:
    """Names of the GPU kernels that *run* starts."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        run()
        torch.cuda.synchronize()
    return sorted({event.name for event in seen.events() if "cp_gather" in event.name})


@case("0001-twin", "0001", TWIN, stock=r"failed as named: .*twin-writes-past-the-end")
def twin(context: Context) -> dict[str, Any]:
    """The Triton twin, compiled: live rows right, rows past the end untouched, whatever token_to_seq ends in."""
    return run_checks(context, "dsa_mtp_ima", ("twin-live-rows", "twin-tail-untouched"))
