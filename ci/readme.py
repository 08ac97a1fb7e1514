"""Run every command of the README: those of its console blocks that .ci/run does not run as a part of its own.

Examples that stand for something of the reader's (a checkout, a fork, a release that does not exist yet) are replaced
by the real thing. Runs in a scratch clone, so that what the commands write stays out of this checkout.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEW_RELEASE = "0.14.1"  # any release that the table does not know


def commands(text: str) -> list[str]:
    """The lines after ``$`` in console blocks, without their comments."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.S)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [re.sub(r"\s{2,}#.*", "", line) for line in lines]


def parts_of_ci() -> set[str]:
    """The commands that .ci/run runs itself."""
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    return set(re.findall(r"^part \S+ (.+)$", text, re.M))


def prepare(scratch: Path) -> dict[str, str]:
    """A clone that shares this checkout's environment, a pristine git checkout, and what replaces what in examples."""
    clone, checkout = scratch / "clone", scratch / "checkout"
    run(["git", "clone", "--quiet", str(ROOT), str(clone)], ROOT)
    (clone / ".venv").symlink_to(ROOT / ".venv")
    run(["make", "apply"], clone)
    run(["git", "clone", "--quiet", "--branch", "pristine", "build/src/vllm-0.20.2", str(checkout)], clone)
    return {
        "/path/to/checkout": str(checkout),
        "/path/to/fork": str(checkout),
        "/path/to/patches": str(clone / "patches"),
        "SDIST=vllm-0.20.2.tar.gz": f"SDIST={cached('sdist', 'vllm-0.20.2.tar.gz')}",
        "/path/to/official.whl": str(cached("wheel", "vllm-0.20.2-cp38-abi3-manylinux_2_35_x86_64.whl")),
        "VERSION=0.34.0": f"VERSION={NEW_RELEASE}",
    }


def cached(kind: str, name: str) -> Path:
    """A file that an earlier part of CI has fetched; the README's offline examples are run on it."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-patches"
    return next(base.glob(f"{kind}*/*/{name}"), base / name)


def run(command: list[str] | str, cwd: Path) -> None:
    """Run to the end (a string through bash); a failure ends the whole, with what was said."""
    words = ["bash", "-c", command] if isinstance(command, str) else command
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"README: {command} failed with status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def plain_tools(command: str) -> bool:
    """git am, quilt and patch want a pristine tree of their own."""
    return command.startswith(("git am", "QUILT_PATCHES", "cat "))


def main() -> int:
    """Run them one by one and say how long each took."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    todo = [command for command in commands(text) if command not in parts_of_ci()]
    if not todo:
        sys.exit("README: no command found; has its form changed?")
    with tempfile.TemporaryDirectory(prefix="readme-") as name:
        scratch = Path(name)
        replacements = prepare(scratch)
        for command in todo:
            real = command
            for example, thing in replacements.items():
                real = real.replace(example, thing)
            cwd = scratch / "clone"
            if plain_tools(command):
                cwd = scratch / "plain"
                run(["rm", "-rf", str(cwd)], scratch)
                run(["git", "clone", "--quiet", "--branch", "pristine", str(scratch / "checkout"), str(cwd)], scratch)
                run(["git", "config", "user.email", "ci@vllm-patches.invalid"], cwd)
                run(["git", "config", "user.name", "ci"], cwd)
            started = time.perf_counter()
            run(real, cwd)
            print(f"{time.perf_counter() - started:6.1f} s  {command}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
