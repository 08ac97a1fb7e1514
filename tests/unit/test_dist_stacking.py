"""Other people's quilt folders and diffs: what is taken, and how the rest is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_patches.dist.stacking import read_third
from vllm_patches.dist.unified import NO_BLOB, Kind, parse_unified, rewrite
from vllm_patches.errors import PatchesError

PLAIN = b"""\
Description: theirs
--- a/vllm/engine.py\t2026-01-01 00:00:00.000000000 +0000
+++ b/vllm/engine.py\t2026-01-02 00:00:00.000000000 +0000
@@ -1,3 +1,3 @@ class Engine:
 one
-two
+zwei

@@ -9 +9,2 @@
 nine
+ten
"""
GIT = b"""\
From 1111111111111111111111111111111111111111 Mon Sep 17 00:00:00 2001
From: A Person <a@person.invalid>
Date: Mon, 1 Jun 2026 00:00:00 +0000
Subject: [PATCH 1/2] engine: count

--- dashes that are prose
---
 vllm/new.py | 1 +

diff --git a/vllm/new.py b/vllm/new.py
new file mode 100755
index 0000000..1111111
--- /dev/null
+++ b/vllm/new.py
@@ -0,0 +1 @@
+new
\\ No newline at end of file
diff --git a/vllm/old.py b/vllm/old.py
deleted file mode 100644
index 2222222..0000000
--- a/vllm/old.py
+++ /dev/null
@@ -1 +0,0 @@
-old
--\x20
2.39.5
"""


def folder(tmp_path: Path, series: str = "theirs.patch\n", raw: bytes = PLAIN) -> Path:
    own = tmp_path / "own"
    own.mkdir()
    (own / "series").write_text(series, encoding="utf-8")
    (own / "theirs.patch").write_bytes(raw)
    return own


def test_a_plain_diff() -> None:
    (section,) = parse_unified("theirs.patch", PLAIN)
    assert (section.path, section.stated, section.kind) == ("vllm/engine.py", "b/vllm/engine.py", Kind.CHANGE)
    assert (section.mode, section.index_at, section.hunks_at) == ("", None, (3, 8))
    assert section.hunks[0].lines == (b" one\n", b"-two\n", b"+zwei\n", b" \n")
    assert (section.hunks[1].old_count, section.hunks[1].new_count) == (1, 2)


def test_a_mail_of_gits() -> None:
    new, old = parse_unified("theirs.patch", GIT)
    assert (new.path, new.kind, new.mode, new.hunks[0].lines) == ("vllm/new.py", Kind.CREATE, "100755", (b"+new",))
    assert (old.path, old.kind, old.mode) == ("vllm/old.py", Kind.DELETE, "100644")


def test_a_series_and_its_subject(tmp_path: Path) -> None:
    series = read_third(folder(tmp_path, "# ours\n\ntheirs.patch -p1\n", GIT))
    assert (series.name, series.patches[0].name, series.patches[0].subject) == ("own", "theirs.patch", "engine: count")


def test_the_folder_above_the_patches_is_understood(tmp_path: Path) -> None:
    (tmp_path / "debian").mkdir()
    patches = folder(tmp_path).rename(tmp_path / "debian" / "patches")
    assert read_third(patches).name == "debian"
    with pytest.raises(PatchesError) as caught:
        read_third(tmp_path / "debian")
    assert caught.value.next_command == f"ls {patches}"


def test_rewriting_changes_numbers_and_untrue_blobs_only() -> None:
    (section,) = parse_unified("t", PLAIN)
    same = rewrite(PLAIN, [section], [("1" * 40, "2" * 40, section.hunks)])
    assert same == PLAIN
    sections = parse_unified("t", GIT)
    after = rewrite(GIT, sections, [(NO_BLOB, "3" * 40, sections[0].hunks), ("2" * 40, NO_BLOB, sections[1].hunks)])
    assert after == GIT.replace(b"0000000..1111111", f"{NO_BLOB}..{'3' * 40}".encode())


@pytest.mark.parametrize(
    ("series", "expected", "found"),
    [
        ("theirs.patch -p0\n", "-p1: no strip level, or -p1", "wrong strip level: line 1: theirs.patch -p0"),
        ("# one\ntheirs.patch -p 0\n", "-p1: no strip level, or -p1", "wrong strip level: line 2: theirs.patch -p 0"),
        ("theirs.patch -R\n", "no option but -p1", "line 1: theirs.patch -R"),
        ("sub/theirs.patch\n", "a plain name: letters, digits, dots, dashes; no folder", "line 1: sub/theirs.patch"),
        ("../theirs.patch\n", "a plain name: letters, digits, dots, dashes; no folder", "line 1: ../theirs.patch"),
        ("$(id).patch\n", "a plain name: letters, digits, dots, dashes; no folder", "line 1: $(id).patch"),
        ("theirs.patch\ntheirs.patch\n", "each patch once", "line 2: theirs.patch"),
        ("gone.patch\n", "a file of that name beside the series file", "No such file or directory"),
        ("# nothing\n", "a quilt series: one patch name a line", "no line that names a patch"),
    ],
)
def test_a_series_file_that_is_refused(tmp_path: Path, series: str, expected: str, found: str) -> None:
    with pytest.raises(PatchesError) as caught:
        read_third(folder(tmp_path, series))
    assert (caught.value.expected, caught.value.found) == (expected, found)
    assert caught.value.next_command


def test_no_series_file(tmp_path: Path) -> None:
    with pytest.raises(PatchesError) as caught:
        read_third(tmp_path)
    assert caught.value.file == str(tmp_path / "series")


@pytest.mark.parametrize(
    ("old", "new", "expected", "found"),
    [
        (b"+zwei\n", b"+zwei\r\n", "LF line ends", "CRLF in line 7"),
        (b"@@ -1,3 +1,3 @@", b"@@ -1,4 +1,3 @@", "4 old and 3 new lines, as the hunk header says", "3 and 3"),
        (b"@@ -9 +9,2 @@", b"@@ -9 +9,x @@", "@@ -A,B +C,D @@", "@@ -9 +9,x @@"),
        (b"b/vllm/engine.py", b"b/../engine.py", "a path inside the tree", "b/../engine.py"),
        (b"b/vllm/engine.py", b"b/.git/config", "a path inside the tree", "b/.git/config"),
        (b"b/vllm/engine.py", b"engine.py", "-p1: a path with a folder to strip", "wrong strip level: engine.py"),
        (b"b/vllm/engine.py", b"/etc/passwd", "-p1: a path with a folder to strip", "wrong strip level: /etc/passwd"),
        (b"b/vllm/engine.py", b'"b/vllm/caf\\303\\251.py"', "a path that needs no quotes", '"b/vllm/caf\\303\\251.py"'),
        (b"@@ -9 +9,2 @@\n nine\n", b"@@ -8,0 +9 @@\n", "context: a line that says where to insert", "none (diff -U0)"),
        (
            b"--- a/",
            b"Binary files a/x and b/x differ\n--- a/",
            "changed, new and deleted text files",
            "a binary file: Binary files a/x and b/x differ",
        ),
        (
            b"--- a/",
            b"diff --git a/x b/y\nrename from x\n--- a/",
            "changed, new and deleted text files",
            "a rename: rename from x",
        ),
        (
            b"--- a/",
            b"diff --git a/x b/x\nold mode 100644\n--- a/",
            "changed, new and deleted text files",
            "a change of mode: old mode 100644",
        ),
        (
            b"--- a/",
            b"diff --git a/x b/x\nGIT binary patch\n--- a/",
            "changed, new and deleted text files",
            "a binary file: GIT binary patch",
        ),
        (PLAIN, b"only prose\n", "at least one '--- a/\u2026', '+++ b/\u2026' and '@@ \u2026 @@'", "none"),
        (b"+ten\n", b"+ten", "a line feed at the end", "none"),
    ],
)
def test_a_patch_that_is_refused(tmp_path: Path, old: bytes, new: bytes, expected: str, found: str) -> None:
    assert PLAIN.count(old) == 1
    with pytest.raises(PatchesError) as caught:
        read_third(folder(tmp_path, raw=PLAIN.replace(old, new)))
    assert (caught.value.patch, caught.value.expected, caught.value.found) == ("theirs.patch", expected, found)
    assert caught.value.next_command


def test_prose_may_use_gits_words(tmp_path: Path) -> None:
    raw = b"copy from the release\nold mode was wrong\nBinary files are not touched\n" + PLAIN
    assert [section.path for section in parse_unified("t", raw)] == ["vllm/engine.py"]


def test_a_plain_section_after_one_of_gits_has_no_index_line() -> None:
    """Only what stands above it, and below the last hunk, is a section's own header."""
    git = b"diff --git a/x/y b/x/y\nindex 1111111..2222222 100755\n--- a/x/y\n+++ b/x/y\n@@ -1 +1 @@\n-1\n+2\n"
    first, second = parse_unified("t", git + b"--- a/x/z\n+++ b/x/z\n@@ -1 +1 @@\n-1\n+2\n")
    assert (first.index_at, first.mode) == (1, "100755")
    assert (second.index_at, second.mode) == (None, "")
