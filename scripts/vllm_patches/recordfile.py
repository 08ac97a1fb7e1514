"""RECORD of an installed package or a wheel: rows are changed one by one, all others keep their bytes."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Iterable, Mapping

from vllm_patches.hunks import split_lines


def digest(data: bytes) -> str:
    """A file's hash in RECORD's spelling."""
    raw = hashlib.sha256(data).digest()
    return "sha256=" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def rows(record: bytes) -> dict[str, tuple[str, str]]:
    """Path to hash and size, as RECORD has them; a row that is no row is skipped."""
    text = record.decode("utf-8", "surrogateescape")
    return {row[0]: (row[1], row[2]) for row in csv.reader(io.StringIO(text, newline="")) if len(row) == 3}


def edited(record: bytes, put: Mapping[str, bytes | None], drop: Iterable[str]) -> bytes:
    """*record* with the rows of the files *put* (path to content) renewed or added, and those of *drop* gone.

    A file without content gets a row without hash, as RECORD has one for itself.
    """
    gone = set(drop)
    pending = dict(put)
    end = b"\r\n" if b"\r\n" in record else b"\n"
    out: list[bytes] = []
    for line in _lines(record):
        path = _path(line)
        if path in pending:
            out.append(_row(path, pending.pop(path)) + end)
        elif path not in gone:
            out.append(line)
    if out and pending and not out[-1].endswith(b"\n"):
        out[-1] += end
    return b"".join(out + [_row(path, data) + end for path, data in pending.items()])


def copied(record: bytes, original: bytes, paths: Iterable[str], drop: Iterable[str]) -> bytes:
    """*record* with the rows of *paths* as *original* has them, and those of *drop* gone."""
    wanted = {_path(line): line for line in _lines(original)}
    again = [path for path in paths if path in wanted]
    gone = set(drop) - set(again)
    there = {_path(line) for line in _lines(record)}
    out = [
        wanted[path] if (path := _path(line)) in again else line for line in _lines(record) if _path(line) not in gone
    ]
    return b"".join(out + [wanted[path] for path in again if path not in there])


def _lines(record: bytes) -> list[bytes]:
    """Rows with their line ends. (A quoted path may hold a line end of its own.)"""
    lines: list[bytes] = []
    for piece in split_lines(record):
        if lines and lines[-1].count(b'"') % 2:
            lines[-1] += piece
        else:
            lines.append(piece)
    return lines


def _path(line: bytes) -> str:
    text = line.decode("utf-8", "surrogateescape")
    return next(iter(next(csv.reader(io.StringIO(text, newline="")), [])), "")


def _row(path: str, data: bytes | None) -> bytes:
    text = io.StringIO(newline="")
    known = ("", "") if data is None else (digest(data), len(data))
    csv.writer(text, lineterminator="\n").writerow((path, *known))
    return text.getvalue()[:-1].encode("utf-8", "surrogateescape")
