"""A side's process ends when lm-eval has ended, also with workers that do not: seen with vLLM on two GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

CI = Path(__file__).resolve().parents[2] / "ci"
# lm-eval's command line with a worker as vLLM's executor for several GPUs has them: a child that ignores SIGTERM, and
# that the interpreter waits for.
STAND_IN = """
import multiprocessing, os, signal, sys, time

def work(ready):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(20)

def cli_evaluate():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    context.Process(target=work, args=(ready,)).start()
    ready.wait()
    print("all answers written")
    {end}
"""


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("return", 0, "all answers written"),
        ("sys.exit()", 0, "all answers written"),
        ("sys.exit(3)", 3, "all answers written"),
        ("sys.exit('no such task')", 1, "no such task"),
        ("raise RuntimeError('CUDA error: an illegal memory access')", 1, "RuntimeError: CUDA error: an illegal"),
    ],
)
def test_a_worker_that_stays_does_not_hold_up_the_end(tmp_path: Path, end: str, status: int, said: str) -> None:
    package = tmp_path / "lm_eval"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN.format(end=end), encoding="utf-8")
    request = {"folder": str(tmp_path), "model": "vllm", "model_args": {}, "task": "gsm8k", "batch_size": 1}
    file = tmp_path / "request.json"
    file.write_text(json.dumps(request | {"limit": 0, "device": ""}), encoding="utf-8")
    log = tmp_path / "log"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(CI)])}
    begun = time.monotonic()
    with log.open("wb") as out:
        command = [sys.executable, "-m", "gsm8k.evaluate", str(file)]
        with subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True) as process:
            try:
                assert process.wait(15) == status
            finally:
                os.killpg(process.pid, 9)
    assert time.monotonic() - begun < 15
    assert said in log.read_text(encoding="utf-8")
