"""Run the checks of one case against one vLLM source tree, in this process, and record every outcome.

    python tests/repro/child.py --case mla_flat_buffer --tree DIR --release 0.20.2 --result out.json

The result file is rewritten before and after each check, so that a check that kills the process is
named by what it left behind. Exit status 0 says only that every check was run; the verdict is the file's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent


def prepare_environment(tree: Path) -> None:
    """Set what vLLM and triton read at import; must run before either is imported."""
    # Empty, not unset: vLLM then takes the branch on which triton counts as present without a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(tree), str(HERE), str(HERE / "cases")]


def run_check(case: object, name: str, tree: Path) -> dict[str, object]:
    """Run one check; outcome is pass, fail (the case's own assertion) or error (anything else)."""
    from case_api import Defect

    started = time.perf_counter()
    record: dict[str, object] = {"check": name, "outcome": "pass"}
    try:
        case.checks[name](tree)  # type: ignore[attr-defined]
    except Defect as defect:
        record |= {
            "outcome": "fail",
            "assertion": defect.assertion,
            "detail": defect.detail,
            "where": defect.where,
        }
    except BaseException as error:  # an error is recorded whatever it is, SystemExit and skips included
        record |= {
            "outcome": "error",
            "detail": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
    record["seconds"] = round(time.perf_counter() - started, 3)
    return record


def write_result(path: Path, result: dict[str, object]) -> None:
    """Replace the result file as a whole."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=1), encoding="utf-8")
    beside.replace(path)


def main(argv: list[str] | None = None) -> int:
    """Run the named case (or only the checks given) and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", required=True, help="module name in tests/repro/cases")
    parser.add_argument("--tree", required=True, type=Path)
    parser.add_argument("--release", required=True)
    parser.add_argument("--result", required=True, type=Path)
    parser.add_argument("--only", action="append", default=[], help="run this check alone (repeatable)")
    options = parser.parse_args(argv)
    tree = options.tree.resolve()
    prepare_environment(tree)
    os.environ["VLLM_PATCHES_RELEASE"] = options.release
    result: dict[str, object] = {"case": options.case, "release": options.release, "checks": []}
    started = time.perf_counter()
    write_result(options.result, result | {"running": "import"})
    case = importlib.import_module(options.case).CASE
    result["import_seconds"] = round(time.perf_counter() - started, 3)
    result["stock_fails"] = case.stock_fails.get(options.release, {})
    for name in options.only or list(case.checks):
        write_result(options.result, result | {"running": name})
        result["checks"].append(run_check(case, name, tree))  # type: ignore[attr-defined]
    write_result(options.result, result | {"complete": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
