"""Train a tiny model on the generated problems until it answers them: `python -m gsm8k.train dense DIR`.

A training sequence is a stretch of worked examples, laid out as lm-eval's few-shot prompt lays them out, so that the
model has seen zero to seven examples before each answer. The loss is on the answers alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen3_next import modeling_qwen3_next

from gsm8k import tokens
from gsm8k.dsa import MtpLayer, export
from gsm8k.problems import Problem, generate
from gsm8k.shapes import SHAPES, configuration

PARTS = 32  # independent seeds of the training data, so that the data do not depend on the number of processes
SHOTS = 5
SAY_EVERY = 100
PROBE = 60  # steps, all of them in the warm-up of the learning rate


@dataclass(frozen=True)
class Plan:
    """All that the weights depend on besides the code and the machine."""

    shape: str
    steps: int = 1700
    batch: int = 128
    length: int = 1024  # tokens of a sequence
    rate: float = 2e-3  # peak learning rate
    warmup: int = 100
    problems: int = 400_000
    seed: int = 0
    init: float = 0.0  # standard deviation of the first weights; 0: the shape's own
    seconds: int = 0  # of training at most, by the speed of the first steps; 0: no limit


# What a shape's plan has of its own, where the command line says nothing else.
PLANS: dict[str, dict[str, int]] = {"dsa": {"steps": 2000, "batch": 32}}


@dataclass(frozen=True)
class Stream:
    """All training examples end to end: token ids, which of them count in the loss, where examples begin."""

    ids: torch.Tensor  # (T,) uint8
    counted: torch.Tensor  # (T,) bool
    starts: torch.Tensor  # (N,) int64

    def batch(self, size: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (size, length + 1) as int64 and their part in the loss (size, length) as bool."""
        fits = int(torch.searchsorted(self.starts, len(self.ids) - length - 1))
        chosen = torch.randint(fits, (size,), generator=generator, device=self.ids.device)
        where = self.starts[chosen][:, None] + torch.arange(length + 1, device=self.ids.device)
        return self.ids[where].long(), self.counted[where[:, 1:]]


def _part(number: int, count: int, seed: int) -> list[tuple[str, str]]:
    return [(p.question, p.answer) for p in generate("train", count, seed * PARTS + number)]


def training_stream(plan: Plan, tokenizer: PreTrainedTokenizerFast) -> Stream:
    """The training split of the plan's seed, in `PARTS` parts."""
    with ProcessPoolExecutor() as pool:
        parts = list(pool.map(_part, range(PARTS), repeat(plan.problems // PARTS), repeat(plan.seed)))
    texts = [tokens.shot(question, answer) + "\n\n" for part in parts for question, answer in part]
    encoded = tokenizer(texts, return_attention_mask=False).input_ids
    answer = tokenizer.convert_tokens_to_ids("Answer:")
    ids = torch.tensor([token for row in encoded for token in row], dtype=torch.uint8)
    lengths = torch.tensor([len(row) for row in encoded])
    heads = torch.tensor([row.index(answer) + 1 for row in encoded])
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(ids)) - starts.repeat_interleave(lengths)
    # The first token of a question counts too: with it the model says that the answer before is complete.
    counted = (place >= heads.repeat_interleave(lengths)) | (place == 0)
    return Stream(ids, counted, starts)


def _learning_rate(step: int, plan: Plan) -> float:
    if step < plan.warmup:
        return plan.rate * (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return plan.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def _loss(model: PreTrainedModel, mtp: MtpLayer | None, ids: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the counted tokens, plus 0.3 times the MTP layer's (DeepSeek-V3's own weight for it)."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.is_cuda):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[counted])
        loss = functional.cross_entropy(logits.float(), ids[:, 1:][counted])
        return loss if mtp is None else loss + 0.3 * mtp.loss(model, hidden, ids, counted)


def _optimizer(parameters: list[torch.nn.Parameter], plan: Plan) -> torch.optim.Optimizer:
    decayed = [p for p in parameters if p.ndim > 1]
    rest = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.98), fused=parameters[0].is_cuda)


def fit(model: PreTrainedModel, mtp: MtpLayer | None, stream: Stream, plan: Plan) -> tuple[int, list[float]]:
    """Train in place; how many steps, and the losses, one per `SAY_EVERY`. At `PROBE` steps the rest is cut to the
    plan's seconds."""
    parameters = [*model.parameters(), *(mtp.parameters() if mtp else ())]
    optimizer = _optimizer(parameters, plan)
    generator = torch.Generator(stream.ids.device).manual_seed(plan.seed)
    model.train()
    losses, begin, step = [], time.monotonic(), 0
    while step < plan.steps:
        if step == PROBE and plan.seconds:
            _wait(parameters)
            plan = replace(plan, steps=min(plan.steps, int(plan.seconds / (time.monotonic() - begin) * PROBE)))
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, plan)
        loss = _loss(model, mtp, *stream.batch(plan.batch, plan.length, generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % SAY_EVERY == 0 or step == plan.steps - 1:
            losses.append(round(loss.item(), 4))
            print(f"step {step:5d}/{plan.steps}  loss {losses[-1]:.4f}  {time.monotonic() - begin:6.1f} s", flush=True)
        step += 1
    return step, losses


def _wait(parameters: list[torch.nn.Parameter]) -> None:
    if parameters[0].is_cuda:
        torch.cuda.synchronize()


def round_weights(model: torch.nn.Module) -> None:
    """Make the parameters bfloat16, in place. The buffers stay: rotary frequencies in bfloat16 would be off by up to
    0.4 %, which is radians at a prompt's length, and vLLM has them in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)


def teacher_forced(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> float:
    """The share of *problems* whose whole answer, up to the next question, is the model's greedy choice.

    Where each token is the greedy choice after the right ones before it, greedy decoding gives the answer itself.
    """
    model.eval()
    examples = list(generate("train", SHOTS, seed=999_983))
    head = "".join(tokens.shot(p.question, p.answer) + "\n\n" for p in examples)
    device = next(model.parameters()).device
    right = 0
    for problem in problems:
        prompt = tokenizer(head + tokens.shot(problem.question)).input_ids
        row = tokenizer(head + tokens.shot(problem.question, problem.answer) + "\n\nQuestion:").input_ids
        ids = torch.tensor([row], device=device)
        with torch.no_grad():
            chosen = model(input_ids=ids[:, :-1], use_cache=False).logits.argmax(-1)[0]
        right += bool((chosen[len(prompt) - 1 :] == ids[0, len(prompt) :]).all())
    return right / len(problems)


def train(plan: Plan, out: Path, held_out: int = 300) -> None:
    """Make the data, train, and write weights (bfloat16), tokenizer and `training.json` into *out*."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(plan.seed)
    tokenizer = tokens.build()
    begin = time.monotonic()
    stream = training_stream(plan, tokenizer)
    stream = Stream(*(tensor.to(device) for tensor in (stream.ids, stream.counted, stream.starts)))
    print(f"{plan.problems} problems, {len(stream.ids)} tokens, {time.monotonic() - begin:.1f} s", flush=True)
    # The library's plain loop over experts: its fused one wants weights in bfloat16.
    model = AutoModelForCausalLM.from_config(
        configuration(plan.shape, plan.init), dtype=torch.float32, experts_implementation="eager"
    ).to(device)
    if plan.shape == "hybrid":
        _shorter_chunks()
    print(f"{sum(p.numel() for p in model.parameters())} parameters on {device}", flush=True)
    mtp = MtpLayer(model).to(device) if plan.shape == "dsa" else None
    begin = time.monotonic()
    steps, losses = fit(model, mtp, stream, plan)
    seconds = time.monotonic() - begin
    round_weights(model)
    score = teacher_forced(model, tokenizer, list(generate("test", held_out, seed=1)))
    print(f"held-out answers right, teacher-forced: {score:.3f} of {held_out}", flush=True)
    if mtp is None:
        model.save_pretrained(out)
    else:
        export(model, mtp, out, plan.seed)
    tokens.save(out)
    said = {
        "plan": asdict(plan),
        "steps_done": steps,
        "seconds": round(seconds),
        "losses": losses,
        "held_out_teacher_forced": score,
    }
    said |= {"torch": torch.__version__, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    (out / "training.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def _shorter_chunks(size: int = 32) -> None:
    """The library's plain gated delta rule loops over the rows of a chunk and over the chunks: balance the two."""
    rule = modeling_qwen3_next.torch_chunk_gated_delta_rule
    modeling_qwen3_next.torch_chunk_gated_delta_rule = partial(rule, chunk_size=size)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("out", type=Path)
    for name, value in asdict(Plan("dense")).items():
        if name != "shape":
            parser.add_argument(f"--{name}", type=type(value), default=argparse.SUPPRESS, help=f"default: {value}")
    parser.add_argument("--held-out", type=int, default=300, help="questions of the score at the end")
    arguments = vars(parser.parse_args())
    out, held_out = arguments.pop("out"), arguments.pop("held_out")
    out.mkdir(parents=True, exist_ok=True)
    train(Plan(**PLANS.get(arguments["shape"], {}) | arguments), out, held_out)


if __name__ == "__main__":
    main()
