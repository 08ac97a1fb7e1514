"""The offline task's committed files: questions from the generator, and the tiny models trained on it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from gsm8k.problems import Problem, generate

FOLDER = Path(__file__).parent
TASK = FOLDER / "task"
MODELS = FOLDER / "models"
TEST, SHOTS = 1000, 200  # questions; lm-eval draws the five examples of a prompt from the second
SHOTS_SEED = 1_000_003  # no part of any model's training data


def lines(problems: Iterable[Problem]) -> str:
    """gsm8k's own two fields, a line each."""
    return "".join(json.dumps({"question": p.question, "answer": p.answer}) + "\n" for p in problems)


def write_data(folder: Path = TASK) -> None:
    """Write both splits into *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text(lines(generate("test", TEST)), encoding="utf-8")
    (folder / "train.jsonl").write_text(lines(generate("train", SHOTS, SHOTS_SEED)), encoding="utf-8")
