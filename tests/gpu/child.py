"""Run one case on one side in this process and write what came of it.

    python tests/gpu/child.py JOB.json RESULT.json

The result file is there only if the case came to an end: a process that is killed leaves none, and the runner says how
it ended. The process leaves by os._exit, because a CUDA context in error can hang an ordinary exit.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
COMPILED = ("_C", "_C_stable_libtorch", "_moe_C", "_rocm_C")
ATTENTION = "vllm_flash_attn"


class Absent(ModuleType):
    """A module that has every name, none of which can be called."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def stand_in_for_compiled(target: Path) -> None:
    """In a source tree vLLM's compiled modules are missing; its CUDA platform imports them for their side effects."""
    for name in COMPILED:
        if not list((target / "vllm").glob(f"{name}.*so")):
            sys.modules[f"vllm.{name}"] = ModuleType(f"vllm.{name}")
    if not list((target / "vllm" / ATTENTION).glob("*.so")):
        sys.modules[f"vllm.{ATTENTION}"] = Absent(f"vllm.{ATTENTION}")


def describe(error: BaseException) -> str:
    """Type and text, with what it was raised from: vLLM wraps the worker's errors."""
    parts: list[str] = []
    seen: BaseException | None = error
    while seen is not None and len(parts) < 4:
        parts.append(f"{type(seen).__name__}: {seen}")
        seen = seen.__cause__ or seen.__context__
    return "\n".join(parts)


def main() -> None:
    """Read the job, run the case, write the result."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.path[:0] = [str(HERE)]
    from gpu_case import Context, Side, load_cases

    target = Path(job["target"])
    stand_in_for_compiled(target)
    operators = Path(job["operators"]) if job["operators"] else None
    folders = Path(job["scratch"]), Path(job["shared"])
    context = Context(job["release"], Side(job["side"]), target, *folders, operators)
    started = time.perf_counter()
    result: dict[str, object] = {"outcome": "pass", "detail": "", "measures": {}}
    try:
        result["measures"] = dict(load_cases(Path(job["cases"]))[job["case"]].run(context))
    except BaseException as error:
        result |= {"outcome": "fail", "detail": describe(error)[:4000], "measures": getattr(error, "measures", {})}
        traceback.print_exc()
    result["seconds"] = round(time.perf_counter() - started, 2)
    beside = Path(sys.argv[2]).with_suffix(".tmp")
    beside.write_text(json.dumps(result), encoding="utf-8")
    beside.replace(sys.argv[2])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
