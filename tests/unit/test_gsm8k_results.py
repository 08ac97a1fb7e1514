"""What the README says of gsm8k is what the recorded runs say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| (?P<cells>.*) \| \[JSON\]\((?P<file>ci/results/gsm8k-[^)]+\.json)\) \|$", re.M)
ROWS = list(ROW.finditer((ROOT / "README.md").read_text(encoding="utf-8")))


def test_every_recorded_run_is_in_the_readme() -> None:
    recorded = {file.relative_to(ROOT).as_posix() for file in (ROOT / "ci" / "results").glob("gsm8k-*.json")}
    assert {row["file"] for row in ROWS} == recorded
    assert recorded


@pytest.mark.parametrize("row", ROWS, ids=lambda row: Path(row["file"]).stem)
def test_a_row_is_its_runs(row: re.Match[str]) -> None:
    said = json.loads((ROOT / row["file"]).read_text(encoding="utf-8"))
    model, scenario, questions, in_process, served = row["cells"].split(" | ")
    assert model.startswith(said["job"]["model"])
    assert scenario == said["job"]["scenario"]["name"].replace("plain", "none")
    for name, cell in (("in-process", in_process), ("served", served)):
        assert cell == _cell(said["modes"].get(name), int(questions)), name


def _cell(mode: dict[str, Any] | None, questions: int) -> str:
    if mode is None:
        return "not run"
    if mode["verdict"] == "stock crashed":
        shares = [mode["alone"]["patched"]["strict-match"]]
        text = f"stock crashed; patched {shares[0]['accuracy']:.3f}"
    else:
        shares = [mode["metrics"]["strict-match"][side] for side in ("stock", "patched")]
        text = f"{mode['verdict']}: {shares[0]['accuracy']:.3f} and {shares[1]['accuracy']:.3f}"
    assert {share["count"] for share in shares} == {questions}
    return text


@pytest.mark.parametrize("row", ROWS, ids=lambda row: Path(row["file"]).stem)
def test_a_run_names_what_it_ran_and_no_path(row: re.Match[str]) -> None:
    text = (ROOT / row["file"]).read_text(encoding="utf-8")
    said = json.loads(text)
    assert re.search(r"(?<![\w.:/-])/(?:[\w.+-]+/)", text) is None
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", said["commit"])
    assert {"gpu", "driver", "torch", "vllm", "lm_eval"} <= said["machine"].keys()
    assert set(said["sides"]["patched"].values()) == {"0.20.2", "present"}
    assert set(said["sides"]["stock"].values()) == {"0.20.2", "missing"}
