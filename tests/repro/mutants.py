"""Wrong half-fixes against the proofs: every one must be caught by a check that names it (`make mutants`).

Two kinds. The listed mutants of ``mutants/<fix>.toml`` are half-fixes that somebody might write. The deletions are made
here: each line that a patch adds is taken out alone, unless it is blank or a comment. A mutant is killed when a check
fails on its own assertion; a tree that cannot even be imported is killed as well, and said to be ("broken"). What
survives must be listed as equivalent, with the reason.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import proof
from proof import HERE, Side, proof_trees, run_cases
from vllm_patches.catalog import open_catalog
from vllm_patches.hunks import index_of
from vllm_patches.model import FilePatch, Fix, Release


@dataclass(frozen=True)
class Mutant:
    """One wrong tree: *file* with *text* instead of the patched one."""

    fix: str
    release: str
    name: str
    file: str
    text: str
    killed_by: tuple[str, ...] = ()  # empty: any check may kill it
    equivalent: str = ""  # why no check can tell it from the patch


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: killed, broken (no import), equivalent, or survived."""

    fix: str
    release: str
    name: str
    result: str
    by: str

    @property
    def fine(self) -> bool:
        """True unless the proof let the mutant through, or calls one equivalent that it can tell."""
        return self.result in ("killed", "broken", "equivalent")


def listed_mutants(fix: Fix, release: Release, tree: Path) -> Iterator[Mutant]:
    """The half-fixes of ``mutants/<fix>.toml`` that are written for this release."""
    table = HERE / "mutants" / f"{fix.id}.toml"
    for row in tomllib.loads(table.read_text(encoding="utf-8")).get("mutant", []):
        if release.version not in row["releases"]:
            continue
        text = (tree / row["file"]).read_text(encoding="utf-8")
        if text.count(row["find"]) != 1:
            raise SystemExit(f"{table.name}: {row['name']}: 'find' occurs {text.count(row['find'])} times, not once")
        mutated = text.replace(row["find"], row["replace"])
        killed_by, equivalent = tuple(row.get("killed_by", ())), row.get("equivalent", "")
        yield Mutant(fix.id, release.version, row["name"], row["file"], mutated, killed_by, equivalent)


def deletions(fix: Fix, release: Release, tree: Path) -> Iterator[Mutant]:
    """One mutant for each line of code that the patch adds."""
    series = open_catalog().series_of(release)
    excused = _excused(fix)
    for patch in series.patches:
        if patch.number != fix.id:
            continue
        for file in patch.files:
            lines = (tree / file.path).read_text(encoding="utf-8").splitlines(keepends=True)
            for number in _added(file, lines):
                code = lines[number].strip()
                text = "".join(lines[:number] + lines[number + 1 :])
                name = f"without {file.path}:{number + 1}: {code}"
                yield Mutant(fix.id, release.version, name, file.path, text, (), excused.get(code, ""))


def _excused(fix: Fix) -> dict[str, str]:
    """Lines whose deletion changes nothing that can be told, with the reason."""
    table = tomllib.loads((HERE / "mutants" / f"{fix.id}.toml").read_text(encoding="utf-8"))
    return {row["line"].strip(): row["reason"] for row in table.get("equivalent_line", [])}


def _added(file: FilePatch, lines: list[str]) -> Iterator[int]:
    """Indexes in the patched file of the added lines that hold code."""
    for hunk in file.hunks:
        at = index_of(hunk.new_start, hunk.new_count)
        for line in hunk.lines:
            if line[:1] == b"+" and not _is_comment(lines[at].strip()):
                yield at
            at += line[:1] != b"-"


def _is_comment(code: str) -> bool:
    return not code or code.startswith(("#", "//")) or code in (")", "}", "(", "{", "],", "),")


def judge(fix: Fix, mutant: Mutant, patched: Path) -> Verdict:
    """Run the case on the mutated tree."""
    with tempfile.TemporaryDirectory(prefix=".mutant-", dir=proof.BUILD) as scratch:
        tree = Path(scratch) / "tree"
        subprocess.run(["cp", "-al", str(patched), str(tree)], check=True)
        target = tree / mutant.file
        target.unlink()  # never write through the link
        target.write_text(mutant.text, encoding="utf-8")
        side = run_cases((fix,), mutant.release, "mutant", tree, mutant.killed_by)[fix.id]
        shutil.rmtree(tree)
    result, by = _result(side)
    if mutant.equivalent:
        result = "equivalent" if result == "survived" else "not equivalent"
        by = by or mutant.equivalent
    return Verdict(mutant.fix, mutant.release, mutant.name, result, by)


def _result(side: Side) -> tuple[str, str]:
    failed = [f"{check} ({outcome})" for check, outcome in side.outcomes.items() if outcome.startswith("fail: ")]
    if failed:
        return "killed", "; ".join(failed[:2])
    wrong = [f"{check} ({outcome[:80]})" for check, outcome in side.outcomes.items() if outcome != "pass"]
    if wrong or side.trouble:
        return "broken", (wrong or [side.trouble.splitlines()[-1]])[0]
    return "survived", ""


def main() -> int:
    """Print every mutant that is not simply killed, and the counts; exit status 1 if one survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pin", action="append", help="only this release (repeatable); default: every series'")
    parser.add_argument("--fix", action="append", help="only this fix (repeatable)")
    parser.add_argument("--listed", action="store_true", help="only the listed half-fixes")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    work = list(_work(options))
    with ThreadPoolExecutor(options.jobs) as pool:
        verdicts = list(pool.map(lambda item: _judge_and_tell(*item), work))
    killed = sum(verdict.result in ("killed", "broken") for verdict in verdicts)
    equivalent = sum(verdict.result == "equivalent" for verdict in verdicts)
    if options.json:
        print(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    print(f"{killed} killed, {equivalent} equivalent, of {len(verdicts)}", file=sys.stderr)
    return 0 if verdicts and all(verdict.fine for verdict in verdicts) else 1


def _work(options: argparse.Namespace) -> Iterator[tuple[Fix, Mutant, Path]]:
    catalog = open_catalog()
    for version in options.pin or [name.removeprefix("v") for name in catalog.series]:
        release = catalog.release(version)
        carried = {patch.number for patch in catalog.series_of(release).patches}
        patched = proof_trees(version)[1]
        for fix in catalog.fixes.values():
            if fix.id not in carried or (options.fix and fix.id not in options.fix):
                continue
            for mutant in listed_mutants(fix, release, patched):
                yield fix, mutant, patched
            for mutant in () if options.listed else deletions(fix, release, patched):
                yield fix, mutant, patched


def _judge_and_tell(fix: Fix, mutant: Mutant, patched: Path) -> Verdict:
    verdict = judge(fix, mutant, patched)
    print(
        f"{verdict.result:<14} {mutant.fix} {mutant.release} {mutant.name}  [{verdict.by}]", file=sys.stderr, flush=True
    )
    return verdict


if __name__ == "__main__":
    sys.exit(main())
