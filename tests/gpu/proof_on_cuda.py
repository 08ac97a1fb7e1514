"""The checks of ``tests/repro`` on a GPU: same inputs, same references, the kernels compiled, not interpreted."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from gpu_case import Context, Defect, Side

REPRO = Path(__file__).resolve().parents[1] / "repro"


def _to_gpu(release: str) -> None:
    """Make torch's factories use the GPU."""
    import torch

    os.environ["VLLM_PATCHES_RELEASE"] = release
    sys.path[:0] = [str(REPRO), str(REPRO / "cases")]
    torch.set_default_device("cuda")


class _Torch:
    """torch as a check's module sees it: the generators that it seeds are the GPU's."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return functools.partial(torch.Generator, device="cuda") if name == "Generator" else getattr(torch, name)


def _compiled_again() -> None:
    """Undo what the proof of 0002 does for the interpreter alone."""
    from vllm.model_executor.layers.fla.ops import fused_recurrent, op

    fused_recurrent.exp = op.exp


def run_checks(context: Context, module: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Run the named checks; on stock those that the proof names must fail with their assertion, the others pass.

    Raises `Defect` with the list of the failed ones if all is as named, RuntimeError if anything else came up.
    """
    _to_gpu(context.release)
    import torch
    from case_api import Defect as ProofDefect

    loaded: Any = importlib.import_module(module)
    case = loaded.CASE
    loaded.torch = _Torch()
    if module == "gdn_null_block_guard":
        _compiled_again()
    failed: dict[str, str] = {}
    for name in names:
        try:
            case.checks[name](context.target)
            torch.cuda.synchronize()
        except ProofDefect as defect:
            failed[name] = defect.assertion
    named = case.stock_fails.get(context.release, {})
    wanted = {name: named[name] for name in names if name in named} if context.side is Side.STOCK else {}
    if failed != wanted:
        raise RuntimeError(f"failed: {failed}; expected: {wanted}")
    if failed:
        raise Defect("failed as named: " + ", ".join(f"{name} ({text})" for name, text in failed.items()))
    return {"checks_passed": list(names)}
