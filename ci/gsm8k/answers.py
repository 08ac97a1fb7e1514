"""What lm-eval logged of one side: every question with the extracted answer and whether it was right."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILTERS = ("strict-match", "flexible-extract")


@dataclass(frozen=True)
class Answer:
    """One question under one of lm-eval's filters; *question* is lm-eval's hash of the document and its number."""

    question: str
    target: str
    extracted: str
    right: bool
    text: str


def read_answers(folder: Path) -> dict[str, dict[str, Answer]]:
    """Filter to question to answer, from the newest samples file that lm-eval wrote below *folder*."""
    files = sorted(folder.rglob("samples_*.jsonl"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"lm-eval wrote no samples below {folder}")
    found: dict[str, dict[str, Answer]] = {name: {} for name in FILTERS}
    for line in files[-1].read_text(encoding="utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        answer = _answer(row)
        if answer.question in found[row["filter"]]:
            raise ValueError(f"question {answer.question} is in {files[-1].name} twice")
        found[row["filter"]][answer.question] = answer
    return found


def _answer(row: dict[str, Any]) -> Answer:
    text = row["resps"][0][0]
    extracted = row["filtered_resps"][0]
    target = str(row["doc"]["answer"]).rpartition("#### ")[2]
    name = f"{row['doc_id']}:{row['doc_hash'][:12]}"
    return Answer(name, target, str(extracted), row["exact_match"] == 1, str(text))


def pair_up(stock: dict[str, Answer], patched: dict[str, Answer]) -> list[tuple[Answer, Answer]]:
    """The same questions side by side; a question that one side lacks is an error, never left out."""
    if stock.keys() != patched.keys():
        odd = sorted(stock.keys() ^ patched.keys())
        raise ValueError(f"the sides did not answer the same questions: {len(odd)} differ, the first is {odd[0]}")
    return [(stock[name], patched[name]) for name in sorted(stock, key=lambda name: int(name.partition(":")[0]))]
