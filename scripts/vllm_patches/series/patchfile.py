"""One patch file as bytes, read into the model. Reading is strict: what git would not have written is refused."""

from __future__ import annotations

import re
from email.utils import parsedate_to_datetime
from pathlib import Path

from vllm_patches.errors import PatchesError
from vllm_patches.series.model import FilePatch, Hunk, Patch

FROM_LINE = "From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001"

_DIFF = re.compile(rb"diff --git a/(?P<old>[!-~]+) b/(?P<new>[!-~]+)\n")
_INDEX = re.compile(rb"index (?P<old>[0-9a-f]{40})\.\.(?P<new>[0-9a-f]{40}) (?P<mode>[0-7]{6})\n")
_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@.*\n")
_TRAILER = re.compile(r"(?P<key>[A-Z][A-Za-z-]*): (?P<value>\S.*)")
_NO_NEWLINE = b"\\ No newline at end of file"


def read_patch(path: Path) -> Patch:
    """Read and parse *path*; raises `PatchesError` when the file is missing or not a patch of ours."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PatchesError(
            f"cannot read the patch: {error.strerror}",
            patch=str(path),
            next_command=f"git checkout -- {path}",
        ) from error
    return parse_patch(path.name, raw)


def parse_patch(name: str, raw: bytes) -> Patch:
    """Parse the bytes of one ``git format-patch`` file."""
    if b"\r" in raw:
        raise _bad(name, "LF line ends", "a carriage return (a CRLF checkout?)")
    if not raw.endswith(b"\n"):
        raise _bad(name, "a line feed at the end", _show(raw[raw.rfind(b"\n") + 1 :]))
    head, separator, diff = raw.partition(b"\ndiff --git ")
    if not separator:
        raise _bad(name, "a line 'diff --git a/… b/…'", "none")
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(name, "UTF-8", f"byte {error.object[error.start]:#x} at {error.start}") from error
    fields, body = _parse_head(name, text)
    return Patch(
        number=name[:4],
        name=name,
        author=fields["From"],
        date=fields["Date"],
        subject=fields["Subject"].removeprefix("[PATCH] "),
        body=body,
        trailers=parse_trailers(body),
        files=_parse_diff(name, b"diff --git " + diff),
        raw=raw,
    )


def parse_trailers(body: str) -> tuple[tuple[str, str], ...]:
    """The trailers of a message: its last paragraph, where every line of it is ``Key: value``."""
    matches = [_TRAILER.fullmatch(line) for line in body.rstrip("\n").rsplit("\n\n", 1)[-1].split("\n")]
    if not all(matches):
        return ()
    return tuple((m["key"], m["value"]) for m in matches if m)


def _parse_head(name: str, text: str) -> tuple[dict[str, str], str]:
    """The mail header's fields and the body below it."""
    header, _, body = text.partition("\n\n")
    lines = header.split("\n")
    if lines[0] != FROM_LINE:
        raise _bad(name, FROM_LINE, lines[0])
    fields = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    if list(fields) != ["From", "Date", "Subject"] or len(lines) != 4:
        raise _bad(name, "the header lines From:, Date:, Subject:, one line each", " | ".join(lines[1:]))
    if not _is_date(fields["Date"]):
        raise _bad(name, "Date: RFC 2822 with a zone", fields["Date"])
    return fields, body


def _is_date(text: str) -> bool:
    """True for a date that stands for one moment wherever it is read; ``-0000`` is local time to `email`."""
    try:
        return parsedate_to_datetime(text).tzinfo is not None
    except ValueError:
        return False


def _parse_diff(name: str, diff: bytes) -> tuple[FilePatch, ...]:
    """The file sections, in order."""
    lines = diff.splitlines(keepends=True)
    files: list[FilePatch] = []
    at = 0
    while at < len(lines):
        file, at = _parse_file(name, lines, at)
        files.append(file)
    return tuple(files)


def _parse_file(name: str, lines: list[bytes], at: int) -> tuple[FilePatch, int]:
    """One file section that starts at line *at*; only changes of existing files are in our patches."""
    diff = _DIFF.fullmatch(lines[at])
    index = _INDEX.fullmatch(lines[at + 1]) if at + 1 < len(lines) else None
    if not diff or diff["old"] != diff["new"]:
        raise _bad(name, "diff --git a/PATH b/PATH, the same path twice", _show(lines[at]))
    path = diff["old"].decode()
    if not index:
        found = _show(lines[at + 1]) if at + 1 < len(lines) else "the end of the file"
        raise _bad(name, "index <40 hex>..<40 hex> <mode> (format-patch --full-index)", found, path)
    for line, wanted in zip(lines[at + 2 : at + 4], (f"--- a/{path}\n", f"+++ b/{path}\n"), strict=False):
        if line != wanted.encode():
            raise _bad(name, wanted.rstrip(), _show(line), path)
    hunks, at = _parse_hunks(name, path, lines, at + 4)
    blobs = index["old"].decode(), index["new"].decode()
    return FilePatch(path, *blobs, index["mode"].decode(), hunks), at


def _parse_hunks(name: str, path: str, lines: list[bytes], at: int) -> tuple[tuple[Hunk, ...], int]:
    """The hunks from line *at* up to the next file section or the end."""
    hunks: list[Hunk] = []
    while at < len(lines) and not lines[at].startswith(b"diff --git "):
        match = _HUNK.fullmatch(lines[at])
        if not match:
            raise _bad(name, "a hunk header '@@ -A,B +C,D @@'", _show(lines[at]), path, len(hunks) + 1)
        a, b, c, d = (int(group) if group is not None else 1 for group in match.groups())
        body, at = _hunk_lines(lines, at + 1, b, d)
        hunk = Hunk(a, b, c, d, body)
        if (len(hunk.old), len(hunk.new)) != (b, d):
            found = f"{len(hunk.old)} and {len(hunk.new)}"
            raise _bad(name, f"{b} old and {d} new lines, as the hunk header says", found, path, len(hunks) + 1)
        hunks.append(hunk)
    if not hunks:
        raise _bad(name, "at least one hunk", "none", path)
    return tuple(hunks), at


def _hunk_lines(lines: list[bytes], at: int, old: int, new: int) -> tuple[tuple[bytes, ...], int]:
    """As many lines as the header's counts ask for."""
    body: list[bytes] = []
    while at < len(lines) and (old > 0 or new > 0 or lines[at].startswith(_NO_NEWLINE)):
        kind = lines[at][:1]
        if lines[at].startswith(_NO_NEWLINE) and body:
            body[-1] = body[-1].removesuffix(b"\n")
        elif kind in b" -+":
            body.append(lines[at])
            old -= kind in b" -"
            new -= kind in b" +"
        else:
            break
        at += 1
    return tuple(body), at


def _show(line: bytes) -> str:
    return line.decode("utf-8", "replace").rstrip("\n")


def _bad(name: str, expected: str, found: str, file: str = "", hunk: int = 0) -> PatchesError:
    return PatchesError(
        "malformed patch",
        patch=name,
        file=file,
        hunk=hunk,
        expected=expected,
        found=found,
        next_command="vllm-patches export --help    # how patch files are made",
    )
