"""RECORD: rows change one by one, all others keep their bytes."""

from __future__ import annotations

import csv
import io

from hypothesis import given
from hypothesis import strategies as st
from vllm_patches import recordfile

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\r\x00"), min_size=1, max_size=8)
ROWS = st.dictionaries(NAMES, st.tuples(st.sampled_from(["", "sha256=x"]), st.sampled_from(["", "7"])), max_size=6)


def dumped(rows: dict[str, tuple[str, str]], end: str) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows((name, *rest) for name, rest in rows.items())
    return text.getvalue().encode()


@given(
    ROWS,
    st.dictionaries(NAMES, st.binary(max_size=4), max_size=3),
    st.sets(NAMES, max_size=3),
    st.sampled_from(["\n", "\r\n"]),
)
def test_edited(rows: dict[str, tuple[str, str]], put: dict[str, bytes], drop: set[str], end: str) -> None:
    drop |= set(list(rows)[:1])
    drop -= set(put)
    before = dumped(rows, end)
    assert recordfile.rows(before) == rows
    after = recordfile.edited(before, put, drop)
    wanted = {name: rest for name, rest in rows.items() if name not in drop}
    wanted |= {name: (recordfile.digest(data), str(len(data))) for name, data in put.items()}
    assert recordfile.rows(after) == wanted
    assert list(recordfile.rows(after))[: len(rows)] == list(wanted)[: len(rows)]
    assert recordfile.edited(after, put, drop) == after
    kept = {name: rest for name, rest in rows.items() if name not in drop and name not in put}
    assert all(dumped({name: rest}, end) in after for name, rest in kept.items())


@given(ROWS, st.dictionaries(NAMES, st.binary(max_size=4), max_size=3), st.sets(NAMES, max_size=3))
def test_copied_takes_an_edit_back(rows: dict[str, tuple[str, str]], put: dict[str, bytes], drop: set[str]) -> None:
    drop -= set(put)
    before = dumped(rows, "\n")
    after = recordfile.edited(before, put, drop)
    added = [name for name in put if name not in rows]
    again = recordfile.copied(after, before, [*rows], added)
    assert recordfile.rows(again) == rows
    assert sorted(again.splitlines()) == sorted(before.splitlines())


def test_a_last_row_without_a_line_end() -> None:
    assert recordfile.edited(b"a,,", {"b": b""}, []) == b"a,,\nb,sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU,0\n"
    assert recordfile.edited(b"a,,", {"a": None}, []) == b"a,,\n"
