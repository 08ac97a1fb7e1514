"""The matrix in the README, and what is wrong with one that is not the generated one."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_patches.errors import PatchesError
from vllm_patches.upkeep.matrix import BEGIN, END, lint_readme, readme_path, render_matrix, replace_matrix
from world import World

EXPECTED = """\
| release | date | 0001 dsa-mtp-ima | 0002 gdn-null-block-guard | 0003 mla-flat-buffer | 0004 rocm-kv-strides \
| 0005 mrv2-wake-up |
| --- | --- | --- | --- | --- | --- | --- |
| 0.22.0 | 2026-03-22 | fixed upstream | fixed upstream | fixed upstream | absent | broken upstream |
| 0.21.0 | 2026-03-21 | fixed upstream | fixed upstream | **applied** (live) | fixed upstream | fixed upstream |
| 0.20.2 | 2026-03-20 | **applied** (live) | fixed upstream | **applied** (latent) | absent | **applied** (live) |
| 0.20.1 | 2026-03-20 | **applied** (live) | fixed upstream | **applied** (latent) | absent | **applied** (live) |
| 0.19.0 | 2026-03-19 | not patched (live) | not patched (live) | not patched (live) | not patched (live) | absent |
"""


def _readme(world: World) -> Path:
    return readme_path(world.catalog)


def test_the_matrix(world: World) -> None:
    assert render_matrix(world.catalog) == EXPECTED


def test_it_stands_between_its_markers(world: World) -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert replace_matrix(text, world.catalog) == f"before\n{BEGIN}\n{EXPECTED}{END}\nafter\n"


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n"])
def test_a_readme_without_markers_is_an_error(world: World, text: str) -> None:
    with pytest.raises(PatchesError) as caught:
        replace_matrix(text, world.catalog)
    assert caught.value.file == "README.md"
    assert BEGIN in caught.value.expected


def test_the_committed_one_is_the_generated_one(world: World) -> None:
    assert _readme(world) == world.patches.parent / "README.md"
    assert lint_readme(world.catalog) == []


def test_another_cell_is_named_with_its_line(world: World) -> None:
    text = _readme(world).read_text(encoding="utf-8")
    _readme(world).write_text(text.replace("| broken upstream |", "| fixed upstream |"), encoding="utf-8")
    problem = lint_readme(world.catalog)[0]
    assert (problem.rule, problem.file, problem.next_command) == ("matrix", "README.md:6", "make matrix")
    assert "broken upstream" in problem.expected
    assert "broken upstream" not in problem.found


def test_a_row_too_few_is_a_finding(world: World) -> None:
    text = _readme(world).read_text(encoding="utf-8")
    last = EXPECTED.splitlines(keepends=True)[-1]
    _readme(world).write_text(text.replace(last, ""), encoding="utf-8")
    assert [problem.rule for problem in lint_readme(world.catalog)] == ["matrix"]


def test_a_missing_line_feed_is_a_finding(world: World) -> None:
    text = _readme(world).read_text(encoding="utf-8")
    _readme(world).write_text(text.replace(f"\n{END}", END), encoding="utf-8")
    assert [problem.rule for problem in lint_readme(world.catalog)] == ["matrix"]


def test_without_a_readme_there_is_nothing_to_find(world: World) -> None:
    """So it is where the package is installed without the checkout."""
    _readme(world).unlink()
    assert lint_readme(world.catalog) == []


def test_the_command_line_prints_it(world: World) -> None:
    ran = world.run("matrix")
    assert (ran.status, ran.out) == (0, EXPECTED)


def test_the_command_line_writes_it(world: World) -> None:
    before = _readme(world).read_text(encoding="utf-8")
    _readme(world).write_text(before.replace("**applied**", "x"), encoding="utf-8")
    assert world.run("matrix", "--write").status == 0
    assert _readme(world).read_text(encoding="utf-8") == before
