"""Every test gets a copy of one small world, and an environment in which nothing of the machine's user counts."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from world import World, make_template


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For what runs in this process: no git, pip or proxy setting of the machine, and folders of the test's own."""
    for name in list(os.environ):
        if name.startswith(("GIT_", "PIP_", "VLLM_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_PATCHES_DIR", str(tmp_path / "world" / "project" / "patches"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that other users reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(autouse=True, scope="session")
def _signals() -> Iterator[None]:
    """A shell that starts the tests in the background ignores SIGINT for them; their children must not inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world, made once; never changed by a test."""
    return make_template(tmp_path_factory.mktemp("template") / "world")


@pytest.fixture
def world(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """This test's own world; code in this process sees the same cache as the command lines do."""
    made = World.copy_of(template, tmp_path / "world")
    monkeypatch.setenv("XDG_CACHE_HOME", str(made.cache))
    return made
