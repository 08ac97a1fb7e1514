"""Run the mutants of one release, each forked from a process that has imported everything its file cannot change.

    python tests/repro/mutant_child.py --tree DIR --release 0.20.2 --out FOLDER <jobs.jsonl

DIR is a patched tree that may be changed: one file at a time, written beside and renamed, and put back. Three levels
of processes: this one has the imports of all cases; a group, for each mutated file, those that the file cannot change;
a mutant. Before its mutants each group runs the whole case on the unchanged tree: it must pass, or no verdict counts.
The result files are ``<out>/<job>/<case>.json``; the number of each job that is done is printed.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import preload
from child import HERE, Run, forked, own_session, run_case, run_forked, start


@dataclass(frozen=True)
class Job:
    """One mutant: *file*, relative to the tree, holds *text*. *checks* as in `Run`; empty: the first that fails."""

    number: int
    case: str
    file: str
    text: str
    checks: list[str]
    all: bool  # run all checks although none is named


@dataclass(frozen=True)
class Bench:
    """Where the mutants of a release run."""

    tree: Path
    release: str
    out: Path
    timeout: float  # seconds for one mutant

    def run(self, name: str, case: str, checks: tuple[str, ...] = (), *, first_fail: bool = False) -> Run:
        """A run of *case* with the folder *name* for its results."""
        out = self.out / name
        out.mkdir()
        return Run(case, self.release, self.tree, out, checks, first_fail, self.timeout)


def in_a_fork(function: Callable[[], None]) -> None:
    """Call *function* in a process of its own; an error there ends this one too."""
    if os.waitpid(forked(function), 0)[1]:
        raise SystemExit(1)


def probe(bench: Bench, case: str, report: Path, files: list[str]) -> None:
    """Run the case on the unchanged tree; write which modules each of *files* leaves alone."""
    before = set(sys.modules)
    run = bench.run(f"probe-{case}", case)
    own_session(run)
    with preload.recorded() as imports:
        run_case(run)
    # in the order in which they were first asked for
    after = preload.files_of(set(sys.modules) - before)
    ordered = {name: after[name] for name in sys.modules if name in after}
    found = {file: preload.untouched(ordered, imports, bench.tree / file, HERE) for file in files}
    report.write_text(json.dumps(found), encoding="utf-8")


def baseline(bench: Bench, case: str, name: str) -> list[str]:
    """The checks of the case, all of which pass on the unchanged tree: an error if one does not."""
    run = bench.run(name, case)
    run_forked(run)
    result = json.loads(run.result.read_text(encoding="utf-8"))
    wrong = [check for check in result.get("checks", []) if check["outcome"] != "pass"]
    if wrong or not result.get("complete"):
        raise RuntimeError(f"{case} does not pass on the patched tree of {bench.release}: {wrong or result}")
    return [check["check"] for check in result["checks"]]


def run_group(bench: Bench, case: str, file: str, modules: list[str], jobs: list[Job]) -> None:
    """Every mutant of one file."""
    target = bench.tree / file
    patched = target.read_bytes()
    preload.load(modules, target)
    gc.freeze()  # a collection in a fork would copy every page of what is imported
    order = baseline(bench, case, f"unchanged-{jobs[0].number}")
    for job in jobs:
        checks = job.checks or order
        run = bench.run(str(job.number), case, tuple(checks), first_fail=not (job.checks or job.all))
        replace(target, job.text.encode())
        try:
            run_forked(run)
        finally:
            replace(target, patched)
        print(job.number, flush=True)
        if not job.checks:
            order = killers_first(order, run)


def killers_first(order: list[str], run: Run) -> list[str]:
    """The checks in *order*, that which has just killed a mutant before all others."""
    result = json.loads(run.result.read_text(encoding="utf-8"))
    killers = [check["check"] for check in result.get("checks", []) if check["outcome"] == "fail"]
    return killers + [check for check in order if check not in killers]


def replace(target: Path, data: bytes) -> None:
    """A new file in the place of *target*, whose bytes may be linked from elsewhere."""
    beside = target.with_name(f"{target.name}.mutant")
    beside.write_bytes(data)
    beside.replace(target)


def grouped(jobs: list[Job], key: str) -> Iterator[tuple[str, list[Job]]]:
    """Consecutive jobs with the same *key*."""
    for value, group in itertools.groupby(jobs, lambda job: getattr(job, key)):
        yield value, list(group)


def main() -> int:
    """Run the jobs on stdin, grouped by case and file as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", required=True, type=Path)
    parser.add_argument("--release", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one mutant")
    options = parser.parse_args()
    bench = Bench(options.tree.resolve(), options.release, options.out, options.timeout)
    jobs = [Job(**json.loads(line)) for line in sys.stdin]
    start(bench.tree, bench.release)
    for case, of_case in grouped(jobs, "case"):
        report = bench.out / f"{case}.modules"
        files = sorted({job.file for job in of_case})
        in_a_fork(lambda case=case, report=report, files=files: probe(bench, case, report, files))
        modules = json.loads(report.read_text(encoding="utf-8"))
        for file, of_file in grouped(of_case, "file"):
            in_a_fork(
                lambda case=case, file=file, names=modules[file], jobs=of_file: run_group(
                    bench, case, file, names, jobs
                )
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
