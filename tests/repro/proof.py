"""The proof of one fix on one release: the same repro on the stock and on the patched tree, each in its own process.

Only the pair counts: stock fails on the assertions that the case names for this release, and on nothing else;
patched passes every check. Where upstream has the fix, or the code is not there, stock passes every check. An error, a
skip, a time-out, a crash on import, a check that did not run: each is a failed proof, whatever the rest says.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = Path(os.environ.get("VLLM_PATCHES_PROOF_TREES", ROOT / "build" / "proof"))
FIRST_PINS = ("0.18.1", "0.19.1", "0.20.2", "0.21.0")
TIMEOUT = 300.0  # seconds for one side; a repro takes about ten

sys.path[:0] = [str(ROOT / "scripts"), str(HERE), str(HERE / "cases")]

from vllm_patches import git  # noqa: E402
from vllm_patches.apply import apply_release  # noqa: E402
from vllm_patches.catalog import Catalog, open_catalog  # noqa: E402
from vllm_patches.index import fetch_sdist  # noqa: E402
from vllm_patches.model import Fix, Release  # noqa: E402
from vllm_patches.render import say, table  # noqa: E402
from vllm_patches.tree import PRISTINE  # noqa: E402


@dataclass(frozen=True)
class Side:
    """What one tree answered. *outcomes* is check to "pass", "error: …" or "fail: <assertion id>"."""

    release: str
    side: str  # "stock" or "patched"
    outcomes: dict[str, str]
    where: dict[str, str]  # check to file:line of the defect it met
    stock_fails: dict[str, str]  # check to the assertion id that the case wants of this release's stock tree
    trouble: str  # why the run as a whole cannot be judged; empty if it can
    seconds: float


@dataclass(frozen=True)
class Proof:
    """Both sides of one fix on one release; *patched* is None where the series does not carry the fix."""

    fix: str
    release: str
    state: str
    stock: Side
    patched: Side | None

    @property
    def complaints(self) -> list[str]:
        """Everything that keeps this from being a proof; empty for a proof."""
        expected = self.stock.stock_fails
        found = [f"stock: {text}" for text in _judge(self.stock, expected)]
        if self.patched is not None:
            found += [f"patched: {text}" for text in _judge(self.patched, {})]
            if not expected:
                found.append("the series carries a patch, but no check fails on the stock tree")
        elif expected:
            found.append("stock must fail, but the series carries no patch")
        return found


def _judge(side: Side, expected: dict[str, str]) -> list[str]:
    if side.trouble:
        return [side.trouble]
    wrong = [f"{check} is expected to fail but is not a check" for check in expected.keys() - side.outcomes.keys()]
    for check, outcome in side.outcomes.items():
        wanted = f"fail: {expected[check]}" if check in expected else "pass"
        if outcome != wanted:
            wrong.append(f"{check}: expected {wanted!r}, got {outcome!r}")
        elif check in expected and ":" not in side.where.get(check, ""):
            wrong.append(f"{check}: failed as expected, but named no file:line")
    return wrong


def case_module(fix: Fix) -> str:
    """The module in ``cases/`` that proves *fix*."""
    return fix.slug.replace("-", "_")


def prove(catalog: Catalog, fix: Fix, release: Release) -> Proof:
    """Run both sides of *fix* on *release*."""
    carried = fix.id in {patch.number for patch in catalog.series_of(release).patches}
    stock = run_side(fix, release, "stock")
    patched = run_side(fix, release, "patched") if carried else None
    return Proof(fix.id, release.version, release.states[fix.id].state.value, stock, patched)


def run_side(fix: Fix, release: Release, side: str) -> Side:
    """Run the case of *fix* in a new process on the stock or patched tree of *release*."""
    stock, patched = proof_trees(release.version)
    return run_case(fix, release.version, side, stock if side == "stock" else patched)


def run_case(fix: Fix, version: str, side: str, tree: Path, only: tuple[str, ...] = ()) -> Side:
    """Run the case of *fix*, or some of its checks, in a new process on *tree*."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="proof-") as scratch:
        result = Path(scratch) / "result.json"
        command = [sys.executable, str(HERE / "child.py"), "--case", case_module(fix), "--tree", str(tree)]
        command += ["--release", version, "--result", str(result)]
        command += [word for name in only for word in ("--only", name)]
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=TIMEOUT, check=False)
            status: int | None = done.returncode
            tail = (done.stdout + done.stderr)[-2000:]
        except subprocess.TimeoutExpired:
            status, tail = None, ""
        record = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
    return _read_side(version, side, record, status, tail, time.perf_counter() - started)


def _read_side(version: str, side: str, record: dict[str, Any], status: int | None, tail: str, seconds: float) -> Side:
    outcomes: dict[str, str] = {}
    where: dict[str, str] = {}
    for check in record.get("checks", []):
        kind = check["outcome"]
        detail = check.get("assertion") if kind == "fail" else check.get("detail")
        outcomes[check["check"]] = kind if kind == "pass" else f"{kind}: {detail}"
        where[check["check"]] = check.get("where", "")
    trouble = ""
    if status != 0 or not record.get("complete"):
        trouble = f"{_ending(status)} while running {record.get('running', 'nothing')!r}\n{tail}".rstrip()
    elif not outcomes:
        trouble = "no check was run"
    wanted = dict(record.get("stock_fails", {}))
    return Side(version, side, outcomes, where, wanted, trouble, round(seconds, 1))


def _ending(status: int | None) -> str:
    if status is None:
        return f"no end within {TIMEOUT:.0f} s"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


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


def _prove_and_tell(catalog: Catalog, fix: Fix, release: Release) -> Proof:
    found = prove(catalog, fix, release)
    say(f"{fix.id} on {release.version}: {'; '.join(found.complaints) or 'proved'}")
    return found


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
    for version in versions:
        proof_trees(version)
    work = [(f, catalog.release(v)) for v in versions for f in catalog.fixes.values() if f.id in (options.fix or f.id)]
    with ThreadPoolExecutor(options.jobs) as pool:
        proofs = list(pool.map(lambda item: _prove_and_tell(catalog, *item), work))
    if options.json:
        print(json.dumps([asdict(p) | {"complaints": p.complaints} for p in proofs], indent=1))
    else:
        print(_table(proofs))
    return 0 if proofs and not any(p.complaints for p in proofs) else 1


if __name__ == "__main__":
    sys.exit(main())
