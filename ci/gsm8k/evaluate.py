"""Run lm-eval in a side's own interpreter: `python -m gsm8k.evaluate REQUEST.json`.

It is lm-eval's own command line; what is added is the offline task, which is lm-eval's `gsm8k` over our data, and a
vLLM model that goes to sleep and wakes up between questions.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import lm_eval

TASK = Path(__file__).with_name("task")


def write_task(folder: Path) -> str:
    """Describe the offline task in *folder*, for ``--include_path``; its name.

    Prompt, stop words, filters and metrics are included from the installed lm-eval, so they cannot differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    original = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    lines = [
        f"include: {original}",
        "task: gsm8k_fixture",
        "dataset_path: json",
        "dataset_name: null",
        f"dataset_kwargs: {json.dumps({'data_files': {s: str(TASK / f'{s}.jsonl') for s in ('train', 'test')}})}",
    ]
    (folder / "gsm8k_fixture.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "gsm8k_fixture"


def register_sleeper() -> None:
    """Make ``--model vllm-sleep`` known: vLLM with a sleep and a wake-up after every *sleep_every* questions."""
    from lm_eval.api.registry import register_model
    from lm_eval.models.vllm_causallms import VLLM

    @register_model("vllm-sleep")
    class SleepingVLLM(VLLM):
        def __init__(self, *args: Any, sleep_every: int = 64, sleep_level: int = 1, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.sleep_every, self.sleep_level = int(sleep_every), int(sleep_level)

        def _model_generate(
            self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None
        ) -> list[Any]:
            answered: list[Any] = []
            for start in range(0, len(requests), self.sleep_every):
                end = start + self.sleep_every
                if start:
                    self._nap()
                answered += super()._model_generate(requests[start:end], generate, sampling_params[start:end])
            return answered

        def _nap(self) -> None:
            self.model.sleep(level=self.sleep_level)
            if self.sleep_level == 1:
                self.model.wake_up()
                return
            self.model.wake_up(tags=["weights"])  # level 2 has dropped them
            self.model.collective_rpc("reload_weights")
            self.model.wake_up(tags=["kv_cache"])


def main(request: dict[str, Any]) -> None:
    """Translate *request* (see `runs.request_of`) to lm-eval's command line and run it."""
    folder = Path(request["folder"])
    words = ["lm_eval", "run", "--model", request["model"], "--model_args", json.dumps(request["model_args"])]
    task = "gsm8k"
    if request["task"] == "fixture":
        task = write_task(folder / "task")
        words += ["--include_path", str(folder / "task")]
    words += ["--tasks", task, "--num_fewshot", "5", "--batch_size", str(request["batch_size"])]
    words += ["--output_path", str(folder / "lm-eval"), "--log_samples", "--seed", "1234"]
    words += ["--limit", str(request["limit"])] if request["limit"] else []
    words += ["--device", request["device"]] if request["device"] else []
    if request["model"] == "vllm-sleep":
        register_sleeper()
    sys.argv = words
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def run_and_leave(request: dict[str, Any]) -> NoReturn:
    """Run, and end this process at once, with the status that an ordinary end would have had.

    An interpreter waits for its children. On more than one GPU vLLM's workers wait for it in turn, and a run that has
    written all its answers, or whose engine has crashed, would end at its time limit only. Whoever started this
    process ends what it leaves.
    """
    status = 0
    try:
        main(request)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)  # torch's own names the rank
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run_and_leave(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
