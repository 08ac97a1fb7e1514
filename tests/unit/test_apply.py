"""`apply` on a release, through the command line: what it makes, and that a refusal changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_sdist import UNSAFE, _file, _tar
from world import ENGINE, PINS, Ran, World, plain_env, plain_git, scratch_left, snapshot, write_gzip


def files_of(folder: Path) -> dict[str, str]:
    """Every file below *folder*, but for what an error may leave: folders, the lock, and the sdist's own objects."""
    kept = snapshot(folder, skip=("build/.lock", "cache/vllm-patches/pristine-v1/"))
    return {name: kind for name, kind in kept.items() if not kind.startswith("4")}


@contextlib.contextmanager
def unchanged(world: World) -> Iterator[None]:
    """Nothing in the whole world changes: catalogue, cache, build folder, home."""
    before = files_of(world.root)
    yield
    assert files_of(world.root) == before
    assert scratch_left(world.root) == []


def refused(world: World, *arguments: object, says: tuple[str, ...], **options: object) -> Ran:
    """`apply` fails, says these parts and the next command, and leaves everything as it was."""
    with unchanged(world):
        ran = world.apply(*arguments, **options)  # type: ignore[arg-type]
    assert ran.status == 1, ran
    assert ran.says("error: ", "\n  next:     ", *says)
    assert ran.out == ""
    return ran


def next_command(ran: Ran) -> str:
    return ran.err.rsplit("\n  next:     ", 1)[1].strip()


def edit(path: Path, old: str, new: str) -> None:
    data = path.read_bytes()
    assert old.encode() in data
    path.write_bytes(data.replace(old.encode(), new.encode(), 1))


# --- what it makes


def test_the_default_pin(world: World) -> None:
    ran = world.apply()
    assert ran.status == 0
    assert ran.says(
        "vLLM 0.20.2: applied", f"tree: {world.tree()}", f"HEAD: {world.release().head}", "the recorded one"
    )
    assert world.head() == world.release().head
    assert scratch_left(world.root) == []
    assert sorted(path.name for path in world.build.iterdir()) == [".lock", "vllm-0.20.2"]


@pytest.mark.parametrize("version", PINS)
def test_every_pin_ends_in_its_recorded_head(world: World, version: str) -> None:
    ran = world.apply("--pin", version, "--json")
    result = json.loads(ran.out)[0]
    assert (result["release"], result["outcome"], result["head"]) == (version, "applied", world.release(version).head)
    assert world.head(world.tree(version)) == world.release(version).head


def test_the_table_of_five(world: World) -> None:
    rows = [line.split("  ") for line in world.apply().out.splitlines()[2:7]]
    assert [row[0] for row in rows] == ["0001", "0002", "0003", "0004", "0005"]
    assert "was latent (vllm/engine.py:3)" in " ".join(rows[2])


def test_all_pins(world: World) -> None:
    ran = world.apply("--pin", "all", "--json")
    assert [(row["release"], row["outcome"]) for row in json.loads(ran.out)] == [
        ("0.19.0", "no series"),
        ("0.20.1", "applied"),
        ("0.20.2", "applied"),
        ("0.21.0", "applied"),
        ("0.22.0", "no series"),
    ]
    assert {world.head(world.tree(version)) for version in PINS} == {world.release(version).head for version in PINS}


def test_an_sdist_given_by_hand(world: World) -> None:
    sdist = world.sdist().rename(world.root / "mine.tar.gz")
    shutil.rmtree(world.cache)
    assert world.apply("--sdist", sdist).status == 0
    assert world.head() == world.release().head


def test_a_build_folder_below_the_current_one(world: World) -> None:
    assert world.run("apply", cwd=world.root).status == 0
    assert world.head(world.root / "build" / "src" / "vllm-0.20.2") == world.release().head


def test_a_head_that_is_not_recorded_yet_is_said(world: World) -> None:
    world.write_release(replace(world.release(), head=""))
    assert world.apply().says("HEAD is not recorded yet (make record)")


# --- releases and series


@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_an_unknown_pin_names_the_nearest(world: World, json_too: list[str]) -> None:
    with unchanged(world):
        ran = world.apply("--pin", "0.20.3", *json_too)
    assert ran.status == 1
    assert ran.says("error: unknown release", "release:  0.20.3", "nearest: 0.20.2", "next:     make apply PIN=0.20.2")
    assert not json_too or json.loads(ran.out)["error"]["found"].startswith("0.20.3; nearest")


def test_nothing_to_apply_says_why_for_each_of_the_five(world: World) -> None:
    with unchanged(world):
        ran = world.apply("--pin", "0.22.0")
    assert ran.status == 0
    assert ran.out.splitlines()[0] == "vLLM 0.22.0: nothing to do"
    rows = [line.split() for line in ran.out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["0001", "0002", "0003", "0004", "0005"]
    assert ran.out.count("fixed upstream") == 3
    assert ran.says("absent in this release", "removed with the old runner", "broken upstream", "(vllm/engine.py:5)")
    assert not world.build.exists()


def test_a_release_that_has_no_series_yet(world: World) -> None:
    ran = refused(world, "--pin", "0.19.0", says=("there is no series for this release yet", "release:  0.19.0"))
    assert ran.says("it needs 0001, 0002, 0003, 0004", "0.20.1, 0.20.2, 0.21.0", "0005 absent in this release")
    assert ran.says("0001 not patched: live", "make apply PIN=0.21.0")


def test_a_series_without_patches_is_no_success(world: World) -> None:
    """Its release says that it has a series: an empty file is damage, not a release that needs nothing."""
    (world.patches / "v0.20.2" / "series").write_text("# nothing\n", encoding="utf-8")
    refused(world, says=("the series is empty", "release:  0.20.2", "0001, 0003, 0005"))


@pytest.mark.parametrize("name", ["series", "0003-mla-flat-buffer.patch"])
def test_a_missing_file_of_the_series(world: World, name: str) -> None:
    (world.patches / "v0.20.2" / name).unlink()
    refused(world, says=("cannot read", name, "git checkout -- "))


def test_a_patch_left_out_of_the_series_is_missed(world: World) -> None:
    edit(world.patches / "v0.20.2" / "series", "0005-mrv2-wake-up.patch\n", "")
    refused(world, says=("the series does not end in the recorded commit", f"expected: {world.release().head}"))


# the edit of 0003, and what is said of it besides release and patch
EDITS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "context line": (
        " int lane = 28\n",
        " int lane = 2.8\n",
        ("hunk:     2", "line 28: int lane = 2.8", "line 28: int lane = 28"),
    ),
    "added line": ("+long lane = 9\n", "+short lane = 9\n", ("the blob after the patch", "expected: 56cea534")),
    "line numbers": ("@@ -27,7 +27,6 @@", "@@ -28,7 +28,6 @@", ("hunk:     2", "line 28: int lane = 27", "offset 0")),
    "path": ("vllm/engine.py b/vllm/engine.py", "vllm/motor.py b/vllm/motor.py", ("--- a/vllm/motor.py",)),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_patch_edited_by_hand(world: World, case: str) -> None:
    old, new, says = EDITS[case]
    edit(world.patch("0003"), old, new)
    refused(world, says=("patch:    0003-mla-flat-buffer.patch", "expected: ", "found:    ", *says))


def test_a_patch_to_a_file_that_is_not_there(world: World) -> None:
    path = world.patch("0003")
    path.write_bytes(path.read_bytes().replace(b"vllm/engine.py", b"vllm/motor.py"))
    refused(world, says=("file:     vllm/motor.py", "a file that the tree does not have", "release:  0.20.2"))


def test_only_the_message_edited_by_hand(world: World) -> None:
    edit(world.patch("0003"), "Why: because", "Why: only because")
    ran = refused(world, says=("the series does not end in the recorded commit", "git diff patches/", "make record"))
    assert f"expected: {world.release().head}" in ran.err


def test_a_patch_with_crlf(world: World) -> None:
    path = world.patch("0003")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    refused(world, says=("malformed patch", "expected: LF line ends", "a carriage return"))


def test_a_date_that_is_none(world: World) -> None:
    edit(world.patch("0003"), "Date: Sat, 21 Nov 2026", "Date: some day")
    refused(world, says=("malformed patch", "found:    some day"))


# --- sdists


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])


SDIST_DAMAGE = [(_truncate, "the sdist is truncated"), (_flip, "the sdist is not the recorded file")]


@pytest.mark.parametrize("cache", ["cold", "hot"])
@pytest.mark.parametrize(("damage", "what"), SDIST_DAMAGE)
def test_a_damaged_sdist_given_by_hand(world: World, damage: Callable[[Path], None], what: str, cache: str) -> None:
    if cache == "hot":
        assert world.apply().status == 0
        shutil.rmtree(world.tree())
    damage(world.sdist())
    refused(
        world, "--sdist", world.sdist(), says=(what, f"file:     {world.sdist()}", world.release().sha256, "SDIST=FILE")
    )


@pytest.mark.parametrize("cache", ["cold", "hot"])
def test_a_missing_sdist_given_by_hand(world: World, cache: str) -> None:
    if cache == "hot":
        assert world.apply().status == 0
        shutil.rmtree(world.tree())
    refused(world, "--sdist", world.root / "none", says=("cannot read the sdist: No such file", f"ls -l {world.root}"))


@pytest.mark.parametrize("damage", [_truncate, _flip])
def test_a_damaged_sdist_in_the_cache_is_not_used(world: World, damage: Callable[[Path], None]) -> None:
    """Nothing offers another (test_index.py has the index that does), so this is an error about the index."""
    damage(next(world.cache.rglob("vllm-0.20.2.tar.gz")))
    refused(world, says=("no configured package index offers the sdist", "vllm-0.20.2.tar.gz"))


def _record_as(world: World, sdist: Path) -> None:
    """Let the table say that *sdist* is the release's: the hash is right, the content is bad."""
    data = sdist.read_bytes()
    world.write_release(replace(world.release(), sha256=hashlib.sha256(data).hexdigest(), size=len(data)))


@pytest.mark.parametrize("case", UNSAFE)
def test_a_member_that_leaves_the_tree(world: World, case: str) -> None:
    name, change, why = UNSAFE[case]
    _record_as(world, write_gzip(world.sdist(), _tar(("vllm-0.20.2/sound", _file), (name, change))))
    refused(world, "--sdist", world.sdist(), says=("must not be extracted", f"file:     {name}", why))
    assert not (world.root / "x").exists()
    assert not (world.build / "x").exists()


@pytest.mark.parametrize("content", [b"", b"not gzip", b"\x1f\x8b\x08\x00", None])
def test_an_sdist_that_is_no_tar(world: World, content: bytes | None) -> None:
    """Recorded like that (by a hand's mistake), so its hash says nothing."""
    if content is None:
        write_gzip(world.sdist(), b"not a tar" * 100)
    else:
        world.sdist().write_bytes(content)
    _record_as(world, world.sdist())
    refused(world, "--sdist", world.sdist(), says=("the sdist is not a .tar.gz", "release:  0.20.2"))


def test_one_sdist_cannot_serve_all_pins(world: World) -> None:
    refused(world, "--pin", "all", "--sdist", world.sdist(), says=("--sdist needs the one release", "found:    all"))


# --- what stands at the target


def test_an_already_patched_tree(world: World) -> None:
    assert world.apply().status == 0
    before = snapshot(world.build)
    ran = world.apply()
    assert ran.status == 0
    assert ran.says("vLLM 0.20.2: already patched", "nothing was changed", f"HEAD: {world.release().head}")
    assert snapshot(world.build) == before


def test_an_already_patched_tree_needs_no_sdist(world: World) -> None:
    assert world.apply().status == 0
    shutil.rmtree(world.cache)
    assert world.apply().says("already patched")


def _folder(target: Path) -> None:
    target.mkdir(parents=True)
    (target / "mine").write_text("mine", encoding="utf-8")


def _plain_file(target: Path) -> None:
    target.parent.mkdir(parents=True)
    target.write_text("mine", encoding="utf-8")


def _repository(target: Path) -> None:
    _folder(target)
    plain_git(target, "init", "--quiet")
    plain_git(target, "add", "mine")
    plain_git(target, "commit", "--quiet", "-m", "mine")


def _dangling_link(target: Path) -> None:
    target.parent.mkdir(parents=True)
    target.symlink_to("nowhere")


@pytest.mark.parametrize("make", [_folder, _plain_file, _repository, _dangling_link, Path.mkdir])
def test_something_foreign_at_the_target(world: World, make: Callable[[Path], None]) -> None:
    if make is Path.mkdir:
        world.build.mkdir()
    make(world.tree())
    ran = refused(world, says=("the target exists and is not an untouched tree of ours", f"file:     {world.tree()}"))
    assert ran.says("a folder that apply did not make", f"mv {world.tree()} {world.tree()}.mine")


@pytest.mark.parametrize("record", ["", "[]", "{}", '"text"', "\xff"])
def test_a_tree_whose_record_is_damaged_is_not_ours(world: World, record: str) -> None:
    assert world.apply().status == 0
    (world.tree() / ".git" / "vllm-patches.json").write_text(record, encoding="latin-1")
    refused(world, says=("the target exists and is not an untouched tree of ours",))


def test_a_changed_file_of_the_tree(world: World) -> None:
    assert world.apply().status == 0
    (world.tree() / ENGINE).write_text("mine", encoding="utf-8")
    refused(world, says=(f"found:     M {ENGINE}", "expected: no changes", f"mv {world.tree()}"))


def test_a_partly_patched_tree_is_mended_by_the_command_that_is_told(world: World) -> None:
    assert world.apply().status == 0
    plain_git(world.tree(), "reset", "--quiet", "--hard", "HEAD~2")
    ran = refused(world, says=("partly patched: without 0003-mla-flat-buffer.patch, 0005-mrv2-wake-up.patch",))
    subprocess.run(shlex.split(next_command(ran)), check=True, env=plain_env(), capture_output=True)
    assert world.apply().says("already patched")


def test_a_tree_on_its_pristine_branch_is_mended_without_moving_that(world: World) -> None:
    """A reset there would move `pristine`, and the next export would find no commit to write."""
    assert world.apply().status == 0
    pristine = plain_git(world.tree(), "rev-parse", "pristine")
    plain_git(world.tree(), "switch", "--quiet", "pristine")
    ran = refused(world, says=("partly patched: without 0001-dsa-mtp-ima.patch, 0003",))
    subprocess.run(shlex.split(next_command(ran)), check=True, env=plain_env(), capture_output=True)
    assert plain_git(world.tree(), "rev-parse", "pristine") == pristine
    assert world.apply().says("already patched")


def test_a_commit_of_the_users_own(world: World) -> None:
    assert world.apply().status == 0
    (world.tree() / "mine").touch()
    world.commit(world.tree(), "mine")
    mine = world.head()
    ran = refused(world, says=(f"found:    another commit: {mine}", f"expected: {world.release().head}"))
    assert next_command(ran) == f"mv {world.tree()} {world.tree()}.mine"


def test_a_commit_on_a_branch_of_the_users_own(world: World) -> None:
    assert world.apply().status == 0
    plain_git(world.tree(), "switch", "--quiet", "--create", "mine")
    (world.tree() / "mine").touch()
    world.commit(world.tree(), "mine")
    ran = refused(world, says=("another commit: ",))
    subprocess.run(shlex.split(next_command(ran)), check=True, env=plain_env(), capture_output=True)
    assert world.apply().says("already patched")
    assert plain_git(world.tree(), "log", "-1", "--format=%s", "mine") == "mine"


def test_what_a_build_leaves_in_the_tree_is_no_change(world: World) -> None:
    assert world.apply().status == 0
    for name in ("built.so", "new.py"):
        (world.tree() / name).touch()
    before = snapshot(world.build)
    assert world.apply().says("already patched")
    assert snapshot(world.build) == before


# --- the series changes


def _change_series(world: World) -> str:
    """Another message in 0005; returns the new head, once recorded."""
    edit(world.patch("0005"), "Why: because", "Why: only because")
    assert world.run("record").status == 0
    return world.release().head


def test_an_untouched_tree_follows_the_series(world: World) -> None:
    assert world.apply().status == 0
    old, new = world.head(), _change_series(world)
    ran = world.apply()
    assert ran.says("vLLM 0.20.2: applied", f"HEAD: {new}")
    assert (world.head(), old != new) == (new, True)
    assert scratch_left(world.root) == []
    assert sorted(path.name for path in world.build.iterdir()) == [".lock", "vllm-0.20.2"]


@pytest.mark.parametrize("name", ["built.so", "new.py"])
def test_a_tree_with_build_results_is_not_replaced(world: World, name: str) -> None:
    """One of them is hidden by .gitignore; neither may be lost."""
    assert world.apply().status == 0
    (world.tree() / name).write_text("an hour's work", encoding="utf-8")
    _change_series(world)
    ran = refused(world, says=("only files of the old series' tree", name))
    assert next_command(ran).startswith(f"mv {world.tree()} {world.tree()}.mine")


def test_a_series_that_does_not_apply_leaves_the_old_tree(world: World) -> None:
    assert world.apply().status == 0
    edit(world.patch("0005"), " echo run", " echo walk")
    refused(world, says=("patch:    0005-mrv2-wake-up.patch", "hunk:     1"))
    assert world.head() == world.release().head


# --- the build folder


@pytest.mark.parametrize("ignored", [True, False])
def test_a_build_folder_inside_another_repository(world: World, ignored: bool) -> None:
    outer = world.root / "outer"
    outer.mkdir()
    (outer / ".gitignore").write_text("/build/\n" if ignored else "\n", encoding="utf-8")
    plain_git(outer, "init", "--quiet")
    world.commit(outer, "outer")
    before = snapshot(outer)
    for expected in ("applied", "already patched"):
        ran = world.run("apply", "--build", "build/src", cwd=outer)
        assert ran.says(f"vLLM 0.20.2: {expected}")
    after = {name: kind for name, kind in snapshot(outer).items() if not name.startswith("build")}
    assert after == before
    assert world.head(outer / "build/src/vllm-0.20.2") == world.release().head
    assert plain_git(outer, "status", "--porcelain") == ("" if ignored else "?? build/")


def test_a_build_folder_that_is_a_file(world: World) -> None:
    world.build.write_text("mine", encoding="utf-8")
    refused(world, says=(str(world.build),))


def test_a_build_folder_with_blanks_and_accents(world: World) -> None:
    build = world.root / "my b\u00fcilds"
    assert world.run("apply", "--build", build).status == 0
    assert world.head(build / "vllm-0.20.2") == world.release().head


# --- what a killed run has left


def _left_behind(world: World) -> Path:
    left = world.build / ".vllm-0.20.2.making-abc"
    (left / "tree" / ".git").mkdir(parents=True)
    (left / "tree" / "half").touch()
    return left


def test_a_scratch_folder_is_swept(world: World) -> None:
    left = _left_behind(world)
    assert world.apply().says("vLLM 0.20.2: applied")
    assert not left.exists()


def test_a_tree_that_was_moved_aside_is_put_back(world: World) -> None:
    """Killed between the two renames: the old tree is in the scratch folder, and nothing at its place."""
    assert world.apply().status == 0
    left = _left_behind(world)
    before = snapshot(world.tree())
    world.tree().rename(left / "replaced")
    assert world.apply().says("already patched")
    assert snapshot(world.tree()) == before
    assert not left.exists()


def test_a_tree_that_was_already_replaced_is_not_put_back(world: World) -> None:
    assert world.apply().status == 0
    left = _left_behind(world)
    shutil.copytree(world.tree(), left / "replaced")
    (left / "replaced" / "old").touch()
    assert world.apply().says("already patched")
    assert not (world.tree() / "old").exists()
    assert not left.exists()


def test_other_folders_in_the_build_folder_are_left_alone(world: World) -> None:
    for name in ("vllm-0.20.2.mine", ".vllm-mine", "other"):
        (world.build / name).mkdir(parents=True)
    assert world.apply().status == 0
    assert {"vllm-0.20.2.mine", ".vllm-mine", "other"} < {path.name for path in world.build.iterdir()}
