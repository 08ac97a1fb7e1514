"""One sound patch header, and one bad one for every rule; each must be told by the rule that it breaks, alone."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_patches.series import headers
from vllm_patches.series.headers import REPOSITORY, Problem, lint_header
from vllm_patches.series.patchfile import parse_patch
from world import World

Lint = Callable[..., list[Problem]]


@pytest.fixture
def lint(world: World) -> Lint:
    """Lint 0001 of v0.20.2 after replacing *old* by *new* in it."""

    def run(old: str = "", new: str = "") -> list[Problem]:
        raw = world.patch().read_text(encoding="utf-8")
        assert old in raw, "the case replaces nothing"
        patch = parse_patch(world.patch().name, raw.replace(old, new, 1).encode())
        return lint_header(patch, world.catalog.fixes["0001"], "v0.20.2", ["0.20.1", "0.20.2"])

    return run


def test_a_sound_header(lint: Lint) -> None:
    assert lint() == []


WHY = "Why: because the fake engine needs it."
LONG_SUBJECT = "engine: " + "x" * 58
STATUS = "Applied-Upstream: no\nLast-Update: 2026-11-21\nUpstream-Status: Pending"
PR = f"{REPOSITORY}/pull/7"

# rule, what is replaced, by what, a part of what is found
BAD = [
    ("from", "From: vllm-patches maintainers", "From: Somebody Else", "Somebody Else"),
    ("date", "Sat, 21 Nov 2026 00:00:00 +0000", "Sat, 21 Nov 2026 10:00:00 +0000", "10:00:00"),
    ("date", "Sat, 21 Nov 2026 00:00:00 +0000", "Sat, 21 Nov 2026 00:00:00 +0200", "+0200"),
    ("subject", "engine: take the third step twice", "take the third step twice", "take the third step"),
    ("subject", "engine: take the third step twice", "engine: take the third step twice.", "twice."),
    ("subject", "engine: take the third step twice", "[Bugfix] engine: take it", "[Bugfix]"),
    ("subject", "engine: take the third step twice", LONG_SUBJECT, LONG_SUBJECT),
    ("subject", "[PATCH] engine", "[PATCH 1/3] engine", "[PATCH 1/3]"),
    ("prose", f"{WHY}\n\n", "", "Mechanism, Fix"),
    ("prose", "Scope: because", "Range: because", "Fix, Beyond upstream"),
    ("trailers", "Requires: none\n", "", "missing: Requires"),
    ("trailers", "Origin: other, written for this series\nBug:", "Bug:", "missing: Origin"),
    ("trailers", "Requires: none\n", "Requires: none\nSigned-off-by: x\n", "Signed-off-by"),
    ("trailer-origin", "Origin: other, written for this series", "Origin: elsewhere", "Origin: elsewhere"),
    ("trailer-bug", f"Bug: {REPOSITORY}/issues/1", "Bug: #1", "malformed: Bug: #1"),
    ("trailer-forwarded", "Forwarded: no", "Forwarded: yes", "Forwarded: yes"),
    ("trailer-applied-upstream", STATUS, STATUS.replace("no", "0.21").replace("Pending", f"Backport [{PR}]"), "0.21"),
    ("trailer-last-update", "2026-11-21\nUpstream", "21.11.2026\nUpstream", "21.11.2026"),
    ("trailer-upstream-status", "Upstream-Status: Pending", "Upstream-Status: Unknown", "malformed: Upstream-Status"),
    ("trailer-upstream-status", "Upstream-Status: Pending", f"Upstream-Status: Backport [{PR}]", "Backport"),
    ("trailer-upstream-status", "Applied-Upstream: no", f"Applied-Upstream: 0.21.0, {PR}", "Pending | 0.21.0"),
    ("trailer-requires", "Requires: none", "Requires: 1", "malformed: Requires: 1"),
    ("trailer-applies-to", "Applies-To: 0.20.1, 0.20.2", "Applies-To: 0.20.2", "0.20.2"),
    ("trailer-test", "test_proof[0001-0.20.2]", "test_proof[0002-0.20.2]", "test_proof[0002-0.20.2]"),
    ("line-length", WHY, "Why: " + "x" * 72, "Why: xxx"),
    ("ascii", WHY, "Why: caf\u00e9.", "caf\u00e9"),
    ("separator", WHY, f"{WHY}\n---", "---"),
    ("separator", WHY, f"{WHY}\ndiff -u a b", "diff -u"),
    ("separator", WHY, f"{WHY}\nIndex: a", "Index: a"),
    ("whitespace", WHY, f"{WHY} ", "needs it. "),
    ("whitespace", "\nOrigin:", "\n\nOrigin:", "two blank lines"),
    ("whitespace", "engine: take the third step twice", "engine: take  the third step", "take  the"),
]


@pytest.mark.parametrize(("rule", "old", "new", "found"), BAD)
def test_a_bad_header_is_told_by_its_rule(lint: Lint, rule: str, old: str, new: str, found: str) -> None:
    problems = lint(old, new)
    assert {problem.rule for problem in problems} == {rule}
    assert found in problems[0].found
    assert problems[0].expected
    assert problems[0].file == "patches/v0.20.2/0001-dsa-mtp-ima.patch"


def test_a_malformed_list_of_releases_breaks_two_rules_of_one_name(lint: Lint) -> None:
    problems = lint("Applies-To: 0.20.1, 0.20.2", "Applies-To: all")
    assert [(p.rule, p.found) for p in problems] == [
        ("trailer-applies-to", "malformed: Applies-To: all"),
        ("trailer-applies-to", "all"),
    ]


def test_trailers_must_be_ascii_too(lint: Lint) -> None:
    problems = lint("Last-Update: 2026-11-21", "Last-Update: 2026-11-2\u0661")  # a digit, but not an ASCII one
    assert {p.rule for p in problems} == {"ascii"}


def test_without_a_trailer_paragraph_each_is_missing(lint: Lint) -> None:
    problems = {p.rule: p.found for p in lint("Origin: other", "And then: no\nOrigin: other")}
    assert problems["trailers"].startswith("no trailer paragraph before the diff; missing: Origin, Bug")
    assert problems["trailer-test"] == "none"


SOUND = [
    ("Forwarded: no", "Forwarded: not-needed"),
    ("Forwarded: no", f"Forwarded: {PR}"),
    ("Upstream-Status: Pending", f"Upstream-Status: Submitted [{PR}]"),
    ("Upstream-Status: Pending", "Upstream-Status: Inappropriate [only this release]"),
    ("Upstream-Status: Pending", "Upstream-Status: Denied"),
    ("Requires: none", "Requires: 0002, 0003"),
    ("engine: take the third step twice", "engine: " + "x" * 57),
    (WHY, "Why: " + "x" * 71),
    (
        STATUS,
        f"Applied-Upstream: 0.21.0, {PR}, commit 0123456789ab\nLast-Update: 2026-11-21\n"
        f"Upstream-Status: Backport [{PR}]",
    ),
]


@pytest.mark.parametrize(("old", "new"), SOUND)
def test_other_sound_headers(lint: Lint, old: str, new: str) -> None:
    assert lint(old, new) == []


def test_a_problem_in_words() -> None:
    assert str(Problem("rule", "f", "this", "that")) == "f: rule\n  expected: this\n  found:    that"
    assert str(Problem("rule", "f", "this", "that", "type it")).endswith("that\n  next:     type it")


def test_every_rule_has_a_bad_case() -> None:
    """The rules are the first strings of the tuples that headers.py yields."""
    tree = ast.parse(Path(headers.__file__).read_text(encoding="utf-8"))
    yielded = [
        node.value.elts[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple)
    ]
    rules = {first.value for first in yielded if isinstance(first, ast.Constant)}
    rules |= {f"trailer-{key.lower()}" for key in (*headers._VALUES, "Test")}
    assert len(rules) > 15
    assert rules == {rule for rule, *_ in BAD}
