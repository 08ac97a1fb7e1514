"""Unified diffs as other people write them, with the line number of all that may have to be rewritten.

`patchfile` reads what git made for us and refuses the rest; here plain `diff -u` output, quilt's and git's are read.
What the channels could not all carry (renames, binary files, mode changes alone, CRLF) is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from vllm_patches.errors import PatchesError
from vllm_patches.series.hunks import split_lines
from vllm_patches.series.model import Hunk

NO_BLOB = "0" * 40
_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(.*)\n?")
_INDEX = re.compile(rb"index ([0-9a-f]{7,40})\.\.([0-9a-f]{7,40})(?: ([0-7]{6}))?\n")
_BINARY = re.compile(rb"(?:Binary f|F)iles \S.* and \S.* differ\n")
_REFUSED = {  # in git's own header; prose may start a line with the same words
    b"rename from ": "a rename",
    b"copy from ": "a copy",
    b"GIT binary patch": "a binary file",
    b"old mode ": "a change of mode",
}


class Kind(Enum):
    """What a section does to its file."""

    CHANGE = "change"
    CREATE = "create"
    DELETE = "delete"


@dataclass(frozen=True)
class Section:
    """What a patch does to one file. Line numbers count from 0 in the patch's own lines."""

    path: str  # as -p1 leaves it
    stated: str  # as the patch writes it
    kind: Kind
    mode: str
    index_at: int | None  # the line ``index …``, where there is one
    hunks: tuple[Hunk, ...]
    hunks_at: tuple[int, ...]


def parse_unified(name: str, raw: bytes) -> tuple[Section, ...]:
    """The sections of a patch for ``patch -p1``; raises `PatchesError` where a channel could not take it."""
    if b"\r\n" in raw:
        line = raw[: raw.index(b"\r\n")].count(b"\n") + 1
        raise bad_patch(name, "LF line ends", f"CRLF in line {line}", command=f"sed -i 's/\\r$//' {name}")
    lines = split_lines(raw)
    sections: list[Section] = []
    at, header = 0, False
    while at < len(lines):
        if _starts_file(lines, at):
            section, at = _read_section(name, lines, at)
            sections.append(section)
            header = False
        else:
            header = header or lines[at].startswith(b"diff --git ")
            _refuse(name, lines[at], sections, header)
            at += 1
    if not sections:
        raise bad_patch(name, "at least one '--- a/…', '+++ b/…' and '@@ … @@'", "none")
    return tuple(sections)


def _starts_file(lines: Sequence[bytes], at: int) -> bool:
    """True at ``--- …`` that is followed by ``+++ …`` and a hunk: prose may have dashes of its own."""
    wanted = (b"--- ", b"+++ ", b"@@ -")
    return len(lines) > at + 2 and all(lines[at + n].startswith(mark) for n, mark in enumerate(wanted))


def _refuse(name: str, line: bytes, sections: Sequence[Section], header: bool) -> None:
    what = next((what for mark, what in _REFUSED.items() if header and line.startswith(mark)), "")
    if _BINARY.fullmatch(line):
        what = "a binary file"
    if what:
        found = f"{what}: {line.decode('utf-8', 'replace').rstrip()}"
        raise bad_patch(name, "changed, new and deleted text files", found, sections[-1].path if sections else "")


def _read_section(name: str, lines: Sequence[bytes], at: int) -> tuple[Section, int]:
    old, new = (_path(lines[at + n]) for n in (0, 1))
    index_at, mode, words = _git_header(lines, at)
    hunks: list[Hunk] = []
    places: list[int] = []
    place = at + 2
    stated = old if new == "/dev/null" else new
    path = _strip(name, stated)
    while place < len(lines) and lines[place].startswith(b"@@ -"):
        places.append(place)
        hunk, place = _read_hunk(name, path, lines, place, len(hunks) + 1)
        hunks.append(hunk)
    kind = _kind(old, new, words, hunks)
    if kind is Kind.CHANGE and (bare := [n for n, hunk in enumerate(hunks, 1) if not hunk.old]):
        raise bad_patch(name, "context: a line that says where to insert", "none (diff -U0)", path, bare[0])
    return Section(path, stated, kind, mode, index_at, tuple(hunks), tuple(places)), place


def _path(line: bytes) -> str:
    return line[4:].decode("utf-8", "surrogateescape").rstrip("\n").partition("\t")[0].rstrip()


def _strip(name: str, stated: str) -> str:
    """The path below the first folder, as ``-p1`` takes it."""
    path = stated.partition("/")[2]
    if stated.startswith('"'):
        raise bad_patch(name, "a path that needs no quotes", stated)
    if not path or stated.startswith("/"):
        raise wrong_strip(name, stated, "a path with a folder to strip")
    if any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise bad_patch(name, "a path inside the tree", stated)
    return path


def wrong_strip(name: str, stated: str, expected: str) -> PatchesError:
    """The error for a patch that was made for another strip level than 1."""
    return bad_patch(
        name,
        f"-p1: {expected}",
        f"wrong strip level: {stated}",
        command=f"quilt refresh -p1 {name}    # with -p0: quilt import -p0, then quilt refresh",
    )


def _git_header(lines: Sequence[bytes], at: int) -> tuple[int | None, str, bytes]:
    """The index line, the file's mode and the words of git's own header above line *at*, where there is one."""
    first = at - 1
    while first > 0 and at - first < 8 and not lines[first].startswith((b"diff --git ", b"@@ -")):
        first -= 1  # at most the modes, the similarity and the index line stand between
    if first < 0 or not lines[first].startswith(b"diff --git "):
        return None, "", b""
    header = lines[first:at]
    index_at = next((first + n for n, line in enumerate(header) if _INDEX.fullmatch(line)), None)
    found = re.search(rb"(?:new file mode |deleted file mode |index \S+ )([0-7]{6})", b"".join(header))
    return index_at, found[1].decode() if found else "", b"".join(header)


def _kind(old: str, new: str, header: bytes, hunks: Sequence[Hunk]) -> Kind:
    alone = hunks[0] if len(hunks) == 1 else None
    if old == "/dev/null" or b"new file mode " in header or (alone and (alone.old_start, alone.old_count) == (0, 0)):
        return Kind.CREATE
    if (
        new == "/dev/null"
        or b"deleted file mode " in header
        or (alone and (alone.new_start, alone.new_count) == (0, 0))
    ):
        return Kind.DELETE
    return Kind.CHANGE


def _read_hunk(name: str, path: str, lines: Sequence[bytes], at: int, number: int) -> tuple[Hunk, int]:
    match = _HUNK.fullmatch(lines[at])
    if not match:
        raise bad_patch(name, "@@ -A,B +C,D @@", lines[at].decode("utf-8", "replace").rstrip(), path, number)
    old_start, old, new_start, new = (1 if group is None else int(group) for group in match.groups()[:4])
    body: list[bytes] = []
    left_old, left_new = old, new
    at += 1
    while at < len(lines) and (left_old > 0 or left_new > 0 or lines[at].startswith(b"\\ ")):
        line = b" \n" if lines[at] == b"\n" else lines[at]  # an editor has removed the blank of an empty line
        if line.startswith(b"\\ "):
            body[-1] = body[-1].removesuffix(b"\n")
        elif line[:1] in b" -+":
            body.append(line)
            left_old -= line[:1] in b" -"
            left_new -= line[:1] in b" +"
        else:
            break
        at += 1
    if left_old or left_new:
        found = f"{old - left_old} and {new - left_new}"
        raise bad_patch(name, f"{old} old and {new} new lines, as the hunk header says", found, path, number)
    return Hunk(old_start, old, new_start, new, tuple(body)), at


def bad_patch(name: str, expected: str, found: str, file: str = "", hunk: int = 0, command: str = "") -> PatchesError:
    """The error for a patch of somebody else's that cannot be taken as it is."""
    return PatchesError(
        "the patch cannot be taken as it is",
        patch=name,
        file=file,
        hunk=hunk,
        expected=expected,
        found=found,
        next_command=command or f"quilt refresh -p1 {name}    # in the tree that it was made for",
    )


def rewrite(raw: bytes, sections: Sequence[Section], placed: Sequence[tuple[str, str, Sequence[Hunk]]]) -> bytes:
    """*raw* with other line numbers and blob ids: for each section its blobs before and after, and its hunks."""
    lines = split_lines(raw)
    for section, (before, after, hunks) in zip(sections, placed, strict=True):
        if section.index_at is not None:
            lines[section.index_at] = _index_line(lines[section.index_at], before, after)
        for at, hunk in zip(section.hunks_at, hunks, strict=True):
            lines[at] = _hunk_line(lines[at], hunk)
    return b"".join(lines)


def _index_line(line: bytes, before: str, after: str) -> bytes:
    match = _INDEX.fullmatch(line)
    assert match
    if before.startswith(match[1].decode()) and after.startswith(match[2].decode()):
        return line  # still true, shortened or not
    mode = b" " + match[3] if match[3] else b""
    return f"index {before}..{after}".encode() + mode + b"\n"


def _hunk_line(line: bytes, hunk: Hunk) -> bytes:
    match = _HUNK.fullmatch(line)
    assert match
    if (hunk.old_start, hunk.new_start) == (int(match[1]), int(match[3])):
        return line
    old, new = span(hunk.old_start, hunk.old_count), span(hunk.new_start, hunk.new_count)
    return b"@@ -" + old + b" +" + new + b" @@" + match[5] + b"\n"


def span(start: int, count: int) -> bytes:
    """START,COUNT as git and diff write it: a count of 1 is left out."""
    return f"{start}".encode() if count == 1 else f"{start},{count}".encode()
