"""The catalogue as a whole: a sound one, and one damaged for every rule."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from vllm_patches.series.model import State
from vllm_patches.upkeep import lint
from vllm_patches.upkeep.lint import lint_catalog
from world import PINS, World


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_a_sound_catalogue(world: World) -> None:
    assert lint_catalog(world.catalog) == []


def _no_fifth_fix(world: World) -> None:
    _edit(world.patches / "fixes.toml", 'id = "0005"', 'id = "0006"')
    _edit(world.patches / "fixes.toml", 'slug = "mrv2-wake-up"', 'slug = "other"')


def _other_quotes(world: World) -> None:
    _edit(world.patches / "releases.toml", 'sdist = "vllm-0.19.0.tar.gz"', "sdist = 'vllm-0.19.0.tar.gz'")


def _more_lines(world: World) -> None:
    with (world.patches / "releases.toml").open("a", encoding="utf-8") as file:
        file.write("\n# end\n")


def _unnamed_directory(world: World) -> None:
    (world.patches / "v0.30.0").mkdir()


def _no_directory(world: World) -> None:
    (world.patches / "v0.21.0").rename(world.root / "away")


def _unlisted_patch(world: World) -> None:
    world.patch().with_name("0002-gdn-null-block-guard.patch").write_bytes(world.patch().read_bytes())


def _no_patch_file(world: World) -> None:
    world.patch("0005").unlink()


def _reversed_series(world: World) -> None:
    path = world.patches / "v0.20.2" / "series"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))), encoding="utf-8")


def _patch_listed_twice(world: World) -> None:
    _edit(world.patches / "v0.20.2" / "series", "0005", "0003-mla-flat-buffer.patch\n0005")


def _state(world: World, fix: str, state: State, evidence: str = "a.py:1") -> None:
    for version in ("0.20.1", "0.20.2"):
        release = world.release(version)
        changed = replace(release.states[fix], state=state, evidence=evidence)
        world.write_release(replace(release, states=release.states | {fix: changed}))


def _needs_another(world: World) -> None:
    _state(world, "0004", State.LATENT)


def _needs_one_less(world: World) -> None:
    _state(world, "0005", State.BROKEN)


def _evidence_in_prose(world: World) -> None:
    _state(world, "0002", State.FIXED, "somewhere: in the engine")


def _no_evidence(world: World) -> None:
    _state(world, "0004", State.ABSENT, "")


def _another_blob(world: World) -> None:
    _edit(
        world.patches / "releases.toml",
        f'csrc/kernel.cu" = "{world.release().blobs["csrc/kernel.cu"]}',
        'csrc/kernel.cu" = "00',
    )


def _a_blob_too_many(world: World) -> None:
    release = world.release("0.21.0")
    world.write_release(replace(release, blobs=release.blobs | {"README.md": "0" * 40}))


def _no_head(world: World) -> None:
    world.write_release(replace(world.release("0.21.0"), head=""))


def _no_revision(world: World) -> None:
    world.write_release(replace(world.release("0.21.0"), revision=0))


def _another_name(world: World) -> None:
    world.patch().rename(world.patch().with_name("0001-other.patch"))
    _edit(world.patches / "v0.20.2" / "series", "0001-dsa-mtp-ima", "0001-other")


def _another_number(world: World) -> None:
    world.patch("0005").rename(world.patch("0005").with_name("0009-mrv2-wake-up.patch"))
    _edit(world.patches / "v0.20.2" / "series", "0005-", "0009-")
    _state(world, "0005", State.ABSENT, "gone")


def _requires_a_later_one(world: World) -> None:
    _edit(world.patch(), "Requires: none", "Requires: 0003")


def _no_date_of_a_patch(world: World) -> None:
    _edit(world.patch(), "Date: Sat, ", "Date: ")
    _edit(world.patch(), "Date: 21 Nov 2026 00:00:00 +0000\n", "")


def _bad_subject(world: World) -> None:
    _edit(world.patch(), "[PATCH] engine", "[PATCH] Engine")


# rule, the damage, a part of the place, of what is expected, of what is found
BAD: list[tuple[str, Callable[[World], None], str, str, str]] = [
    ("fixes", _no_fifth_fix, "fixes.toml", "0004, 0005", "0004, 0006"),
    ("table-form", _other_quotes, "releases.toml:21", 'sdist = "vllm', "sdist = 'vllm"),
    ("table-form", _more_lines, "releases.toml", "canonical end", "more or less"),
    ("directory-unlisted", _unnamed_directory, "patches/v0.30.0", "a release that names it", "none"),
    ("directory-missing", _no_directory, "patches/v0.21.0", "a directory", "none"),
    ("patch-unlisted", _unlisted_patch, "v0.20.2/series", "0002-gdn-null-block-guard.patch", "none"),
    ("patch-missing", _no_patch_file, "v0.20.2/series", "0005-mrv2-wake-up.patch", "none"),
    (
        "series-order",
        _reversed_series,
        "v0.20.2/series",
        "0001-dsa-mtp-ima.patch, 0003",
        "0005-mrv2-wake-up.patch, 0003",
    ),
    ("series-order", _patch_listed_twice, "v0.20.2/series", "0001", "0003-mla-flat-buffer.patch, 0003"),
    ("patch-for-state", _needs_another, "release 0.20.1, 0004", "a patch 0004 in v0.20.2, for it is latent", "none"),
    ("state-for-patch", _needs_one_less, "release 0.20.1, 0005", "live or latent", "broken"),
    ("evidence", _evidence_in_prose, "release 0.20.1, 0002", "file:line", "somewhere: in"),
    ("evidence", _no_evidence, "release 0.20.1, 0004", "file:line", "none"),
    ("blob", _another_blob, "release 0.20.1, blobs, csrc/kernel.cu", "6a8c41ae", "00"),
    ("blob", _a_blob_too_many, "release 0.21.0, blobs, README.md", "no entry", "0000"),
    ("head", _no_head, "release 0.21.0", "head", "none"),
    ("revision", _no_revision, "release 0.21.0", "revision", "none"),
    ("patch-name", _another_name, "0001-other.patch", "0001-dsa-mtp-ima.patch", "0001-other.patch"),
    ("patch-name", _another_number, "0009-mrv2-wake-up.patch", "a number from fixes.toml", "0009-"),
    ("requires", _requires_a_later_one, "0001-dsa-mtp-ima.patch", "0003 before it", ""),
    ("unreadable", _no_date_of_a_patch, "0001-dsa-mtp-ima.patch", "Date:", "Subject"),
    ("subject", _bad_subject, "v0.20.2/0001-dsa-mtp-ima.patch", "<area>", "Engine"),
]
# What cannot be seen alone: a patch that is missing or renumbered is missed by other rules as well.
WITH_OTHERS = {_no_fifth_fix, _no_directory, _no_patch_file, _another_number, _patch_listed_twice, _reversed_series}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[1].__name__.strip("_"))
def test_damage_is_told_by_its_rule(world: World, case: tuple[str, Callable[[World], None], str, str, str]) -> None:
    rule, damage, place, expected, found = case
    damage(world)
    problems = lint_catalog(world.catalog)
    matching = [
        p for p in problems if p.rule == rule and place in p.file and expected in p.expected and found in p.found
    ]
    assert matching, problems
    if damage not in WITH_OTHERS:
        assert {problem.rule for problem in problems} == {rule}, problems


def test_what_cannot_be_read_is_one_finding_and_the_rest_goes_on(world: World) -> None:
    _edit(world.patch(), "[PATCH] engine", "[PATCH]")
    world.patch("0003").write_bytes(b"garbage\n")
    _unnamed_directory(world)
    rules = [problem.rule for problem in lint_catalog(world.catalog)]
    assert rules.count("unreadable") == 1
    assert "directory-unlisted" in rules


def test_a_damaged_series_does_not_hide_the_other_pins(world: World) -> None:
    world.patch("0003").write_bytes(b"garbage\n")
    _no_head(world)
    _edit(world.patch("0003", "v0.21.0"), "[PATCH] kernel", "[PATCH] Kernel")
    found = {(problem.rule, problem.file) for problem in lint_catalog(world.catalog)}
    assert ("head", "patches/releases.toml, release 0.21.0") in found
    assert ("subject", "patches/v0.21.0/0003-mla-flat-buffer.patch") in found


def test_a_missing_table_is_one_finding(world: World) -> None:
    (world.patches / "fixes.toml").unlink()
    problems = lint_catalog(world.catalog)
    assert [problem.rule for problem in problems] == ["unreadable"]
    assert problems[0].file.endswith("fixes.toml")


def test_a_required_patch_before_it_is_fine(world: World) -> None:
    for version in PINS:
        assert world.release(version)
    _edit(world.patch("0005"), "Requires: none", "Requires: 0001, 0003")
    assert lint_catalog(world.catalog) == []


def test_every_rule_has_a_bad_case() -> None:
    """The rules are the first arguments of `Problem` in lint.py."""
    tree = ast.parse(Path(lint.__file__).read_text(encoding="utf-8"))
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Problem"
    ]
    rules = {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}
    assert rules == {rule for rule, *_ in BAD} - {"subject"}
