"""The command line itself: usage, exit status, standard output and error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_patches import __version__
from world import World

VERBS = ("apply", "check", "matrix", "export", "record")


def test_the_version(world: World) -> None:
    assert world.run("--version").out == f"vllm-patches {__version__}\n"


def test_help_names_every_verb(world: World) -> None:
    ran = world.run("--help")
    assert ran.status == 0
    assert ran.says(*VERBS)


@pytest.mark.parametrize("arguments", [[], ["aply"], ["apply", "--pim", "x"], ["export"], ["check", "0.20.2"]])
def test_wrong_usage_is_status_2(world: World, arguments: list[str]) -> None:
    ran = world.run(*arguments)
    assert ran.status == 2
    assert ran.err.startswith("usage: vllm-patches")
    assert not world.build.exists()


def test_an_error_as_json(world: World) -> None:
    ran = world.run("apply", "--pin", "9.9.9", "--json")
    error = json.loads(ran.out)["error"]
    assert (ran.status, error["what"], error["release"]) == (1, "unknown release", "9.9.9")
    assert ran.err.startswith("error: unknown release\n")


def test_progress_stays_out_of_the_json(world: World) -> None:
    ran = world.apply("--json")
    assert json.loads(ran.out)[0]["tree"] == str(world.tree())
    assert "making" in ran.err


def test_the_matrix_as_json(world: World) -> None:
    rows = json.loads(world.run("matrix", "--json").out)
    assert [row["version"] for row in rows] == list(world.catalog.releases)
    assert rows[0]["states"]["0001"] == {"state": "live", "evidence": "vllm/engine.py:1", "note": ""}


def test_a_catalogue_that_is_not_there(world: World) -> None:
    ran = world.run("apply", env={"VLLM_PATCHES_DIR": "/nowhere"})
    assert ran.status == 1
    assert ran.says("error: cannot read a table", "file:     /nowhere/releases.toml", "next:")


@pytest.mark.parametrize("json_too", [[], ["--json"]])
def test_an_error_of_the_system_names_the_file(world: World, json_too: list[str]) -> None:
    """Nobody has thought of it: still no traceback, and JSON where it was asked for."""
    world.build.write_text("a file where the folder should be", encoding="utf-8")
    ran = world.apply(*json_too)
    assert ran.status == 1
    assert ran.says("error: ", "File exists", str(world.build), "next:     ls -ld ")
    assert not json_too or "File exists" in json.loads(ran.out)["error"]["what"]


def test_a_reader_that_goes_away(world: World) -> None:
    """`vllm-patches matrix | head -1`: no traceback, no noise."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        ran = world.run("matrix", stdout=closed)
    assert (ran.status, ran.err) == (1, "")


@pytest.mark.parametrize("verb", ["matrix", "check"])
def test_a_full_disk_under_standard_output(world: World, verb: str) -> None:
    """What could not be told was not done well: a script must not take it for a success."""
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        ran = world.run(verb, stdout=full)
    assert ran.status == 1
    assert ran.err.startswith("error: [Errno 28] No space left on device")
    assert "Exception ignored" not in ran.err


def test_the_package_runs_without_the_library_of_the_network(world: World, tmp_path: Path) -> None:
    """pypi-simple is needed only where something is fetched, and then its absence is named."""
    (tmp_path / "pypi_simple.py").write_text("raise ImportError('no such library')", encoding="utf-8")
    hidden = {"PYTHONPATH": f"{tmp_path}:{world.env['PYTHONPATH']}"}
    assert world.apply(env=hidden).status == 0
    assert world.run("check", env=hidden).status == 0
    env = hidden | {
        "XDG_CACHE_HOME": str(tmp_path / "empty"),
        "PIP_NO_INDEX": "0",
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
    }
    ran = world.apply("--pin", "0.21.0", env=env)
    assert ran.status == 1
    assert ran.says("the library that talks to the package index is missing", "expected: pypi-simple", "SDIST=FILE")


def test_strict_makes_an_offset_a_failure(world: World) -> None:
    source = world.checkout()
    path = source / "vllm/engine.py"
    path.write_bytes(b"# moved\n" + path.read_bytes())
    assert world.run("check", "--tree", source).status == 0
    ran = world.run("check", "--tree", source, "--strict", "--json")
    assert ran.status == 1
    assert json.loads(ran.out)["patches"][0]["fit"] == "applies at an offset"


def test_a_conflict_is_status_1(world: World) -> None:
    source = world.checkout()
    (source / "vllm/engine.py").write_bytes(b"other\n")
    ran = world.run("check", "--tree", source, "--pin", "0.20.2")
    assert ran.status == 1
    assert ran.says("conflict")


def test_one_tree_is_held_against_one_pin(world: World) -> None:
    ran = world.run("check", "--tree", world.checkout(), "--pin", "0.20.2", "--pin", "0.21.0")
    assert ran.status == 1
    assert ran.says("--tree needs", "expected: one --pin, or none", "found:    0.20.2, 0.21.0", "next:")


@pytest.mark.parametrize("options", [["--tree", "src"], ["--src", "src"]])
def test_an_sdist_is_of_no_use_to_a_checkout(world: World, options: list[str]) -> None:
    """It would be passed over in silence."""
    world.checkout()
    verb = "check" if "--tree" in options else "apply"
    ran = world.run(verb, *options, "--pin", "0.20.2", "--sdist", world.sdist())
    assert ran.status == 1
    assert ran.says("--sdist is of no use with", str(world.sdist()), "next:")


def test_the_installed_command_is_the_same(world: World) -> None:
    code = "import sys; from vllm_patches.cli import main; sys.argv[0] = 'vllm-patches'; sys.exit(main(['--version']))"
    done = subprocess.run([sys.executable, "-c", code], env=world.env, capture_output=True, text=True, check=True)
    assert done.stdout == f"vllm-patches {__version__}\n"
