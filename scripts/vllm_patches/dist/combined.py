"""One patch with everything: a section per file, from the release's own to the last patch's."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

from vllm_patches.dist.bundle import Asset, Bundle
from vllm_patches.dist.links import Links, banner
from vllm_patches.dist.unified import NO_BLOB, span
from vllm_patches.series.hunks import blob_id, split_lines

CONTEXT = 3  # lines, as in the series


def assets(bundle: Bundle, links: Links) -> list[Asset]:
    """``vllm-RELEASE-patches.patch`` (`links` plays no part)."""
    names = "".join(f"  {item.name}: {item.subject}\n" for item in bundle.items)
    head = f"{banner(bundle)}\n\n{names}\n".encode()
    return [Asset(f"vllm-{bundle.release.version}-patches.patch", head + diff(bundle, bundle.after))]


def diff(bundle: Bundle, paths: Iterable[str]) -> bytes:
    """The changes of *paths*, sorted, as git writes them."""
    return b"".join(_file(path, bundle) for path in sorted(paths))


def _file(path: str, bundle: Bundle) -> bytes:
    before, after, mode = bundle.before[path], bundle.after[path], bundle.modes[path]
    if before == after:
        return b""
    old = NO_BLOB if before is None else blob_id(before)
    new = NO_BLOB if after is None else blob_id(after)
    head = [f"diff --git a/{path} b/{path}"]
    if before is None:
        head += [f"new file mode {mode}", f"index {old}..{new}"]
    elif after is None:
        head += [f"deleted file mode {mode}", f"index {old}..{new}"]
    else:
        head += [f"index {old}..{new} {mode}"]
    head += [
        f"--- {'/dev/null' if before is None else f'a/{path}'}",
        f"+++ {'/dev/null' if after is None else f'b/{path}'}",
    ]
    return "".join(f"{line}\n" for line in head).encode() + b"".join(_hunks(before or b"", after or b""))


def _hunks(before: bytes, after: bytes) -> Iterable[bytes]:
    old, new = split_lines(before), split_lines(after)
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    for group in matcher.get_grouped_opcodes(CONTEXT):
        (_, a, _, c, _), (_, _, b, _, d) = group[0], group[-1]
        yield b"@@ -" + _range(a, b) + b" +" + _range(c, d) + b" @@\n"
        for tag, i, j, k, m in group:
            if tag == "equal":
                yield from (_line(b" ", line) for line in old[i:j])
                continue
            yield from (_line(b"-", line) for line in old[i:j])
            yield from (_line(b"+", line) for line in new[k:m])


def _range(start: int, end: int) -> bytes:
    """A half-open range of lines, counted from 0; an empty one is named by the line before it."""
    return span(start + (end > start), end - start)


def _line(kind: bytes, line: bytes) -> bytes:
    return kind + line if line.endswith(b"\n") else kind + line + b"\n\\ No newline at end of file\n"
