"""RECORD: what csv writes is read back, in any name; what is no RECORD is refused; an edit keeps all other rows."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_patches.errors import PatchesError
from vllm_patches.wheels.record import Row, copied, dump_record, edited, listed_rows, parse_record, row_of

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


ROWS = st.dictionaries(
    PATHS, st.sampled_from([("", ""), ("sha256=x", "7"), ("md5=y", ""), ("sha512=z_-", "0")]), max_size=6
)


def dumped(rows: dict[str, tuple[str, str]], end: str) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows((name, *rest) for name, rest in rows.items())
    return text.getvalue().encode()


@given(
    rows=ROWS,
    files=st.dictionaries(PATHS, st.binary(max_size=4), max_size=3),
    drop=st.sets(PATHS, max_size=3),
    end=st.sampled_from(["\n", "\r\n"]),
    cut=st.booleans(),
)
def test_an_edit_changes_its_own_rows_alone(
    rows: dict[str, tuple[str, str]], files: dict[str, bytes], drop: set[str], end: str, cut: bool
) -> None:
    drop = (drop | set(list(rows)[:1])) - set(files)
    put = [row_of(path, data) for path, data in files.items()]
    before = dumped(rows, end).removesuffix(end.encode() if cut else b"")
    after = edited(before, put, drop)
    wanted = {path: row for path, row in listed_rows(before).items() if path not in drop}
    wanted |= {row.path: row for row in put}
    assert listed_rows(after) == wanted
    assert list(listed_rows(after))[: len(rows)] == list(wanted)[: len(rows)]
    assert edited(after, put, drop) == after
    for name, rest in rows.items():
        if name not in drop and name not in files:
            assert dumped({name: rest}, end).removesuffix(end.encode()) in after


@given(
    rows=ROWS, files=st.dictionaries(PATHS, st.binary(max_size=4), max_size=3), drop=st.sets(PATHS, max_size=3),
    cut=st.booleans(),
)  # fmt: skip
def test_an_edit_can_be_taken_back(
    rows: dict[str, tuple[str, str]], files: dict[str, bytes], drop: set[str], cut: bool
) -> None:
    before = dumped(rows, "\n").removesuffix(b"\n" if cut else b"")
    after = edited(before, [row_of(path, data) for path, data in files.items()], drop - set(files))
    again = copied(after, before, [*rows], [name for name in files if name not in rows])
    assert listed_rows(again) == listed_rows(before)
    assert sorted(again.splitlines()) == sorted(before.splitlines())


def test_a_last_row_without_a_line_end() -> None:
    empty = b"b,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0\n"
    assert edited(b"a,,", [row_of("b", b"")], []) == b"a,,\n" + empty
    assert edited(b"a,,", [Row("a")], []) == b"a,,\n"
    assert copied(b"a,,", b"b,,\na,,\n", ["b"], []) == b"a,,\nb,,\n"


def test_rows_that_are_none_are_passed_over_in_a_record_of_somebody_else() -> None:
    data = b"a,sha256=x,1\n\nb\nc,,-1\n\xff,,\nd,md5=x,\na,sha256=y,2\n"
    rows = listed_rows(data)
    assert list(rows) == ["a", "\udcff", "d"]
    assert (rows["a"], rows["d"]) == (Row("a", "sha256", "y", 2), Row("d", "md5", "x"))
    assert edited(data, [Row("\udcff")], ["d"]) == data.replace(b"d,md5=x,\n", b"")
