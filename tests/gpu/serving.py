"""An OpenAI server of a tiny model in a process of its own, and what asks it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from gpu_case import Context

START = 180.0  # seconds
SAYS = re.compile(r"illegal memory access|is_contiguous\(\)|must be contiguous|EngineDead\w+")


def flags(options: Mapping[str, Any]) -> list[str]:
    """Engine options as the command line takes them."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


class Server:
    """A context manager; the server is killed at its end, whatever state it is in."""

    def __init__(self, context: Context, options: Mapping[str, Any], env: Mapping[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = context.scratch / "server.txt"
        self.url = f"http://127.0.0.1:{self.port}"
        more = {"host": "127.0.0.1", "port": self.port, "served_model_name": "tiny", "uvicorn_log_level": "warning"}
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags({**options, **more})]
        settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **env}
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, env=os.environ | settings, stdout=out, stderr=out)

    def __enter__(self) -> Server:
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return self
            except OSError:
                time.sleep(0.5)
        self.process.kill()
        raise RuntimeError(f"the server did not start: {self.said()[-2500:]}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def said(self) -> str:
        """The server's log."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def complaint(self) -> str:
        """What the log says of the errors that the cases look for, and the first line of each."""
        time.sleep(2)  # the engine's process writes it after the answer is out
        seen: dict[str, str] = {}
        for line in self.said().splitlines():
            if match := SAYS.search(line):
                seen.setdefault(match[0], line.strip()[:200])
        return " | ".join(seen.values()) or "nothing of a known error"

    def get(self, path: str) -> Any:
        """JSON of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return json.load(reply)

    def post(self, path: str, value: object = None, timeout: float = 60) -> Any:
        """JSON of a POST, None for an empty reply; raises OSError with the status, or "no answer"."""
        data = json.dumps(value).encode() if value is not None else b""
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                text = reply.read()
        except urllib.error.HTTPError as error:
            raise OSError(f"{path} answered {error.code}: {error.read()[:300]!r}") from error
        except OSError as error:
            raise OSError(f"{path}: no answer ({error})") from error
        return json.loads(text) if text.strip() else None

    def complete(self, prompt: list[int], length: int) -> list[int]:
        """Greedy token ids."""
        reply = self.post("/v1/completions", body(prompt, length))
        ids: list[int] = reply["choices"][0]["token_ids"]
        return ids


def body(prompt: list[int] | list[list[int]], length: int) -> dict[str, Any]:
    """A greedy request of exactly *length* tokens."""
    return {"model": "tiny", "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True}  # fmt: skip


@dataclass
class Load:
    """What came of many requests; *seconds* is the whole time."""

    requests: int = 0
    failures: int = 0
    tokens: int = 0
    seconds: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """For the results."""
        rate = round(self.tokens / self.seconds, 1) if self.seconds else 0.0
        return {"requests": self.requests, "failures": self.failures, "tokens": self.tokens, "errors": self.errors,
                "seconds": round(self.seconds, 1), "tokens_per_second": rate}  # fmt: skip


def load(server: Server, prompts: Iterable[list[int]], length: int, concurrency: int) -> Load:
    """Send every prompt, at most *concurrency* at a time; after 50 failures the rest is counted as failed, unsent."""
    return asyncio.run(_load(server.url, list(prompts), length, concurrency))


async def _load(url: str, prompts: list[list[int]], length: int, concurrency: int) -> Load:
    import aiohttp

    found, waiting = Load(requests=len(prompts)), iter(prompts)
    started = time.monotonic()
    connector, timeout = aiohttp.TCPConnector(limit=concurrency), aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def worker() -> None:
            for prompt in waiting:
                if found.failures >= 50:
                    found.failures += 1
                    continue
                await _ask(session, url, body(prompt, length), found)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    found.seconds = time.monotonic() - started
    return found


async def _ask(session: Any, url: str, value: dict[str, Any], found: Load) -> None:
    import aiohttp

    try:
        async with session.post(f"{url}/v1/completions", json=value) as reply:
            text = await reply.text()
            if reply.status == 200:
                tokens = json.loads(text)["usage"]["completion_tokens"]
                found.tokens += tokens
                problem = "" if tokens == value["max_tokens"] else f"{tokens} tokens"
            else:
                problem = f"status {reply.status}"
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        problem = type(error).__name__
    if problem:
        found.failures += 1
        found.errors[problem] = found.errors.get(problem, 0) + 1
