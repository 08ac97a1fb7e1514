"""The tools' packages stand one above the other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "scripts" / "vllm_patches"


def imported(file: Path) -> Iterator[str]:
    """The packages and top modules of ours that *file* imports, under TYPE_CHECKING and in functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("vllm_patches."))


def test_no_package_imports_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        mine = file.relative_to(PACKAGE).with_suffix("").parts[0]
        graph.setdefault(mine, set()).update(set(imported(file)) - {mine})
    floors = list(TopologicalSorter(graph).static_order())  # CycleError names the circle
    assert floors.index("series") < floors.index("trees") < floors.index("installed") < floors.index("cli")
