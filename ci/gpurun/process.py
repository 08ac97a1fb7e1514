"""A process with a time limit, ended with all that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def run_to_end(
    command: Sequence[str], env: Mapping[str, str], log: Path, limit: float, cwd: Path | None = None
) -> int | None:
    """Exit status of *command* (-N: signal N ended it), None if it was killed after *limit* seconds.

    Its output goes to *log*. What it leaves running is killed: servers hold the memory of the GPU.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        process.kill()
        end_session(process.pid)
        process.wait()


def end_session(leader: int) -> None:
    """Kill every process of the session, those in process groups of their own too, until no new one is found."""
    killed: set[int] = set()
    while found := _members(leader) - killed:
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        killed |= found


def _members(session: int) -> set[int]:
    found: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(ProcessLookupError):  # ended meanwhile
            if os.getsid(int(folder.name)) == session:
                found.add(int(folder.name))
    return found
