"""`python -m gsm8k run`: gsm8k on stock and on patched vLLM, compared; `python -m gsm8k data`: the offline task."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpurun.provenance import commit, machine
from vllm_patches.errors import PatchesError
from vllm_patches.installed.installation import base_version

from gsm8k.fixture import MODELS, write_data
from gsm8k.record import last_day, record
from gsm8k.report import ModeReport, as_json, plot, report_mode, table
from gsm8k.runs import Job, Mode, run_side
from gsm8k.scenario import Scenario, scenario_of
from gsm8k.sides import ROOT, RunError, Side, fixes_of, patched_copy, side_of
from gsm8k.stats import enough

NO_VLLM = {"vllm": "not in this run"}


def main() -> int:
    """The command line; 0 only where the patched side has shown itself no worse in every mode."""
    options = _parser().parse_args()
    try:
        if options.verb == "data":
            write_data()
            return 0
        if options.verb == "record":
            print("\n".join(map(str, record(options.out.resolve(), options.name, options.note))))
            return 0
        return _run(options)
    except (RunError, PatchesError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gsm8k", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("data", help="write the offline task's questions, from their seed")
    keep = verbs.add_parser("record", help="write a run's results to ci/results")
    keep.add_argument("out", type=Path, help="the run's folder")
    keep.add_argument("--name", required=True, help="the end of the files' name")
    keep.add_argument("--note", default="", help="what a reader has to know about the sides or the machine")
    run = verbs.add_parser("run", help="stock and patched, the same questions")
    run.add_argument("--model", default="", help="a model's name or folder, or fixture:NAME; default: the scenario's")
    run.add_argument("--scenario", default="", help="a name or a fix of ci/scenarios.toml")
    run.add_argument("--mode", action="append", choices=[mode.value for mode in Mode], help="default: both of vLLM's")
    run.add_argument("--stock", default="", help="an interpreter, or a folder with vllm/ in it (default: this one's)")
    run.add_argument("--patched", default="", help="likewise; default: the stock side's vLLM, copied and patched")
    run.add_argument("--python", default=sys.executable, help="the interpreter for sides given as folders")
    run.add_argument("--tp", type=int, default=0, help="tensor parallel size (default: the scenario's GPUs)")
    run.add_argument("--limit", type=int, default=0, help="questions (default: all)")
    run.add_argument("--margin", type=float, default=0.02, help="what still counts as the same accuracy")
    run.add_argument("--concurrency", type=int, default=256, help="requests at a time on the served endpoint")
    run.add_argument("--time-limit", type=float, default=4 * 3600.0, help="seconds, of one side in one mode")
    run.add_argument("--engine", type=json.loads, default={}, help="further engine arguments of vLLM, as JSON")
    run.add_argument("--out", type=Path, default=Path("build/gsm8k"), help="finished sides in it are kept")
    return parser


def _run(options: argparse.Namespace) -> int:
    scenario = scenario_of(options.scenario)
    model, task = _model(options.model or scenario.model, scenario)
    modes = [Mode(name) for name in options.mode or ("in-process", "served")]
    out = options.out.resolve()
    job = Job(
        task=task,
        model=model,
        scenario=scenario,
        limit=options.limit,
        tensor_parallel=options.tp or scenario.gpus,
        concurrency=options.concurrency,
        time_limit=options.time_limit,
        engine=options.engine,
    )
    _say_if_few(options)
    out.mkdir(parents=True, exist_ok=True)
    sides = _sides(options, out, [mode for mode in modes if mode is not Mode.HF])
    _say_if_other_release(scenario, sides[0][1]["vllm"])
    about = _about(sides)
    reports: list[ModeReport] = []
    for mode in modes:
        ran = [run_side(job, side, mode, {} if mode is Mode.HF else fixes, out) for side, fixes in sides]
        reports.append(report_mode(mode, ran[0], ran[1], options.margin, out))
        _write(job, options, reports, sides, about, out)
    print(table(reports, options.margin))
    print(f"report: {out}/report.json, report.svg, pairs-*.tsv")
    return 0 if all(report.verdict.fine for report in reports) else 1


def _model(name: str, scenario: Scenario) -> tuple[str, str]:
    """The model and the task: the offline models answer the offline task, all others gsm8k."""
    if not name:
        raise RunError("no model\n  next:     make gsm8k MODEL=Qwen/Qwen3-0.6B    # or MODEL=fixture:dense")
    kind, _, place = name.partition(":")
    if kind != "fixture":
        return name, "gsm8k"
    place = place or scenario.fixture or "dense"
    folder = MODELS / place if (MODELS / place).is_dir() else Path(place).absolute()
    if not (folder / "config.json").is_file():
        known = " ".join(f"fixture:{found.name}" for found in sorted(MODELS.iterdir()))
        raise RunError(f"MODEL={name}: no model in {folder}\n  next:     make gsm8k MODEL=...    # {known}")
    return str(folder), "fixture"


def _say_if_few(options: argparse.Namespace) -> None:
    if 0 < options.limit < (least := enough(options.margin)):
        print(
            f"note: {options.limit} questions cannot show 'same' within {options.margin}; that takes {least} or more",
            file=sys.stderr,
        )


def _say_if_other_release(scenario: Scenario, release: str) -> None:
    """A scenario tells what to expect in its own releases only; in others it is a control."""
    if scenario.pins and release != NO_VLLM["vllm"] and base_version(release) not in scenario.pins:
        print(f"note: scenario {scenario.name} is for {', '.join(scenario.pins)}; this is {release}", file=sys.stderr)


def _sides(options: argparse.Namespace, out: Path, vllm: list[Mode]) -> list[tuple[Side, dict[str, str]]]:
    """Both sides, each with what `verify` says of it; without vLLM in the run there is nothing to verify."""
    stock = side_of("stock", options.stock, options.python)
    if not vllm:
        return [(stock, NO_VLLM), (side_of("patched", options.patched, options.python), NO_VLLM)]
    found = fixes_of(stock)
    if options.patched:
        patched = side_of("patched", options.patched, options.python)
    else:
        patched = patched_copy(stock, out / "patched-vllm")
    return [(stock, found), (patched, fixes_of(patched))]


def _about(sides: list[tuple[Side, dict[str, str]]]) -> dict[str, Any]:
    """What the report says of where it comes from; asked before the questions, which take hours."""
    stock = sides[0][0]
    return {
        "sides": {side.name: fixes for side, fixes in sides},
        "machine": machine(stock.python, stock.environment({})),
        "commit": commit(),
    }


def _write(
    job: Job,
    options: argparse.Namespace,
    reports: list[ModeReport],
    sides: list[tuple[Side, dict[str, str]]],
    about: dict[str, Any],
    out: Path,
) -> None:
    hidden = {str(out): "OUT", str(ROOT): ".", job.model: Path(job.model).name if "/" in job.model else job.model}
    hidden = hidden if job.task == "fixture" else {str(out): "OUT", str(ROOT): "."}
    for side, _ in sides:
        hidden |= {side.python: "python"} | {str(folder): side.name.upper() for folder in side.folders}
    said = as_json(asdict(job), options.margin, reports, about | {"date": last_day(out)}, hidden)
    (out / "report.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    title = f"{Path(job.model).name}, {job.scenario.name}"
    plot(reports, options.margin, title, out / "report.svg")


if __name__ == "__main__":
    sys.exit(main())
