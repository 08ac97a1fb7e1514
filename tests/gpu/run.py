"""`make test-gpu`: every case on the stock and on the patched vLLM, on the GPU of this machine.

    python tests/gpu/run.py --stock DIR|WHEEL|TREE [--patched DIR|WHEEL|TREE] [--case NAME ...] [--list]

Without --patched it is made from the stock one by this project's own tool; a release without a series has the stock
side alone, and cases that only observe. Each side of each case is a process of its own. A case is proved when the stock
side fails with the named error and the patched side passes; a case that was not run is reported as that and makes the
exit status 1, like one that is not proved.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CODE = ROOT / "ci"
sys.path[:0] = [str(HERE), str(CODE), str(ROOT / "scripts")]

import results  # noqa: E402
import targets  # noqa: E402
from gpu_case import Case, Side, load_cases  # noqa: E402
from gpurun.process import run_to_end  # noqa: E402
from gpurun.provenance import commit, machine  # noqa: E402
from results import Outcome, SideResult, Verdict  # noqa: E402
from vllm_patches.errors import PatchesError  # noqa: E402
from vllm_patches.render import table  # noqa: E402

PLUGIN = {
    "METADATA": "Metadata-Version: 2.1\nName: vllm-patches-gpu-cases\nVersion: 1\n",
    "entry_points.txt": "[vllm.general_plugins]\nseeded_weights = seeded_weights:register\n",
}


@dataclass
class Run:
    """One run of the runner: what it tests, with what, and what it found so far."""

    options: argparse.Namespace
    stock: targets.Target
    patched: targets.Target | None  # None: the release has no series
    work: Path
    cases: list[Case]
    info: dict[str, Any]
    cleaner: results.Cleaner
    found: dict[str, dict[Side, SideResult]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def late(self) -> bool:
        """Whether the whole run's time is up."""
        return bool(self.options.budget) and time.monotonic() - self.started > self.options.budget

    def folder(self, side: Side) -> Path:
        """The vLLM of a side; the upstream one is made from the patched at run time."""
        target = self.stock if side is Side.STOCK else self.patched
        if target is None:
            raise PatchesError(
                "a case asks for a side that this release does not have", release=self.stock.version,
                expected="stock alone: there is no series", found=side.value,
                next_command="python tests/gpu/run.py --list",
            )  # fmt: skip
        return target.folder


def environment(folder: Path, work: Path, sites: list[Path]) -> dict[str, str]:
    """What vLLM and triton read; everything that they write stays in *work*."""
    plugins = work / "shared" / "plugins"
    info = plugins / "vllm_patches_gpu_cases-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    for name, text in PLUGIN.items():
        (info / name).write_text(text, encoding="utf-8")
    path = [str(folder), *map(str, sites), str(HERE), str(plugins), str(CODE)]
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"), "1")
    return os.environ | offline | {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CACHE_ROOT": str(work / "shared" / "vllm"),
        "TRITON_CACHE_DIR": str(work / "shared" / "triton"),
        "XDG_CACHE_HOME": str(work / "shared" / "cache"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a case looks into the worker
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "OMP_NUM_THREADS": "4",
    }  # fmt: skip


def run_side(run: Run, case: Case, side: Side) -> SideResult:
    """One process; the result is what it wrote, or how it ended without."""
    if run.late:
        return SideResult(Outcome.NOT_RUN, f"the {run.options.budget} s given to the whole run were over")
    scratch = run.work / f"{case.name}-{side.value}"
    scratch.mkdir(parents=True)
    job = {
        "case": case.name, "side": side.value, "release": run.stock.version, "target": str(run.folder(side)),
        "scratch": str(scratch), "shared": str(run.work / "shared"), "cases": str(run.options.cases),
        "operators": str(run.options.operators or ""),
    }  # fmt: skip
    (scratch / "job.json").write_text(json.dumps(job), encoding="utf-8")
    log, result = scratch / "log.txt", scratch / "result.json"
    env = environment(run.folder(side), run.work, run.options.site)
    command = [run.options.python, str(HERE / "gpu_child.py"), str(scratch / "job.json"), str(result)]
    started = time.monotonic()
    status = run_to_end(command, env, log, case.limit, scratch)
    seconds = round(time.monotonic() - started, 1)
    said = log.read_text(encoding="utf-8", errors="replace")
    if result.is_file() and status is not None:
        record = json.loads(result.read_text(encoding="utf-8"))
        outcome, lines = Outcome(record["outcome"]), results.excerpt(said)
        return SideResult(
            outcome, record["detail"], seconds, record["measures"], () if outcome is Outcome.PASS else lines
        )
    outcome = Outcome.LATE if status is None else Outcome.DIED
    return SideResult(outcome, f"{ending(status, case.limit)}\n{said[-3000:]}", seconds, {}, results.excerpt(said))


def ending(status: int | None, limit: float) -> str:
    """How a child without a result ended."""
    if status is None:
        return f"late: no end within {limit:.0f} s"
    return f"exit {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"


def perform(run: Run, case: Case, side: Side) -> None:
    """Run one side, keep what it said, and write the file anew."""
    result = run_side(run, case, side)
    with run.lock:
        run.found.setdefault(case.name, {})[side] = result
        first = result.detail.strip().splitlines()[0][:110] if result.detail.strip() else ""
        print(f"{result.seconds:7.1f} s  {case.name:38} {side.value:9} {result.outcome.value:8} {first}", flush=True)
        save(run)


def save(run: Run) -> None:
    """The results so far."""
    done = [case for case in run.cases if len(run.found.get(case.name, {})) == len(case.sides)]
    rows = [results.judge(case, run.stock.version, run.found[case.name]) for case in done]
    cases = [results.as_json(row, run.cleaner) for row in rows]
    results.write(run.options.out, run.info | {"seconds": round(time.monotonic() - run.started, 1), "cases": cases})


def perform_all(run: Run) -> None:
    """The cases that may share the GPU, side by side; then one by one those that must have it alone."""
    for side in {side for case in run.cases for side in case.sides}:
        run.folder(side)  # a side that there is none for is an error before the first process, not after an hour
    shared = [(case, side) for case in run.cases if not case.alone for side in case.sides]
    with ThreadPoolExecutor(run.options.jobs) as pool:
        list(pool.map(lambda item: perform(run, *item), shared))
    for case in run.cases:
        for side in case.sides if case.alone else ():
            perform(run, case, side)


def describe(
    run_id: str, options: argparse.Namespace, stock: targets.Target, patched: targets.Target | None
) -> dict[str, Any]:
    """The head of the run: everything but the cases; "patched" is None where the release has no series."""
    series = targets.patch_set(stock.version)
    env = environment(stock.folder, options.work, options.site)
    return {
        "id": run_id,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "machine": machine(options.python, env),
        "release": stock.version,
        "stock": {"kind": stock.kind, "fixes": stock.verified},
        "patched": {"kind": patched.kind, "fixes": patched.verified, **series} if patched else None,
        "jobs": options.jobs,
    }


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stock", type=Path, help="a site folder with vLLM in it, a wheel or a source tree")
    parser.add_argument("--patched", type=Path, help="the same, patched (default: made from the stock one)")
    parser.add_argument(
        "--site", type=Path, action="append", default=[], help="a folder of further packages (repeatable)"
    )
    parser.add_argument("--operators", type=Path, help="an installed vLLM whose operators a source tree borrows")
    parser.add_argument("--case", action="append", default=[], help="only cases whose name starts so (repeatable)")
    parser.add_argument("--not-case", action="append", default=[], help="leave these out, and record them as not run")
    parser.add_argument("--jobs", type=int, default=1, help="sides that run at once")
    parser.add_argument("--budget", type=float, default=0, help="seconds, after which no further side is started")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--out", type=Path, help="default: ci/results/<date>-<gpu>.json")
    parser.add_argument("--work", type=Path, help="folder for logs and patched copies (default: a temporary one)")
    parser.add_argument("--cases", type=Path, default=HERE / "cases", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="the cases, and what the stock side must fail with")
    options = parser.parse_args(argv)
    if not options.list and options.stock is None:
        parser.error("--stock is needed: the vLLM to test")
    return options


def listing(cases: Mapping[str, Case]) -> str:
    """A row per case."""
    rows = [("case", "releases", "stock must fail with", "about")]
    for case in cases.values():
        expected = case.stock or ("nothing: a control" if case.judged else "not judged")
        rows.append((case.name, " ".join(case.releases), expected, case.about))
    return table(rows)


def chosen(cases: Mapping[str, Case], options: argparse.Namespace, release: str) -> list[Case]:
    """The cases of *release* that were asked for; asking for one that there is not is an error."""
    of_release = [case for case in cases.values() if release in case.releases]
    for prefix in options.case:
        if not any(case.name.startswith(prefix) for case in of_release):
            raise PatchesError(
                "no such case", release=release, expected="a name that --list shows for this release", found=prefix,
                next_command="python tests/gpu/run.py --list",
            )  # fmt: skip
    return [case for case in of_release if not options.case or case.name.startswith(tuple(options.case))]


def default_out(info: Mapping[str, Any]) -> Path:
    """ci/results/<date>-<gpu>.json."""
    gpu = info["machine"]["gpu"].lower().removeprefix("nvidia ").replace(" ", "-")
    return ROOT / "ci" / "results" / f"{info['date'][:10]}-{gpu}.json"


def cleaner_for(
    options: argparse.Namespace, stock: targets.Target, patched: targets.Target | None, work: Path
) -> results.Cleaner:
    """What takes this machine's folders out of the results."""
    folders = {"stock": stock.folder, "work": work, "repository": ROOT}
    folders |= {"patched": patched.folder} if patched else {}
    folders |= {f"site{number}": site for number, site in enumerate(options.site)} | {"python": Path(sys.prefix)}
    return results.Cleaner(folders | ({"operators": options.operators} if options.operators else {}))


def cleaned_command(
    script: str, options: argparse.Namespace, stock: targets.Target, patched: targets.Target | None, work: Path
) -> str:
    """The command as typed, without this machine's folders."""
    return cleaner_for(options, stock, patched, work).text(shlex.join([script, *options.argv]))


def patched_for(stock: targets.Target, options: argparse.Namespace) -> targets.Target | None:
    """The patched vLLM: the given one, else made from *stock*; None where the release has no series to make it with."""
    if options.patched:
        return targets.open_target(options.patched, options.work)
    return targets.make_patched(stock, options.work) if targets.patch_set(stock.version)["series"] else None


def run_cases(options: argparse.Namespace) -> list[results.CaseResult]:
    """Set up both sides, run, and return a row per case."""
    options.work = (options.work or Path(tempfile.mkdtemp(prefix="vllm-patches-gpu-"))).resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    options.site = [site.resolve() for site in options.site]
    options.operators = options.operators.resolve() if options.operators else None
    stock = targets.open_target(options.stock, options.work)
    patched = patched_for(stock, options)
    cases = chosen(load_cases(options.cases), options, stock.version)
    started = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    work = options.work / f"run-{started}-{stock.version}"
    (work / "shared").mkdir(parents=True)
    info = describe(f"{started}-{stock.version}", options, stock, patched)
    options.out = options.out or default_out(info)
    cleaner = cleaner_for(options, stock, patched, work)
    info["command"] = cleaned_command("tests/gpu/run.py", options, stock, patched, work)
    run = Run(options, stock, patched, work, cases, info, cleaner)
    for case in cases:
        if case.name.startswith(tuple(options.not_case) or ("\0",)):
            run.found[case.name] = dict.fromkeys(case.sides, SideResult(Outcome.NOT_RUN, "left out by --not-case"))
    run.cases = [case for case in cases if case.name not in run.found]
    perform_all(run)
    run.cases = cases
    save(run)
    return [results.judge(case, stock.version, run.found[case.name]) for case in cases]


def report(rows: list[results.CaseResult]) -> str:
    """The table, and what each bad row complains of."""
    lines = [("case", "release", "verdict", "stock", "patched", "seconds")]
    for row in rows:
        seconds = sum(side.seconds for side in row.sides.values())
        ended = tuple(row.sides[side].outcome.value if side in row.sides else "no series" for side in lines[0][3:5])
        lines.append((row.case, row.release, row.verdict.value, *ended, f"{seconds:.0f}"))
    complaints = [f"{row.case}: {text}" for row in rows for text in row.complaints]
    return "\n".join([table(lines), *complaints])


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 only if every chosen case has a good verdict."""
    options = arguments(argv)
    options.argv = sys.argv[1:] if argv is None else argv
    if options.list:
        print(listing(load_cases(options.cases)))
        return 0
    try:
        rows = run_cases(options)
    except PatchesError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(rows))
    print(f"results: {options.out}")
    bad = (Verdict.NOT_PROVED, Verdict.NOT_RUN)
    return 0 if rows and not any(row.verdict in bad for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
