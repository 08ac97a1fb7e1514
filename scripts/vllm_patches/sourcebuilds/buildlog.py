"""A long build of somebody else's: run to its end or killed whole, logged, told as it goes, explained at last."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

_STEP = re.compile(rb"^\s*\[(\d+)/(\d+)\] (\S.*)")
_QUIET_SECONDS = 2.0  # what is done by then needs no progress
_LINE_SECONDS = 30.0  # where there is no terminal: a line that often at most

# What a failure is told by, and what pip and Python say around each one.
_TELLING = re.compile(r"error|fatal|failed|killed|not found|cannot |no such |no space|higher is required", re.I)
_NOISE = re.compile(
    r"subprocess-exited-with-error|metadata-generation-failed|Encountered error while|did not run successfully|"
    r"error originates from|Failed (building|to build)|CalledProcessError|^\s*raise |^\s*File \"|"
    r"finished with status|Configuring incomplete|_errors?\.py|Wno-error|^\s*(adding|copying|creating) |"
    r"Performing C|full command:"
)
_CMAKE = re.compile(r"CMake (Error|Warning)")
_MAX_LINES = 10


@dataclass
class Progress:
    """Elapsed time and ninja's [n/m] on *out*: one line rewritten on a terminal, plain lines now and then elsewhere."""

    out: TextIO
    started: float = field(default_factory=time.monotonic)
    step: str = ""
    _shown: float = 0.0

    def feed(self, line: bytes) -> None:
        """Take one line of the build's output."""
        if match := _STEP.match(line):
            done, total, what = (part.decode("utf-8", "replace") for part in match.groups())
            self.step = f"[{done}/{total}] {Path(what.split()[-1]).name}"

    def tick(self) -> None:
        """Show where the build is, if it is time to."""
        now = time.monotonic()
        wait = 1.0 if self.out.isatty() else _LINE_SECONDS
        if now - self.started < _QUIET_SECONDS or now - self._shown < wait:
            return
        self._shown = now
        text = f"{clock(now - self.started)} {self.step or 'upstream is building'}"
        self.out.write(f"\r{text[:100]:<100}" if self.out.isatty() else f"{text}\n")
        self.out.flush()

    def close(self) -> None:
        """End the line that is rewritten."""
        if self.out.isatty() and self._shown:
            self.out.write("\n")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def run_logged(
    command: Sequence[str], folder: Path, env: Mapping[str, str], log: Path, progress: Progress, held: int
) -> int:
    """Run *command* to its end and return its exit status; all that it says goes into *log*.

    The build gets a session of its own, and whatever ends this call ends all of it. Where this process is killed
    outright, the build still holds the lock *held* (a descriptor), so that no second one starts beside it.
    """
    with log.open("wb") as file, _started(command, folder, env, held) as process:
        for line in _lines(process, progress):
            file.write(line)
            progress.feed(line)
        return process.wait()


@contextlib.contextmanager
def _started(
    command: Sequence[str], folder: Path, env: Mapping[str, str], held: int
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(held,),
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):  # gone, and its children with it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


def _lines(process: subprocess.Popen[bytes], progress: Progress) -> Iterator[bytes]:
    """The output line by line; progress ticks while a long job says nothing."""
    assert process.stdout
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            ready = selector.select(timeout=1.0)
            progress.tick()
            if not ready:
                continue
            block = os.read(process.stdout.fileno(), 1 << 16)
            if not block:
                break
            *whole, pending = (pending + block).split(b"\n")
            yield from (line + b"\n" for line in whole)
    if pending:
        yield pending
    progress.close()


def last_words(text: str) -> list[str]:
    """The lines that say why a build failed, the last ten at most; where nothing tells, the last lines there are."""
    lines = [line.rstrip()[:300] for line in text.splitlines()]
    told: list[str] = []
    number = 0
    while number < len(lines):
        line, number = lines[number], number + 1
        found = [line.strip()] if _TELLING.search(line) and not _NOISE.search(line) else []
        if cmake := _CMAKE.search(line):
            message = _cmake_message(lines[number:], len(line) - len(line.lstrip()))
            number += len(message)
            found = [line.strip(), *message] if cmake[1] == "Error" else []
        told += [word for word in found if word and word not in told]
    return told[-_MAX_LINES:] or [line.strip() for line in lines if line.strip()][-_MAX_LINES:]


def _cmake_message(lines: Sequence[str], indent: int) -> list[str]:
    """The text of a CMake message: what follows its heading and stands further in, blank lines between."""
    text: list[str] = []
    for line in lines[:8]:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        text.append(line.strip())
    return text


# Sources that upstream's CMake files clone, and the environment variable with which they take a local copy instead.
LOCAL_COPY = {
    "nvidia/cutlass": "VLLM_CUTLASS_SRC_DIR",
    "vllm-project/flash-attention": "VLLM_FLASH_ATTN_SRC_DIR",
    "vllm-project/flashmla": "FLASH_MLA_SRC_DIR",
    "triton-lang/triton": "TRITON_KERNELS_SRC_DIR",
    "ist-daslab/qutlass": "QUTLASS_SRC_DIR",
    "deepseek-ai/deepgemm": "DEEPGEMM_SRC_DIR",
    "oneapi-src/onednn": "FETCHCONTENT_SOURCE_DIR_ONEDNN",
    "arm-software/computelibrary": "ACL_ROOT_DIR",
}
_CLONE = re.compile(r"Failed to clone repository:\s+'(?P<url>[^']+)'")
_MEMORY = re.compile(r"Killed signal terminated|out of memory|cannot allocate memory|signal 9|Killed$", re.I | re.M)


@dataclass(frozen=True)
class Advice:
    """What a failed build's log points at: *what* in a few words, and *command*, to be typed before the same again."""

    what: str
    command: str


def advice(text: str, jobs: int) -> Advice | None:
    """The known causes: sources that cannot be cloned, memory, a full disk; None for any other."""
    if match := _CLONE.search(text):
        name = match["url"].removesuffix(".git").partition("://")[2].partition("/")[2].lower()
        variable = LOCAL_COPY.get(name)
        command = f"{variable}=/path/to/a/checkout" if variable else f"git ls-remote {match['url']} &&"
        return Advice(f"upstream clones {match['url']}, and that failed", command)
    if _MEMORY.search(text) and jobs > 1:
        return Advice(f"a compiler was killed: {jobs} jobs are too many for the memory", f"MAX_JOBS={jobs // 2}")
    return None
