"""RECORD: what csv writes is read back, in any name; what is no RECORD is refused."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_patches.errors import PatchesError
from vllm_patches.record import Row, dump_record, parse_record, row_of

# No carriage return: csv before Python 3.13 does not quote it, and wheelfile refuses such a name.
PATHS = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0\r"), min_size=1, max_size=20)


@given(files=st.dictionaries(PATHS, st.binary(max_size=20), max_size=6))
def test_round_trip_with_commas_quotes_and_line_ends(files: dict[str, bytes]) -> None:
    rows = [row_of(path, data) for path, data in files.items()]
    data = dump_record([*rows, Row("\u00e9.dist-info/RECORD")])
    parsed = parse_record(data, "x")
    assert list(parsed.values()) == [*rows, Row("\u00e9.dist-info/RECORD")]
    plain = list(csv.reader(io.StringIO(data.decode(), newline="")))
    assert [cells[0] for cells in plain] == [*files, "\u00e9.dist-info/RECORD"]
    assert dump_record(parsed.values()) == data


def test_the_known_answer() -> None:
    row = row_of("a,b", b"hello")
    assert dump_record([row]) == b'"a,b",sha256=LPJNul-wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ,5\n'


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\xff,,\n", "invalid start byte"),
        (b"a,,\na,,\n", "two of a"),
        (b"a,md5=x,1\n", "a,md5=x,1"),
        (b"a,sha256=x,-1\n", "a,sha256=x,-1"),
        (b"a,sha256=x\n", "a,sha256=x"),
        (b'"a,sha256=x,1\n', "unexpected end"),
    ],
)
def test_what_is_no_record_is_refused(data: bytes, found: str) -> None:
    with pytest.raises(PatchesError) as caught:
        parse_record(data, "x")
    assert found in caught.value.found


def test_crlf_and_empty_lines_are_read() -> None:
    assert parse_record(b"a,,\r\n\r\nb,sha256=x,1\r\n", "x") == {"a": Row("a"), "b": Row("b", "sha256", "x", 1)}
