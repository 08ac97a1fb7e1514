"""The patches' ``Test:`` trailers against the proofs of ``tests/repro``, in both directions; nothing is run.

Which proofs there are is data: ``tests/repro/expected.toml`` says for each fix and release what the stock tree must
fail on. A release on which nothing must fail (fixed upstream, or absent) is no proof of a patch.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.series.catalog import Catalog
from vllm_patches.series.headers import PROOFS, Problem, proof_id

EXPECTED = "tests/repro/expected.toml"
_ID = re.compile(re.escape(f"{PROOFS}::test_proof[") + r"(\d{4})-(\d+(?:\.\d+)*)\]")

Proof = tuple[str, str]  # fix id, release


def lint_proofs(catalog: Catalog) -> list[Problem]:
    """Trailers without a proof, proofs without a trailer; nothing where there is no ``tests/repro`` (installed)."""
    root = catalog.folder.parent
    if not (root / "tests" / "repro").is_dir():
        return []
    try:
        proofs = stock_failures(root / EXPECTED)
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        return [Problem("proof-table", EXPECTED, "a table of proofs", found, f"git checkout -- {EXPECTED}")]
    needed = {proof for proof, failures in proofs.items() if failures}
    return [*_unproven(catalog, needed), *_unnamed(catalog, needed), *_files(catalog, root, needed)]


def stock_failures(path: Path) -> dict[Proof, dict[str, str]]:
    """For each fix and release, the checks that must fail on the stock tree, with the assertion each must reach."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["expected"]
    return {(row["fix"], release): dict(row["stock_fails"]) for row in rows for release in row["releases"]}


def _trailers(catalog: Catalog) -> Iterator[tuple[str, str]]:
    """Each patch file and its ``Test:`` trailer; `lint_catalog` tells of series that cannot be read."""
    for name in dict.fromkeys(release.series for release in catalog.pins):
        try:
            series = catalog.series_of(next(pin for pin in catalog.pins if pin.series == name))
        except PatchesError:
            continue
        for patch in series.patches:
            yield f"patches/{name}/{patch.name}", patch.trailer("Test")


def _unproven(catalog: Catalog, proofs: set[Proof]) -> Iterator[Problem]:
    for where, trailer in _trailers(catalog):
        named = _ID.fullmatch(trailer)
        if named is None or (named[1], named[2]) not in proofs:
            yield Problem("proof-missing", where, f"Test: the id of a proof that {EXPECTED} knows", trailer or "none")


def _unnamed(catalog: Catalog, proofs: set[Proof]) -> Iterator[Problem]:
    trailers = {trailer for _, trailer in _trailers(catalog)}
    for fix, release in sorted(proofs):
        if proof_id(fix, release) not in trailers:
            expected = f"a patch with Test: {proof_id(fix, release)}"
            yield Problem("proof-unnamed", f"{EXPECTED}, {fix}, {release}", expected, "none")


def _files(catalog: Catalog, root: Path, proofs: set[Proof]) -> Iterator[Problem]:
    """What the ids stand for: the test, and a case for each fix."""
    wanted = {PROOFS: "def test_proof("}
    for fix in sorted({fix for fix, _ in proofs}):
        slug = catalog.fixes[fix].slug if fix in catalog.fixes else fix
        wanted[f"tests/repro/cases/{slug.replace('-', '_')}.py"] = f'CASE = Case("{fix}")'
    for name, line in wanted.items():
        text = (root / name).read_text(encoding="utf-8") if (root / name).is_file() else ""
        if not any(found.startswith(line) for found in text.splitlines()):
            yield Problem("proof-file", name, line, "not there" if text else "no such file", f"git checkout -- {name}")
