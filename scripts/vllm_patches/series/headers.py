"""Lint of one patch file's header: git's, DEP-3's and OpenEmbedded's rules at once.

Every finding quotes what was found, says what was expected, and is one line of `Problem`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vllm_patches.series.model import IDENT_EMAIL, IDENT_NAME, Fix, Patch

TRAILERS = (
    "Origin",
    "Bug",
    "Forwarded",
    "Applied-Upstream",
    "Last-Update",
    "Upstream-Status",
    "Applies-To",
    "Requires",
    "Test",
)
SECTIONS = ("Why", "Mechanism", "Fix", "Scope", "Beyond upstream", "Removal")
ORIGIN = "other, written for this series"
PROOFS = "tests/repro/test_proof.py"
REPOSITORY = "https://github.com/vllm-project/vllm"

# Upstream's change: the pull request where a source that was read names it, else the first release that holds it.
_CHANGE = rf"{REPOSITORY}/(pull/\d+|releases/tag/v\d+\.\d+\.\d+)"

_VALUES = {
    "Origin": re.escape(ORIGIN),
    "Bug": rf"{REPOSITORY}/(issues|pull)/\d+",
    "Forwarded": rf"no|not-needed|{REPOSITORY}/(issues|pull)/\d+",
    "Applied-Upstream": rf"no|\d+\.\d+\.\d+, {_CHANGE}(, commit [0-9a-f]{{9,40}})?",
    "Last-Update": r"\d{4}-\d{2}-\d{2}",
    # OpenEmbedded's vocabulary; see its patch guidelines.
    "Upstream-Status": rf"Pending|Submitted \[{REPOSITORY}/pull/\d+\]|Backport \[{_CHANGE}\]"
    r"|Denied|Inappropriate \[[^\]]+\]",
    "Applies-To": r"\d+\.\d+\.\d+(, \d+\.\d+\.\d+)*",
    "Requires": r"none|\d{4}(, \d{4})*",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the catalogue; *rule* is stable, *next_command* is something to type."""

    rule: str
    file: str
    expected: str
    found: str
    next_command: str = ""

    def __str__(self) -> str:
        tail = f"\n  next:     {self.next_command}" if self.next_command else ""
        return f"{self.file}: {self.rule}\n  expected: {self.expected}\n  found:    {self.found}{tail}"


def pull_requests(fix: Fix) -> list[str]:
    """The addresses of upstream's pull requests for *fix*."""
    return [f"{REPOSITORY}/pull/{number}" for number in fix.upstream_pr]


def proof_id(fix: str, release: str) -> str:
    """The pytest id of the proof of *fix* on *release*, as the trailer ``Test:`` names it."""
    return f"{PROOFS}::test_proof[{fix}-{release}]"


def lint_header(patch: Patch, fix: Fix, series: str, applies_to: list[str]) -> list[Problem]:
    """Everything that is wrong with the header of *patch* in the directory *series*."""
    where = f"patches/{series}/{patch.name}"
    rules: tuple[Callable[[Patch], Iterator[tuple[str, str, str]]], ...] = (
        _identity,
        _subject,
        _sections,
        _trailer_keys,
        _trailer_values,
        _lines,
        _whitespace,
    )
    found = [Problem(rule, where, *pair) for check in rules for rule, *pair in check(patch)]
    expected = {
        "Applies-To": ", ".join(applies_to),
        "Test": proof_id(fix.id, series.removeprefix("v")),
    }
    for key, value in expected.items():
        if patch.trailer(key) != value:
            found.append(Problem(f"trailer-{key.lower()}", where, f"{key}: {value}", patch.trailer(key) or "none"))
    return found


def _identity(patch: Patch) -> Iterator[tuple[str, str, str]]:
    ident = f"{IDENT_NAME} <{IDENT_EMAIL}>"
    if patch.author != ident:
        yield "from", f"From: {ident}", f"From: {patch.author}"
    if not re.fullmatch(r"[A-Z][a-z]{2}, \d{1,2} [A-Z][a-z]{2} \d{4} 00:00:00 \+0000", patch.date):
        yield "date", "Date: at 00:00:00 +0000, so that the bytes never move", f"Date: {patch.date}"


def _subject(patch: Patch) -> Iterator[tuple[str, str, str]]:
    if not re.fullmatch(r"[a-z0-9_ .+-]+: \S.*[^.\s]", patch.subject) or len(patch.subject) > 65:
        yield "subject", "'<area>: <imperative>', at most 65 characters, no tag, no full stop", patch.subject


def _sections(patch: Patch) -> Iterator[tuple[str, str, str]]:
    """The prose says why, mechanism, fix, scope, what goes beyond upstream, and how it goes away, in this order."""
    paragraphs = patch.body.split("\n\n")
    labels = tuple(label for p in paragraphs for label in SECTIONS if p.startswith(f"{label}: "))
    if labels != SECTIONS:
        yield "prose", "paragraphs " + ", ".join(f"'{s}:'" for s in SECTIONS), ", ".join(labels) or "none"


def _trailer_keys(patch: Patch) -> Iterator[tuple[str, str, str]]:
    keys = tuple(key for key, _ in patch.trailers)
    if keys != TRAILERS:
        missing = [key for key in TRAILERS if key not in keys]
        note = f"; missing: {', '.join(missing)}" if missing else ""
        yield "trailers", ", ".join(TRAILERS), (", ".join(keys) or "no trailer paragraph before the diff") + note


def _trailer_values(patch: Patch) -> Iterator[tuple[str, str, str]]:
    for key, value in patch.trailers:
        if key in _VALUES and not re.fullmatch(_VALUES[key], value):
            yield f"trailer-{key.lower()}", f"{key}: {_VALUES[key]}", f"malformed: {key}: {value}"
    status, applied = patch.trailer("Upstream-Status"), patch.trailer("Applied-Upstream")
    if status.startswith("Backport") == (applied == "no"):
        yield (
            "trailer-upstream-status",
            "Backport exactly where Applied-Upstream names a release",
            f"{status} | {applied}",
        )


def _lines(patch: Patch) -> Iterator[tuple[str, str, str]]:
    """What mail, DEP-3 parsers and a reader at night can take."""
    *prose, trailers = patch.body.rstrip("\n").split("\n\n")
    for line in "\n".join(prose).split("\n"):
        if len(line) > 76:
            yield "line-length", "prose wrapped at 76 characters", line
        if not line.isascii():
            yield "ascii", "ASCII prose", line
        if line == "---" or line.startswith(("diff ", "Index: ", "--- ")):
            yield "separator", "no line that git am takes for the end of the message", line
    if not trailers.isascii():
        yield "ascii", "ASCII trailers", trailers


def _whitespace(patch: Patch) -> Iterator[tuple[str, str, str]]:
    """git am tidies these away, and its commit would no longer be ours."""
    for line in (patch.subject, *patch.body.split("\n")):
        if line != line.rstrip():
            yield "whitespace", "no blanks at the end of a line", repr(line)
    if "\n\n\n" in patch.body.rstrip("\n"):
        yield "whitespace", "one blank line between paragraphs", "two blank lines"
    if "  " in patch.subject:
        yield "whitespace", "one blank between the words of the subject", patch.subject
