"""The GPU runner without a GPU: synthetic cases through real processes, its verdicts, and what is recorded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "tests" / "gpu"
sys.path[:0] = [str(GPU), str(ROOT / "ci")]

import bench_gpu  # noqa: E402
import engine  # noqa: E402
import gpu_case  # noqa: E402
import gpu_table  # noqa: E402
import results  # noqa: E402
from gpu_case import Case, Defect, Side, load_cases  # noqa: E402
from results import Outcome, SideResult, Verdict  # noqa: E402
from vllm_patches.series.catalog import Catalog  # noqa: E402

SCHEMA = Draft202012Validator(json.loads((GPU / "results.schema.json").read_text(encoding="utf-8")))
CASES = '''
import os, time
from gpu_case import Defect, Side, case, expect

AT = ("0.20.2",)

@case("good", "0001", AT, stock="rows were written", equal=("n",))
def good(context):
    """Stock fails as named."""
    expect(context.side is Side.PATCHED, f"7 rows were written under {context.target}")
    return {"n": 1}

@case("signal", "0001", AT, stock="killed by SIGSEGV")
def signal(context):
    """Stock dies."""
    if context.side is Side.STOCK:
        os.kill(os.getpid(), 11)
    return {}

@case("wrong-error", "0002", AT, stock="rows were written")
def wrong_error(context):
    """Stock fails, but not so."""
    if context.side is Side.STOCK:
        import no_such_module
    return {}

@case("stock-passes", "0002", AT, stock="rows were written")
def stock_passes(context):
    """Stock has nothing."""
    return {}

@case("patched-fails", "0003", AT, stock="rows were written")
def patched_fails(context):
    """Both fail."""
    raise Defect("7 rows were written")

@case("late", "0004", AT, stock="no end", limit=1.0)
def late(context):
    """A time-out is no expected failure."""
    if context.side is Side.STOCK:
        time.sleep(30)
    return {}

@case("control-differs", "0005", AT, equal=("side",))
def control_differs(context):
    """A control whose figures must be equal."""
    return {"side": context.side.value}

@case("left-out", "0005", AT)
def left_out(context):
    """Not run is not passed."""
    return {}

@case("seen", "0005", AT, judged=False, sides=(Side.STOCK, Side.PATCHED, Side.UPSTREAM))
def seen(context):
    """Only observed."""
    return {"side": context.side.value}
'''
STOCK_ALONE = '''

@case("stock-alone", "0005", ("0.28.0",), judged=False, sides=(Side.STOCK,))
def stock_alone(context):
    """Only stock, only observed."""
    return {"side": context.side.value}
'''
BOTH_SIDES = '''

@case("both-sides", "0005", ("0.28.0",))
def both_sides(context):
    """There is no patched one."""
    return {}
'''
WANTED = {
    "good": "proved",
    "signal": "proved",
    "wrong-error": "not proved",
    "stock-passes": "not proved",
    "patched-fails": "not proved",
    "late": "not proved",
    "control-differs": "not proved",
    "left-out": "not run",
    "seen": "observed",
}


def tree(folder: Path, version: str = "0.20.2") -> Path:
    """The least that the runner takes for a source tree of a release."""
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text("", encoding="utf-8")
    (folder / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
    return folder


def run(tmp_path: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The runner on synthetic cases; its process and the results file."""
    both = ("--patched", str(tree(tmp_path / "patched-tree")), "--jobs", "3")
    return start(tmp_path, CASES, tree(tmp_path / "stock-tree"), *both, *words)


def start(
    tmp_path: Path, text: str, stock: Path, *words: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The runner on the cases of *text*."""
    cases, out = tmp_path / "cases", tmp_path / "out.json"
    cases.mkdir()
    (cases / "synthetic.py").write_text(text, encoding="utf-8")
    command = [sys.executable, str(GPU / "run.py"), "--stock", str(stock)]
    command += ["--cases", str(cases), "--out", str(out), "--work", str(tmp_path / "work"), *words]
    env = os.environ | {"VLLM_PATCHES_DIR": str(ROOT / "patches")}  # not the tests' own world
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    return done, json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}


def test_every_way_to_end_has_its_verdict(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--not-case", "left-out")
    assert done.returncode == 1, done.stdout + done.stderr
    SCHEMA.validate(found)
    (only,) = found["runs"]
    assert {row["case"]: row["verdict"] for row in only["cases"]} == WANTED
    assert str(tmp_path) not in json.dumps(found)
    rows = {row["case"]: row for row in only["cases"]}
    assert rows["good"]["sides"]["stock"]["detail"] == "Defect: 7 rows were written under <stock>"
    assert rows["late"]["sides"]["stock"]["outcome"] == "late"
    assert rows["seen"]["sides"]["upstream"]["measures"] == {"side": "upstream"}
    assert "wrong-error: stock: fail, but not with /rows were written/" in done.stdout


def test_only_good_verdicts_are_a_success_and_a_second_run_is_added(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--case", "good", "--case", "signal")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["verdict"] for row in found["runs"][0]["cases"]] == ["proved", "proved"]
    later = found["runs"][0] | {"id": "later"}
    results.write(tmp_path / "out.json", later)
    results.write(tmp_path / "out.json", later | {"seconds": 7.0})
    again = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [(entry["id"], entry["seconds"]) for entry in again["runs"]][1:] == [("later", 7.0)]


def test_an_unknown_case_is_an_error(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--case", "no-such")
    assert (done.returncode, found) == (2, {})
    assert "run.py --list" in done.stderr


def test_a_release_without_a_series_has_its_stock_side_observed(tmp_path: Path) -> None:
    done, found = start(tmp_path, CASES + STOCK_ALONE, tree(tmp_path / "stock-tree", "0.28.0"))
    assert done.returncode == 0, done.stdout + done.stderr
    SCHEMA.validate(found)
    (only,) = found["runs"]
    (row,) = only["cases"]
    assert (only["release"], only["patched"], row["verdict"], list(row["sides"])) == (
        "0.28.0", None, "observed", ["stock"],
    )  # fmt: skip
    assert re.search(r"stock-alone +0\.28\.0 +observed +pass +no series", done.stdout)
    assert not list((tmp_path / "work").glob("patched-*"))
    assert gpu_table.rates(found["runs"]) == []


def test_a_release_without_a_series_has_no_other_side(tmp_path: Path) -> None:
    done, found = start(tmp_path, CASES + STOCK_ALONE + BOTH_SIDES, tree(tmp_path / "stock-tree", "0.28.0"))
    assert (done.returncode, found) == (2, {})
    assert "a side that this release does not have" in done.stderr and "patched" in done.stderr


def test_a_verdict_needs_both_sides() -> None:
    with pytest.raises(ValueError, match="a verdict needs stock and patched"):
        gpu_case.case("one-sided", "0005", ("0.28.0",), sides=(Side.STOCK,), about="x")(lambda context: {})
    assert "one-sided" not in gpu_case.CASES
    row = {"case": "x", "fix": "0005", "release": "0.28.0", "about": "", "expected": "", "complaints": []}
    one = {"stock": {"outcome": "pass", "detail": "", "seconds": 1, "measures": {}, "excerpt": []}}
    rows = SCHEMA.evolve(schema=SCHEMA.schema["$defs"]["case"] | {"$defs": SCHEMA.schema["$defs"]})
    assert rows.is_valid(row | {"verdict": "observed", "sides": one})
    assert not rows.is_valid(row | {"verdict": "proved", "sides": one})
    assert rows.is_valid(row | {"verdict": "proved", "sides": one | {"patched": one["stock"]}})


def test_time_that_is_over_leaves_cases_not_run(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--case", "good", "--budget", "0.000001")
    assert done.returncode == 1
    assert [row["verdict"] for row in found["runs"][0]["cases"]] == ["not run"]


def side(outcome: Outcome, detail: str = "", **measures: int) -> SideResult:
    return SideResult(outcome, detail, 1.0, measures)


BOOM = side(Outcome.FAIL, "Defect: boom")


@pytest.mark.parametrize(
    ("stock", "patched", "verdict"),
    [
        (BOOM, side(Outcome.PASS), Verdict.PROVED),
        (side(Outcome.DIED, "killed by SIGABRT\nboom"), side(Outcome.PASS), Verdict.PROVED),
        (BOOM, side(Outcome.DIED, "boom"), Verdict.NOT_PROVED),
        (side(Outcome.LATE, "late\nboom"), side(Outcome.PASS), Verdict.NOT_PROVED),
        (side(Outcome.FAIL, "ImportError: bo om"), side(Outcome.PASS), Verdict.NOT_PROVED),
        (side(Outcome.PASS), side(Outcome.PASS), Verdict.NOT_PROVED),
        (side(Outcome.NOT_RUN), side(Outcome.PASS), Verdict.NOT_RUN),
        (BOOM, side(Outcome.NOT_RUN), Verdict.NOT_RUN),
    ],
)
def test_judge(stock: SideResult, patched: SideResult, verdict: Verdict) -> None:
    case = Case("x", "0001", ("0.20.2",), lambda context: {}, "x", stock="boom")
    assert results.judge(case, "0.20.2", {Side.STOCK: stock, Side.PATCHED: patched}).verdict is verdict


@pytest.mark.parametrize(
    ("stock", "patched", "verdict"),
    [
        (side(Outcome.PASS, n=1), side(Outcome.PASS, n=1), Verdict.CONTROL),
        (side(Outcome.PASS, n=1), side(Outcome.PASS, n=2), Verdict.NOT_PROVED),
        (side(Outcome.PASS), side(Outcome.PASS), Verdict.NOT_PROVED),  # a figure that is missing on both is not equal
        (BOOM, side(Outcome.PASS, n=1), Verdict.NOT_PROVED),
    ],
)
def test_judge_control(stock: SideResult, patched: SideResult, verdict: Verdict) -> None:
    case = Case("x", "0001", ("0.20.2",), lambda context: {}, "x", equal=("n",))
    assert results.judge(case, "0.20.2", {Side.STOCK: stock, Side.PATCHED: patched}).verdict is verdict


@pytest.mark.parametrize(
    ("stock", "verdict"),
    [
        (side(Outcome.PASS), Verdict.OBSERVED),
        (side(Outcome.FAIL, "boom", seen=1), Verdict.OBSERVED),
        (BOOM, Verdict.NOT_RUN),  # it ended before it saw anything
        (side(Outcome.DIED, "exit 1"), Verdict.NOT_RUN),
    ],
)
def test_judge_observation(stock: SideResult, verdict: Verdict) -> None:
    case = Case("x", "0001", ("0.28.0",), lambda context: {}, "x", sides=(Side.STOCK,), judged=False)
    found = results.judge(case, "0.28.0", {Side.STOCK: stock})
    assert (found.verdict, bool(found.complaints)) == (verdict, verdict is Verdict.NOT_RUN)


def test_cleaner_takes_folders_hosts_and_addresses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results.socket, "gethostname", lambda: "gpu-box-17")
    cleaner = results.Cleaner({"stock": Path("/data/site"), "work": Path("/data/site/work")})
    text = (
        'File "/data/site/vllm/x.py" on gpu-box-17 at 10.1.2.3, /data/site/work/log, /home/me/a/b.txt, 0.5/2, 127.0.0.1'
    )
    wanted = 'File "<stock>/vllm/x.py" on <host> at <address>, <work>/log, …/a/b.txt, 0.5/2, 127.0.0.1'
    assert cleaner.text(text) == wanted
    assert cleaner.value({"a": ["/data/site/x", 1, None]}) == {"a": ["<stock>/x", 1, None]}


def test_the_cases_are_listed_without_a_gpu_and_name_what_they_expect() -> None:
    catalog, cases = Catalog(ROOT / "patches"), load_cases()
    assert {case.fix for case in cases.values()} == set(catalog.fixes)
    for case in cases.values():
        assert case.name.startswith((case.fix, "load-"))
        re.compile(case.stock)
        for release in case.releases:
            carried = {patch.number for patch in catalog.series_of(catalog.release(release)).patches}
            observed = not catalog.release(release).series and case.sides == (Side.STOCK,) and not case.judged
            assert case.fix in carried or observed, f"{case.name}: no patch of {case.fix} in {release}"


def test_compare_takes_a_near_tie_and_nothing_else() -> None:
    wanted = [{"tokens": [5, 6, 7], "top": [{"5": -0.1}, {"6": -0.7, "8": -0.8, "9": -3.0}, {"7": -0.1}]}]
    assert engine.compare([{"tokens": [5, 6, 7]}], wanted)["equal"] == 1
    left = engine.compare([{"tokens": [5, 8, 1]}], wanted)
    assert (left["equal"], left["left_at_near_ties"], left["tokens_compared"]) == (0, [0.1], 2)
    for other in (9, 4):
        with pytest.raises(Defect, match="differs at token 1"):
            engine.compare([{"tokens": [5, other, 7]}], wanted)


def recorded() -> list[Path]:
    return sorted((ROOT / "ci" / "results").glob("[0-9]*.json"))


@pytest.mark.parametrize("path", recorded(), ids=lambda path: path.stem)
def test_recorded_results_are_what_the_runner_would_say(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    SCHEMA.validate(found)
    for row in (row for entry in found["runs"] for row in entry["cases"]):
        sides = {
            Side(name): SideResult(Outcome(value["outcome"]), value["detail"], value["seconds"], value["measures"])
            for name, value in row["sides"].items()
        }
        unseen = row["verdict"] == "not run" and all(each.outcome is not Outcome.NOT_RUN for each in sides.values())
        judged = row["verdict"] != "observed" and not unseen
        case = Case(row["case"], row["fix"], (), lambda context: {}, "", row["expected"], (), tuple(sides), judged)
        verdict = results.judge(case, row["release"], sides).verdict
        # What must be equal on both sides is the case's own, and not recorded: only that can make a row worse.
        worse = row["verdict"] == "not proved" and verdict is Verdict.CONTROL and row["complaints"]
        assert verdict.value == row["verdict"] or worse, row["case"]


@pytest.mark.parametrize("path", recorded(), ids=lambda path: path.stem)
def test_recorded_results_name_no_folder_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r'[" (]/(?:root|home|tmp|work|opt|usr)/\S*', text)


def test_the_readme_has_the_summary_of_the_recorded_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert gpu_table.with_summary(readme, gpu_table.summary(gpu_table.runs())) == readme


def test_a_run_that_did_not_get_to_a_case_takes_nothing_away() -> None:
    row = {"case": "a", "release": "1", "verdict": "proved"}
    runs = [{"cases": [row]}, {"cases": [row | {"verdict": "not run"}]}]
    assert gpu_table.newest_cases(runs)[("a", "1")]["verdict"] == "proved"
    assert gpu_table.newest_cases([*runs, {"cases": [row | {"verdict": "not proved"}]}])[("a", "1")] != row


def test_bench_judges_by_the_limit_or_the_spread_of_its_own_stock() -> None:
    assert bench_gpu.judged({"stock again": 100.0, "stock": 100.0, "patched": 102.0})["within"]
    assert not bench_gpu.judged({"stock again": 100.0, "stock": 100.0, "patched": 102.1})["within"]
    assert bench_gpu.judged({"stock again": 100.0, "stock": 110.0, "patched": 112.0})["within"]
    assert "within" not in bench_gpu.judged({"patched again": 1.0, "patched": 1.0, "upstream": 2.0})


def test_bench_changes_text_in_one_place_or_not_at_all(tmp_path: Path) -> None:
    path, other = tmp_path / "a.py", tmp_path / "b.py"
    path.write_text("import os\n\n\n@f\ndef g():\n    return 1\n\n\ndef h():\n    return 2\n", encoding="utf-8")
    other.write_text("@k(1)\n@f\ndef g():\n    x = 3\n    return x\n\n\ndef h():\n    return 4\n", encoding="utf-8")
    assert bench_gpu.changed(path, ("return 1", "return 9")).count("return 9") == 1
    for text in ("return", "nowhere"):
        with pytest.raises(RuntimeError, match="expected once"):
            bench_gpu.changed(path, (text, "x"))
    both = bench_gpu.with_functions_of(path, other, ("g", "h"))
    assert both == "import os\n\n\n@k(1)\n@f\ndef g():\n    x = 3\n    return x\n\n\ndef h():\n    return 4\n"


def test_modules_that_a_tree_lacks_are_stood_in_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_child

    present = tree(tmp_path / "t") / "vllm"
    (present / "_C.abi3.so").write_bytes(b"")
    before = dict(sys.modules)
    try:
        gpu_child.stand_in_for_compiled(present.parent)
        new: dict[str, ModuleType] = {name: sys.modules[name] for name in sys.modules.keys() - before.keys()}
    finally:
        sys.modules.clear()
        sys.modules.update(before)
    assert "vllm._C" not in new and "vllm._moe_C" in new
    assert new["vllm.vllm_flash_attn"].anything is None
