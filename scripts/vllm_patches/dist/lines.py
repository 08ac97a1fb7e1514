"""A tree whose every line remembers which patch brought it, and which patch took it away.

Lines are told apart by identity, not by text: a hunk can so be carried from one tree to another to exactly the same
lines, however often their text occurs, and where it cannot be, the patches that stand in the way are known by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vllm_patches.series.hunks import split_lines
from vllm_patches.series.model import Hunk


@dataclass(frozen=True, eq=False)
class Line:
    """One line with its end; *by* is the patch that brought it, empty for the release's own."""

    text: bytes
    by: str = ""


@dataclass
class Tree:
    """Some files of a release, as lines. A path that is not there has no file."""

    files: dict[str, list[Line]]
    removed: dict[Line, str] = field(default_factory=dict)  # by which patch

    @classmethod
    def of(cls, contents: Mapping[str, bytes]) -> Tree:
        """The tree of a release's own files."""
        return cls({path: [Line(text) for text in split_lines(data)] for path, data in contents.items()})

    def copy(self) -> Tree:
        """Another tree of the very same lines."""
        return Tree({path: list(lines) for path, lines in self.files.items()}, dict(self.removed))

    def data(self, path: str) -> bytes | None:
        """The file's bytes, None where there is no such file."""
        return b"".join(line.text for line in self.files[path]) if path in self.files else None

    def texts(self, path: str) -> list[bytes]:
        """The file's lines as bytes."""
        return [line.text for line in self.files[path]]

    def put(self, path: str, at: int, old: Sequence[Line], new: Sequence[Line], by: str) -> None:
        """Replace the lines *old*, which stand from index *at* on, by *new*."""
        lines = self.files[path]
        assert lines[at : at + len(old)] == list(old)
        lines[at : at + len(old)] = new
        kept = set(new)
        self.removed.update({line: by for line in old if line not in kept})


def lines_after(hunk: Hunk, old: Sequence[Line], by: str) -> list[Line]:
    """What stands where *old* stood once the hunk is in: context keeps its identity."""
    here = iter(old)
    result: list[Line] = []
    for line in hunk.lines:
        if line[:1] == b"+":
            result.append(Line(line[1:], by))
        elif line[:1] == b"-":
            next(here)
        else:
            result.append(next(here))
    return result


@dataclass(frozen=True)
class Obstacle:
    """Why lines of one tree have no counterpart in another: what is missing there, and what has come between."""

    line: Line
    missing: tuple[str, ...]  # patches of the first tree that the second lacks
    in_the_way: tuple[str, ...]  # patches of the second tree that the first lacks


def find(old: Sequence[Line], source: Tree, target: Tree, path: str) -> int | Obstacle:
    """The index in *target* at which the lines *old* of *source* stand together, or why they do not."""
    there = target.files.get(path, [])
    place = {line: at for at, line in enumerate(there)}
    absent = [line for line in old if line not in place]
    present = [place[line] for line in old if line in place]
    between = [line for line in there[present[0] : present[-1] + 1] if line not in set(old)] if present else []
    if absent or between:
        return _obstacle(absent, between, source, target)
    first = present[0]
    return first if (edge := _edge(old, source, target, path)) is None else _obstacle((), [edge], source, target)


def _edge(old: Sequence[Line], source: Tree, target: Tree, path: str) -> Line | None:
    """A hunk that ends with the file must do so there too: with less context than usual, tools hold it to that."""
    here, there = source.files[path], target.files[path]
    if old[-1] is here[-1] and old[-1] is not there[-1]:
        return there[there.index(old[-1]) + 1]
    if old[0] is here[0] and old[0] is not there[0]:
        return there[there.index(old[0]) - 1]
    return None


def _obstacle(absent: Sequence[Line], between: Sequence[Line], source: Tree, target: Tree) -> Obstacle:
    missing = [line.by for line in absent if line not in target.removed]
    missing += [source.removed[line] for line in between if line in source.removed]
    in_the_way = [target.removed[line] for line in absent if line in target.removed]
    in_the_way += [line.by for line in between if line not in source.removed]
    line = (*absent, *between)[0]
    return Obstacle(line, _names(missing), _names(in_the_way))


def _names(found: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({name for name in found if name}))
