"""Run cases against one vLLM source tree, each in a process of its own, and record every outcome.

    python tests/repro/child.py mla_flat_buffer --tree DIR --release 0.20.2 --out FOLDER

The imports that all cases need (torch, triton, vLLM's configuration: most of the time a case takes) are made once;
each case is then forked off. Its result file is rewritten before and after each check, so that a check that kills the
process is named by what it left behind. Exit status 0 says only that every case was run; the verdict is the files'.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
# None of these reads a file that a patch touches, and importing them starts no thread that a fork would lose.
PRELOAD = ("torch", "triton", "vllm.config")


def prepare_environment(tree: Path) -> None:
    """Set what vLLM and triton read at import; must run before either is imported."""
    # Empty, not unset: vLLM then takes the branch on which triton counts as present without a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"  # cases run side by side, and their tensors are small
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


def run_case(name: str, release: str, tree: Path, path: Path, only: list[str]) -> None:
    """Import the case and run its checks, one by one, in this process."""
    result: dict[str, object] = {"case": name, "release": release, "checks": []}
    started = time.perf_counter()
    write_result(path, result | {"running": "import"})
    case = importlib.import_module(name).CASE
    result["import_seconds"] = round(time.perf_counter() - started, 3)
    result["stock_fails"] = case.stock_fails.get(release, {})
    for check in only or list(case.checks):
        write_result(path, result | {"running": check})
        result["checks"].append(run_check(case, check, tree))  # type: ignore[attr-defined]
    result["seconds"] = round(time.perf_counter() - started, 3)
    write_result(path, result | {"complete": True})


def run_forked(name: str, options: argparse.Namespace, tree: Path) -> None:
    """Run one case in a process of its own, which has this one's imports; record how that process ended."""
    path = options.out / f"{name}.json"
    write_result(path, {"running": "nothing yet"})
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            log = os.open(options.out / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            run_case(name, options.release, tree, path, options.only)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    ending = wait_for(pid, time.monotonic() + options.timeout)
    record = json.loads(path.read_text(encoding="utf-8"))
    write_result(path, record | {"ending": ending})


def wait_for(pid: int, deadline: float) -> str:
    """How the process ended: "exit N", "killed by SIGNAL", or "no end in time" (then it is killed)."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return f"exit {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "no end in time"


def main(argv: list[str] | None = None) -> int:
    """Run the named cases and write a result file for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", help="module names in tests/repro/cases")
    parser.add_argument("--tree", required=True, type=Path)
    parser.add_argument("--release", required=True)
    parser.add_argument("--out", required=True, type=Path, help="folder for <case>.json and <case>.log")
    parser.add_argument("--only", action="append", default=[], help="run this check alone (repeatable)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one case")
    options = parser.parse_args(argv)
    tree = options.tree.resolve()
    prepare_environment(tree)
    os.environ["VLLM_PATCHES_RELEASE"] = options.release
    for module in PRELOAD:
        importlib.import_module(module)
    for name in options.cases:
        run_forked(name, options, tree)
    return 0


if __name__ == "__main__":
    sys.exit(main())
