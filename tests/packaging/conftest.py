"""Real packaging tools on the real sdist. `make test-packaging` sets PACKAGING; `make test` does not run these."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from packkit import PIN, Assets, dist, run
from vllm_patches.series.catalog import open_catalog
from vllm_patches.sources.index import fetch_sdist

if not os.environ.get("PACKAGING"):
    collect_ignore_glob = ["test_*.py"]
elif os.environ["PACKAGING"] == "quick":
    collect_ignore = ["test_lintian.py"]  # 127 packages to install


@pytest.fixture(scope="session")
def sdist() -> Path:
    """The real sdist of 0.20.2."""
    return fetch_sdist(open_catalog().release(PIN))


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """All channels of 0.20.2; never changed by a test."""
    return Assets(dist(tmp_path_factory.mktemp("dist") / "out", "--pin", PIN))


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory, sdist: Path) -> Path:
    """The unpacked sdist; tests work on copies."""
    folder = tmp_path_factory.mktemp("pristine")
    run(f"tar xzf {sdist}", folder)
    return folder / f"vllm-{PIN}"


@pytest.fixture(scope="session")
def touched(assets: Assets, pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The touched files alone, in a git repository with the branch pristine: enough for most tools, and quick."""
    folder = tmp_path_factory.mktemp("touched") / f"vllm-{PIN}"
    for path in [*assets.promised, "LICENSE"]:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(pristine / path, folder / path)
    run(
        "git init --quiet --initial-branch=main && git add -A"
        " && git -c user.name=a -c user.email=a@a.invalid commit --quiet -m pristine && git branch pristine",
        folder,
    )
    return folder
