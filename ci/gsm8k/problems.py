"""Grade-school word problems in gsm8k's format, generated from a seed: `question`, and `answer` with `#### N`.

A problem is a start quantity, one to three events and a way of asking. The test split is out of reach of the training
split in two ways, and every test question in both:

- numbers: those in `HELD_OUT_NUMBERS` are given in no training question (they occur there as results only);
- compositions: `held_out` picks a quarter of all compositions of three and more steps; no training question has one.

The text is ours and under this project's licence; nothing is taken from gsm8k itself.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

# Ranges within a decade: every digit is seen in training at either place, but not these numbers.
HELD_OUT_NUMBERS = frozenset((*range(34, 38), *range(53, 57), *range(72, 76)))
EVENTS = ("get", "lose", "packs", "double", "triple", "half")
ASKS = ("plain", "share", "price", "together")
LARGEST = 199  # of any running quantity

# fmt: off
NAMES = [
    "Ada", "Ben", "Cora", "Dan", "Elsa", "Finn", "Gina", "Hugo", "Ines", "Jack", "Kira", "Liam", "Mona", "Nils",
    "Olga", "Paul", "Rosa", "Sven", "Tara", "Udo", "Vera", "Will", "Yara", "Zoe",
]
OBJECTS = [
    "apples", "books", "cards", "coins", "cups", "eggs", "flags", "hats", "jars", "keys", "kites", "lamps", "maps",
    "marbles", "masks", "mugs", "nuts", "pears", "pens", "pins", "plums", "ropes", "shells", "stamps", "stones",
    "tiles", "toys",
]
# fmt: on
PLACES = ("market", "school", "park", "beach", "library", "garden", "fair", "station")


class Impossible(Exception):
    """The drawn numbers make no whole, small quantity; another draw is taken."""


@dataclass(frozen=True)
class Problem:
    """One question; *steps* are its events and its way of asking, *given* the numbers in its text."""

    question: str
    answer: str
    steps: tuple[str, ...]
    given: tuple[int, ...]

    @property
    def result(self) -> str:
        """What follows ``####``."""
        return self.answer.rpartition("#### ")[2]


def held_out(steps: Sequence[str]) -> bool:
    """Whether this composition is kept for the test split; the choice is arbitrary but fixed."""
    return len(steps) > 2 and zlib.crc32(" ".join(steps).encode()) % 4 == 0


class _Story:
    """A problem while it is told: the running quantity, the sentences, the steps of the answer."""

    def __init__(self, rng: random.Random, any_number: bool) -> None:
        self.rng = rng
        self.any_number = any_number
        self.name, self.friend = rng.sample(NAMES, 2)
        self.thing = rng.choice(OBJECTS)
        self.given: list[int] = []
        self.told: list[str] = []
        self.worked: list[str] = []
        self.quantity = self.number(2, 99)

    def number(self, low: int, high: int) -> int:
        """A given number; in training never one of those held out."""
        allowed = [n for n in range(low, high + 1) if self.any_number or n not in HELD_OUT_NUMBERS]
        if not allowed:
            raise Impossible
        drawn = self.rng.choice(allowed)
        self.given.append(drawn)
        return drawn

    def say(self, *phrasings: str, **values: object) -> None:
        """One of the *phrasings*, with the story's words put in."""
        words = {"n": self.name, "f": self.friend, "o": self.thing, "p": self.rng.choice(PLACES)}
        self.told.append(self.rng.choice(phrasings).format(**words, **values))

    def work(self, formula: str, result: int, tail: str) -> int:
        """A step of the answer, the computation marked as gsm8k marks it."""
        if not 1 < result <= 10 * LARGEST:  # 1 would need the singular
            raise Impossible
        self.worked.append(f"{self.name} {tail.format(f'<<{formula}={result}>>{result}', o=self.thing)}.")
        return result

    def hold(self, formula: str, result: int) -> None:
        """The running quantity becomes *result*."""
        if result > LARGEST:
            raise Impossible
        self.quantity = self.work(formula, result, "has {0} {o}")


def _get(story: _Story) -> None:
    more = story.number(2, 99)
    story.say(
        "{n} finds {a} more {o} at the {p}.", "Then {n} gets {a} {o} from {f}.", "{f} gives {n} {a} more {o}.", a=more
    )
    story.hold(f"{story.quantity}+{more}", story.quantity + more)


def _lose(story: _Story) -> None:
    less = story.number(2, min(99, story.quantity - 2))
    story.say(
        "{n} gives {a} {o} to {f}.", "{n} loses {a} {o} at the {p}.", "Then {a} of the {o} are sold at the {p}.", a=less
    )
    story.hold(f"{story.quantity}-{less}", story.quantity - less)


def _packs(story: _Story) -> None:
    packs, each = story.number(2, 9), story.number(2, 9)
    story.say(
        "{n} buys {a} bags with {b} {o} each.", "At the {p} {n} picks up {a} boxes of {b} {o} each.", a=packs, b=each
    )
    bought = story.work(f"{packs}*{each}", packs * each, "gets {0} {o}")
    story.hold(f"{story.quantity}+{bought}", story.quantity + bought)


def _double(story: _Story) -> None:
    story.say("Then {n} doubles the number of {o}.", "A week later {n} has twice as many {o}.")
    story.hold(f"{story.quantity}*2", story.quantity * 2)


def _triple(story: _Story) -> None:
    story.say("Then {n} triples the number of {o}.", "A month later {n} has three times as many {o}.")
    story.hold(f"{story.quantity}*3", story.quantity * 3)


def _half(story: _Story) -> None:
    if story.quantity % 2:
        raise Impossible
    story.say("Half of the {o} break on the way to the {p}.", "{n} leaves half of the {o} at the {p}.")
    story.hold(f"{story.quantity}/2", story.quantity // 2)


def _plain(story: _Story) -> None:
    story.say("How many {o} does {n} have now?", "How many {o} are left with {n} in the end?")


def _share(story: _Story) -> None:
    parts = [n for n in range(2, 10) if story.quantity % n == 0]
    if not parts:
        raise Impossible
    boxes = story.rng.choice(parts)
    story.given.append(boxes)
    story.say("{n} puts them into {a} equal boxes. How many {o} are in each box?", a=boxes)
    story.work(f"{story.quantity}/{boxes}", story.quantity // boxes, "puts {0} {o} into each box")


def _price(story: _Story) -> None:
    if story.quantity > 60:
        raise Impossible
    price = story.number(2, 5)
    story.say("{n} sells all of the {o} for {a} dollars each. How many dollars does {n} get?", a=price)
    story.work(f"{story.quantity}*{price}", story.quantity * price, "gets {0} dollars")


def _together(story: _Story) -> None:
    more = story.number(2, 99)
    story.say("{f} has {a} more {o} than {n}. How many {o} do they have together?", a=more)
    theirs = story.quantity + more
    if theirs > LARGEST:
        raise Impossible
    story.worked.append(f"{story.friend} has <<{story.quantity}+{more}={theirs}>>{theirs} {story.thing}.")
    story.work(f"{story.quantity}+{theirs}", story.quantity + theirs, "and " + story.friend + " have {0} {o}")


_TELL: dict[str, Callable[[_Story], None]] = {
    "get": _get,
    "lose": _lose,
    "packs": _packs,
    "double": _double,
    "triple": _triple,
    "half": _half,
    "plain": _plain,
    "share": _share,
    "price": _price,
    "together": _together,
}


def _draw(rng: random.Random, test: bool) -> Problem:
    steps = (*rng.choices(EVENTS, k=rng.randint(1, 3)), rng.choice(ASKS))
    if held_out(steps) != test:
        raise Impossible
    story = _Story(rng, test)
    story.say("{n} has {a} {o}.", "{n} brings {a} {o} to the {p}.", "There are {a} {o} in {n}'s bag.", a=story.quantity)
    for step in steps:
        _TELL[step](story)
    last = story.worked[-1].rpartition(">>")[2].split(" ", 1)[0]
    answer = "\n".join([*story.worked, f"#### {last}"])
    return Problem(" ".join(story.told), answer, steps, tuple(story.given))


def generate(split: str, count: int, seed: int = 0) -> Iterator[Problem]:
    """*count* different problems of the `train` or the `test` split; the same arguments give the same problems."""
    if split not in ("train", "test"):
        raise ValueError(f"no split {split!r}: train or test")
    rng = random.Random(f"{split}:{seed}")
    seen: set[str] = set()
    while len(seen) < count:
        try:
            problem = _draw(rng, split == "test")
        except Impossible:
            continue
        unseen_number = not HELD_OUT_NUMBERS.isdisjoint(problem.given)
        if problem.question not in seen and unseen_number == (split == "test"):
            seen.add(problem.question)
            yield problem
