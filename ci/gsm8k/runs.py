"""Run one side in one mode: lm-eval in its own process, its outcome kept, so that a finished side is not run again."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from gpurun.process import run_to_end
from gpurun.server import ServerError, free_port, nap, server_command, serving

from gsm8k.scenario import Scenario
from gsm8k.sides import RunError, Side

SERVER_THEN = "server-then.log"  # the server's log as it was when lm-eval ended


class Mode(Enum):
    """How the questions reach the model."""

    HF = "hf"  # lm-eval's transformers backend on a CPU: no vLLM in it; for testing the harness itself
    INPROCESS = "in-process"  # lm-eval's vllm backend
    SERVED = "served"  # vLLM's OpenAI server, lm-eval's local-completions


class Outcome(Enum):
    """How a side's run ended; anything else raises `RunError`."""

    FINISHED = "finished"
    CRASHED = "crashed"  # the engine died, with a known sign of it in the log
    HUNG = "hung"  # no end within the time limit


@dataclass(frozen=True)
class Job:
    """What is asked of a side; together with the side's own identity the key of a kept result."""

    task: str  # gsm8k or fixture
    model: str
    scenario: Scenario
    limit: int = 0  # questions; 0: all
    tensor_parallel: int = 1
    concurrency: int = 256
    time_limit: float = 4 * 3600.0  # seconds, of one side in one mode
    engine: dict[str, Any] = field(default_factory=dict)  # further engine arguments, over the scenario's

    def key(self, side: Side, mode: Mode, fixes: dict[str, str]) -> str:
        """Changes whenever another result could come out."""
        parts = [asdict(self), side.name, mode.value, fixes, side.python, [str(folder) for folder in side.folders]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Ran:
    """One side's run; *folder* holds lm-eval's log and files."""

    outcome: Outcome
    seconds: float
    command: tuple[str, ...]
    folder: Path
    sign: str = ""  # the line of the log that shows the crash
    kept: bool = False  # from an earlier run


def run_side(job: Job, side: Side, mode: Mode, fixes: dict[str, str], out: Path) -> Ran:
    """Run *side*, or take what an earlier call with the same key has finished."""
    folder = out / mode.value / side.name
    key = job.key(side, mode, fixes)
    if (kept := _kept(folder, key)) is not None:
        return kept
    if folder.exists():
        folder.rename(_unused(folder))
    folder.mkdir(parents=True)
    begin = time.monotonic()
    command, problem = (_served if mode is Mode.SERVED else _inside)(job, side, mode, folder)
    ran = _judge(job, side, problem, Ran(Outcome.FINISHED, round(time.monotonic() - begin, 1), command, folder))
    said = {"key": key, "outcome": ran.outcome.value, "seconds": ran.seconds, "command": command, "sign": ran.sign}
    (folder / "side.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    return ran


def _kept(folder: Path, key: str) -> Ran | None:
    """The finished run in *folder*; a killed one has written no side.json and is run again."""
    file = folder / "side.json"
    said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return read_run(folder) if said.get("key") == key else None


def read_run(folder: Path) -> Ran:
    """The finished run in *folder*, whatever it was run for."""
    said = json.loads((folder / "side.json").read_text(encoding="utf-8"))
    return Ran(Outcome(said["outcome"]), said["seconds"], tuple(said["command"]), folder, said["sign"], kept=True)


def crash_sign(scenario: Scenario, folder: Path) -> str:
    """The line of a run's logs that shows a crash; empty where there is none."""
    for name in (SERVER_THEN, "lm-eval.log"):
        log = folder / name
        if log.is_file() and (sign := scenario.crashed(log.read_text(encoding="utf-8", errors="replace"))):
            return sign
    return ""


def _unused(folder: Path) -> Path:
    """A name beside *folder* for an older result, which is never deleted."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return aside


def _judge(job: Job, side: Side, problem: str, ran: Ran) -> Ran:
    """Tell a crash from a mistake in the run, by what the logs say."""
    if not problem:
        return ran
    if problem == "hung":
        return Ran(Outcome.HUNG, ran.seconds, ran.command, ran.folder, f"no end within {job.time_limit:.0f} s")
    if sign := crash_sign(job.scenario, ran.folder):
        return Ran(Outcome.CRASHED, ran.seconds, ran.command, ran.folder, sign)
    if problem.startswith("killed by signal"):
        return Ran(Outcome.CRASHED, ran.seconds, ran.command, ran.folder, problem)
    look = f"tail -n 40 {ran.folder}/lm-eval.log"
    raise RunError(f"{side.name}: {problem}, and no sign of a crashed engine in the log\n  next:     {look}")


def _inside(job: Job, side: Side, mode: Mode, folder: Path) -> tuple[tuple[str, ...], str]:
    return _lm_eval(job, side, folder, request_of(job, mode, folder))


def _served(job: Job, side: Side, mode: Mode, folder: Path) -> tuple[tuple[str, ...], str]:
    port = free_port()
    command = server_command(side.python, port, {"model": job.model} | _engine(job))
    env = side.environment({"VLLM_SERVER_DEV_MODE": "1"} | job.scenario.env)
    try:
        with serving(command, env, port, folder / "server.log", min(job.time_limit, 1800)) as address:
            if job.scenario.sleep_every:
                nap(address, job.model, job.scenario.sleep_level)
            request = request_of(job, mode, folder) | {"model": "local-completions", "batch_size": 1}
            request["model_args"] = _client_args(job, address)
            _, problem = _lm_eval(job, side, folder, request)
            _keep_log(folder)  # what the server says while it is being ended is no sign of anything
    except ServerError as error:
        _keep_log(folder)
        return command, str(error)
    return command, problem


def _keep_log(folder: Path) -> None:
    shutil.copyfile(folder / "server.log", folder / SERVER_THEN)


def request_of(job: Job, mode: Mode, folder: Path) -> dict[str, Any]:
    """What `gsm8k.evaluate` is to run, as JSON."""
    common = {"task": job.task, "limit": job.limit, "folder": str(folder), "device": ""}
    if mode is Mode.HF:
        args = {"pretrained": job.model, "dtype": "float32"}
        return common | {"model": "hf", "model_args": args, "batch_size": 32, "device": "cpu"}
    sleeping = job.scenario.sleep_every
    naps: dict[str, Any] = {"sleep_every": sleeping, "sleep_level": job.scenario.sleep_level} if sleeping else {}
    args = {"pretrained": job.model} | _engine(job) | naps
    return common | {"model": "vllm-sleep" if sleeping else "vllm", "model_args": args, "batch_size": "auto"}


def _engine(job: Job) -> dict[str, Any]:
    """vLLM's engine arguments, by their Python names."""
    return {"seed": 0, "tensor_parallel_size": job.tensor_parallel} | job.scenario.engine | job.engine


def _client_args(job: Job, address: str) -> dict[str, Any]:
    return {
        "model": job.model,
        "base_url": f"{address}/v1/completions",
        "num_concurrent": job.concurrency,
        "tokenizer_backend": "none",
        "tokenized_requests": False,
        "max_retries": 1,
        "timeout": int(min(job.time_limit, 3600)),
    }


def _lm_eval(job: Job, side: Side, folder: Path, request: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    """Run lm-eval to its end; what went wrong, in words, or nothing."""
    file = folder / "request.json"
    file.write_text(json.dumps(request, indent=1), encoding="utf-8")
    command = (side.python, "-m", "gsm8k.evaluate", str(file))
    # One process, so that a crash is lm-eval's own and the sleeping model reaches the engine.
    env = side.environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | job.scenario.env)
    status = run_to_end(command, env, folder / "lm-eval.log", job.time_limit)
    if status is None:
        return command, "hung"
    if status < 0:
        return command, f"killed by signal {-status}"
    return command, f"lm-eval ended with status {status}" if status else ""
