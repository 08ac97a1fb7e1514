"""`ci/scenarios.toml`: the flags under which each defect is met, and what stock does then."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gsm8k.sides import CODE, RunError

FILE = CODE / "scenarios.toml"

# How a broken engine ends, whatever broke it: the cause where the log has it, else that it ended. Anything else that
# fails a run is a mistake in the run, not a result.
CAUSES = re.compile(r"illegal memory access|CUDA error|HIP error|device-side assert|Assertion error \(")
ENDS = re.compile(r"EngineDeadError|EngineCore encountered|Fatal Python error|Segmentation fault")


@dataclass(frozen=True)
class Scenario:
    """One entry; *engine* are vLLM's engine arguments by their Python names, *env* its environment variables."""

    name: str
    fix: str = ""
    model: str = ""
    fixture: str = ""  # the tiny model that stands in for it
    platform: str = "cuda"
    gpus: int = 1
    pins: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    sleep_every: int = 0  # questions between a sleep and wake-up; 0: none
    sleep_level: int = 1
    stock: str = ""  # what breaks there, in words
    crash: str = ""  # a regular expression for the log of stock's crash; empty: stock answers, wrongly or not

    def crashed(self, log: str) -> str:
        """The line of *log* that shows a crash, the scenario's own first; empty where there is none."""
        own = [re.compile(self.crash)] if self.crash else []
        lines = log.splitlines()
        for pattern in (*own, CAUSES, ENDS):
            if found := next((line for line in lines if pattern.search(line)), None):
                return found.strip()
        return ""


PLAIN = Scenario("plain")


def read_scenarios(file: Path = FILE) -> dict[str, Scenario]:
    """Every scenario by its name."""
    with file.open("rb") as opened:
        tables = tomllib.load(opened)["scenario"]
    found: dict[str, Scenario] = {}
    for table in tables:
        if unknown := table.keys() - Scenario.__dataclass_fields__.keys():
            raise RunError(f"{file.name}: scenario {table.get('name')!r} has unknown keys: {sorted(unknown)}")
        scenario = Scenario(**table | {"pins": tuple(table["pins"])})
        found[scenario.name] = scenario
    return found


def scenario_of(name: str) -> Scenario:
    """The scenario *name* (its name or its fix); the plain one for an empty name."""
    if not name:
        return PLAIN
    known = read_scenarios()
    chosen = [s for s in known.values() if name in (s.name, s.fix)]
    if len(chosen) != 1:
        raise RunError(f"SCENARIO={name}: {len(chosen)} scenarios have that name; there are: {', '.join(known)}")
    return chosen[0]
