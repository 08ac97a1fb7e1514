"""Trailers and proofs in both directions, on the real project's files and on damaged copies of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_patches.series.catalog import Catalog
from vllm_patches.upkeep.check import check_catalog
from vllm_patches.upkeep.proofs import EXPECTED, lint_proofs, stock_failures
from world import World

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what the rule reads."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "patches", copy / "patches")
    shutil.copytree(ROOT / "tests" / "repro", copy / "tests" / "repro")
    return copy


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_the_projects_own_trailers_and_proofs(project: Path) -> None:
    assert lint_proofs(Catalog(project / "patches")) == []
    carried = sum(len(series.patches) for series in Catalog(project / "patches").series.values())
    proofs = [proof for proof, failures in stock_failures(project / EXPECTED).items() if failures]
    assert len(proofs) == carried > 0


def _trailer_of_another_fix(project: Path) -> None:
    _edit(project / "patches/v0.21.0/0002-gdn-null-block-guard.patch", "[0002-0.21.0]", "[0005-0.21.0]")


def _trailer_of_another_release(project: Path) -> None:
    _edit(project / "patches/v0.20.0/0003-mla-flat-buffer.patch", "[0003-0.20.0]", "[0003-0.19.1]")


def _trailer_of_another_test(project: Path) -> None:
    _edit(project / "patches/v0.18.1/0001-dsa-mtp-ima.patch", "test_proof[0001", "test_other[0001")


def _no_patch(project: Path) -> None:
    (project / "patches/v0.19.1/0004-rocm-kv-strides.patch").unlink()
    _edit(project / "patches/v0.19.1/series", "0004-rocm-kv-strides.patch\n", "")


def _proof_of_another_release(project: Path) -> None:
    _edit(project / EXPECTED, 'releases = ["0.18.1", "0.19.1"]', 'releases = ["0.18.1", "0.19.1", "0.22.0"]')


def _no_proof(project: Path) -> None:
    _edit(project / EXPECTED, '"0.20.0", "0.20.2", "0.21.0"]', '"0.20.0", "0.20.2"]')


def _nothing_fails(project: Path) -> None:
    _edit(project / EXPECTED, '"0.19.1", "0.20.0", "0.20.2"]', '"0.19.1", "0.20.0"]')
    _edit(project / EXPECTED, 'releases = ["0.21.0"]', 'releases = ["0.20.2", "0.21.0"]')


def _no_case(project: Path) -> None:
    (project / "tests/repro/cases/mla_flat_buffer.py").unlink()


def _case_of_another_fix(project: Path) -> None:
    _edit(project / "tests/repro/cases/mrv2_wake_up.py", 'CASE = Case("0005")', 'CASE = Case("0004")')


def _no_test(project: Path) -> None:
    _edit(project / "tests/repro/test_proof.py", "def test_proof(", "def test_prove(")


def _damaged_table(project: Path) -> None:
    _edit(project / EXPECTED, 'fix = "0003"', "fix = 0003")


def _no_table(project: Path) -> None:
    (project / EXPECTED).unlink()


def _row_without_fix(project: Path) -> None:
    _edit(project / EXPECTED, 'fix = "0003"\n', "")


BAD: list[tuple[str, Callable[[Path], None], str, str]] = [
    ("proof-missing", _trailer_of_another_fix, "v0.21.0/0002-gdn-null-block-guard.patch", "[0005-0.21.0]"),
    ("proof-missing", _trailer_of_another_release, "v0.20.0/0003-mla-flat-buffer.patch", "[0003-0.19.1]"),
    ("proof-missing", _trailer_of_another_test, "v0.18.1/0001-dsa-mtp-ima.patch", "::test_other["),
    ("proof-unnamed", _no_patch, "0004, 0.19.1", "none"),
    ("proof-unnamed", _proof_of_another_release, "0001, 0.22.0", "none"),
    ("proof-missing", _no_proof, "v0.21.0/0001-dsa-mtp-ima.patch", "[0001-0.21.0]"),
    ("proof-missing", _nothing_fails, "v0.20.2/0005-mrv2-wake-up.patch", "[0005-0.20.2]"),
    ("proof-file", _no_case, "cases/mla_flat_buffer.py", "no such file"),
    ("proof-file", _case_of_another_fix, "cases/mrv2_wake_up.py", "not there"),
    ("proof-file", _no_test, "tests/repro/test_proof.py", "not there"),
    ("proof-table", _damaged_table, EXPECTED, "TOMLDecodeError"),
    ("proof-table", _no_table, EXPECTED, "FileNotFoundError"),
    ("proof-table", _row_without_fix, EXPECTED, "'fix'"),
]
BOTH_WAYS = {_trailer_of_another_fix, _trailer_of_another_release, _trailer_of_another_test}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[1].__name__.strip("_"))
def test_damage_is_told(project: Path, case: tuple[str, Callable[[Path], None], str, str]) -> None:
    rule, damage, place, found = case
    damage(project)
    problems = lint_proofs(Catalog(project / "patches"))
    told = [p for p in problems if p.rule == rule and place in p.file and found in p.found]
    assert len(told) == 1, problems
    also = {"proof-unnamed"} if damage in BOTH_WAYS else set()  # the proof that it named before
    assert {problem.rule for problem in problems} == {rule} | also, problems


def test_a_damaged_series_does_not_hide_the_rest(project: Path) -> None:
    (project / "patches/v0.20.2/0003-mla-flat-buffer.patch").write_bytes(b"garbage\n")
    _trailer_of_another_test(project)
    found = {(problem.rule, problem.file) for problem in lint_proofs(Catalog(project / "patches"))}
    assert ("proof-missing", "patches/v0.18.1/0001-dsa-mtp-ima.patch") in found


def test_an_installed_tool_has_no_proofs_to_compare(world: World) -> None:
    """Its trailers are whatever they are: without tests/repro nothing is said of them."""
    assert not (world.patches.parent / "tests").exists()
    assert lint_proofs(world.catalog) == []


def test_check_says_it(world: World) -> None:
    shutil.copytree(ROOT / "tests" / "repro", world.patches.parent / "tests" / "repro")
    report = check_catalog(world.catalog, (), lambda artifact: pytest.fail("nothing to fetch"))
    assert {problem.rule for problem in report.problems} == {"proof-unnamed"}
    assert not report.ok


def test_needs_neither_torch_nor_pytest(project: Path) -> None:
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "scripts")!r})
from vllm_patches.series.catalog import Catalog
from vllm_patches.upkeep.proofs import lint_proofs
assert lint_proofs(Catalog(Path({str(project / "patches")!r}))) == []
assert not {{"torch", "pytest", "triton"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-I", "-c", program], check=True)
