"""Apply and undo hunks in memory: at the stated lines and nowhere else (offset 0, fuzz 0)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_patches.errors import PatchesError
from vllm_patches.series.model import FilePatch, Hunk, Patch


@dataclass(frozen=True)
class Mismatch:
    """The first line at which a hunk does not fit; *line* counts from 1, *found* is None past the end."""

    line: int
    expected: bytes
    found: bytes | None


def blob_id(data: bytes) -> str:
    """The id git gives a blob of these bytes (SHA-1 over ``blob <size>\\0`` and the data)."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def split_lines(data: bytes) -> list[bytes]:
    """Lines with their ends, split at LF alone as git does (`bytes.splitlines` splits at CR too)."""
    lines = data.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def mismatch(hunk: Hunk, lines: list[bytes], at: int) -> Mismatch | None:
    """Why *hunk* does not fit *lines* at index *at* (from 0), or None where it fits."""
    for offset, expected in enumerate(hunk.old):
        here = at + offset
        found = lines[here] if 0 <= here < len(lines) else None
        if found != expected:
            return Mismatch(here + 1, expected, found)
    return None


def index_of(start: int, count: int) -> int:
    """The index in a list of lines that a hunk header's START,COUNT stands for."""
    return start if count == 0 else start - 1


def apply_hunks(file: FilePatch, data: bytes, *, patch: str = "", release: str = "") -> bytes:
    """The file's bytes after all hunks, in order; raises `PatchesError` at the first that does not fit."""
    lines = split_lines(data)
    out: list[bytes] = []
    done = 0
    for number, hunk in enumerate(file.hunks, 1):
        at = index_of(hunk.old_start, hunk.old_count)
        new_at = len(out) + at - done
        wrong = mismatch(hunk, lines, at)
        if wrong or at < done or new_at != index_of(hunk.new_start, hunk.new_count):
            raise _misfit(file, number, hunk, wrong, new_at, patch, release)
        out += lines[done:at] + hunk.new
        done = at + hunk.old_count
    return b"".join(out + lines[done:])


def reverse(file: FilePatch) -> FilePatch:
    """The file section that undoes *file*."""
    hunks = tuple(hunk.reversed() for hunk in file.hunks)
    return FilePatch(file.path, file.new_blob, file.old_blob, file.mode, hunks)


def apply_patch(patch: Patch, files: dict[str, bytes], *, release: str = "") -> dict[str, bytes]:
    """*files* (path to bytes) after *patch*; before and after are checked by blob id."""
    return _apply(patch, patch.files, files, release)


def undo_patch(patch: Patch, files: dict[str, bytes], *, release: str = "") -> dict[str, bytes]:
    """*files* before *patch*, from what it left behind; checked by blob id as well."""
    return _apply(patch, [reverse(file) for file in patch.files], files, release)


def _apply(patch: Patch, sections: Iterable[FilePatch], files: dict[str, bytes], release: str) -> dict[str, bytes]:
    result = dict(files)
    for section in sections:
        if section.path not in result:
            raise _no_such_file(section, patch, release)
        before = result[section.path]
        after = apply_hunks(section, before, patch=patch.name, release=release)
        _expect_blob(section, section.old_blob, before, patch.name, release, "before")
        _expect_blob(section, section.new_blob, after, patch.name, release, "after")
        result[section.path] = after
    return result


def _no_such_file(section: FilePatch, patch: Patch, release: str) -> PatchesError:
    return PatchesError(
        "the patch touches a file that the tree does not have",
        release=release,
        patch=patch.name,
        file=section.path,
        expected="a file",
        found="no such file",
        next_command=f"vllm-patches check --tree DIR --pin {release or 'RELEASE'}",
    )


def _expect_blob(section: FilePatch, blob: str, data: bytes, patch: str, release: str, when: str) -> None:
    found = blob_id(data)
    if found != blob:
        raise PatchesError(
            f"the blob {when} the patch is not the one its index line names",
            release=release,
            patch=patch,
            file=section.path,
            expected=blob,
            found=found,
            next_command=f"vllm-patches export --pin {release or 'RELEASE'}",
        )


def _misfit(
    file: FilePatch,
    number: int,
    hunk: Hunk,
    wrong: Mismatch | None,
    new_at: int,
    patch: str,
    release: str,
) -> PatchesError:
    if wrong:
        expected = f"line {wrong.line}: {_show(wrong.expected)}"
        found = f"line {wrong.line}: {_show(wrong.found)}" if wrong.found is not None else "the end of the file"
    else:
        expected = f"the hunk to leave its lines at {new_at + 1}, where they end up"
        found = f"a hunk header that says +{hunk.new_start},{hunk.new_count}"
    return PatchesError(
        "a hunk does not apply at its stated line (fuzz 0, offset 0)",
        release=release,
        patch=patch,
        file=file.path,
        hunk=number,
        expected=expected,
        found=found,
        next_command=f"vllm-patches check --tree DIR --pin {release or 'RELEASE'}    # where each hunk would fit",
    )


def _show(line: bytes | None) -> str:
    return (line or b"").decode("utf-8", "replace").rstrip("\n")
