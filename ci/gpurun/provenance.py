"""What a result is of: the machine and the versions, asked of the interpreter that ran it, and the commit."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_patches.errors import PatchesError
from vllm_patches.trees import git

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "VLLM_PATCHES_COMMIT"  # the environment variable of a copy without .git
ASK = """
import importlib.metadata, json, platform, torch
try:
    import triton
except ImportError:
    triton = None
gpu = torch.cuda.is_available()
said = {
    "gpu": torch.cuda.get_device_name(0) if gpu else "none",
    "gpus": torch.cuda.device_count() if gpu else 0,
    "capability": "%d.%d" % torch.cuda.get_device_capability(0) if gpu else "",
    "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30) if gpu else 0,
    "python": platform.python_version(),
    "torch": torch.__version__,
    "torch_cuda": torch.version.cuda or "",
    "triton": triton.__version__ if triton else "",
}
for name in ("vllm", "transformers", "lm_eval", "flashinfer-python"):
    try:
        said[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(said))
"""


def machine(python: str, env: Mapping[str, str]) -> dict[str, Any]:
    """GPU, driver, kernel and versions, as *python* with its torch sees them."""
    done = subprocess.run([python, "-c", ASK], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PatchesError(
            "the interpreter cannot say what it runs on",
            file=python,
            expected="one that imports torch",
            found=done.stderr.strip()[-500:],
            next_command=f"{python} -c 'import torch; torch.cuda.is_available()'",
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    kernel = re.match(r"\d+\.\d+(\.\d+)?", platform.release())
    return found | {"driver": driver(), "os_kernel": f"{platform.system()} {kernel[0] if kernel else ''}".strip()}


def driver() -> str:
    """The GPU driver's version, "none" without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.split("\n")[0].strip() or "none"


def commit(root: Path = ROOT) -> str:
    """The commit of this repository, "+changes" behind it if tracked files differ; a copy without one is told it.

    Where git knows the commit the environment is not asked: a variable left over from another day would lie.
    """
    own = (git.rev_parse(root, "HEAD") or "") if (root / ".git").exists() else ""
    found = own or os.environ.get(COMMIT, "").strip()
    if own and any(not line.startswith("??") for line in git.status(root)):
        found += "+changes"
    if not re.fullmatch(r"[0-9a-f]{40}(\+changes)?", found):
        raise PatchesError(
            "the results must name the commit that they are of",
            file=str(root),
            expected=f"a git checkout, or {COMMIT} with 40 hex digits",
            found=found or "neither",
            next_command=f"export {COMMIT}=$(git -C /the/checkout rev-parse HEAD)    # of which this is a copy",
        )
    return found
