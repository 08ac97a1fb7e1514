"""What came of a run: judged, cleaned of the machine's own names, and written to one JSON file."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from gpu_case import Case, Side

SCHEMA = 1
EXCERPT = 12  # lines of a side's output that are kept


class Outcome(Enum):
    """How one side ended. Only PASS is a pass."""

    PASS = "pass"
    FAIL = "fail"  # an exception, the case's own assertion among them; *detail* has its text
    DIED = "died"  # the process ended without a result: a signal, or an exit of its own
    LATE = "late"  # killed at its time limit
    NOT_RUN = "not run"


class Verdict(Enum):
    """What both sides of a case say together."""

    PROVED = "proved"  # stock failed as named, patched passed
    CONTROL = "control passed"  # both passed, and their figures that must be equal are
    OBSERVED = "observed"  # a case that is not judged
    NOT_PROVED = "not proved"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class SideResult:
    """One side of one case; *seconds* is the whole process's."""

    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0
    measures: Mapping[str, Any] = field(default_factory=dict)
    excerpt: tuple[str, ...] = ()


@dataclass(frozen=True)
class CaseResult:
    """One row: the verdict and, where it is not a good one, why."""

    case: str
    fix: str
    release: str
    about: str
    expected: str
    verdict: Verdict
    complaints: tuple[str, ...]
    sides: Mapping[str, SideResult]


def judge(case: Case, release: str, sides: Mapping[Side, SideResult]) -> CaseResult:
    """The verdict on a case; a side that was not run leaves it NOT_RUN, whatever the other says.

    So does a side of a case that only observes, if it ended otherwise than well before it had a figure.
    """
    complaints: tuple[str, ...] = ()
    if any(sides[side].outcome is Outcome.NOT_RUN for side in case.sides):
        verdict = Verdict.NOT_RUN
        complaints = tuple(f"{side.value}: {sides[side].detail}" for side in case.sides if sides[side].detail)
    elif not case.judged:
        complaints = tuple(
            f"{side.value}: {sides[side].outcome.value}, nothing was observed: {_first(sides[side].detail)}"
            for side in case.sides
            if not _seen(sides[side])
        )
        verdict = Verdict.NOT_RUN if complaints else Verdict.OBSERVED
    else:
        complaints = tuple(_complaints(case, sides))
        good = Verdict.PROVED if case.stock else Verdict.CONTROL
        verdict = Verdict.NOT_PROVED if complaints else good
    named = {side.value: sides[side] for side in case.sides}
    return CaseResult(case.name, case.fix, release, case.about, case.stock, verdict, complaints, named)


def _seen(side: SideResult) -> bool:
    return side.outcome is Outcome.PASS or bool(side.measures)


def _complaints(case: Case, sides: Mapping[Side, SideResult]) -> Iterable[str]:
    stock, patched = sides[Side.STOCK], sides[Side.PATCHED]
    if not case.stock and stock.outcome is not Outcome.PASS:
        yield f"stock: a control must pass, but it {stock.outcome.value}: {_first(stock.detail)}"
    if case.stock and stock.outcome is Outcome.PASS:
        yield f"stock: passed, but must fail with /{case.stock}/"
    elif case.stock and (stock.outcome is Outcome.LATE or not re.search(case.stock, stock.detail)):
        yield f"stock: {stock.outcome.value}, but not with /{case.stock}/: {_first(stock.detail)}"
    if patched.outcome is not Outcome.PASS:
        yield f"patched: {patched.outcome.value}: {_first(patched.detail)}"
    if patched.outcome is stock.outcome is Outcome.PASS:
        for name in case.equal:
            if name not in stock.measures or stock.measures[name] != patched.measures.get(name):
                yield f"{name}: {stock.measures.get(name)!r} on stock, {patched.measures.get(name)!r} on patched"


def _first(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "no text"


class Cleaner:
    """Takes this machine's own names out of a text: folders, host and user."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        known = sorted(folders.items(), key=lambda item: -len(str(item[1])))
        self.folders = [(str(path), f"<{name}>") for name, path in known]
        names = {socket.gethostname(), platform.node(), os.environ.get("HOSTNAME", "")}
        self.names = sorted((name for name in names if len(name) > 3), key=len, reverse=True)

    def text(self, text: str) -> str:
        """*text* without them; of any other absolute path only the last two parts stay."""
        for path, name in self.folders:
            text = text.replace(path, name)
        for name in self.names:
            text = text.replace(name, "<host>")
        text = re.sub(r"\b(?:10|172|192)\.\d+\.\d+\.\d+\b", "<address>", text)
        text = re.sub(r"(?<![\w>.:/])/(?:[\w.+@~-]+/)+(?=[\w.+@~-]+/[\w.+@~-]+)", "…/", text)
        return re.sub(r"(?<![\w>.:/…])/(?:root|home|tmp|work|opt|usr)/", "…/", text)

    def value(self, value: Any) -> Any:
        """The same for every text in *value*."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value.value if isinstance(value, Enum) else value


NOISE = re.compile(r"it/s\]|Capturing|Loading|^\s*$|\(EngineCore|WARNING|INFO|DeprecationWarning|FutureWarning")


def excerpt(log: str) -> tuple[str, ...]:
    """The last lines of a side's output that say something."""
    lines = [line.rstrip()[:300] for line in log.splitlines() if not NOISE.search(line)]
    return tuple(lines[-EXCERPT:])


def as_json(result: CaseResult, cleaner: Cleaner) -> dict[str, Any]:
    """A row for the file."""
    row: dict[str, Any] = cleaner.value(asdict(result))
    row["expected"] = result.expected  # a regular expression of ours: nothing to clean
    return row


def write(path: Path, run: Mapping[str, Any]) -> None:
    """Add *run* to the file, in place of an earlier state of the same run; the file is replaced as a whole."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"schema": SCHEMA, "runs": []}
    same = (run["id"], run["command"])  # two runs may start in one second
    runs = [old for old in known["runs"] if (old["id"], old["command"]) != same]
    text = json.dumps({"schema": SCHEMA, "runs": [*runs, run]}, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+(-?[\d.]+(?:,\s+-?[\d.]+)*)\s+\]", _on_one_line, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def _on_one_line(numbers: re.Match[str]) -> str:
    """A list of numbers, which indent spreads over as many lines."""
    return f"[{' '.join(numbers[1].split())}]"


def main() -> None:
    """results.py INTO FROM...: add the runs of the other files to the first."""
    into, *others = (Path(word) for word in sys.argv[1:])
    for other in others:
        for run in json.loads(other.read_text(encoding="utf-8"))["runs"]:
            write(into, run)


if __name__ == "__main__":
    main()
