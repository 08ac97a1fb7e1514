"""Which fixes the repros have proved: read from what ``make prove JSON=1`` prints, and judged here once more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_patches.errors import PatchesError
from vllm_patches.series.model import Release
from vllm_patches.upkeep.proofrun import Proof, Side


@dataclass(frozen=True)
class Proofs:
    """The proofs of a run by release and fix, and for each the HEAD of the series that it was of."""

    records: Mapping[tuple[str, str], tuple[Proof, str]]

    def trouble(self, release: Release, fix: str) -> str:
        """Why *fix* is not proved on *release*; empty where its repro flips."""
        record = self.records.get((release.version, fix))
        if record is None:
            return "the proof run has no result for it"
        proof, head = record
        if head != release.head:
            return f"the proof run was of another state of the series: HEAD {head}"
        if not proof.stock.stock_fails or proof.patched is None:
            return "the repro is not one that fails on the stock tree and passes on the patched one"
        return next(iter(proof.complaints), "")


def read_proofs(path: Path) -> Proofs:
    """The results in the file *path*; raises `PatchesError` unless it is the output of a proof run."""
    try:
        return from_rows(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PatchesError(
            "not the results of a proof run",
            file=str(path),
            expected="the JSON that the proofs print",
            found=f"{type(error).__name__}: {error}",
            next_command=f"make --silent prove PIN=all JSON=1 >{path}",
        ) from error


def from_rows(rows: list[dict[str, Any]]) -> Proofs:
    """The JSON's rows; one of another shape raises KeyError, TypeError or AttributeError."""
    records: dict[tuple[str, str], tuple[Proof, str]] = {}
    for row in rows:
        patched = Side(**row["patched"]) if row["patched"] is not None else None
        proof = Proof(row["fix"], row["release"], row["state"], Side(**row["stock"]), patched)
        _ = proof.complaints  # reads everything that is judged
        records[proof.release, proof.fix] = proof, row["head"]
    return Proofs(records)
