"""The proof of one fix on one release: the same repro on the stock and on the patched tree, each in its own process.

`vllm_patches.upkeep.proofrun` has the rule; what stock must fail on is in expected.toml. An error, a skip, a time-out,
a crash on import, a check that did not run: each is a failed proof, whatever the rest says.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = Path(os.environ.get("VLLM_PATCHES_PROOF_TREES", ROOT / "build" / "proof"))
FIRST_PINS = ("0.18.1", "0.19.1", "0.20.2", "0.21.0")
TIMEOUT = 300.0  # seconds for one side; a repro takes about ten

sys.path[:0] = [str(ROOT / "scripts"), str(HERE), str(HERE / "cases")]

from vllm_patches.render import say, table  # noqa: E402
from vllm_patches.series.catalog import Catalog, open_catalog  # noqa: E402
from vllm_patches.series.model import Fix, Release  # noqa: E402
from vllm_patches.sources.index import fetch_sdist  # noqa: E402
from vllm_patches.trees import git  # noqa: E402
from vllm_patches.trees.apply import apply_release  # noqa: E402
from vllm_patches.trees.tree import PRISTINE  # noqa: E402
from vllm_patches.upkeep.proofrun import Proof, Side  # noqa: E402

Answers = Callable[[str, str], dict[str, Side]]  # (release, "stock" or "patched") to the sides by fix id


def case_module(fix: Fix) -> str:
    """The module in ``cases/`` that proves *fix*."""
    return fix.slug.replace("-", "_")


def prove(catalog: Catalog, fix: Fix, release: Release, answers: Answers | None = None) -> Proof:
    """Both sides of *fix* on *release*; all fixes of one tree are run at once, so that they share its imports."""
    answers = answers or sides
    carried = fix.id in {patch.number for patch in catalog.series_of(release).patches}
    stock = answers(release.version, "stock")[fix.id]
    patched = answers(release.version, "patched")[fix.id] if carried else None
    return Proof(fix.id, release.version, release.states[fix.id].state.value, stock, patched)


@cache
def sides(version: str, side: str) -> dict[str, Side]:
    """What the cases of all five fixes answer on the stock or patched tree of a release, by fix id."""
    stock, patched = proof_trees(version)
    return run_cases(tuple(open_catalog().fixes.values()), version, side, stock if side == "stock" else patched)


def run_cases(fixes: tuple[Fix, ...], version: str, side: str, tree: Path) -> dict[str, Side]:
    """Run the cases of *fixes* on *tree*, each in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="proof-") as scratch:
        command = [sys.executable, str(HERE / "child.py"), *map(case_module, fixes), "--tree", str(tree)]
        command += ["--release", version, "--out", scratch, "--timeout", str(TIMEOUT)]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        tail = (done.stdout + done.stderr)[-2000:] if done.returncode else ""
        return {fix.id: read_side(version, side, Path(scratch) / case_module(fix), tail) for fix in fixes}


def read_side(version: str, side: str, path: Path, tail: str = "") -> Side:
    """The result file of one case; without a complete one the run cannot be judged, and says why.

    *path* has no suffix; *tail* is said where the case has left no log.
    """
    result, log = path.with_suffix(".json"), path.with_suffix(".log")
    record: dict[str, Any] = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    checks = record.get("checks", [])
    outcomes = {check["check"]: _outcome(check) for check in checks}
    where = {check["check"]: check.get("where", "") for check in checks}
    trouble = ""
    if record.get("ending") != "exit 0" or not record.get("complete"):
        said = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.is_file() else tail
        ending = record.get("ending", "not started")
        trouble = f"{ending} while running {record.get('running', 'nothing')!r}\n{said}".rstrip()
    elif not outcomes:
        trouble = "no check was run"
    wanted = dict(record.get("stock_fails", {}))
    return Side(version, side, outcomes, where, wanted, trouble, round(record.get("seconds", 0.0), 1))


def _outcome(check: dict[str, Any]) -> str:
    """ "pass", "fail: <assertion id>" or "error: <what>"."""
    kind: str = check["outcome"]
    return kind if kind == "pass" else f"{kind}: {check['assertion' if kind == 'fail' else 'detail']}"


@cache
def proof_trees(version: str) -> tuple[Path, Path]:
    """The stock and the patched tree of a release; the stock one is hard-linked but for the touched files."""
    catalog = open_catalog()
    release = catalog.release(version)
    applied = apply_release(catalog, release, fetch_sdist, BUILD, say)
    patched = Path(applied.tree)
    stock = BUILD / f"stock-{version}-{applied.head[:12]}"
    if not stock.exists():
        with tempfile.TemporaryDirectory(prefix=".stock-", dir=BUILD) as scratch:
            tree = Path(scratch) / "tree"
            _link_pristine(patched, tree, catalog.series_of(release).paths)
            tree.rename(stock)
    return stock, patched


def _link_pristine(patched: Path, tree: Path, touched: tuple[str, ...]) -> None:
    subprocess.run(["cp", "-al", str(patched), str(tree)], check=True)
    blobs = git.blobs(patched, PRISTINE, touched)
    contents = git.read_blobs(patched, blobs.values())
    for path, blob in blobs.items():
        target = tree / path
        target.unlink()  # never write through the link
        target.write_bytes(contents[blob])


def _run_and_tell(version: str, side: str) -> None:
    say(f"{version}, {side} tree")
    sides(version, side)


def _table(proofs: list[Proof]) -> str:
    rows = [("fix", "release", "state", "stock", "patched", "verdict", "seconds")]
    for p in proofs:
        total = p.stock.seconds + (p.patched.seconds if p.patched else 0)
        verdict = "PROVED" if not p.complaints else "NOT PROVED"
        rows.append((p.fix, p.release, p.state, _count(p.stock), _count(p.patched), verdict, f"{total:.0f}"))
    return table(rows)


def _count(side: Side | None) -> str:
    """How many checks failed on their own assertion, of how many."""
    if side is None:
        return "-"
    failed = sum(outcome.startswith("fail: ") for outcome in side.outcomes.values())
    return f"{failed} of {len(side.outcomes)} fail"


def main() -> int:
    """`make prove`: the proof table; exit status 1 if one is not a proof."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pin", default="", help="release, or 'all' (default: the first four pins)")
    parser.add_argument("--fix", action="append", help="only this fix (repeatable)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    catalog = open_catalog()
    versions = [options.pin] if options.pin else list(FIRST_PINS)
    if options.pin == "all":
        versions = [name.removeprefix("v") for name in catalog.series]
    work = [(v, side) for v in versions for side in ("stock", "patched") if proof_trees(v)]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda item: _run_and_tell(*item), work))
    chosen = [fix for fix in catalog.fixes.values() if fix.id in (options.fix or catalog.fixes)]
    proofs = [prove(catalog, fix, catalog.release(version)) for version in versions for fix in chosen]
    if options.json:
        heads = {version: catalog.release(version).head for version in versions}  # which series it was
        print(
            json.dumps([asdict(p) | {"head": heads[p.release], "complaints": p.complaints} for p in proofs], indent=1)
        )
    else:
        print(_table(proofs))
        print("\n".join(f"{p.fix} on {p.release}: {text}" for p in proofs for text in p.complaints))
    return 0 if proofs and not any(p.complaints for p in proofs) else 1


if __name__ == "__main__":
    sys.exit(main())
