"""Our strict applier against git's own diffs: forwards, backwards, and never at another line."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from test_patchfile import SOUND
from vllm_patches.errors import PatchesError
from vllm_patches.series.hunks import apply_hunks, apply_patch, blob_id, index_of, reverse, split_lines, undo_patch
from vllm_patches.series.model import FilePatch, Hunk, Patch
from vllm_patches.series.patchfile import parse_patch
from world import plain_env

HEAD = SOUND[: SOUND.index(b"diff --git")]

# Lines that a careless parser takes for something else, few enough that they repeat.
LINES = st.sampled_from(
    [b"a", b"b", b"c", b"", b" a", b"-- ", b"++ x", b"@@ -1 +1 @@", b"\\ No newline", b"diff --git"]
)


@st.composite
def edits(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A file and an edited copy of it, each with or without a line feed at its end."""
    old = draw(st.lists(LINES, max_size=60))
    new = list(old)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(new)))
        new[at : at + draw(st.integers(0, 3))] = draw(st.lists(LINES, max_size=3))
    return _joined(old, draw(st.booleans())), _joined(new, draw(st.booleans()))


def _joined(lines: list[bytes], ends: bool) -> bytes:
    return b"\n".join(lines) + (b"\n" if ends and lines else b"")


def git_diff(old: bytes, new: bytes) -> Patch:
    """A patch file with git's own diff of two versions of one file."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in (("a", old), ("b", new)):
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "f").write_bytes(data)
        command = ["git", "diff", "--no-index", "--no-prefix", "--full-index", "--text", "a/f", "b/f"]
        done = subprocess.run(command, cwd=folder, env=plain_env(), capture_output=True, check=False)
    assert done.returncode == 1, done.stderr
    return parse_patch("0001-x.patch", HEAD + done.stdout)


def git_apply(patch: Patch, old: bytes) -> bytes | None:
    """What `git apply` makes of it (it takes any offset), or None where it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        path.write_bytes(old)
        command = ["git", "apply", "-"]
        done = subprocess.run(command, cwd=folder, env=plain_env(), input=patch.raw, capture_output=True, check=False)
        return path.read_bytes() if done.returncode == 0 else None


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edits())
@example((b"", b"a\n"))
@example((b"a\n", b""))
@example((b"a", b"a\n"))
@example((b"a\n" * 40, b"b\n" * 3 + b"a\n" * 30 + b"b\n" * 2 + b"a\n" * 5))
@example((b"a\n", b"a"))
def test_what_git_diffs_goes_in_and_comes_out(pair: tuple[bytes, bytes]) -> None:
    old, new = pair
    assume(old != new)
    patch = git_diff(old, new)
    assert apply_patch(patch, {"f": old}) == {"f": new}
    assert undo_patch(patch, {"f": new}) == {"f": old}


def _shifted(patch: Patch, by: int) -> Patch:
    """The patch with every hunk header moved, as an editor's mistake would."""
    raw = patch.raw
    for hunk in patch.files[0].hunks:
        old, new = f"@@ -{hunk.old_start},", f"@@ -{hunk.old_start + by},"
        raw = raw.replace(old.encode(), new.encode())
        old, new = f" +{hunk.new_start},", f" +{hunk.new_start + by},"
        raw = raw.replace(old.encode(), new.encode())
    return parse_patch(patch.name, raw)


@settings(max_examples=15, deadline=None)
@given(st.integers(8, 32), st.sampled_from([-4, -1, 1, 3]))
def test_a_shifted_header_is_refused_although_git_takes_it(line: int, by: int) -> None:
    old = b"".join(b"line %d\n" % number for number in range(40))
    new = old.replace(b"line %d\n" % line, b"changed\n")
    moved = _shifted(git_diff(old, new), by)
    assert git_apply(moved, old) == new
    with pytest.raises(PatchesError) as caught:
        apply_patch(moved, {"f": old}, release="1.2.3")
    assert "offset 0" in caught.value.what
    first = moved.files[0].hunks[0].old_start
    assert caught.value.expected == f"line {first}: line {line - 3}"
    assert caught.value.found == f"line {first}: line {first - 1}"


def _hunk(start: int, new_start: int, *lines: bytes) -> Hunk:
    old = sum(line[:1] in b" -" for line in lines)
    new = sum(line[:1] in b" +" for line in lines)
    return Hunk(start, old, new_start, new, lines)


def _file(*hunks: Hunk) -> FilePatch:
    return FilePatch("f", "", "", "100644", hunks)


def test_only_the_new_start_moved_is_refused() -> None:
    with pytest.raises(PatchesError) as caught:
        apply_hunks(_file(_hunk(1, 2, b" a\n", b"-b\n", b"+c\n")), b"a\nb\n", patch="0001-x.patch", release="1.2.3")
    error = caught.value
    assert (error.release, error.patch, error.file, error.hunk) == ("1.2.3", "0001-x.patch", "f", 1)
    assert error.expected == "the hunk to leave its lines at 1, where they end up"
    assert error.found == "a hunk header that says +2,2"
    assert "--pin 1.2.3" in error.next_command
    with pytest.raises(PatchesError) as caught:
        apply_hunks(_file(_hunk(1, 2, b" a\n", b"-b\n", b"+c\n")), b"a\nb\n")
    assert "--pin RELEASE" in caught.value.next_command


def test_a_hunk_past_the_end_says_so() -> None:
    with pytest.raises(PatchesError) as caught:
        apply_hunks(_file(_hunk(2, 2, b" b\n", b"-c\n")), b"a\nb\n")
    assert (caught.value.expected, caught.value.found) == ("line 3: c", "the end of the file")


def test_a_later_hunk_is_numbered() -> None:
    hunks = _hunk(1, 1, b"-a\n", b"+A\n"), _hunk(3, 3, b"-x\n", b"+X\n")
    with pytest.raises(PatchesError) as caught:
        apply_hunks(_file(*hunks), b"a\nb\nc\n")
    assert (caught.value.hunk, caught.value.found) == (2, "line 3: c")


def test_a_later_hunk_is_moved_by_what_the_earlier_ones_add_and_take() -> None:
    old = b"".join(b"line %d\n" % number for number in range(60))
    new = old.replace(b"line 5\n", b"").replace(b"line 25\n", b"line 25\nand\nmore\n").replace(b"line 50\n", b"x\n")
    patch = git_diff(old, new)
    assert [hunk.new_start - hunk.old_start for hunk in patch.files[0].hunks] == [0, -1, 1]
    assert apply_patch(patch, {"f": old}) == {"f": new}
    assert undo_patch(patch, {"f": new}) == {"f": old}


def test_hunks_that_overlap_are_refused() -> None:
    hunks = _hunk(1, 1, b" a\n", b"-b\n"), _hunk(2, 1, b"-b\n")
    with pytest.raises(PatchesError) as caught:
        apply_hunks(_file(*hunks), b"a\nb\nc\n")
    assert caught.value.hunk == 2


def test_a_line_feed_at_the_end_counts() -> None:
    with pytest.raises(PatchesError):
        apply_hunks(_file(_hunk(1, 1, b"-a\n", b"+b\n")), b"a")


def test_the_blob_before_is_checked_where_every_hunk_fits() -> None:
    old = b"".join(b"%d\n" % number for number in range(30))
    patch = git_diff(old, old.replace(b"9\n", b"nine\n", 1))
    other = old.replace(b"25\n", b"elsewhere\n")
    with pytest.raises(PatchesError) as caught:
        apply_patch(patch, {"f": other}, release="1.2.3")
    assert "blob before" in caught.value.what
    assert (caught.value.expected, caught.value.found) == (blob_id(old), blob_id(other))
    assert caught.value.next_command == "vllm-patches export --pin 1.2.3"


def test_the_blob_after_is_checked() -> None:
    patch = git_diff(b"a\nb\n", b"a\nc\n")
    edited = parse_patch(patch.name, patch.raw.replace(b"+c\n", b"+d\n"))
    with pytest.raises(PatchesError) as caught:
        apply_patch(edited, {"f": b"a\nb\n"})
    assert "blob after" in caught.value.what
    assert (caught.value.expected, caught.value.found) == (blob_id(b"a\nc\n"), blob_id(b"a\nd\n"))


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(PatchesError) as caught:
        apply_patch(git_diff(b"a\n", b"b\n"), {"g": b"a\n"}, release="1.2.3")
    assert (caught.value.release, caught.value.patch, caught.value.file) == ("1.2.3", "0001-x.patch", "f")
    assert caught.value.found == "no such file"


def test_files_that_a_patch_does_not_touch_are_passed_on() -> None:
    files = {"f": b"a\n", "g": b"other\n"}
    assert apply_patch(git_diff(b"a\n", b"b\n"), files) == {"f": b"b\n", "g": b"other\n"}
    assert files["f"] == b"a\n", "the argument is not changed"


def test_reverse_swaps_everything() -> None:
    file = FilePatch("f", "1", "2", "100755", (_hunk(3, 4, b" a\n", b"-b\n", b"+c\n", b"+d\n"),))
    back = reverse(file)
    assert (back.old_blob, back.new_blob, back.mode) == ("2", "1", "100755")
    assert back.hunks == (Hunk(4, 3, 3, 2, (b" a\n", b"+b\n", b"-c\n", b"-d\n")),)


def test_lines_are_split_at_line_feeds_alone() -> None:
    assert split_lines(b"a\rb\r\nc\x0bd\x85e\n\nf") == [b"a\rb\r\n", b"c\x0bd\x85e\n", b"\n", b"f"]
    assert split_lines(b"") == []


def test_the_blob_id_is_gits() -> None:
    done = subprocess.run(["git", "hash-object", "--stdin"], input=b"a\0\r\n", capture_output=True, check=True)
    assert blob_id(b"a\0\r\n") == done.stdout.decode().strip()


def test_a_header_with_no_old_lines_names_the_line_before() -> None:
    assert (index_of(0, 0), index_of(1, 1), index_of(7, 0), index_of(7, 2)) == (0, 0, 7, 6)
