"""Upstream's own tests that import a patched module and run on a CPU: what passes on stock must pass on patched."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from proof import FIRST_PINS, proof_trees

# Of the sdists' tests that import a module which a series touches, these run without a GPU; the others ask for CUDA,
# ROCm or a model hub, or fail on stock for want of them.
FILES = (
    "tests/model_executor/test_routed_experts_capture.py",  # v1/worker/gpu_model_runner.py
    "tests/v1/worker/test_gpu_model_runner_v2_eplb.py",  # v1/worker/gpu/model_runner.py; not in 0.18.1
)


def passed(tree: Path, scratch: Path) -> set[str]:
    """The ids of the tests that pass on *tree*."""
    report = scratch / f"{tree.name}.xml"
    files = [name for name in FILES if (tree / name).is_file()]
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-o", "addopts="]
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")},
        "CUDA_VISIBLE_DEVICES": "",
        "TRITON_INTERPRET": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(tree),
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    done = subprocess.run([*command, f"--junitxml={report}", *files], cwd=tree, env=env, capture_output=True, text=True)
    assert report.is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    cases = ElementTree.parse(report).iter("testcase")
    return {f"{c.get('classname')}::{c.get('name')}" for c in cases if len(c) == 0 or c[0].tag in ("system-out",)}


@pytest.mark.parametrize("version", FIRST_PINS)
def test_what_passed_still_passes(version, tmp_path):
    stock, patched = proof_trees(version)
    before = passed(stock, tmp_path)
    assert before, "no upstream test passes on the stock tree: nothing would be compared"
    assert before - passed(patched, tmp_path) == set()
