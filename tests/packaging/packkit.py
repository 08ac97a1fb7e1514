"""What the packaging tests share: commands of a plain user, and the output of one `dist` with what it promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vllm_patches.series.hunks import blob_id

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "packaging"
RECIPES = HERE / "recipes"
PIN = "0.20.2"
TOP = "vllm-patches-0.1.0"

# In the tools' own words: a hunk that was taken elsewhere than at its stated line, or with fuzz.
INEXACT = re.compile(r"\(offset -?\d+ line|with fuzz \d|Reversed \(or previously")


def need(*tools: str) -> None:
    """A missing tool is a failure: with a skip nobody would notice that it is not tried."""
    if missing := [tool for tool in tools if not shutil.which(tool)]:
        pytest.fail(f"not installed: {', '.join(missing)}; see ci/system-packages-packaging.txt")


def run(command: str, cwd: Path, env: Mapping[str, str] | None = None, user: int | None = None) -> str:
    """A command line of bash, which must succeed and must not speak of offset or fuzz; what it printed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env={**plain_environment(cwd), **(env or {})},
        user=user,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    assert not INEXACT.search(done.stdout), done.stdout
    return done.stdout


def plain_environment(home: Path) -> dict[str, str]:
    """What the tools see: the machine's PATH with our Python first, and nothing else of its user's."""
    path = os.pathsep.join([str(HERE / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "XDG_CACHE_HOME"))}
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return {**kept, "PATH": path, "HOME": str(home), "LC_ALL": "C.UTF-8", "XDG_CACHE_HOME": cache}


def own_environment() -> dict[str, str]:
    """What our own command and make see besides: all that says how the index is reached, and where proof trees are."""
    names = ("HOME", "XDG_CONFIG_HOME")
    prefixes = ("PIP_", "SSL_", "REQUESTS_", "VLLM_PATCHES_")
    return {
        key: value
        for key, value in os.environ.items()
        if key in names or key.startswith(prefixes) or key.lower().endswith("_proxy")
    }


@dataclass(frozen=True)
class Assets:
    """The output of one `dist` for 0.20.2: *top* is the folder it made, *folder* that of the release."""

    top: Path

    @property
    def folder(self) -> Path:
        return self.top / PIN

    @property
    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        return found

    @property
    def promised(self) -> dict[str, str]:
        """Path to git blob id, of every touched file after the patches."""
        return {path: record["after"]["blob"] for path, record in self.manifest["files"].items()}

    def check(self, tree: Path) -> None:
        """Every touched file of *tree* is what the patches promise, and no tool has left a backup or a reject."""
        assert {path: blob_id((tree / path).read_bytes()) for path in self.promised} == self.promised
        folders = {(tree / path).parent for path in self.promised}
        assert not [f for folder in folders for f in folder.iterdir() if f.suffix in (".orig", ".rej")]


def dist(out: Path, *arguments: str) -> Path:
    """Run the verb; the folder it made."""
    command = [sys.executable, "-m", "vllm_patches", "dist", "--json", "--out", str(out), *arguments]
    env = {**plain_environment(out.parent), **own_environment(), "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(command, cwd=out.parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out.parent / json.loads(done.stdout)["folder"]
