"""Reading one patch file: what is in it, and every way in which it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm_patches.errors import PatchesError
from vllm_patches.series.patchfile import parse_patch, parse_trailers, read_patch

OLD, NEW, TAIL = "1" * 40, "2" * 40, "3" * 40
SOUND = f"""\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: A Name <a@name.invalid>
Date: Sat, 21 Nov 2026 00:00:00 +0000
Subject: [PATCH] engine: do it

Why: because.

Origin: here
Requires: none

diff --git a/vllm/a.py b/vllm/a.py
index {OLD}..{NEW} 100644
--- a/vllm/a.py
+++ b/vllm/a.py
@@ -3,3 +3,4 @@ class Engine:
 one
-two
+two and
+a half
 three
@@ -20 +21 @@
-last
+final
\\ No newline at end of file
diff --git a/tools/run.sh b/tools/run.sh
index {NEW}..{TAIL} 100755
--- a/tools/run.sh
+++ b/tools/run.sh
@@ -1 +0,0 @@
-gone
""".encode()


def test_every_field_is_read() -> None:
    patch = parse_patch("0001-x.patch", SOUND)
    assert (patch.number, patch.name, patch.raw) == ("0001", "0001-x.patch", SOUND)
    assert (patch.author, patch.date) == ("A Name <a@name.invalid>", "Sat, 21 Nov 2026 00:00:00 +0000")
    assert (patch.subject, patch.body) == ("engine: do it", "Why: because.\n\nOrigin: here\nRequires: none\n")
    assert patch.trailers == (("Origin", "here"), ("Requires", "none"))
    assert [(f.path, f.old_blob, f.new_blob, f.mode) for f in patch.files] == [
        ("vllm/a.py", OLD, NEW, "100644"),
        ("tools/run.sh", NEW, TAIL, "100755"),
    ]


def test_hunks_keep_their_lines_and_a_missing_count_is_one() -> None:
    first, second = parse_patch("0001-x.patch", SOUND).files[0].hunks
    assert (first.old_start, first.old_count, first.new_start, first.new_count) == (3, 3, 3, 4)
    assert first.lines == (b" one\n", b"-two\n", b"+two and\n", b"+a half\n", b" three\n")
    assert (second.old_start, second.old_count, second.new_start, second.new_count) == (20, 1, 21, 1)
    assert second.lines == (b"-last\n", b"+final"), "no newline at the end of the file"
    assert (second.old, second.new) == ([b"last\n"], [b"final"])


def test_trailers_are_the_last_paragraph_only_where_every_line_is_one() -> None:
    assert parse_trailers("Why: x\n\nOrigin: here\nBug: there\n") == (("Origin", "here"), ("Bug", "there"))
    assert parse_trailers("Origin: here\n\nBug: there\nand prose\n") == ()
    assert parse_trailers("") == ()


# (what is replaced, by what, a part of "expected", a part of "found")
BAD = {
    "crlf": (b"\n", b"\r\n", "LF line ends", "carriage return"),
    "no diff": (SOUND[SOUND.index(b"diff --git") :], b"", "diff --git a/", "none"),
    "latin-1": (b"Why: because", b"Why: caf\xe9", "UTF-8", "0xe9"),
    "first line": (b"From 0000", b"From abcd", "From 0000", "From abcd"),
    "no date": (b"Date: Sat, 21 Nov 2026 00:00:00 +0000\n", b"", "From:, Date:, Subject:", "Subject"),
    "folded subject": (b"engine: do it\n", b"engine: do it\n and more\n", "one line each", "and more"),
    "another header": (b"Subject:", b"To: x\nSubject:", "From:, Date:, Subject:", "To: x"),
    "date in prose": (b"Sat, 21 Nov 2026 00:00:00 +0000", b"yesterday", "Date: RFC 2822 with a zone", "yesterday"),
    "date without zone": (b"00:00:00 +0000", b"00:00:00 -0000", "Date: RFC 2822 with a zone", "-0000"),
    "rename": (b"b/vllm/a.py\nindex", b"b/vllm/b.py\nindex", "the same path twice", "b/vllm/b.py"),
    "blank in a path": (b"a/vllm/a.py b/vllm/a.py", b"a/vllm/a b.py b/vllm/a b.py", "the same path twice", "a b.py"),
    "path not ASCII": (b"a/vllm/a.py b/vllm/a.py", b"a/\xff b/\xff", "the same path twice", "diff --git a/"),
    "short blob": (b"index " + b"1" * 40, b"index 1111111", "--full-index", "index 1111111"),
    "new file": (f"index {OLD}".encode(), f"new file mode 100644\nindex {OLD}".encode(), "index <40", "new file mode"),
    "minus line": (b"--- a/vllm/a.py", b"--- /dev/null", "--- a/vllm/a.py", "--- /dev/null"),
    "plus line": (b"+++ b/vllm/a.py", b"+++ /dev/null", "+++ b/vllm/a.py", "+++ /dev/null"),
    "hunk header": (b"@@ -3,3 +3,4 @@", b"@@ -3,3 3,4 @@", "a hunk header", "@@ -3,3 3,4"),
    "line added by hand": (b"+a half\n", b"+a half\n+more\n", "3 old and 4 new lines", "3 and 5"),
    "line removed by hand": (b"+a half\n", b"", "3 old and 4 new lines", "3 and 3"),
    "blank stripped": (b"\n one\n", b"\none\n", "3 old and 4 new lines", "0 and 0"),
    "empty context line": (b"\n one\n", b"\n\n", "3 old and 4 new lines", "0 and 0"),
    "no newline of nothing": (b"\n one\n", b"\n\\ No newline at end of file\n", "3 old and 4 new lines", "0 and 0"),
    "signature": (b"-gone\n", b"-gone\n-- \n2.39.5\n", "a hunk header", "-- "),
    "cut within a line": (b"-gone\n", b"-go", "a line feed at the end", "-go"),
    "cut within a hunk": (b"-gone\n", b"", "1 old and 0 new lines", "0 and 0"),
    "no hunk": (b"@@ -1 +0,0 @@\n-gone\n", b"", "at least one hunk", "none"),
    "no index line": (SOUND[SOUND.rindex(b"index ") :], b"", "index <40 hex>", "the end of the file"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_git_would_not_have_written_is_refused(case: str) -> None:
    old, new, expected, found = BAD[case]
    assert old in SOUND
    with pytest.raises(PatchesError) as caught:
        parse_patch("0001-x.patch", SOUND.replace(old, new))
    error = caught.value
    assert (error.what, error.patch) == ("malformed patch", "0001-x.patch")
    assert expected in error.expected
    assert found in error.found
    assert error.next_command


def test_a_refusal_within_the_diff_names_file_and_hunk() -> None:
    with pytest.raises(PatchesError) as caught:
        parse_patch("0001-x.patch", SOUND.replace(b"-last\n", b"-last\n-more\n"))
    assert (caught.value.file, caught.value.hunk) == ("vllm/a.py", 2)
    with pytest.raises(PatchesError) as caught:
        parse_patch("0001-x.patch", SOUND.replace(b"@@ -20 +21 @@", b"@@ -20 21 @@"))
    assert (caught.value.file, caught.value.hunk) == ("vllm/a.py", 2)


def test_a_missing_file_says_how_to_get_it_back(tmp_path: Path) -> None:
    path = tmp_path / "0001-x.patch"
    with pytest.raises(PatchesError) as caught:
        read_patch(path)
    assert "No such file" in caught.value.what
    assert caught.value.next_command == f"git checkout -- {path}"


def test_a_file_is_named_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "0001-x.patch").write_bytes(SOUND)
    assert read_patch(tmp_path / "0001-x.patch") == parse_patch("0001-x.patch", SOUND)
