"""What the tests run on: asked of the interpreter that runs the cases, so that its torch is the one named."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

ASK = """
import json, platform, torch
try:
    import triton
except ImportError:
    triton = None
gpu = torch.cuda.is_available()
print(json.dumps({
    "gpu": torch.cuda.get_device_name(0) if gpu else "none",
    "capability": "%d.%d" % torch.cuda.get_device_capability(0) if gpu else "",
    "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30) if gpu else 0,
    "python": platform.python_version(),
    "torch": torch.__version__,
    "torch_cuda": torch.version.cuda or "",
    "triton": triton.__version__ if triton else "",
}))
"""


def machine(python: str, env: Mapping[str, str]) -> dict[str, Any]:
    """GPU, driver, kernel and versions; raises RuntimeError where torch cannot be asked."""
    done = subprocess.run([python, "-c", ASK], env=dict(env), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{python} cannot say what it runs on: {done.stderr.strip()[-500:]}")
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


if __name__ == "__main__":
    import os

    print(json.dumps(machine(sys.executable, os.environ), indent=1))
