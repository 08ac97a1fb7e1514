"""RECORD, the list of a package's files with hash and size, as the wheel specification has it.

A wheel's RECORD is read strictly and written anew. An installed package's is somebody else's file: there single rows
are changed, and all others keep their bytes.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_patches.series.hunks import split_lines
from vllm_patches.wheels.wheelfile import damaged

ALGORITHMS = ("sha256", "sha384", "sha512")  # the specification asks for sha256 or better


@dataclass(frozen=True)
class Row:
    """One file; hash and size are empty for RECORD itself, which cannot hold its own hash."""

    path: str
    algorithm: str = ""
    digest: str = ""  # URL-safe base64 without padding
    size: int | None = None


def row_of(path: str, data: bytes) -> Row:
    """The row of a file with that content."""
    return Row(path, "sha256", encoded(hashlib.sha256(data).digest()), len(data))


def encoded(digest: bytes) -> str:
    """A digest as RECORD writes it."""
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def parse_record(data: bytes, where: str) -> dict[str, Row]:
    """The rows by path; raises `PatchesError` for what is no RECORD."""
    rows: dict[str, Row] = {}
    try:
        table = list(csv.reader(io.StringIO(data.decode("utf-8"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise damaged(where, "RECORD as CSV in UTF-8", str(error)) from error
    for cells in table:
        if not cells:
            continue
        row = _row(cells)
        if row is None or (row.algorithm and row.algorithm not in ALGORITHMS):
            expected = f"path, a hash by one of {', '.join(ALGORITHMS)}, and a size in each row of RECORD"
            raise damaged(where, expected, ",".join(cells))
        if row.path in rows:
            raise damaged(where, "one row a file in RECORD", f"two of {row.path}")
        rows[row.path] = row
    return rows


def listed_rows(data: bytes) -> dict[str, Row]:
    """The rows by path of a RECORD that need not be sound: what is no row is skipped, of two the last counts."""
    cells = csv.reader(io.StringIO(data.decode("utf-8", "surrogateescape"), newline=""))
    return {row.path: row for row in map(_row, cells) if row is not None}


def _row(cells: list[str]) -> Row | None:
    if len(cells) != 3 or not (cells[2] == "" or (cells[2].isascii() and cells[2].isdigit())):
        return None
    algorithm, _, value = cells[1].partition("=")
    return Row(cells[0], algorithm, value, int(cells[2]) if cells[2] else None)


def dump_record(rows: Iterable[Row]) -> bytes:
    """The bytes of RECORD, rows in the given order."""
    return b"".join(_line(row) + b"\n" for row in rows)


def edited(record: bytes, put: Iterable[Row], drop: Iterable[str]) -> bytes:
    """*record* with the rows *put* renewed or added, those of the paths *drop* gone, and all others byte for byte."""
    gone = set(drop)
    pending = {row.path: row for row in put}
    end = b"\r\n" if b"\r\n" in record else b"\n"
    out: list[bytes] = []
    for line in _lines(record):
        path = _path(line)
        if path in pending:
            out.append(_line(pending.pop(path)) + end)
        elif path not in gone:
            out.append(line)
    return _extended(out, [_line(row) + end for row in pending.values()], end)


def copied(record: bytes, original: bytes, paths: Iterable[str], drop: Iterable[str]) -> bytes:
    """*record* with the rows of *paths* as *original* has them, and those of *drop* gone."""
    wanted = {_path(line): line for line in _lines(original)}
    again = [path for path in paths if path in wanted]
    gone = set(drop) - set(again)
    there = {_path(line) for line in _lines(record)}
    out = [
        wanted[path] if (path := _path(line)) in again else line for line in _lines(record) if _path(line) not in gone
    ]
    return _extended(out, [wanted[path] for path in again if path not in there], b"\n")


def _extended(lines: list[bytes], more: list[bytes], end: bytes) -> bytes:
    """All lines as one; the last of the first, which may lack its line end, does not run into the next."""
    if lines and more and not lines[-1].endswith(b"\n"):
        lines[-1] += end
    return b"".join(lines + more)


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


def _line(row: Row) -> bytes:
    """A row without its line end; names that are no UTF-8 (of other packages) keep their bytes."""
    text = io.StringIO(newline="")
    hashed = f"{row.algorithm}={row.digest}" if row.algorithm else ""
    csv.writer(text, lineterminator="\n").writerow((row.path, hashed, "" if row.size is None else row.size))
    return text.getvalue()[:-1].encode("utf-8", "surrogateescape")
