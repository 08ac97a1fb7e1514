"""Put a patch into a tree that it was not made for, without fuzz: by the identity of its lines, or by their text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_patches.dist.lines import Line, Obstacle, Tree, find, lines_after
from vllm_patches.dist.unified import NO_BLOB, Kind, Section
from vllm_patches.series.hunks import blob_id, index_of, mismatch
from vllm_patches.series.model import Hunk


@dataclass(frozen=True)
class Placed:
    """Where a section's hunks went: its blobs before and after, and the hunks with the numbers of that tree."""

    before: str
    after: str
    hunks: tuple[Hunk, ...]


@dataclass(eq=False)
class Misfit(Exception):
    """A hunk (counted from 1) that has no place; *obstacle* is None where its text is nowhere at all."""

    section: Section
    hunk: int
    obstacle: Obstacle | None
    line: int = 0
    expected: str = ""
    found: str = ""


Find = Callable[[Hunk, int], int]  # (hunk, its number from 1) to its index in the tree; raises Misfit


def carry(sections: Sequence[Section], source: Tree, target: Tree, by: str) -> list[Placed]:
    """Apply the sections to *source*, for which they were made, and to the same lines of *target*."""
    placed: list[Placed] = []
    for section in sections:

        def same_lines(hunk: Hunk, number: int, section: Section = section) -> int:
            at = index_of(hunk.new_start, hunk.new_count)
            assert mismatch(hunk, source.texts(section.path), at) is None, (by, section.path, number)
            old = source.files[section.path][at : at + hunk.old_count]
            where = find(old, source, target, section.path)
            if isinstance(where, Obstacle):
                raise Misfit(section, number, where)
            new = lines_after(hunk, old, by)
            source.put(section.path, at, old, new, by)
            target.put(section.path, where, old, new, by)
            return where

        placed.append(_place(section, target, same_lines))
    return placed


def locate(sections: Sequence[Section], target: Tree, base: Tree, by: str) -> list[Placed]:
    """Apply the sections to *target* wherever their text stands, nearest to their stated lines.

    *base* is the tree without the other side's patches. It is kept in step as long as it can be: only there can be
    told whose patches a hunk that fits nowhere in *target* collides with.
    """
    placed: list[Placed] = []
    for section in sections:
        drift = 0  # how far earlier hunks have moved from where they are stated

        def by_text(hunk: Hunk, number: int, section: Section = section) -> int:
            nonlocal drift
            stated = index_of(hunk.new_start, hunk.new_count)
            at = nearest(hunk, target.texts(section.path), stated + drift)
            if at is None:
                raise _misfit(section, number, hunk, target, base, stated + drift)
            old = target.files[section.path][at : at + hunk.old_count]
            new = lines_after(hunk, old, by)
            _follow(base, target, section.path, old, new, by)
            target.put(section.path, at, old, new, by)
            drift = at - stated
            return at

        placed.append(_place(section, target, by_text))
        if section.path not in target.files:
            base.files.pop(section.path, None)
    return placed


def _place(section: Section, target: Tree, put: Find) -> Placed:
    """One section; *put* finds the place of each hunk and replaces its lines there."""
    before = target.data(section.path)
    if section.kind is Kind.CREATE:
        _create(section, target)
    elif before is None:
        raise Misfit(section, 1, None, expected="the file", found="no such file")
    hunks: list[Hunk] = []
    shift = 0  # lines that earlier hunks have added
    for number, hunk in enumerate(section.hunks, 1):
        at = put(hunk, number)
        old_start = at - shift + (hunk.old_count > 0)
        hunks.append(Hunk(old_start, hunk.old_count, at + (hunk.new_count > 0), hunk.new_count, hunk.lines))
        shift += hunk.new_count - hunk.old_count
    after = target.data(section.path)
    if section.kind is Kind.DELETE:
        if after:
            raise Misfit(section, len(hunks), None, expected="nothing left of the file", found=f"{len(after)} bytes")
        del target.files[section.path]
        after = None
    return Placed(_blob(before), _blob(after), tuple(hunks))


def _create(section: Section, target: Tree) -> None:
    if section.path in target.files:
        raise Misfit(section, 1, None, expected="no file of that name: the patch creates it", found="one that exists")
    target.files[section.path] = []


def _blob(data: bytes | None) -> str:
    return NO_BLOB if data is None else blob_id(data)


def _follow(base: Tree, target: Tree, path: str, old: Sequence[Line], new: Sequence[Line], by: str) -> None:
    """Put the same into *base*; a hunk that needs the other side's lines makes its file useless there."""
    if not old:
        base.files.setdefault(path, [])
    where = find(old, target, base, path) if old and path in base.files else 0
    if isinstance(where, Obstacle):
        base.files.pop(path)
    elif path in base.files:
        base.put(path, where, old, new, by)


def nearest(hunk: Hunk, lines: list[bytes], stated: int) -> int | None:
    """The index nearest to *stated* at which patch and git would take the hunk without fuzz, or None."""
    old = hunk.old
    if not old:
        return stated if 0 <= stated <= len(lines) else None
    places = [at for at, line in enumerate(lines) if line == old[0] and _fits(hunk, lines, at)]
    return min(places, key=lambda at: abs(at - stated), default=None)


def _fits(hunk: Hunk, lines: list[bytes], at: int) -> bool:
    return mismatch(hunk, lines, at) is None and (at + hunk.old_count == len(lines) or not _wants_end(hunk))


def _wants_end(hunk: Hunk) -> bool:
    """With less context behind than before, patch takes a hunk at the end of the file only; with none, git does."""
    head, tail = _context(hunk)
    return tail < head or tail == 0


def _context(hunk: Hunk) -> tuple[int, int]:
    """How many lines of context the hunk begins and ends with."""
    kinds = [line[:1] == b" " for line in hunk.lines]
    return (kinds.index(False), kinds[::-1].index(False)) if False in kinds else (0, 0)


def _misfit(section: Section, number: int, hunk: Hunk, target: Tree, base: Tree, stated: int) -> Misfit:
    """Why the hunk fits nowhere in *target*: the other side's patches, or else the first line that differs."""
    path = section.path
    if path in base.files and (at := nearest(hunk, base.texts(path), stated)) is not None:
        where = find(base.files[path][at : at + hunk.old_count], base, target, path)
        if isinstance(where, Obstacle):
            return Misfit(section, number, where)
    lines = target.texts(path)
    if fuzz := _fuzz(hunk, lines, stated):
        return Misfit(section, number, None, expected="fuzz 0", found=f"a place with fuzz {fuzz} only")
    at = _likeliest(hunk, lines, stated)
    wrong = mismatch(hunk, lines, at)
    if wrong is None:  # its lines are there, and it ends with the file it was made for
        end = at + hunk.old_count
        return Misfit(section, number, None, end + 1, "the end of the file", _show(lines[end]))
    found = "the end of the file" if wrong.found is None else _show(wrong.found)
    return Misfit(section, number, None, wrong.line, _show(wrong.expected), found)


def _likeliest(hunk: Hunk, lines: list[bytes], stated: int) -> int:
    """Where most of the hunk's first lines stand."""
    places = [stated, *(at for at, line in enumerate(lines) if hunk.old and line == hunk.old[0])]

    def reach(at: int) -> int:
        wrong = mismatch(hunk, lines, at)
        return wrong.line - at if wrong else hunk.old_count + 1

    return max(places, key=lambda at: (reach(at), -abs(at - stated)))


def _fuzz(hunk: Hunk, lines: list[bytes], stated: int) -> int:
    """How many lines of context ``patch`` would have to ignore at each end, 1 or 2; 0 where that does not help."""
    head, tail = _context(hunk)
    for fuzz in (1, 2):
        cut = min(fuzz, head), min(fuzz, tail)
        body = hunk.lines[cut[0] : len(hunk.lines) - cut[1]]
        lines_left = [line[1:] for line in body if line[:1] in b" -"]
        loose = Hunk(hunk.old_start + cut[0], len(lines_left), hunk.new_start, 0, body)
        if lines_left and nearest(loose, lines, stated + cut[0]) is not None:
            return fuzz
    return 0


def _show(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\n")
