"""fast-import streams: the pristine commit of a release, and one commit per patch on top of it.

Author, committer and dates are fixed, so the same pin ends in the same commit id on every machine. A series
commit equals what ``git am --committer-date-is-author-date`` makes of the patch file with our identity.
"""

from __future__ import annotations

import calendar
from collections.abc import Iterable, Iterator
from email.utils import parsedate_to_datetime

from vllm_patches.errors import PatchesError
from vllm_patches.series.model import IDENT_EMAIL, IDENT_NAME, Patch, Release
from vllm_patches.sources.sdist import Entry


def pristine_stream(release: Release, ref: str, entries: Iterable[Entry]) -> Iterator[bytes]:
    """The root commit: the files of the sdist, dated as the release."""
    seconds = calendar.timegm(release.date.timetuple())
    message = f"vLLM {release.version}, as in {release.sdist}\n\nsha256: {release.sha256}\n"
    yield _commit(ref, f"{IDENT_NAME} <{IDENT_EMAIL}> {seconds} +0000", seconds, message)
    for entry in entries:
        yield _modify(entry)


def series_stream(ref: str, base: str, steps: Iterable[tuple[Patch, list[Entry]]]) -> Iterator[bytes]:
    """One commit per patch, each with the whole new content of the files it touches."""
    parent = base
    for number, (patch, entries) in enumerate(steps, 1):
        when = parsedate_to_datetime(patch.date)
        seconds = int(when.timestamp())
        author = f"{patch.author} {seconds} {when.strftime('%z')}"
        message = f"{patch.subject}\n\n{patch.body.rstrip()}\n"
        yield _commit(ref, author, seconds, message, mark=number)
        yield f"from {parent}\n".encode()
        for entry in entries:
            yield _modify(entry)
        parent = f":{number}"


def _commit(ref: str, author: str, seconds: int, message: str, mark: int = 0) -> bytes:
    data = message.encode()
    committer = f"{IDENT_NAME} <{IDENT_EMAIL}> {seconds} +0000"
    marked = f"mark :{mark}\n" if mark else ""
    head = f"commit {ref}\n{marked}author {author}\ncommitter {committer}\ndata {len(data)}\n"
    return head.encode() + data + b"\n"


def _modify(entry: Entry) -> bytes:
    if entry.path.startswith('"') or "\n" in entry.path:
        raise PatchesError("a file name that no stream can carry", file=repr(entry.path))
    return f"M {entry.mode} inline {entry.path}\ndata {len(entry.data)}\n".encode() + entry.data + b"\n"
