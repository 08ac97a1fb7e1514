"""releases.toml and fixes.toml: read, written back in one form, and refused with the place when they are wrong."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_patches.errors import PatchesError
from vllm_patches.series.model import FIX_IDS, FixState, Release, State
from vllm_patches.series.tables import dump_releases, load_fixes, load_releases
from world import SLUGS, World, fixes_toml

GOLDEN = """\

[[release]]
version = "1.2.3"
date = 2026-01-02
sdist = "vllm-1.2.3.tar.gz"
sha256 = "abc"
size = 17
series = "v1.2.3"
head = "def"
[release.state]
0001 = { state = "live", evidence = "vllm/a.py:1" }
0002 = { state = "latent", evidence = "vllm/a.py:2", note = "a \\"note\\" with \\\\" }
0003 = { state = "fixed", evidence = "vllm/a.py:3" }
0004 = { state = "absent", evidence = "no such file" }
0005 = { state = "broken", evidence = "vllm/a.py:5" }
[release.blobs]
"a.py" = "111"
"b.py" = "222"
"""


def golden() -> Release:
    states = {
        "0001": FixState(State.LIVE, "vllm/a.py:1"),
        "0002": FixState(State.LATENT, "vllm/a.py:2", 'a "note" with \\'),
        "0003": FixState(State.FIXED, "vllm/a.py:3"),
        "0004": FixState(State.ABSENT, "no such file"),
        "0005": FixState(State.BROKEN, "vllm/a.py:5"),
    }
    date = datetime.date(2026, 1, 2)
    blobs = {"b.py": "222", "a.py": "111"}
    return Release("1.2.3", date, "vllm-1.2.3.tar.gz", "abc", 17, states, "v1.2.3", "def", blobs)


def _load(folder: Path, text: str) -> dict[str, Release]:
    path = folder / "releases.toml"
    path.write_text(text, encoding="utf-8")
    return load_releases(path)


def test_the_canonical_text(tmp_path: Path) -> None:
    text = dump_releases({"1.2.3": golden()})
    assert text.endswith(GOLDEN)
    assert all(line.startswith("#") for line in text.removesuffix(GOLDEN).splitlines())
    assert _load(tmp_path, text) == {"1.2.3": golden()}


def test_what_is_not_known_yet_is_left_out(tmp_path: Path) -> None:
    bare = replace(golden(), series="", head="", blobs={})
    text = dump_releases({"1.2.3": bare})
    assert "series =" not in text
    assert "head =" not in text
    assert "\n[release.blobs]\n" not in text
    assert _load(tmp_path, text) == {"1.2.3": bare}


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_note_comes_back(tmp_path_factory: pytest.TempPathFactory, note: str, evidence: str) -> None:
    release = golden()
    release.states["0003"] = FixState(State.FIXED, evidence, note)
    loaded = _load(tmp_path_factory.getbasetemp(), dump_releases({"1.2.3": release}))
    assert loaded == {"1.2.3": release}


def test_releases_keep_the_order_of_the_file(world: World) -> None:
    releases = world.catalog.releases
    assert list(releases) == ["0.19.0", "0.20.1", "0.20.2", "0.21.0", "0.22.0"]
    assert dump_releases(releases) == (world.patches / "releases.toml").read_text(encoding="utf-8")


def test_fixes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "fixes.toml"
    path.write_text(fixes_toml() + 'upstream_commit = "abc"\n', encoding="utf-8")
    fixes = load_fixes(path)
    assert tuple(fixes) == FIX_IDS
    assert [fix.slug for fix in fixes.values()] == list(SLUGS)
    assert (fixes["0001"].upstream_pr, fixes["0001"].parts, fixes["0001"].severity) == ((1,), ("a",), "crash")
    assert [fix.upstream_commit for fix in fixes.values()] == ["", "", "", "", "abc"]


# (what is replaced in a sound table, by what, parts of the message)
BAD_RELEASES = {
    "not TOML": ("size = 17", "size = ", ("cannot read a table",)),
    "twice": (GOLDEN, GOLDEN * 2, ("one block for 1.2.3", "two")),
    "no sha256": ('sha256 = "abc"\n', "", ("a complete block for 1.2.3", "sha256")),
    "no states": ("[release.state]", "[release.other]", ("a complete block for 1.2.3", "state")),
    "unknown state": ('state = "live"', 'state = "alive"', ("a complete block for 1.2.3", "alive")),
    "four fixes": ('0005 = { state = "broken", evidence = "vllm/a.py:5" }\n', "", ("0001, 0002", "0004")),
    "six fixes": ("[release.blobs]", '0006 = { state = "live", evidence = "x" }\n[release.blobs]', ("0005, 0006",)),
    "date as text": ("date = 2026-01-02", 'date = "2026-01-02"', ("a complete block for 1.2.3", "date")),
    "state as text": ('0001 = { state = "live", evidence = "vllm/a.py:1" }', '0001 = "live"', ("a complete block",)),
}


@pytest.mark.parametrize("case", BAD_RELEASES)
def test_a_wrong_releases_table_is_named(tmp_path: Path, case: str) -> None:
    old, new, parts = BAD_RELEASES[case]
    assert old in GOLDEN
    with pytest.raises(PatchesError) as caught:
        _load(tmp_path, GOLDEN.replace(old, new))
    text = str(caught.value)
    assert "releases.toml" in text
    assert not [part for part in parts if part not in text], text
    assert caught.value.next_command.startswith("git diff -- ")


BAD_FIXES = {
    "no title": ('title = "dsa mtp ima"\n', "", "'title'"),
    "no id": ('id = "0001"\n', "", "'id'"),
    "a number for a list": ("upstream_pr = [1]", "upstream_pr = 1", "not iterable"),
}


@pytest.mark.parametrize("case", BAD_FIXES)
def test_a_wrong_fixes_table_is_named(tmp_path: Path, case: str) -> None:
    old, new, part = BAD_FIXES[case]
    path = tmp_path / "fixes.toml"
    path.write_text(fixes_toml().replace(old, new), encoding="utf-8")
    with pytest.raises(PatchesError) as caught:
        load_fixes(path)
    assert caught.value.file == "fixes.toml"
    assert part in caught.value.expected + caught.value.found
    assert caught.value.next_command


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(PatchesError) as caught:
        load_releases(tmp_path / "releases.toml")
    assert caught.value.what == "cannot read a table"
    assert "No such file" in caught.value.found


def test_a_table_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "releases.toml").write_bytes(b"\xff")
    with pytest.raises(PatchesError) as caught:
        load_releases(tmp_path / "releases.toml")
    assert caught.value.what == "cannot read a table"
