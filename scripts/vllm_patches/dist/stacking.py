"""A third party's own quilt series, to go above or below ours."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from vllm_patches.dist.unified import Section, bad_patch, parse_unified, wrong_strip
from vllm_patches.errors import PatchesError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")  # what every channel can write without quoting


class Position(Enum):
    """Where the third party's patches go."""

    ABOVE = "above"  # after ours
    BELOW = "below"  # before ours


@dataclass(frozen=True)
class ThirdPatch:
    """One patch file of the third party."""

    name: str
    raw: bytes
    sections: tuple[Section, ...]

    @property
    def subject(self) -> str:
        """Its Subject, DEP-3 Description or first line, as far as there is one."""
        match = re.search(rb"^(?:Subject|Description): *(?:\[[^\]]*\] *)?(.+)$", self.raw, re.M)
        return match[1].decode("utf-8", "replace").strip() if match else self.name


@dataclass(frozen=True)
class ThirdSeries:
    """The patches of a quilt folder, in the order of its series file."""

    name: str
    patches: tuple[ThirdPatch, ...]


def read_third(folder: Path) -> ThirdSeries:
    """Read ``<folder>/series`` and what it names; raises `PatchesError` for what cannot be stacked."""
    if (folder / "series").is_file() or not (folder / "patches" / "series").is_file():
        names = _read_names(folder / "series")
    else:
        raise _no_series(folder / "series", f"it is in {folder / 'patches'}", folder / "patches")
    patches = tuple(_read_patch(folder, name) for name in names)
    if not patches:
        raise _no_series(folder / "series", "no line that names a patch", folder)
    name = folder.resolve().name
    return ThirdSeries(folder.resolve().parent.name if name == "patches" else name, patches)


def _no_series(path: Path, found: str, where: Path) -> PatchesError:
    return PatchesError(
        "there is no series to stack",
        file=str(path),
        expected="a quilt series: one patch name a line",
        found=found,
        next_command=f"ls {where}",
    )


def _read_names(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _no_series(path, str(error), path.parent) from error
    names: list[str] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if words:
            names.append(_checked(path, number, words, names))
    return names


def _checked(path: Path, number: int, words: list[str], before: list[str]) -> str:
    """The name in a line of the series file; *before* are the names above it."""
    name, *options = words
    where = f"line {number}: {' '.join(words)}"
    if others := [option for option in options if option != "-p1"]:
        if any(re.fullmatch(r"-p\S*", option) for option in others):
            raise wrong_strip(name, where, "no strip level, or -p1")
        raise bad_patch(name, "no option but -p1", where, str(path))
    if not _NAME.fullmatch(name):
        raise bad_patch(name, "a plain name: letters, digits, dots, dashes; no folder", where, str(path))
    if name in before or name == "series":
        raise bad_patch(name, "each patch once", where, str(path))
    return name


def _read_patch(folder: Path, name: str) -> ThirdPatch:
    try:
        raw = (folder / name).read_bytes()
    except OSError as error:
        raise bad_patch(
            name,
            "a file of that name beside the series file",
            error.strerror or "",
            str(folder / name),
            0,
            f"ls {folder}",
        ) from error
    if not raw.endswith(b"\n"):
        raise bad_patch(name, "a line feed at the end", "none")
    return ThirdPatch(name, raw, parse_unified(name, raw))
