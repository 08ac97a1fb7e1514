"""RECORD, the list of a wheel's files with hash and size, as the wheel specification has it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_patches.wheelfile import damaged

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
        row = _row(cells, where)
        if row.path in rows:
            raise damaged(where, "one row a file in RECORD", f"two of {row.path}")
        rows[row.path] = row
    return rows


def _row(cells: list[str], where: str) -> Row:
    if len(cells) != 3:
        raise damaged(where, "path, hash and size in each row of RECORD", ",".join(cells))
    path, hashed, size = cells
    algorithm, _, value = hashed.partition("=")
    if (hashed and algorithm not in ALGORITHMS) or (size and not (size.isascii() and size.isdigit())):
        raise damaged(where, f"a hash by one of {', '.join(ALGORITHMS)}, and a size", ",".join(cells))
    return Row(path, algorithm, value, int(size) if size else None)


def dump_record(rows: Iterable[Row]) -> bytes:
    """The bytes of RECORD, rows in the given order."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        hashed = f"{row.algorithm}={row.digest}" if row.algorithm else ""
        writer.writerow((row.path, hashed, "" if row.size is None else row.size))
    return out.getvalue().encode("utf-8")
