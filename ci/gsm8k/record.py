"""A run's results as committed files: `ci/results/gsm8k-<date>-<gpu>-<name>.json`, `.svg` and the tables of pairs.

Everything is worked out again from what the sides have left, so a report of an older harness gains what was added.
"""

from __future__ import annotations

import datetime
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from gsm8k.report import ModeReport, as_json, plot, report_mode
from gsm8k.runs import Mode, Outcome, Ran, crash_sign, read_run
from gsm8k.scenario import Scenario
from gsm8k.sides import CODE, RunError

RESULTS = CODE / "results"


def record(out: Path, name: str, note: str, results: Path = RESULTS) -> list[Path]:
    """Write the results of the run in *out*; the files."""
    if not (out / "report.json").is_file():
        raise RunError(f"{out} has no report.json: the run has not ended\n  next:     make gsm8k MODEL=...")
    old: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    scenario = Scenario(**old["job"]["scenario"])
    reports = [_mode(Mode(mode), scenario, out, old["margin"]) for mode in old["modes"]]
    about = {key: old[key] for key in ("sides", "machine", "commit")} | {"date": last_day(out)}
    about |= {"note": note} if note else {}
    said = as_json(old["job"], old["margin"], reports, about, {})
    for mode in said["modes"]:  # the old report's commands have the names that stand for paths of that machine
        for side in ("stock", "patched"):
            said["modes"][mode][side]["command"] = old["modes"][mode][side]["command"]
    return _write(said, reports, out, results, name)


def last_day(out: Path) -> str:
    """The day on which the last side in *out* ended."""
    ended = max(file.stat().st_mtime for file in out.glob("*/*/side.json"))
    return datetime.datetime.fromtimestamp(ended, datetime.UTC).date().isoformat()


def _mode(mode: Mode, scenario: Scenario, out: Path, margin: float) -> ModeReport:
    stock, patched = (_run(scenario, out / mode.value / side) for side in ("stock", "patched"))
    return report_mode(mode, stock, patched, margin, out)


def _run(scenario: Scenario, folder: Path) -> Ran:
    ran = read_run(folder)
    sign = crash_sign(scenario, folder) if ran.outcome is Outcome.CRASHED else ""
    return replace(ran, sign=sign or ran.sign)


def _write(said: dict[str, Any], reports: list[ModeReport], out: Path, results: Path, name: str) -> list[Path]:
    gpu = re.sub(r"[^a-z0-9]+", "-", said["machine"]["gpu"].lower()).strip("-")
    stem = f"gsm8k-{said['date']}-{gpu}-{name}"
    results.mkdir(parents=True, exist_ok=True)
    written = [results / f"{stem}.json", results / f"{stem}.svg"]
    written[0].write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    plot(reports, said["margin"], f"{said['job']['model']}, {said['job']['scenario']['name']}", written[1])
    for report in reports:
        pairs = out / f"pairs-{report.mode.value}.tsv"
        if report.metrics:
            written.append(results / f"{stem}-{report.mode.value}.tsv")
            shutil.copyfile(pairs, written[-1])
    return written
