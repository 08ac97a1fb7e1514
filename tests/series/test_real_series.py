"""The committed series against the tools that other people use: git am, quilt, patch(1), and git format-patch.

On scratch copies of just the touched files of each pinned release. Each tool has to take the whole series at its
stated lines, without offset or fuzz, and to end in the very blobs that the patches promise.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from vllm_patches.series.catalog import open_catalog, patches_dir
from vllm_patches.series.hunks import blob_id
from vllm_patches.series.model import Release, Series
from vllm_patches.sources.index import fetch_sdist
from vllm_patches.sources.store import pristine_files
from vllm_patches.trees import git

CATALOG = open_catalog()
PINS = CATALOG.pins if (patches_dir() / "releases.toml").is_file() else ()
EACH_PIN = pytest.mark.parametrize("release", PINS, ids=lambda release: release.version)

# In the tools' own words only: a patch's prose, which some of them print, may speak of offsets too.
INEXACT = re.compile(r"\(offset -?\d+ line|with fuzz \d|3-way merge|adds? whitespace error|Reversed \(or previously")


def test_there_is_a_series() -> None:
    """Without one the tests below would be none, and nobody would miss them."""
    assert PINS, f"no release in {patches_dir() / 'releases.toml'} has a series"


class Scratch:
    """The touched files of one release, pristine, and its patches."""

    def __init__(self, release: Release, folder: Path) -> None:
        self.release, self.folder = release, folder
        self.series: Series = CATALOG.series_of(release)
        contents = pristine_files([release], fetch_sdist)
        self.pristine = {path: contents[release.blobs[path]] for path in self.series.paths}
        for path, data in self.pristine.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)

    @property
    def patches(self) -> list[Path]:
        return [CATALOG.folder / self.series.name / patch.name for patch in self.series.patches]

    @property
    def promised(self) -> dict[str, str]:
        return {path: self.series.blob_chain(path)[-1] for path in self.series.paths}

    def blobs(self) -> dict[str, str]:
        """What is on disk now."""
        return {path: blob_id((self.folder / path).read_bytes()) for path in self.series.paths}

    def is_pristine(self) -> bool:
        return all((self.folder / path).read_bytes() == data for path, data in self.pristine.items())

    def run(self, *command: str, **env: str) -> str:
        """A command of a plain user, which must succeed and must not speak of offset or fuzz."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={"PATH": os.environ["PATH"], "HOME": str(self.folder), "LC_ALL": "C", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        assert not INEXACT.search(done.stdout), done.stdout
        return done.stdout

    def commit_pristine(self) -> None:
        """A repository of a plain user's own with the files as its one commit."""
        self.run("git", "init", "--quiet")
        self.run("git", "config", "user.name", "A User")
        self.run("git", "config", "user.email", "user@user.invalid")
        self.run("git", "add", "-A", "-f")
        self.run("git", "commit", "--quiet", "-m", "pristine")


@pytest.fixture
def scratch(release: Release, tmp_path: Path) -> Scratch:
    folder = tmp_path / "tree"
    folder.mkdir()
    return Scratch(release, folder)


def _need(tool: str) -> None:
    """A missing tool is a failure: with a skip nobody would notice that the series is not tried."""
    if not shutil.which(tool):
        pytest.fail(f"{tool} is not installed; to try the series with it: apt-get install {tool}")


@EACH_PIN
def test_git_am(scratch: Scratch) -> None:
    scratch.commit_pristine()
    scratch.run("git", "am", *map(str, scratch.patches))
    assert scratch.blobs() == scratch.promised
    assert scratch.run("git", "status", "--porcelain") == ""
    subjects = scratch.run("git", "log", "--reverse", "--format=%s", "HEAD~" + str(len(scratch.patches)) + "..")
    assert subjects.splitlines() == [patch.subject for patch in scratch.series.patches]


@EACH_PIN
def test_git_apply_tells_no_offset(scratch: Scratch) -> None:
    """`git am` takes an offset in silence; `git apply --verbose` tells of it."""
    scratch.commit_pristine()
    for path in scratch.patches:
        scratch.run("git", "apply", "--verbose", "--whitespace=error-all", "--index", str(path))
    assert scratch.blobs() == scratch.promised


@EACH_PIN
def test_every_patch_leaves_the_blobs_that_it_promises(scratch: Scratch) -> None:
    scratch.commit_pristine()
    for patch, path in zip(scratch.series.patches, scratch.patches, strict=True):
        scratch.run("git", "am", str(path))
        for file in patch.files:
            assert blob_id((scratch.folder / file.path).read_bytes()) == file.new_blob


@EACH_PIN
def test_quilt(scratch: Scratch) -> None:
    _need("quilt")
    shutil.copytree(CATALOG.folder / scratch.series.name, scratch.folder / "patches")
    scratch.run("quilt", "--quiltrc", "-", "push", "-a", "--fuzz=0")
    assert scratch.blobs() == scratch.promised
    applied = scratch.run("quilt", "--quiltrc", "-", "applied").split()
    assert [Path(name).name for name in applied] == [patch.name for patch in scratch.series.patches]
    scratch.run("quilt", "--quiltrc", "-", "pop", "-a")
    assert scratch.is_pristine()


@EACH_PIN
def test_patch(scratch: Scratch) -> None:
    _need("patch")
    for path in scratch.patches:
        scratch.run("patch", "-p1", "-F0", "--input", str(path))
    assert scratch.blobs() == scratch.promised
    for path in reversed(scratch.patches):
        scratch.run("patch", "-p1", "-F0", "--reverse", "--input", str(path))
    assert scratch.is_pristine()
    assert list(scratch.folder.rglob("*.orig")) == [], "patch keeps one where a hunk did not fit exactly"


@EACH_PIN
def test_format_patch_gives_the_very_files(scratch: Scratch) -> None:
    scratch.commit_pristine()
    scratch.run("git", "am", *map(str, scratch.patches))
    commits = scratch.run("git", "rev-list", "--reverse", f"HEAD~{len(scratch.patches)}..").split()
    for commit, path in zip(commits, scratch.patches, strict=True):
        assert git.format_patch(scratch.folder, commit) == path.read_bytes(), path


@EACH_PIN
def test_our_own_applier_agrees(scratch: Scratch) -> None:
    """The committed blobs of the release are those that the patches start from."""
    for path in scratch.series.paths:
        assert scratch.series.blob_chain(path)[0] == scratch.release.blobs[path], path
