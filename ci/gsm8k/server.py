"""vLLM's OpenAI server for the length of a run, and its sleep endpoints."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path


class ServerError(Exception):
    """The server died, or did not come up; its log says why."""


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serving(command: Sequence[str], env: dict[str, str], port: int, log: Path, patience: float) -> Iterator[str]:
    """Start *command*, wait up to *patience* seconds until it is healthy, give its address, end it."""
    with log.open("wb") as written:
        process = subprocess.Popen(command, env=env, stdout=written, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, f"{address}/health", patience)
        yield address
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, patience: float) -> None:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if process.poll() is not None:
            raise ServerError(f"the server ended with status {process.returncode} before it was ready")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise ServerError(f"the server was not ready after {patience:.0f} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            break
    with contextlib.suppress(ProcessLookupError):  # an engine process that outlived its server
        os.killpg(process.pid, signal.SIGKILL)


def nap(address: str, model: str, level: int) -> None:
    """One request, then sleep and wake up, so that the questions that follow find a woken engine."""
    _post(f"{address}/v1/completions", {"model": model, "prompt": "Question:", "max_tokens": 4, "temperature": 0})
    _post(f"{address}/sleep?level={level}")
    if level == 2:
        _post(f"{address}/wake_up?tags=weights")
        _post(f"{address}/collective_rpc", {"method": "reload_weights"})
        _post(f"{address}/wake_up?tags=kv_cache")
    else:
        _post(f"{address}/wake_up")


def _post(url: str, body: dict[str, object] | None = None) -> None:
    data = json.dumps(body).encode() if body is not None else b""
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            reply.read()
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise ServerError(f"POST {url.partition('?')[0].rpartition('/')[2]}: {error}") from error
