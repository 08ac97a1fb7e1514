"""Whatever its user has set, the same pin ends in the same commit; and the user's own settings rule their checkout."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from test_checkout import assert_patched, patched_files
from world import ENGINE, KERNEL, SCRIPT, World, plain_git, snapshot

SETTINGS = """\
[user]
	name = Somebody Else
	email = else@else.invalid
	useConfigOnly = true
[diff]
	noprefix = true
	mnemonicPrefix = true
	algorithm = patience
	external = false
[core]
	autocrlf = true
	eol = crlf
	safecrlf = true
	hooksPath = {home}/hooks
	excludesFile = {home}/ignore
	attributesFile = {home}/attributes
	fsmonitor = false
	filemode = false
	ignorecase = true
	quotePath = false
	abbrev = 5
	pager = false
	editor = false
[commit]
	gpgSign = true
	template = {home}/none
	verbose = true
[gpg]
	program = false
[tag]
	gpgSign = true
[am]
	threeWay = true
	keepcr = true
[apply]
	whitespace = fix
	ignoreWhitespace = change
[init]
	templateDir = {home}/template
	defaultBranch = trunk
	defaultObjectFormat = sha256
[i18n]
	commitEncoding = latin1
	logOutputEncoding = latin1
[fastimport]
	unpackLimit = 1000000
[transfer]
	fsckObjects = true
[receive]
	denyDeletes = true
[status]
	showUntrackedFiles = no
	relativePaths = true
	branch = true
	short = true
[color]
	ui = always
[checkout]
	defaultRemote = origin
	guess = true
[advice]
	detachedHead = true
[push]
	autoSetupRemote = true
[gc]
	auto = 1
[alias]
	status = !false
	fast-import = !false
"""


def _configure(world: World) -> None:
    """All of it at once, as a global configuration."""
    home = world.root / "home"
    (home / ".gitconfig").write_text(SETTINGS.format(home=home), encoding="utf-8")
    (home / "ignore").write_text("*\n", encoding="utf-8")
    (home / "attributes").write_text("* text=auto eol=crlf ident filter=mine diff=mine\n", encoding="utf-8")
    hook = f"#!/bin/sh\ntouch {home}/ran\nexit 1\n"
    for folder in (home / "hooks", home / "template" / "hooks"):
        folder.mkdir(parents=True)
        for name in ("pre-commit", "post-checkout", "post-index-change", "reference-transaction", "applypatch-msg"):
            (folder / name).write_text(hook, encoding="utf-8")
            (folder / name).chmod(0o755)


def _untouched(world: World) -> None:
    """The recorded head, every byte as it should be, nobody's hook run, and a plain git that agrees."""
    assert world.head() == world.release().head
    for path in (ENGINE, KERNEL, SCRIPT):
        assert (world.tree() / path).read_bytes() == patched_files()[path]
    assert plain_git(world.tree(), "status", "--porcelain", "--ignored") == ""
    assert not (world.root / "home" / "ran").exists()


def test_a_users_git_configuration_changes_nothing(world: World) -> None:
    _configure(world)
    assert world.apply().status == 0
    _untouched(world)
    assert not (world.tree() / ".git" / "hooks").exists()
    assert world.apply().says("already patched")
    before = snapshot(world.patches)
    assert world.run("record").status == 0
    assert world.run("check").status == 0
    assert world.run("export", "--pin", "0.20.2", "--tree", world.tree()).status == 0
    assert snapshot(world.patches) == before


def test_the_configuration_would_change_something(world: World) -> None:
    """Or the test above could not fail."""
    _configure(world)
    env = {"PATH": world.env["PATH"], "HOME": str(world.root / "home")}
    folder = world.root / "plain"
    done = subprocess.run(["git", "init", str(folder)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert (folder / ".git" / "hooks" / "pre-commit").exists()
    done = subprocess.run(
        ["git", "-C", str(folder), "commit", "--allow-empty", "-m", "x"], env=env, capture_output=True, check=False
    )
    assert done.returncode != 0


# What scripts, CI systems and shells set.
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "ci": {"CI": "true", "GITHUB_ACTIONS": "true", "TERM": "dumb"},
    "git dir": {"GIT_DIR": "/nowhere/.git", "GIT_WORK_TREE": "/nowhere", "GIT_INDEX_FILE": "/nowhere/index"},
    "git objects": {"GIT_OBJECT_DIRECTORY": "/nowhere", "GIT_ALTERNATE_OBJECT_DIRECTORIES": "/nowhere"},
    "git namespace": {"GIT_NAMESPACE": "ns", "GIT_COMMON_DIR": "/nowhere", "GIT_PREFIX": "vllm/"},
    "git dates": {"GIT_AUTHOR_DATE": "2001-01-01T00:00:00+0100", "GIT_COMMITTER_DATE": "2001-01-01T00:00:00+0100"},
    "git people": {"GIT_AUTHOR_NAME": "x", "GIT_AUTHOR_EMAIL": "x", "GIT_COMMITTER_NAME": "x", "EMAIL": "x@x"},
    "git config": {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "core.autocrlf", "GIT_CONFIG_VALUE_0": "true"},
    "git config parameters": {"GIT_CONFIG_PARAMETERS": "'core.autocrlf'='true'"},
    "git config file": {"GIT_CONFIG": "/nowhere", "GIT_CONFIG_SYSTEM": "/nowhere"},
    "git options": {"GIT_DIFF_OPTS": "-u0", "GIT_EXTERNAL_DIFF": "false", "GIT_LITERAL_PATHSPECS": "1"},
    "git hash": {"GIT_DEFAULT_HASH": "sha256", "GIT_TEMPLATE_DIR": "/nowhere", "GIT_DEFAULT_REF_FORMAT": "reftable"},
    "git noise": {"GIT_TRACE": "1", "GIT_FLUSH": "0", "GIT_ADVICE": "1", "GIT_REDIRECT_STDERR": "off"},
    "git ceiling": {"GIT_CEILING_DIRECTORIES": "/", "GIT_DISCOVERY_ACROSS_FILESYSTEM": "0"},
    "locale": {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "LANGUAGE": "tr"},
    "c locale": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "time zone": {"TZ": "Asia/Kathmandu"},
    "time zone west": {"TZ": "XYZ+11:30"},
    "time": {"SOURCE_DATE_EPOCH": "1"},
    "columns": {"COLUMNS": "10", "LINES": "5", "NO_COLOR": "1", "FORCE_COLOR": "1"},
    "python": {"PYTHONHASHSEED": "7", "PYTHONOPTIMIZE": "2", "PYTHONDONTWRITEBYTECODE": "1"},
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_an_environment_changes_nothing(world: World, case: str) -> None:
    ran = world.apply(env=ENVIRONMENTS[case])
    assert ran.status == 0, ran
    assert ran.says(f"HEAD: {world.release().head}")
    _untouched(world)
    assert world.apply(env=ENVIRONMENTS[case]).says("already patched")


@pytest.mark.parametrize(
    "case", ["git dir", "git objects", "git namespace", "git dates", "git people", "locale", "time zone"]
)
def test_an_environment_does_not_lead_to_another_checkout(world: World, case: str) -> None:
    source = world.checkout()
    base = world.head(source)
    assert world.run("apply", "--src", source).status == 0
    expected = world.head(source)
    plain_git(source, "switch", "--quiet", "main")
    plain_git(source, "branch", "--quiet", "-D", "vllm-patches/0.20.2")
    assert world.run("apply", "--src", source, env=ENVIRONMENTS[case]).status == 0
    assert world.head(source) == expected
    assert_patched(source, base)


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_a_umask_changes_no_commit(world: World, mask: int) -> None:
    assert world.apply(umask=mask).status == 0
    _untouched(world)


def test_a_closed_standard_input(world: World) -> None:
    assert world.apply(stdin=None, close_fds=True).status == 0
    _untouched(world)


# --- line ends in a user's checkout


def _converting_checkout(world: World) -> tuple[Path, dict[str, str]]:
    """A checkout under core.autocrlf=true: LF in its commits, CRLF in its files; and its user's environment."""
    home = world.root / "home"
    (home / ".gitconfig").write_text(
        "[core]\n\tautocrlf = true\n[user]\n\tname = x\n\temail = x@x.invalid\n", encoding="utf-8"
    )
    env = {"PATH": world.env["PATH"], "HOME": str(home)}
    bare = world.checkout(name="upstream")
    source = world.root / "src"
    plain_git(world.root, "clone", "--quiet", str(bare), str(source), env=env)
    assert b"\r\n" in (source / ENGINE).read_bytes()
    return source, env


def test_a_checkout_whose_user_has_crlf_files(world: World) -> None:
    source, env = _converting_checkout(world)
    base = world.head(source)
    ran = world.run("apply", "--src", source)
    assert ran.status == 0, ran
    assert plain_git(source, "status", "--porcelain", env=env) == "", "clean for its user"
    for path in (ENGINE, KERNEL, SCRIPT):
        assert (source / path).read_bytes() == patched_files()[path].replace(b"\n", b"\r\n"), "as the user wants them"
    plain_git(source, "fsck", "--strict")
    assert plain_git(source, "rev-list", "--count", f"{base}..HEAD") == "3"
    assert world.run("apply", "--src", source).says("already patched")


def test_such_a_checkout_ends_in_the_commit_that_any_other_does(world: World) -> None:
    source, _ = _converting_checkout(world)
    plain = world.root / "upstream"
    assert world.run("apply", "--src", source).status == 0
    (world.root / "home" / ".gitconfig").unlink()
    assert world.run("apply", "--src", plain).status == 0
    assert world.head(source) == world.head(plain)


def test_such_a_checkout_with_a_change_is_dirty(world: World) -> None:
    source, env = _converting_checkout(world)
    (source / "README.md").write_bytes(b"mine\r\n")
    ran = world.run("apply", "--src", source)
    assert ran.status == 1
    assert ran.says("the checkout is not clean", "README.md")
    assert plain_git(source, "status", "--porcelain", env=env) == " M README.md"


def test_a_filter_of_the_users_own_is_used(world: World) -> None:
    """What switches the user's checkout is the user's own git: their filters, not ours."""
    source = world.checkout()
    (source / ".gitattributes").write_text("*.cu filter=upper\n", encoding="utf-8")
    world.commit(source, "attributes")
    home = world.root / "home"
    (home / ".gitconfig").write_text(
        '[filter "upper"]\n\tsmudge = tr a-z A-Z\n\tclean = tr A-Z a-z\n', encoding="utf-8"
    )
    env = {"PATH": world.env["PATH"], "HOME": str(home)}
    (source / KERNEL).unlink()
    plain_git(source, "checkout", "--quiet", KERNEL, env=env)
    assert b"INT LANE" in (source / KERNEL).read_bytes()
    assert world.run("apply", "--src", source).status == 0
    assert b"LONG LANE = 9\n" in (source / KERNEL).read_bytes()
    assert plain_git(source, "status", "--porcelain", env=env) == ""


def test_a_checkouts_own_hooks_are_not_run(world: World) -> None:
    source = world.checkout()
    hooks = source / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for name in ("post-checkout", "reference-transaction", "pre-commit"):
        (hooks / name).write_text(f"#!/bin/sh\ntouch {world.root}/ran\nexit 1\n", encoding="utf-8")
        (hooks / name).chmod(0o755)
    assert world.run("apply", "--src", source).status == 0
    assert not (world.root / "ran").exists()


# --- places


def test_a_home_that_is_not_there(world: World) -> None:
    assert world.apply(env={"HOME": "/nonexistent"}).status == 0
    _untouched(world)


def test_another_working_folder(world: World, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    assert world.apply(cwd=tmp_path / "elsewhere").status == 0
    _untouched(world)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_catalogue_elsewhere_is_only_read(world: World) -> None:
    before = snapshot(world.patches)
    for verb in ("apply", "check", "matrix"):
        assert world.run(verb).status == 0
    assert snapshot(world.patches) == before


def test_a_tree_can_be_moved(world: World) -> None:
    """Nothing in it knows where it was made."""
    assert world.apply().status == 0
    moved = shutil.move(world.build, world.root / "moved")
    ran = world.run("apply", "--build", moved)
    assert ran.says("already patched")


def test_a_release_of_another_day_is_another_commit(world: World) -> None:
    """The date in the table is part of what is pinned."""
    release = world.release()
    world.write_release(replace(release, date=release.date.replace(year=2025)))
    shutil.rmtree(world.cache / "vllm-patches" / "pristine-v1", ignore_errors=True)
    ran = world.apply()
    assert ran.status == 1
    assert ran.says("the series does not end in the recorded commit", f"expected: {release.head}")
