"""Run cases against one vLLM source tree, each in a process of its own, and record every outcome.

    python tests/repro/child.py mla_flat_buffer --tree DIR --release 0.20.2 --out FOLDER

The imports that all cases need (torch, triton, vLLM's configuration: most of the time a case takes) are made once;
each case is then forked off. Its result file is rewritten before and after each check, so that a check that kills the
process is named by what it left behind. Exit status 0 says only that every case was run; the verdict is the files'.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
# None of these reads a file that a patch touches, and importing them starts no thread that a fork would lose.
PRELOAD = ("torch", "triton", "vllm.config")
NO_END = "no end in time"


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


@dataclass(frozen=True)
class Run:
    """What one process is to run: a case, or some of its checks, on a tree."""

    case: str  # module in tests/repro/cases
    release: str
    tree: Path
    out: Path  # folder for <case>.json, <case>.log and everything temporary
    checks: tuple[str, ...] = ()  # in this order; empty: all of the case, in its order
    first_fail: bool = False  # end with the first check that fails on an assertion
    timeout: float = 300.0  # seconds

    @property
    def result(self) -> Path:
        """The result file."""
        return self.out / f"{self.case}.json"


def run_case(run: Run) -> None:
    """Import the case and run its checks, one by one, in this process."""
    result: dict[str, object] = {"case": run.case, "release": run.release, "checks": []}
    started = time.perf_counter()
    write_result(run.result, result | {"running": "import"})
    case = importlib.import_module(run.case).CASE
    result["import_seconds"] = round(time.perf_counter() - started, 3)
    result["stock_fails"] = case.stock_fails.get(run.release, {})
    for check in run.checks or case.checks:
        write_result(run.result, result | {"running": check})
        record = run_check(case, check, run.tree)
        result["checks"].append(record)  # type: ignore[attr-defined]
        if run.first_fail and record["outcome"] == "fail":
            break
    result["seconds"] = round(time.perf_counter() - started, 3)
    write_result(run.result, result | {"complete": True})


def run_forked(run: Run) -> None:
    """Run one case in a process of its own, which has this one's imports; record how that process ended."""
    write_result(run.result, {"running": "nothing yet"})

    def alone() -> None:
        own_session(run)
        run_case(run)

    pid = forked(alone)
    try:
        ending = wait_for(pid, time.monotonic() + run.timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # whatever it has started
    record = json.loads(run.result.read_text(encoding="utf-8"))
    write_result(run.result, record | {"ending": ending})


def forked(function: Callable[[], None]) -> int:
    """The id of a new process that calls *function* and ends: with status 1 after an error, which it prints."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


def own_session(run: Run) -> None:
    """In the forked process: its output goes to the log, its temporary files to *out*, for it ends by _exit."""
    os.setsid()
    log = os.open(run.out / f"{run.case}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["TMPDIR"] = tempfile.tempdir = str(run.out)


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
    return NO_END


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
    tree, checks = options.tree.resolve(), tuple(options.only)
    start(tree, options.release)
    for name in options.cases:
        run_forked(Run(name, options.release, tree, options.out, checks, timeout=options.timeout))
    return 0


def start(tree: Path, release: str) -> None:
    """Make this process ready to fork off cases: environment, path and the imports that all of them need."""
    prepare_environment(tree)
    os.environ["VLLM_PATCHES_RELEASE"] = release
    for module in PRELOAD:
        importlib.import_module(module)


if __name__ == "__main__":
    sys.exit(main())
