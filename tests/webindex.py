"""A package index on the loopback: PEP 503 pages and files from a real HTTP server in a thread."""

from __future__ import annotations

import base64
import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass
class Answer:
    """What one path answers; *cut* sends fewer bytes than promised, *length* False promises nothing."""

    body: bytes
    kind: str = "text/html"
    status: int = 200
    cut: int = 0
    length: bool = True


@dataclass
class WebIndex:
    """The index: its pages by path, who may read them, and what was asked."""

    answers: dict[str, Answer] = field(default_factory=dict)
    login: str = ""  # user:password
    asked: list[str] = field(default_factory=list)
    port: int = 0

    def __enter__(self) -> Self:
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://{self.login + '@' if self.login else ''}127.0.0.1:{self.port}/simple/"

    def add(self, name: str, data: bytes, *, digest: str = "", **options: Any) -> None:
        """Offer the file *name* on vLLM's page."""
        self.answers[f"/files/{name}"] = Answer(data, "application/gzip", **options)
        files = [path.removeprefix("/files/") for path in self.answers if path.startswith("/files/")]
        mark = f"#sha256={digest or hashlib.sha256(data).hexdigest()}"
        links = "".join(f'<a href="../../files/{file}{mark if file == name else ""}">{file}</a>\n' for file in files)
        self.answers["/simple/vllm/"] = Answer(f"<!DOCTYPE html><html><body>{links}</body></html>".encode())

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked.append(request.path)
        expected = f"Basic {base64.b64encode(self.login.encode()).decode()}"
        given = self.answers.get(request.path, Answer(b"no such page", status=404))
        if self.login and request.headers.get("Authorization") != expected:
            given = Answer(b"who are you?", status=401)
        request.send_response(given.status)
        request.send_header("Content-Type", given.kind)
        if given.length:
            request.send_header("Content-Length", str(len(given.body)))
        request.end_headers()
        request.wfile.write(given.body[: len(given.body) - given.cut])
        request.close_connection = True
