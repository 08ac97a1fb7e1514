"""Plain virtual environments, as a user has them, and this project as a checkout has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "ci/build_backend.py")


def project_copy(folder: Path) -> Path:
    """This project without its patches and tests: pip builds in the folder that it is given."""
    for name in BUILT_FROM:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return folder


def run(*command: str | Path, code: int = 0, cwd: Path | None = None, **settings: str) -> str:
    """Standard output of a command that ends with *code*; nothing of this Python and its environment is handed on."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VLLM_PATCHES", "VIRTUAL"))}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + ("" if code == 0 else done.stderr)


def make_environment(folder: Path) -> Path:
    """A new virtual environment with pip alone."""
    run(sys.executable, "-m", "venv", folder)
    return folder


def pip(environment: Path, *arguments: str | Path, code: int = 0) -> str:
    """Standard output of the environment's own pip."""
    return run(environment / "bin" / "python", "-m", "pip", "-q", "--disable-pip-version-check", *arguments, code=code)


def site_of(environment: Path) -> Path:
    """Its one site folder."""
    (site,) = environment.glob("lib/python3*/site-packages")
    return site
