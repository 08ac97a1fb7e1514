"""The fixture's tokenizer: whole words of the problems' vocabulary, and digits one by one.

A word takes the space before it along, so that the text comes back byte for byte: a prompt that ends in ``Answer:`` has
the same tokens alone as at the head of an answer, which is what lm-eval's few-shot prompts need.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gsm8k.problems import generate

PIECES = r" ?[A-Za-z]+:?|[0-9]|<<|>>|####|\n\n|[^A-Za-z0-9]"
UNKNOWN, END = "<unk>", "</s>"
VOCABULARY = 256  # rows of the embedding; the words take fewer
SAMPLE = 4000  # problems of either split that the words are collected from: all templates, names and things are in


def shot(question: str, answer: str = "") -> str:
    """One example as lm-eval's gsm8k task prints it; without an answer, the prompt."""
    return f"Question: {question}\nAnswer:{' ' + answer if answer else ''}"


@cache
def build() -> PreTrainedTokenizerFast:
    """The tokenizer; its words are sorted, so that the ids follow from the problems' templates alone."""
    words: set[str] = set("0123456789")
    for split in ("train", "test"):
        for problem in generate(split, SAMPLE):
            words.update(re.findall(PIECES, shot(problem.question, problem.answer) + "\n\n"))
    vocabulary = {word: number for number, word in enumerate([UNKNOWN, END, *sorted(words)])}
    if len(vocabulary) > VOCABULARY:
        raise ValueError(f"{len(vocabulary)} words, and {VOCABULARY} rows")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, eos_token=END, pad_token=END, model_max_length=4096
    )


def save(folder: Path) -> None:
    """Write the tokenizer's files into *folder*, under the class name that every transformers release knows."""
    build().save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    fields = json.loads(settings.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    fields.pop("backend", None)
    settings.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
