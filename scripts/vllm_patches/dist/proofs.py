"""Which fixes the repros have proved: read from what ``make prove JSON=1`` prints, and judged here once more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_patches.errors import PatchesError
from vllm_patches.model import Release


@dataclass(frozen=True)
class Proofs:
    """The records of a proof run by release and fix."""

    records: Mapping[tuple[str, str], Mapping[str, Any]]

    def trouble(self, release: Release, fix: str) -> str:
        """Why *fix* is not proved on *release*; empty where its repro flips."""
        record = self.records.get((release.version, fix))
        if record is None:
            return "the proof run has no result for it"
        if record["head"] != release.head:
            return f"the proof run was of another state of the series: HEAD {record['head']}"
        wanted, stock, patched = record["stock"]["stock_fails"], record["stock"], record["patched"]
        if not wanted or patched is None:
            return "the repro is not one that fails on the stock tree and passes on the patched one"
        for side, text in ((stock, stock["trouble"]), (patched, patched["trouble"])):
            if text:
                return f"the repro could not be judged on the {side['side']} tree: {text}"
        return _judged(wanted, stock["outcomes"], "stock") or _judged({}, patched["outcomes"], "patched")


def _judged(wanted: Mapping[str, str], outcomes: Mapping[str, str], side: str) -> str:
    """The first check whose outcome is not the wanted one: to pass, or to fail on the named assertion."""
    if not outcomes or set(wanted) - set(outcomes):
        return f"checks did not run on the {side} tree"
    for check, outcome in outcomes.items():
        expected = f"fail: {wanted[check]}" if check in wanted else "pass"
        if outcome != expected:
            return f"{check} on the {side} tree: expected {expected}, found {outcome}"
    return ""


def read_proofs(path: Path) -> Proofs:
    """The results in the file *path*; raises `PatchesError` unless it is the output of a proof run."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return Proofs({(row["release"], row["fix"]): _checked(row) for row in rows})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchesError(
            "not the results of a proof run",
            file=str(path),
            expected="the JSON that the proofs print",
            found=f"{type(error).__name__}: {error}",
            next_command=f"make --silent prove PIN=all JSON=1 >{path}",
        ) from error


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """The row itself, once all that is read from it is there."""
    for side in [row["stock"], *([row["patched"]] if row["patched"] is not None else [])]:
        _ = side["side"], side["outcomes"].items(), side["stock_fails"].items(), side["trouble"]
    _ = row["head"]
    return row
