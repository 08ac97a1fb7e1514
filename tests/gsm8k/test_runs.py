"""Runs of both sides with stand-ins for their interpreters: real processes, real HTTP, no engine."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from gpurun.server import server_command
from gsm8k.__main__ import NO_VLLM, _model, _say_if_other_release
from gsm8k.answers import pair_up, read_answers
from gsm8k.record import last_day, record
from gsm8k.report import as_json, plot, report_mode, table
from gsm8k.runs import Job, Mode, Outcome, Ran, _engine, request_of, run_side
from gsm8k.scenario import PLAIN, Scenario, read_scenarios, scenario_of
from gsm8k.sides import RunError, Side
from gsm8k.stats import Verdict

SLEEP = Scenario("sleep", sleep_every=10)
JOB = Job("gsm8k", "some/model", PLAIN, limit=200, time_limit=30)


def stand_in(folder: Path, name: str, **behaviour: Any) -> Side:
    """A side that behaves so; it is run by this interpreter, whose path is its first line."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    script = place / "python"
    text = Path(__file__).with_name("standin.py").read_text(encoding="utf-8")
    script.write_text(text.replace("#!/usr/bin/env python3", f"#!{sys.executable}"), encoding="utf-8")
    script.chmod(0o755)
    (place / "behaviour.json").write_text(json.dumps(behaviour), encoding="utf-8")
    return Side(name, str(script))


def calls(side: Side) -> int:
    file = Path(side.python).with_name("calls")
    return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0


def both(tmp_path: Path, mode: Mode, job: Job = JOB, **sides: dict[str, Any]) -> tuple[Ran, Ran]:
    ran = [
        run_side(job, stand_in(tmp_path, name, **sides.get(name, {})), mode, {}, tmp_path / "out")
        for name in ("stock", "patched")
    ]
    return ran[0], ran[1]


@pytest.mark.parametrize("mode", [Mode.INPROCESS, Mode.SERVED])
def test_the_same_answers_are_the_same(tmp_path: Path, mode: Mode) -> None:
    report = report_mode(mode, *both(tmp_path, mode), 0.02, tmp_path)
    assert report.verdict is Verdict.SAME
    assert report.identical == 200
    assert {found.stock.right for found in report.metrics.values()} == {200}


@pytest.mark.parametrize(
    ("side", "verdict"), [("patched", Verdict.WORSE), ("stock", Verdict.BETTER)], ids=["worse", "better"]
)
def test_lost_answers_are_seen(tmp_path: Path, side: str, verdict: Verdict) -> None:
    wrong = {side: {"wrong": list(range(1, 41))}}
    report = report_mode(Mode.INPROCESS, *both(tmp_path, Mode.INPROCESS, **wrong), 0.02, tmp_path)
    assert report.verdict is verdict
    assert report.identical == 160
    found = report.metrics["strict-match"]
    assert (found.only_stock, found.only_patched) == ((40, 0) if side == "patched" else (0, 40))


@pytest.mark.parametrize("how", ["crash", "kill"])
def test_a_crash_of_stock_is_a_result(tmp_path: Path, how: str) -> None:
    stock, patched = both(tmp_path, Mode.INPROCESS, stock={"evaluate": how})
    assert stock.outcome is Outcome.CRASHED
    assert ("illegal memory access" if how == "crash" else "signal 11") in stock.sign
    assert report_mode(Mode.INPROCESS, stock, patched, 0.02, tmp_path).verdict is Verdict.STOCK_CRASHED


@pytest.mark.parametrize(
    ("broken", "verdict"),
    [(("patched",), Verdict.PATCHED_CRASHED), (("stock", "patched"), Verdict.BOTH_CRASHED)],
    ids=["patched", "both"],
)
def test_a_crash_of_patched_is_never_fine(tmp_path: Path, broken: tuple[str, ...], verdict: Verdict) -> None:
    sides = both(tmp_path, Mode.INPROCESS, **{name: {"evaluate": "crash"} for name in broken})
    report = report_mode(Mode.INPROCESS, *sides, 0.02, tmp_path)
    assert report.verdict is verdict
    assert not report.verdict.fine


def test_the_server_that_breaks_after_waking_is_a_crash_told_by_its_own_log(tmp_path: Path) -> None:
    job = replace(JOB, scenario=SLEEP)
    stock, patched = both(tmp_path, Mode.SERVED, job, stock={"serve": "crash after waking"})
    assert (stock.outcome, patched.outcome) == (Outcome.CRASHED, Outcome.FINISHED)
    assert stock.sign.startswith("EngineCore: torch.AcceleratorError")
    said = (patched.folder / "server-then.log").read_text(encoding="utf-8").split()
    assert said[said.index("/sleep?level=1") + 2] == "/wake_up"
    assert said[-1] == "/v1/completions"  # the questions come after the wake-up


def test_the_cause_is_told_rather_than_the_end_and_the_scenarios_own_sign_first() -> None:
    log = "x\nEngineCore encountered a fatal error.\nRuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED\nown"
    assert PLAIN.crashed(log) == "RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"
    assert Scenario("s", crash="^own").crashed(log) == "own"
    assert PLAIN.crashed("EngineCore encountered a fatal error.") == "EngineCore encountered a fatal error."
    assert PLAIN.crashed("Traceback\nValueError: no such task") == ""


def test_the_side_that_finished_has_its_accuracy_where_the_other_crashed(tmp_path: Path) -> None:
    crash = {"stock": {"evaluate": "crash"}, "patched": {"wrong": [3]}}
    report = report_mode(Mode.INPROCESS, *both(tmp_path, Mode.INPROCESS, **crash), 0.02, tmp_path)
    assert report.alone.keys() == {"patched"}
    assert report.alone["patched"]["strict-match"].right == 199
    assert "strict-match: patched 199/200" in table([report], 0.02)


def test_a_run_is_recorded_from_what_its_sides_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = report_mode(Mode.INPROCESS, *both(tmp_path, Mode.INPROCESS, patched={"wrong": [5]}), 0.02, out)
    about = {"sides": {}, "machine": {"gpu": "NVIDIA H200"}, "commit": "c"}
    old = as_json(asdict(JOB), 0.02, [report], about, {})
    old["modes"]["in-process"]["verdict"] = "of an older harness"
    old["modes"]["in-process"]["stock"]["command"] = "python -m x"
    (out / "report.json").write_text(json.dumps(old), encoding="utf-8")
    written = record(out, "plain", "why", tmp_path / "results")
    day = last_day(out)
    assert [file.name for file in written] == [
        f"gsm8k-{day}-nvidia-h200-plain{end}" for end in (".json", ".svg", "-in-process.tsv")
    ]
    said = json.loads(written[0].read_text(encoding="utf-8"))
    assert said["modes"]["in-process"]["verdict"] == "undecided"
    assert said["modes"]["in-process"]["metrics"]["strict-match"]["patched"]["right"] == 199
    assert said["modes"]["in-process"]["stock"]["command"] == "python -m x"
    assert (said["note"], said["date"]) == ("why", day)
    assert str(tmp_path) not in written[0].read_text(encoding="utf-8")


def test_a_run_that_has_not_ended_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the run has not ended"):
        record(tmp_path, "x", "", tmp_path)


def test_a_server_that_dies_on_the_way_up_is_a_crash(tmp_path: Path) -> None:
    stock, _ = both(tmp_path, Mode.SERVED, stock={"serve": "die"})
    assert stock.outcome is Outcome.CRASHED
    assert "out of memory" in stock.sign


def test_no_end_within_the_limit_is_told_apart(tmp_path: Path) -> None:
    ran = run_side(
        replace(JOB, time_limit=1), stand_in(tmp_path, "stock", evaluate="hang"), Mode.INPROCESS, {}, tmp_path
    )
    assert ran.outcome is Outcome.HUNG
    assert "1 s" in ran.sign


def test_a_mistake_in_the_run_is_no_result(tmp_path: Path) -> None:
    side = stand_in(tmp_path, "stock", evaluate="mistake")
    with pytest.raises(RunError, match=r"status 1, and no sign of a crashed engine.*\n.*tail"):
        run_side(JOB, side, Mode.INPROCESS, {}, tmp_path)
    assert not (tmp_path / "in-process" / "stock" / "side.json").exists()


def test_a_scenarios_own_sign_makes_a_crash_of_what_is_none_elsewhere(tmp_path: Path) -> None:
    side = stand_in(tmp_path, "stock", evaluate="mistake")
    job = replace(JOB, scenario=Scenario("own", crash="No module named 'lm_eval'"))
    assert run_side(job, side, Mode.INPROCESS, {}, tmp_path).outcome is Outcome.CRASHED


def test_a_finished_side_is_kept_and_a_crashed_one_too(tmp_path: Path) -> None:
    for name, behaviour in (("stock", {"evaluate": "crash"}), ("patched", {})):
        side = stand_in(tmp_path, name, **behaviour)
        first = run_side(JOB, side, Mode.INPROCESS, {}, tmp_path)
        again = run_side(JOB, side, Mode.INPROCESS, {}, tmp_path)
        assert calls(side) == 1
        assert again == replace(first, kept=True)


def test_a_killed_run_is_run_again_and_what_it_left_is_moved_aside(tmp_path: Path) -> None:
    left = tmp_path / "in-process" / "stock" / "lm-eval.log"
    left.parent.mkdir(parents=True)
    left.write_text("half", encoding="utf-8")
    assert run_side(JOB, stand_in(tmp_path, "stock"), Mode.INPROCESS, {}, tmp_path).outcome is Outcome.FINISHED
    assert (tmp_path / "in-process" / "stock.old-1" / "lm-eval.log").read_text(encoding="utf-8") == "half"


@pytest.mark.parametrize(
    "change", [{"limit": 100}, {"model": "other"}, {"scenario": SLEEP}, {"engine": {"seed": 1}}], ids=str
)
def test_what_changes_the_run_is_run_again(tmp_path: Path, change: dict[str, Any]) -> None:
    side = stand_in(tmp_path, "stock")
    run_side(JOB, side, Mode.INPROCESS, {"0005": "missing"}, tmp_path)
    run_side(replace(JOB, **change), side, Mode.INPROCESS, {"0005": "missing"}, tmp_path)
    assert calls(side) == 2
    assert (tmp_path / "in-process" / "stock.old-1" / "side.json").is_file()


def test_another_patch_set_is_run_again(tmp_path: Path) -> None:
    side = stand_in(tmp_path, "patched")
    for fixes in ({"0005": "missing"}, {"0005": "present"}):
        run_side(JOB, side, Mode.INPROCESS, fixes, tmp_path)
    assert calls(side) == 2


def test_sides_with_different_questions_are_refused(tmp_path: Path) -> None:
    one = run_side(JOB, stand_in(tmp_path, "stock"), Mode.INPROCESS, {}, tmp_path)
    other = run_side(replace(JOB, limit=199), stand_in(tmp_path, "patched"), Mode.INPROCESS, {}, tmp_path)
    with pytest.raises(ValueError, match="did not answer the same questions: 1 differ"):
        pair_up(*(read_answers(ran.folder)["strict-match"] for ran in (one, other)))


def test_the_table_of_pairs_has_every_question_under_both_filters(tmp_path: Path) -> None:
    report_mode(Mode.INPROCESS, *both(tmp_path, Mode.INPROCESS, stock={"wrong": [7]}), 0.02, tmp_path)
    rows = [line.split("\t") for line in (tmp_path / "pairs-in-process.tsv").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 1 + 2 * 200
    assert len({len(row) for row in rows}) == 1
    wrong = [row for row in rows[1:] if row[5] == "0"]
    assert [(row[1], row[2], row[3], row[4], row[6], row[7]) for row in wrong] == [
        (name, "7", "0", "7", "1", "0") for name in ("strict-match", "flexible-extract")
    ]


def test_the_report_has_no_path_of_the_machine(tmp_path: Path) -> None:
    stock, patched = both(tmp_path, Mode.INPROCESS, stock={"evaluate": "crash"})
    stock = replace(stock, sign="at /home/someone/site-packages/vllm/x.py in http://127.0.0.1:8000/v1: a/b stays")
    report = report_mode(Mode.INPROCESS, stock, patched, 0.02, tmp_path)
    said = as_json(asdict(JOB), 0.02, [report], {"commit": "c"}, {str(tmp_path / "out"): "OUT"})
    text = json.dumps(said)
    assert str(tmp_path) not in text
    assert "/home" not in text
    assert "at x.py in http://127.0.0.1:8000/v1: a/b stays" in text
    assert said["job"]["model"] == "some/model"
    assert said["modes"]["in-process"]["verdict"] == "stock crashed"
    assert said["modes"]["in-process"]["patched"]["command"].endswith("OUT/in-process/patched/request.json")


def test_the_report_and_the_plot_tell_both_sides(tmp_path: Path) -> None:
    fine = report_mode(Mode.INPROCESS, *both(tmp_path, Mode.INPROCESS), 0.02, tmp_path)
    shutil.rmtree(tmp_path / "out")
    crash = report_mode(Mode.SERVED, *both(tmp_path, Mode.SERVED, stock={"evaluate": "crash"}), 0.02, tmp_path)
    said = table([fine, crash], 0.02)
    assert "in-process: same" in said
    assert "served: stock crashed" in said
    assert "stock 200/200 = 1.0000 [0.9812, 1.0000]" in said
    assert "stock    crashed in" in said
    for name in ("one.svg", "two.svg"):
        plot([fine, crash], 0.02, "title", tmp_path / name)
    drawn = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert "stock crashed" in drawn
    assert "stock: crashed" in drawn
    assert drawn == (tmp_path / "two.svg").read_text(encoding="utf-8")


def test_a_sleeping_scenario_sleeps_between_the_questions_in_process() -> None:
    request = request_of(replace(JOB, scenario=scenario_of("0005-sleep")), Mode.INPROCESS, Path("x"))
    assert request["model"] == "vllm-sleep"
    assert request["model_args"]["sleep_every"] == 250
    assert request["model_args"]["enable_sleep_mode"] is True
    assert request_of(JOB, Mode.INPROCESS, Path("x"))["model"] == "vllm"


def test_every_fix_has_a_scenario_whose_releases_have_a_series() -> None:
    from vllm_patches.series.catalog import open_catalog

    catalog = open_catalog()
    scenarios = read_scenarios()
    assert {scenario.fix for scenario in scenarios.values()} == {"0001", "0002", "0003", "0004", "0005"}
    for scenario in scenarios.values():
        for pin in scenario.pins:
            numbers = {patch.number for patch in catalog.series_of(catalog.release(pin)).patches}
            assert scenario.fix in numbers, (scenario.name, pin)


def test_a_fix_with_several_scenarios_must_be_named_in_full() -> None:
    assert scenario_of("0005").name == "0005-sleep"
    with pytest.raises(RunError, match=r"2 scenarios.*0004-nhd"):
        scenario_of("0004")


def test_a_step_of_one_token_reaches_vllm_in_process_and_through_the_server() -> None:
    job = replace(JOB, scenario=scenario_of("0003-one-token-steps"))
    assert request_of(job, Mode.INPROCESS, Path("x"))["model_args"]["long_prefill_token_threshold"] == 1
    flags = server_command("python", 1, _engine(job))
    assert flags[flags.index("--long-prefill-token-threshold") + 1] == "1"


@pytest.mark.parametrize(
    ("release", "said"), [("0.20.2", True), ("0.19.1", False), ("0.19.1+cu129", False), (NO_VLLM["vllm"], False)]
)
def test_a_run_on_a_release_that_the_scenario_is_not_for_is_told(
    release: str, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    _say_if_other_release(scenario_of("0002-gdn"), release)
    note = "note: scenario 0002-gdn is for 0.18.1, 0.19.1; this is 0.20.2\n"
    assert capsys.readouterr().err == (note if said else "")
    _say_if_other_release(PLAIN, release)
    assert capsys.readouterr().err == ""


def test_a_misspelt_key_of_a_scenario_is_told(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text('[[scenario]]\nname = "a"\npins = []\nsleepevery = 3\n', encoding="utf-8")
    with pytest.raises(RunError, match="sleepevery"):
        read_scenarios(tmp_path / "s.toml")


def test_an_unknown_fixture_is_told_with_those_that_there_are() -> None:
    with pytest.raises(RunError, match=r"no model in .*nope\n.*fixture:dense fixture:dsa fixture:hybrid"):
        _model("fixture:nope", PLAIN)
