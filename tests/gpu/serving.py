"""An OpenAI server of a tiny model in a process of its own, and what asks it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from gpu_case import Context
from gpurun import server

START = 180.0  # seconds
SAYS = re.compile(r"illegal memory access|is_contiguous\(\)|must be contiguous|EngineDead\w+")


class Server:
    """A context manager; the server is killed at its end, whatever state it is in."""

    def __init__(self, context: Context, options: Mapping[str, Any], env: Mapping[str, str]) -> None:
        self.log, port = context.scratch / "server.txt", server.free_port()
        more = {"served_model_name": "tiny", "uvicorn_log_level": "warning"}
        command = server.server_command(sys.executable, port, {**options, **more})
        settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **env}
        self.running = server.serving(command, os.environ | settings, port, self.log, START)

    def __enter__(self) -> Server:
        try:
            self.url = self.running.__enter__()
        except server.ServerError as error:
            raise RuntimeError(f"{error}: {self.said()[-2500:]}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.running.__exit__(kind, error, at)

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
        return server.get(self.url, path)

    def post(self, path: str, value: object = None, timeout: float = 60) -> Any:
        """JSON of a POST, None for an empty reply; raises OSError with the status, or "no answer"."""
        return server.post(self.url, path, value, timeout)

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
