"""The mutants' own machinery: what is made of a patch, what a run says of it, and a handful of mutants end to end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mutant_child
import mutants
import preload
import pytest
from child import run_forked
from mutants import Result, judge, judge_all
from mutations import EXCUSES, Mutant, _made, mutants_of
from proof import Side, case_module, proof_trees, read_side
from vllm_patches.series.catalog import open_catalog
from vllm_patches.series.model import FilePatch, Hunk
from vllm_patches.sources import cache

RELEASE = "0.21.0"
MUTANT = Mutant("0003", RELEASE, "made up", "vllm/a.py", "x = 1\n")


def side(trouble: str = "", **outcomes: str) -> Side:
    return Side(RELEASE, "mutant", outcomes, {}, {}, trouble, 0.0)


# --- what is made of a patch ------------------------------------------------------------------------------

PATCHED = '''\
old = 1
def added(
    one,
):
    """Prose."""
    # a comment
    if one:
        return 2

    new = old + 1
later = 3
'''


def added_patch(path: str, text: str, start: int, count: int) -> FilePatch:
    """A patch that adds *count* lines of *text* from line *start* on."""
    lines = text.encode().splitlines(keepends=True)
    new = tuple(b"+" + line for line in lines[start - 1 : start - 1 + count])
    return FilePatch(path, "", "", "100644", (Hunk(start - 1, 0, start, count, new),))


def test_each_line_of_code_and_each_statement_is_taken_out() -> None:
    made = {name: text for name, _, _, text in _made(added_patch("a.py", PATCHED, 2, 9), PATCHED)}
    assert list(made) == [
        "without a.py:2: def added(",
        "without a.py:3: one,",
        "without a.py:7: if one:",
        "without a.py:8: return 2",
        "without a.py:10: new = old + 1",
        "pass for a.py:2-10: def added(",
        "pass for a.py:7-8: if one:",
        "pass for a.py:8: return 2",
    ]
    assert made["without a.py:3: one,"] == PATCHED.replace("    one,\n", "")
    assert made["pass for a.py:7-8: if one:"] == PATCHED.replace("    if one:\n        return 2\n", "    pass\n")
    assert made["pass for a.py:2-10: def added("] == "old = 1\npass\nlater = 3\n"


def test_a_statement_that_is_added_in_part_stays() -> None:
    made = [name for name, *_ in _made(added_patch("a.py", PATCHED, 7, 1), PATCHED)]
    assert made == ["without a.py:7: if one:"]


def test_a_decorator_goes_with_its_function() -> None:
    text = "@cache\ndef f():\n    return 1\n"
    made = {name: text for name, _, _, text in _made(added_patch("a.py", text, 1, 3), text)}
    assert made["pass for a.py:1-3: @cache"] == "pass\n"


def test_other_languages_lose_lines_only() -> None:
    text = "if (x) {\n  // why\n  y();\n}\n"
    made = [(name, kind) for name, kind, *_ in _made(added_patch("a.cu", text, 1, 4), text)]
    assert made == [("without a.cu:1: if (x) {", EXCUSES[0]), ("without a.cu:3: y();", EXCUSES[0])]


def test_a_tree_that_is_not_the_patchs_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"a\.py:10 of the patched tree is not the patch's line"):
        list(_made(added_patch("a.py", PATCHED, 2, 9), PATCHED.replace("old + 1", "old + 2")))


def test_the_tables_fit_every_series() -> None:
    """Each row's text is there once in each of its releases; each patch has rows; no two mutants are the same."""
    catalog = open_catalog()
    for series in catalog.series.values():
        tree = proof_trees(series.name.removeprefix("v"))[1]
        for patch in series.patches:
            made = list(mutants_of(catalog.fixes[patch.number], series, tree))
            assert any(mutant.killed_by for mutant in made)
            assert len({mutant.name for mutant in made}) == len(made)
            assert all(mutant.text != (tree / mutant.file).read_text(encoding="utf-8") for mutant in made)


# --- what a run says --------------------------------------------------------------------------------------

LISTED = replace(MUTANT, killed_by=("a", "b"))
HARMLESS = replace(MUTANT, equivalent="so it is")
FAIL, ERROR = "fail: wrong", "error: TypeError: no"


@pytest.mark.parametrize(
    ("mutant", "answer", "result", "fine"),
    [
        (MUTANT, side(a="pass", b=FAIL), Result.KILLED, True),
        (MUTANT, side(a=ERROR, b=FAIL), Result.KILLED, True),
        (MUTANT, side(a="pass", b=ERROR), Result.BROKEN, True),
        (MUTANT, side(a="pass", b="pass"), Result.SURVIVED, False),
        (MUTANT, side("no end in time while running 'a'"), Result.HANGS, True),
        (MUTANT, side("killed by SIGSEGV while running 'a'"), Result.BROKEN, True),
        (MUTANT, side("exit 1 while running 'import'"), Result.BROKEN, True),
        (LISTED, side(a=FAIL, b=FAIL), Result.KILLED, True),
        (LISTED, side(a=FAIL, b="pass"), Result.SURVIVED, False),
        (LISTED, side(a=FAIL, b=ERROR), Result.SURVIVED, False),
        (LISTED, side("no end in time while running 'b'", a=FAIL), Result.SURVIVED, False),
        (LISTED, side(a=FAIL), Result.SURVIVED, False),
        (HARMLESS, side(a="pass", b="pass"), Result.EQUIVALENT, True),
        (HARMLESS, side(a="pass", b=FAIL), Result.NOT_EQUIVALENT, False),
        (HARMLESS, side(a="pass", b=ERROR), Result.NOT_EQUIVALENT, False),
        (HARMLESS, side("no end in time while running 'a'"), Result.NOT_EQUIVALENT, False),
    ],
)
def test_judgement(mutant: Mutant, answer: Side, result: Result, fine: bool) -> None:
    verdict = judge(mutant, answer)
    assert (verdict.result, verdict.fine) == (result, fine)
    assert verdict.by or result is Result.SURVIVED


# --- what may be imported before the fork -----------------------------------------------------------------


def test_what_imports_the_mutated_file_is_left_to_the_forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "preloadable"
    package.mkdir()
    sources = {
        "__init__": "",
        "mutated": "",
        "alone": "import json",
        "direct": "from . import mutated",
        "distant": "import preloadable.direct as other",
        "late": "def load():\n    import importlib\n    return importlib.import_module('.mutated', 'preloadable')",
        "user": "from preloadable.late import load\nload()",
    }
    for name, text in sources.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = [f"preloadable.{name}" for name in ("alone", "distant", "user")]
    with preload.recorded() as imports:
        for name in names:
            __import__(name)
    files = preload.files_of({name for name in sys.modules if name.partition(".")[0] == "preloadable"})
    found = preload.untouched(files, imports, package / "mutated.py", tmp_path / "own")
    assert set(found) == {"preloadable", "preloadable.alone"}
    assert set(preload.untouched(files, imports, package / "other.py", tmp_path / "own")) == set(files)
    with pytest.raises(RuntimeError, match=r"preloadable\.mutated is the mutated file"):
        preload.load(["preloadable.direct"], package / "mutated.py")


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    original, link = tmp_path / "original", tmp_path / "link"
    original.write_bytes(b"patched")
    os.link(original, link)
    mutant_child.replace(link, b"mutated")
    assert (original.read_bytes(), link.read_bytes()) == (b"patched", b"mutated")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "original"]


# --- end to end -------------------------------------------------------------------------------------------


@pytest.fixture
def scratches(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that the runs of this test work in; others may run beside it."""
    plain, made = cache.scratch, []

    @contextmanager
    def scratch(folder: Path, prefix: str) -> Iterator[Path]:
        with plain(folder, prefix) as path:
            made.append(path)
            yield path

    monkeypatch.setattr(cache, "scratch", scratch)
    return made


def test_a_handful_end_to_end(scratches: list[Path]) -> None:
    """Killed, survived, broken and equivalent mutants of a real patch, each told for what it is."""
    catalog = open_catalog()
    fix, series = catalog.fixes["0003"], catalog.series_of(catalog.release(RELEASE))
    tree = proof_trees(RELEASE)[1]
    listed = next(m for m in mutants_of(fix, series, tree, listed_only=True) if m.killed_by)
    patched = (tree / listed.file).read_text(encoding="utf-8")

    def made_up(name: str, text: str, **kind: object) -> Mutant:
        return replace(listed, name=name, text=text, killed_by=(), **kind)

    wrong = [
        listed,
        replace(listed, name="named in vain", killed_by=(*listed.killed_by, "plain decode passes the lengths through")),
        made_up("deletion", listed.text),
        made_up("not equivalent", "raise ImportError('made up')\n", equivalent="made up"),
        made_up("survivor", patched + "\n# nothing\n"),
        made_up("equivalent", patched + "\n# nothing\n", equivalent="a comment"),
        made_up("no import", "raise ImportError('made up')\n"),
        made_up("no Python", patched + "\n)\n"),
    ]
    verdicts = list(judge_all(RELEASE, wrong, {fix.id: case_module(fix)}))
    assert {v.mutant.name: v.result for v in verdicts} == {
        listed.name: Result.KILLED,
        "named in vain": Result.SURVIVED,
        "deletion": Result.KILLED,
        "not equivalent": Result.NOT_EQUIVALENT,
        "survivor": Result.SURVIVED,
        "equivalent": Result.EQUIVALENT,
        "no import": Result.BROKEN,
        "no Python": Result.BROKEN,
    }
    assert (tree / listed.file).read_text(encoding="utf-8") == patched
    assert len(scratches) == 1 and not scratches[0].exists()


FAILING_CASE = """
import time
from case_api import Case, expect
CASE = Case("0003")
CASE.check("sound")(lambda tree: None)
CASE.check("unsound")(lambda tree: expect(False, "made-up", "it fails", "a.py:1"))
CASE.check("endless")(lambda tree: time.sleep(60))
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mutant_child.Bench:
    """Where `FAILING_CASE` can be run."""
    (tmp_path / "failing_case.py").write_text(FAILING_CASE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return mutant_child.Bench(tmp_path, RELEASE, tmp_path, timeout=0.5)


def test_a_case_that_fails_on_the_patched_tree_says_nothing_of_mutants(bench: mutant_child.Bench) -> None:
    with pytest.raises(RuntimeError, match=r"failing_case does not pass on the patched tree .*made-up"):
        mutant_child.baseline(bench, "failing_case", "unchanged")


def test_the_first_failure_ends_a_run_that_needs_no_more(bench: mutant_child.Bench) -> None:
    run_forked(bench.run("deletion", "failing_case", ("sound", "unsound", "endless"), first_fail=True))
    answer = read_side(RELEASE, "mutant", bench.out / "deletion" / "failing_case")
    assert answer.outcomes == {"sound": "pass", "unsound": "fail: made-up"}
    assert judge(MUTANT, answer).result is Result.KILLED


def test_a_run_without_an_end_is_told_by_the_time_limit(bench: mutant_child.Bench) -> None:
    run_forked(bench.run("hangs", "failing_case", ("sound", "endless")))
    verdict = judge(MUTANT, read_side(RELEASE, "mutant", bench.out / "hangs" / "failing_case"))
    assert (verdict.result, verdict.by) == (Result.HANGS, "no end in time while running 'endless'")


def test_the_check_that_killed_comes_first(bench: mutant_child.Bench) -> None:
    run = bench.run("killed", "failing_case", ("sound", "unsound"))
    run_forked(run)
    assert mutant_child.killers_first(["endless", "sound", "unsound"], run) == ["unsound", "endless", "sound"]


def test_a_release_whose_mutants_cannot_be_run_is_an_error(
    monkeypatch: pytest.MonkeyPatch, scratches: list[Path]
) -> None:
    monkeypatch.setattr(mutants, "HERE", Path("/nonexistent"))  # where the child program would be
    with pytest.raises(SystemExit, match=f"{RELEASE}: 0 of 1 mutants were run"):
        list(judge_all(RELEASE, [replace(MUTANT, file="vllm/version.py")], {"0003": "mla_flat_buffer"}))
    assert len(scratches) == 1 and not scratches[0].exists()


def test_a_thread_that_lasts_is_told_and_one_that_ends_is_waited_for() -> None:
    code = """
import sys, threading, time, preload
threading.Thread(target=time.sleep, args=(float(sys.argv[1]),), daemon=True).start()
print(len(preload._lasting_threads(2.0)))
"""
    for seconds, left in (("0.3", "0"), ("60", "1")):
        command = [sys.executable, "-c", code, seconds]
        done = subprocess.run(command, cwd=Path(preload.__file__).parent, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == left
