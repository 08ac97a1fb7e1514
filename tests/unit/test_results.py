"""Figures in the README are the recorded ones."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_has_the_counts_of_the_recorded_mutants() -> None:
    recorded = json.loads((ROOT / "ci" / "results" / "mutants.json").read_text(encoding="utf-8"))
    cells = Counter[str]()
    for cell in (text for releases in recorded["fixes"].values() for text in releases.values()):
        cells.update({name: int(count) for count, name in re.findall(r"(\d+) ([a-z ]+)", cell)})
    assert cells == recorded["all"]
    assert recorded["all"].keys() == {"killed", "broken", "equivalent", "total"}  # the README says: none passed
    said = re.search(
        r"Of (\d+) mutants .* (\d+) failed on .* and (\d+) could not be .*; (\d+) are equivalent.* (\d+) CPU minutes",
        (ROOT / "README.md").read_text(encoding="utf-8"),
    )
    assert said is not None
    all_of_them = [recorded["all"][name] for name in ("total", "killed", "broken", "equivalent")]
    assert [int(number) for number in said.groups()] == [*all_of_them, round(recorded["cpu_seconds"] / 60)]
