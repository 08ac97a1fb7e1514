"""vLLM's OpenAI server in a process of its own, and requests to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class ServerError(OSError):
    """The server died, did not come up, or did not answer; its log says why."""


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def server_command(python: str, port: int, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The command that serves on *port*; *options* are engine arguments by their Python names."""
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return tuple(words)


@contextlib.contextmanager
def serving(command: Sequence[str], env: Mapping[str, str], port: int, log: Path, patience: float) -> Iterator[str]:
    """Start *command*, wait up to *patience* seconds until it is healthy, give its address, end it.

    Its process group is its own, the session is the caller's: whoever ends that ends the server.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, process_group=0
        )
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
    post(address, "/v1/completions", {"model": model, "prompt": "Question:", "max_tokens": 4, "temperature": 0})
    post(address, f"/sleep?level={level}")
    if level == 2:
        post(address, "/wake_up?tags=weights")
        post(address, "/collective_rpc", {"method": "reload_weights"})
        post(address, "/wake_up?tags=kv_cache")
    else:
        post(address, "/wake_up")


def get(address: str, path: str) -> Any:
    """JSON of a GET."""
    with urllib.request.urlopen(address + path, timeout=60) as reply:
        return json.load(reply)


def post(address: str, path: str, value: object = None, timeout: float = 120) -> Any:
    """JSON of a POST, None for an empty reply; raises `ServerError` with the status, or "no answer"."""
    data = json.dumps(value).encode() if value is not None else b""
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            text = reply.read()
    except urllib.error.HTTPError as error:
        raise ServerError(f"{path} answered {error.code}: {error.read()[:300]!r}") from error
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{path}: no answer ({error})") from error
    return json.loads(text) if text.strip() else None
