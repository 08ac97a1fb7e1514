"""Wrong half-fixes against the proofs: every one must be caught by a check that names it (`make mutants`).

A mutant is killed when a check fails on its own assertion: a listed one when every check does that its row names, a
deletion when any does. A tree on which the case only errors or dies ("broken") and one on which it does not end in
time ("hangs") are told as well, for neither is ever a pass, and are counted apart; a listed mutant has to be killed.
What survives must be listed as equivalent, with the reason, and what is listed so must survive every check.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import proof
from child import NO_END
from mutations import Mutant, mutants_of
from proof import HERE, Side, case_module, proof_trees, read_side
from vllm_patches.render import table
from vllm_patches.series.catalog import Catalog, open_catalog
from vllm_patches.sources import cache
from vllm_patches.trees import git

TIMEOUT = 60.0  # seconds for one mutant; the slowest case takes ten


class Result(Enum):
    """What became of a mutant."""

    KILLED = "killed"  # failed on an assertion: by every check that its row names, or by one if none is named
    BROKEN = "broken"  # told, but by no assertion: it cannot be compiled or imported, or every failed check errs
    HANGS = "hangs"  # told by the time limit
    EQUIVALENT = "equivalent"  # no check can tell it, and the table says why
    SURVIVED = "survived"  # no check told it, or not each of those that the row names
    NOT_EQUIVALENT = "not equivalent"  # a check told what the table calls equivalent


FINE = (Result.KILLED, Result.BROKEN, Result.HANGS, Result.EQUIVALENT)
FINE_IF_LISTED = (Result.KILLED, Result.EQUIVALENT)


@dataclass(frozen=True)
class Verdict:
    """A mutant's end; *by* is the check that told it, or the reason."""

    mutant: Mutant
    result: Result
    by: str

    @property
    def fine(self) -> bool:
        """Whether the proof did with the mutant what it has to."""
        return self.result in (FINE_IF_LISTED if self.mutant.killed_by else FINE)

    def __str__(self) -> str:
        return f"{self.result.value:<14} {self.mutant.fix} {self.mutant.release} {self.mutant.name}  [{self.by}]"


def judge(mutant: Mutant, side: Side) -> Verdict:
    """What the outcomes of a run say about the mutant."""
    failed = [f"{check} ({outcome})" for check, outcome in side.outcomes.items() if outcome.startswith("fail: ")]
    wrong = [f"{check} ({outcome[:80]})" for check, outcome in side.outcomes.items() if outcome != "pass"]
    by = (failed or wrong or side.trouble.splitlines()[:1] or [""])[0]
    if mutant.equivalent:
        return Verdict(mutant, Result.NOT_EQUIVALENT if by else Result.EQUIVALENT, by or mutant.equivalent)
    if mutant.killed_by:
        spared = [name for name in mutant.killed_by if not side.outcomes.get(name, "not run").startswith("fail: ")]
        if spared:
            said = "; ".join(f"{name}: {side.outcomes.get(name, 'not run')[:80]}" for name in spared)
            return Verdict(mutant, Result.SURVIVED, said)
    if failed:
        return Verdict(mutant, Result.KILLED, by)
    if side.trouble.startswith(NO_END):
        return Verdict(mutant, Result.HANGS, by)
    return Verdict(mutant, Result.BROKEN if by else Result.SURVIVED, by)


def judge_all(version: str, mutants: list[Mutant], case_of: dict[str, str]) -> Iterator[Verdict]:
    """Verdicts on mutants of one release as they come; what Python cannot compile needs no run."""
    to_run = []
    for mutant in mutants:
        if error := mutant.syntax_error:
            yield judge(mutant, Side(version, "mutant", {}, {}, {}, error, 0.0))
        else:
            to_run.append(mutant)
    if to_run:
        with cache.scratch(proof.BUILD, ".mutant-") as scratch:
            for mutant, side in _run(version, to_run, case_of, scratch):
                yield judge(mutant, side)


def _run(version: str, mutants: list[Mutant], case_of: dict[str, str], scratch: Path) -> Iterator[tuple[Mutant, Side]]:
    """Each mutant and what the case said on it, from a process that changes a linked copy of the patched tree."""
    tree, out = scratch / "tree", scratch / "out"
    subprocess.run(["cp", "-al", str(proof_trees(version)[1]), str(tree)], check=True)
    out.mkdir()
    jobs, errors = scratch / "jobs.jsonl", scratch / "errors"
    jobs.write_text("".join(_job(number, m, case_of) for number, m in enumerate(mutants)), encoding="utf-8")
    command = [sys.executable, str(HERE / "mutant_child.py"), "--tree", str(tree), "--release", version]
    command += ["--out", str(out), "--timeout", str(TIMEOUT)]
    with jobs.open() as given, errors.open("w") as said:
        child = subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=said, cwd=scratch, text=True)
        done = 0
        for line in child.stdout or ():
            mutant = mutants[int(line)]
            yield mutant, read_side(version, "mutant", out / line.strip() / case_of[mutant.fix])
            done += 1
    if child.wait() or done != len(mutants):
        tail = errors.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(
            f"{version}: {done} of {len(mutants)} mutants were run; exit status {child.returncode}\n{tail}"
        )


def _job(number: int, mutant: Mutant, case_of: dict[str, str]) -> str:
    job = {
        "number": number,
        "case": case_of[mutant.fix],
        "file": mutant.file,
        "text": mutant.text,
        "checks": mutant.killed_by,
        "all": bool(mutant.equivalent),
    }
    return json.dumps(job) + "\n"


def choose(catalog: Catalog, options: argparse.Namespace) -> Iterator[tuple[str, list[Mutant]]]:
    """The mutants of each series, those of one file beside each other."""
    versions = options.pin or [name.removeprefix("v") for name in catalog.series]
    fixes = [fix for fix in catalog.fixes.values() if not options.fix or fix.id in options.fix]
    for version in versions:
        series = catalog.series_of(catalog.release(version))
        carried = {patch.number for patch in series.patches}
        tree = proof_trees(version)[1]
        found = [
            mutant
            for fix in fixes
            if fix.id in carried
            for mutant in mutants_of(fix, series, tree, listed_only=options.listed)
        ]
        yield version, sorted(found, key=lambda mutant: (mutant.fix, mutant.file))


def tell(version: str, mutants: list[Mutant], case_of: dict[str, str]) -> list[Verdict]:
    """Print each verdict as it comes."""
    verdicts = []
    for verdict in judge_all(version, mutants, case_of):
        print(verdict, file=sys.stderr, flush=True)
        verdicts.append(verdict)
    return verdicts


def counts(verdicts: list[Verdict]) -> dict[str, int]:
    """How many of each result that there is, and of all."""
    found = Counter(verdict.result for verdict in verdicts)
    return {result.value: found[result] for result in Result if found[result]} | {"total": len(verdicts)}


def by_cell(verdicts: list[Verdict]) -> dict[str, dict[str, dict[str, int]]]:
    """fix -> release -> counts."""
    cells: dict[str, dict[str, list[Verdict]]] = {}
    for verdict in verdicts:
        cells.setdefault(verdict.mutant.fix, {}).setdefault(verdict.mutant.release, []).append(verdict)
    return {
        fix: {release: counts(found) for release, found in sorted(releases.items())}
        for fix, releases in sorted(cells.items())
    }


def _table(verdicts: list[Verdict]) -> str:
    rows = [("fix", "release", *(result.value for result in Result), "total")]
    for fix, releases in by_cell(verdicts).items():
        for release, found in releases.items():
            rows.append((fix, release, *(str(found.get(result.value, 0)) for result in Result), str(found["total"])))
    return table(rows)


def tested_commit() -> str:
    """The commit of this checkout; what is not committed cannot be named in a record: an error."""
    if changed := git.status(proof.ROOT):
        raise SystemExit(f"error: a record names a commit, but there are changes: {changed[0]}\n  next:     git status")
    return git.rev_parse(proof.ROOT, "HEAD") or "none"


def record(path: Path, commit: str, verdicts: list[Verdict]) -> None:
    """Write the counts of a whole run of *commit*, with the date and the CPU seconds of all its processes."""
    cells = {
        fix: {
            release: ", ".join(f"{count} {name}" for name, count in found.items()) for release, found in of_fix.items()
        }
        for fix, of_fix in by_cell(verdicts).items()
    }
    data = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "cpu_seconds": round(sum(os.times()[:4])),
        "all": counts(verdicts),
        "fixes": cells,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Print every verdict and the counts; exit status 1 if one is not as it has to be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pin", action="append", help="only this release (repeatable); default: every series'")
    parser.add_argument("--fix", action="append", help="only this fix (repeatable)")
    parser.add_argument("--listed", action="store_true", help="only the listed half-fixes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="releases side by side")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the counts of a whole run to this file")
    options = parser.parse_args()
    if options.record and (options.pin or options.fix or options.listed):
        parser.error("--record is for a whole run, without --pin, --fix and --listed")
    commit = tested_commit() if options.record else ""
    catalog = open_catalog()
    case_of = {fix.id: case_module(fix) for fix in catalog.fixes.values()}
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda chosen: tell(*chosen, case_of), list(choose(catalog, options))))
    verdicts = [verdict for of_release in found for verdict in of_release]
    wrong = [verdict for verdict in verdicts if not verdict.fine]
    if options.json:
        print(json.dumps([_row(verdict) for verdict in verdicts], indent=1))
    else:
        print(_table(verdicts))
        print("\n".join(map(str, wrong)))
    print(", ".join(f"{count} {name}" for name, count in counts(verdicts).items()), file=sys.stderr)
    if options.record:
        record(options.record, commit, verdicts)
    return 0 if verdicts and not wrong else 1


def _row(verdict: Verdict) -> dict[str, str]:
    mutant = verdict.mutant
    said = {"fix": mutant.fix, "release": mutant.release, "name": mutant.name}
    return said | {"result": verdict.result.value, "by": verdict.by}


if __name__ == "__main__":
    sys.exit(main())
