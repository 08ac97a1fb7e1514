"""The generator: the same from the same seed, right answers, and a test split that training cannot have seen."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from fractions import Fraction

import pytest
from gsm8k.fixture import SHOTS, SHOTS_SEED, TASK, TEST, lines
from gsm8k.problems import ASKS, EVENTS, HELD_OUT_NUMBERS, Problem, generate, held_out

MARKED = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")
OPERATIONS = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}


@pytest.fixture(scope="module")
def train() -> list[Problem]:
    return list(generate("train", 5000, seed=7))


@pytest.fixture(scope="module")
def test() -> list[Problem]:
    return list(generate("test", 1000))


def test_a_seed_gives_the_same_problems_and_another_seed_others() -> None:
    assert list(generate("train", 50, 3)) == list(generate("train", 50, 3))
    assert list(generate("train", 50, 3)) != list(generate("train", 50, 4))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="valid"):
        next(generate("valid", 1))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_step_is_computed_right_and_the_last_is_the_answer(split: str) -> None:
    for problem in generate(split, 2000, seed=11):
        steps = MARKED.findall(problem.answer)
        assert len(steps) == problem.answer.count("<<")
        for left, sign, right, result, copied in steps:
            assert OPERATIONS[sign](Fraction(left), Fraction(right)) == int(result) == int(copied), problem
        assert problem.answer.splitlines()[-1] == f"#### {steps[-1][4]}"
        assert problem.result == steps[-1][4]


def test_each_step_starts_from_the_result_of_an_earlier_one_or_from_the_question(test: list[Problem]) -> None:
    for problem in test:
        known = {*problem.given, 2, 3}  # doubled, tripled, halved
        for left, _, right, result, _ in MARKED.findall(problem.answer):
            assert {int(left), int(right)} <= known, problem
            known.add(int(result))


def test_the_given_numbers_are_those_in_the_text(test: list[Problem]) -> None:
    for problem in test:
        assert sorted(map(int, re.findall(r"\d+", problem.question))) == sorted(problem.given)


def test_training_questions_have_no_held_out_number_and_no_held_out_composition(train: list[Problem]) -> None:
    for problem in train:
        in_text = {int(number) for number in re.findall(r"\d+", problem.question)}
        assert not in_text & HELD_OUT_NUMBERS
        assert not held_out(problem.steps)


def test_every_test_question_has_both(test: list[Problem]) -> None:
    for problem in test:
        assert set(problem.given) & HELD_OUT_NUMBERS
        assert held_out(problem.steps)


def test_a_quarter_of_the_longer_compositions_is_held_out_and_their_neighbours_are_seen(train: list[Problem]) -> None:
    everything = [(*e, a) for k in (1, 2, 3) for e in itertools.product(EVENTS, repeat=k) for a in ASKS]
    longer = [steps for steps in everything if len(steps) > 2]
    assert 0.2 < sum(map(held_out, longer)) / len(longer) < 0.3
    seen = {pair for problem in train for pair in itertools.pairwise(problem.steps)}
    assert {pair for steps in everything if held_out(steps) for pair in itertools.pairwise(steps)} <= seen


def test_no_answer_is_common_enough_to_be_guessed(test: list[Problem]) -> None:
    """Answers dealt to other questions at random are right with the probability of two equal ones."""
    counts = Counter(problem.result for problem in test)
    assert sum((count / len(test)) ** 2 for count in counts.values()) < 0.05
    assert max(counts.values()) / len(test) < 0.05


def test_the_committed_questions_are_the_generators() -> None:
    assert (TASK / "test.jsonl").read_text(encoding="utf-8") == lines(generate("test", TEST))
    assert (TASK / "train.jsonl").read_text(encoding="utf-8") == lines(generate("train", SHOTS, SHOTS_SEED))


def test_the_committed_questions_are_in_gsm8ks_format() -> None:
    for line in (TASK / "test.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert row.keys() == {"question", "answer"}
        assert re.search(r"\n#### \d+$", row["answer"])
