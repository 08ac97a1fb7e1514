"""The whole chain on a CPU with the shipped dense model: lm-eval itself, both sides, statistics, report.

There is no vLLM in it (lm-eval's transformers backend); what it shows is that the harness tells a sound model from a
broken one, and that the fixture's questions do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gsm8k import tokens
from gsm8k.answers import Answer, read_answers
from gsm8k.fixture import MODELS
from gsm8k.problems import generate
from gsm8k.shapes import configuration
from gsm8k.train import teacher_forced
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
LIMIT, MARGIN = 24, 0.15  # 22 questions are the fewest that can show "same" within this margin


def harness(*words: str, out: Path) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ) | {"PYTHONPATH": f"{ROOT / 'ci'}:{ROOT / 'scripts'}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "gsm8k", "run", "--mode", "hf", "--limit", str(LIMIT), "--margin", str(MARGIN)]
    return subprocess.run(
        [*command, "--out", str(out), *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model on both sides."""
    out = tmp_path_factory.mktemp("chain")
    done = harness("--model", "fixture:dense", out=out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hf: same" in done.stdout
    return out


def test_the_dense_model_answers_held_out_questions(ran: Path) -> None:
    said = json.loads((ran / "report.json").read_text(encoding="utf-8"))
    assert said["modes"]["hf"]["verdict"] == "same"
    for found in said["modes"]["hf"]["metrics"].values():
        assert found["stock"]["count"] == LIMIT
        assert found["stock"]["accuracy"] >= 0.8
        assert found["stock"] == found["patched"]


def test_the_prompt_is_lm_evals_own_with_five_examples(ran: Path) -> None:
    file = next((ran / "hf" / "stock").rglob("samples_*.jsonl"))
    row = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    prompt = row["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.count("Question: ") == 6
    assert prompt.endswith("\nAnswer:")
    assert "#### " in prompt


def test_answers_dealt_to_other_questions_are_not_right(ran: Path) -> None:
    answers = list(read_answers(ran / "hf" / "stock")["strict-match"].values())
    dealt: list[Answer] = [*answers[1:], answers[0]]
    assert sum(a.extracted == b.target for a, b in zip(dealt, answers, strict=True)) / len(answers) < 0.05 + 1 / LIMIT


def test_an_untrained_model_answers_nothing() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration("dense"), dtype=torch.float32)
    assert teacher_forced(model, tokens.build(), list(generate("test", 8, seed=3))) == 0


def test_a_finished_run_is_kept_and_a_damaged_model_is_worse(ran: Path, tmp_path: Path) -> None:
    """The stock side is taken over, finished; the model is damaged in place before the patched side runs."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(MODELS / "dense", model)
    words = ("--model", f"fixture:{model}")
    shutil.copytree(ran / "hf" / "stock", out / "hf" / "stock")
    _claim(out / "hf" / "stock", model)
    weights = load_file(model / "model.safetensors")
    digits = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(list("0123456789"))
    table = weights["model.embed_tokens.weight"]  # of the output as well: it calculates with other digits than it reads
    table[digits] = table[digits].roll(1, 0)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    done = harness(*words, out=out)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "hf: worse" in done.stdout
    assert "kept from an earlier run" in done.stdout


def _claim(folder: Path, model: Path) -> None:
    """Let the kept side be that of *model*, which has the same weights still."""
    from gsm8k.runs import Job, Mode
    from gsm8k.scenario import PLAIN
    from gsm8k.sides import Side

    job = Job("fixture", str(model), PLAIN, limit=LIMIT)
    said = json.loads((folder / "side.json").read_text(encoding="utf-8"))
    said["key"] = job.key(Side("stock", sys.executable), Mode.HF, {})
    (folder / "side.json").write_text(json.dumps(said), encoding="utf-8")


@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_the_shipped_tokenizer_is_the_scripts(name: str) -> None:
    shipped, made = AutoTokenizer.from_pretrained(MODELS / name), tokens.build()
    assert shipped.get_vocab() == made.get_vocab()
    for problem in generate("test", 50, seed=4):
        text = tokens.shot(problem.question, problem.answer) + "\n\n"
        ids = made(text).input_ids
        assert shipped(text).input_ids == ids
        assert made.decode(ids) == text
        assert made.unk_token_id not in ids


@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_the_shipped_weights_are_small(name: str) -> None:
    assert sum(file.stat().st_size for file in (MODELS / name).iterdir()) < 20e6


def test_the_hybrid_model_answers_held_out_questions() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODELS / "hybrid", dtype=torch.float32)
    assert model.config.layer_types.count("linear_attention") == 2
    assert teacher_forced(model, tokens.build(), list(generate("test", 8, seed=6))) >= 0.5
