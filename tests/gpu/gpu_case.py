"""What a GPU case is written with: the registry, the failure it names, and what it is told about its side.

A case is a function that runs once per side (stock, patched and, where it says so, upstream), each time in a process of
its own. It returns its figures when the side is sound and raises when it is not. Modules in ``cases/`` import neither
torch nor vLLM at their top: listing the cases needs no GPU.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Side(Enum):
    """Which code a case runs on."""

    STOCK = "stock"  # the release as it is
    PATCHED = "patched"  # with our series
    UPSTREAM = "upstream"  # the patched release, changed at run time into upstream's own form of the fix; not judged


class Defect(AssertionError):
    """The case's own assertion; its text is what a stock side is expected to fail with."""


@dataclass(frozen=True)
class Context:
    """One run of one case. *target* is the folder that holds ``vllm``; *shared* is kept for the whole run."""

    release: str
    side: Side
    target: Path
    scratch: Path
    shared: Path
    operators: Path | None = None  # an installed vLLM whose compiled operators a source tree may borrow


Run = Callable[[Context], Mapping[str, Any]]


@dataclass(frozen=True)
class Case:
    """One row of the results.

    *stock* is a regular expression for the failure of the stock side; empty: a control, which passes on both.
    *equal* names figures that must be the same on stock and patched. *judged* False: what is seen is recorded, and no
    verdict is given; a release without a series has no other cases than such, with stock the only one of their *sides*.
    *alone*: nothing else runs meanwhile. *limit*: seconds for one side.
    """

    name: str
    fix: str
    releases: tuple[str, ...]
    run: Run
    about: str
    stock: str = ""
    equal: tuple[str, ...] = ()
    sides: tuple[Side, ...] = (Side.STOCK, Side.PATCHED)
    judged: bool = True
    alone: bool = False
    limit: float = 240.0


CASES: dict[str, Case] = {}


def case(name: str, fix: str, releases: tuple[str, ...], **options: Any) -> Callable[[Run], Run]:
    """Register a function as a case; its docstring's first line says what it is about."""

    def register(run: Run) -> Run:
        if name in CASES:
            raise ValueError(f"case {name!r} is registered twice")
        about = options.pop("about", None) or (run.__doc__ or "").strip().splitlines()[0]
        made = Case(name, fix, releases, run, about, **options)
        if made.judged and not {Side.STOCK, Side.PATCHED} <= set(made.sides):
            raise ValueError(f"case {name!r}: a verdict needs stock and patched")
        CASES[name] = made
        return run

    return register


def load_cases(folder: Path = HERE / "cases") -> dict[str, Case]:
    """Import every module of *folder*; returns the registry in the order of the files and of their text."""
    sys.path[:0] = [place for place in (str(HERE), str(folder)) if place not in sys.path]
    for path in sorted(folder.glob("*.py")):
        importlib.import_module(path.stem)
    return CASES


def expect(condition: bool, text: str) -> None:
    """Raise `Defect` unless *condition* holds."""
    if not condition:
        raise Defect(text)
