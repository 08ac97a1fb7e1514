#!/usr/bin/env python3
"""Stands in for a side's interpreter: takes the harness's commands, and behaves as `behaviour.json` beside it says.

As lm-eval it writes samples in lm-eval's layout; as vLLM's server it is a real HTTP server. What it says when it
crashes are lines of real logs of vLLM.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

ILLEGAL = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"
BEHAVIOUR: dict[str, Any] = json.loads(Path(__file__).with_name("behaviour.json").read_text(encoding="utf-8"))


def evaluate(request: dict[str, Any]) -> None:
    """lm-eval: answers each question right unless it is among those to get wrong."""
    with Path(__file__).with_name("calls").open("a", encoding="utf-8") as calls:
        calls.write("lm-eval\n")
    if address := request["model_args"].get("base_url"):
        urllib.request.urlopen(urllib.request.Request(address, data=b"{}", method="POST"), timeout=10).close()
    how = BEHAVIOUR.get("evaluate", "")
    if how == "crash":
        sys.exit(f"Traceback (most recent call last):\n{ILLEGAL}")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hang":
        time.sleep(60)
    if how == "mistake":
        sys.exit("ModuleNotFoundError: No module named 'lm_eval'")
    folder = Path(request["folder"]) / "lm-eval" / "model"
    folder.mkdir(parents=True)
    with (folder / "samples_gsm8k_2026.jsonl").open("w", encoding="utf-8") as out:
        for number in range(request["limit"]):
            for name in ("strict-match", "flexible-extract"):
                out.write(json.dumps(sample(number, name, number not in BEHAVIOUR.get("wrong", []))) + "\n")


def sample(number: int, name: str, right: bool) -> dict[str, Any]:
    """One line of lm-eval's samples file, as far as it is read."""
    said = str(number) if right else "0"
    return {
        "doc_id": number,
        "doc_hash": f"{number:064x}",
        "doc": {"question": "?", "answer": f"x\n#### {number}"},
        "filter": name,
        "resps": [[f" x\n#### {said}"]],
        "filtered_resps": [said],
        "exact_match": float(right),
    }


class Server(http.server.BaseHTTPRequestHandler):
    """The few endpoints of vLLM that the harness calls; after a wake-up it is broken, if it is to be."""

    woken = False

    def do_GET(self) -> None:
        self.reply(200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        print("POST", self.path, flush=True)
        Server.woken |= self.path == "/wake_up"
        if self.path == "/v1/completions" and Server.woken and BEHAVIOUR.get("serve") == "crash after waking":
            print(f"EngineCore: {ILLEGAL}", flush=True)
            self.reply(500)
        else:
            self.reply(200)

    def reply(self, status: int) -> None:
        self.send_response(status)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def serve(words: list[str]) -> None:
    """vLLM's server."""
    if BEHAVIOUR.get("serve") == "die":
        sys.exit("RuntimeError: Engine core initialization failed. CUDA error: out of memory")
    http.server.ThreadingHTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Server).serve_forever()


if __name__ == "__main__":
    if sys.argv[2] == "gsm8k.evaluate":
        evaluate(json.loads(Path(sys.argv[3]).read_text(encoding="utf-8")))
    else:
        serve(sys.argv)
