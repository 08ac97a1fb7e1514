"""The tools' packages stand one above the other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PACKAGE = SCRIPTS / "vllm_patches"


def imported(file: Path) -> Iterator[str]:
    """The dotted names that *file* imports from this package, those under TYPE_CHECKING and in functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def room(dotted: str) -> str:
    """The package or top module that a dotted name belongs to."""
    return dotted.split(".")[1]


def test_no_package_imports_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        mine = room(".".join(file.relative_to(SCRIPTS).with_suffix("").parts))
        names = [name for name in imported(file) if name.startswith("vllm_patches.")]
        graph.setdefault(mine, set()).update({room(name) for name in names} - {mine})
    floors = list(TopologicalSorter(graph).static_order())  # CycleError names the circle
    assert floors.index("series") < floors.index("trees") < floors.index("installed") < floors.index("cli")
