"""Engines of tiny models: their files, their options, and greedy answers to prompts of token ids.

python tests/gpu/engine.py JOB.json RESULT.json      an engine in a process of its own, for a reference
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_case import Context, Defect

VOCABULARY = 1024
GIB = 2**30
COMMON = {"dtype": "bfloat16", "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
          "hidden_act": "silu", "initializer_range": 0.02, "tie_word_embeddings": False,
          "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
DENSE = COMMON | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rope_theta": 10000.0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "eagle": DENSE | {"num_hidden_layers": 1},
    # DeepSeek-V3.2: sparse MLA with its indexer, a dense and a MoE layer, one MTP layer.
    "deepseek": COMMON | {
        "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "hidden_size": 512,
        "intermediate_size": 512, "moe_intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 16,
        "num_key_value_heads": 16, "n_shared_experts": 1, "n_routed_experts": 8, "ep_size": 1,
        "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 256, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "qk_nope_head_dim": 128, "topk_method": "noaux_tc", "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_layer_freq": 1, "first_k_dense_replace": 1, "norm_topk_prob": True,
        "scoring_func": "sigmoid", "rope_theta": 10000, "rope_scaling": None, "attention_bias": False,
        "index_head_dim": 128, "index_n_heads": 32, "index_topk": 2048, "num_nextn_predict_layers": 1,
    },
    # MiniMax-Text-01: three layers of lightning attention, one of softmax attention.
    "minimax": COMMON | {
        "architectures": ["MiniMaxText01ForCausalLM"], "model_type": "minimax", "hidden_size": 512,
        "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 64, "rotary_dim": 64, "attn_type_list": [0, 0, 0, 1], "num_local_experts": 1,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "num_experts_per_tok": 1, "block_size": 256, "rope_theta": 10000, "sliding_window": None, "postnorm": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **{f"{kind}_{name}_factor": 1.0 for kind in ("linear_attn", "full_attn", "mlp") for name in ("alpha", "beta")},
    },
}  # fmt: skip


def model_folder(name: str, shared: Path) -> Path:
    """config.json and a word-level tokenizer ("t0" to "t1023"); the weights are drawn by the plugin."""
    folder = shared / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", MODELS[name])
    words = {f"t{number}": number for number in range(VOCABULARY)}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
    }  # fmt: skip
    _write(folder / "tokenizer.json", tokenizer)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "t0", "eos_token": "t1", "unk_token": "t0"}
    _write(folder / "tokenizer_config.json", settings | {"model_max_length": 4096})
    return folder


def _write(path: Path, value: object) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")  # sides that run at once write the same file
    beside.write_text(json.dumps(value), encoding="utf-8")
    beside.replace(path)


def options(context: Context, model: str, *, graphs: tuple[int, ...] = (), kv_gib: float = 1, **more: Any) -> dict:
    """Arguments of vLLM's engine; *graphs* are the batch sizes (in tokens) of full decode graphs, none: eager.

    The KV cache's size is given, so that an engine does not measure the free memory while others take theirs.
    """
    chosen: dict[str, Any] = {
        "model": str(model_folder(model, context.shared)), "load_format": "dummy", "seed": 0,
        "max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 2048, "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": int(kv_gib * GIB), "disable_log_stats": True,
    }  # fmt: skip
    if graphs:
        sizes = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": list(graphs)}
        chosen["compilation_config"] = {"mode": 0, **sizes}
    else:
        chosen["enforce_eager"] = True
    return chosen | more


def start(chosen: Mapping[str, Any]) -> Any:
    """An engine in this process."""
    from vllm import LLM

    return LLM(skip_tokenizer_init=True, **chosen)


def answer(engine: Any, prompts: list[list[int]], length: int, top: int = 0) -> list[dict[str, Any]]:
    """Greedy tokens of each prompt; with *top*, the log-probabilities of so many candidates at each place."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False, logprobs=top or None)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    return [_kept(output.outputs[0]) for output in outputs]


def _kept(output: Any) -> dict[str, Any]:
    kept: dict[str, Any] = {"tokens": list(output.token_ids)}
    if output.logprobs:
        kept["top"] = [{str(token): entry.logprob for token, entry in place.items()} for place in output.logprobs]
    return kept


def phases(engine: Any, work: list[dict[str, Any]], top: int = 0) -> list[list[dict[str, Any]]]:
    """The answers to one list of prompts after the other."""
    return [answer(engine, phase["prompts"], phase["length"], top) for phase in work]


def reference(context: Context, chosen: Mapping[str, Any], work: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The same in a process of its own, with log-probabilities; raises RuntimeError with the end of its output."""
    job, result = context.scratch / "reference.json", context.scratch / "reference-result.json"
    job.write_text(json.dumps({"options": dict(chosen), "phases": work}), encoding="utf-8")
    command = [sys.executable, str(Path(__file__).resolve()), str(job), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not result.is_file():
        raise RuntimeError(f"the reference engine ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    answers: list[list[dict[str, Any]]] = json.loads(result.read_text(encoding="utf-8"))
    return answers


# bf16 rounds to 8 bits: logits of batches of different shape differ by about this much (nats).
NEAR_TIE = 0.25


def compare(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare token by token; an answer may leave the reference's only where two candidates were nearly even.

    From there on the two have different texts, and nothing more is compared. Raises `Defect` at any other difference.
    """
    equal, compared, ties = 0, 0, []
    for row, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        pairs = list(zip(ours["tokens"], theirs["tokens"], strict=True))
        place = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
        compared += len(pairs) if place is None else place + 1
        if place is None:
            equal += 1
            continue
        candidates = theirs["top"][place]
        best, ours_there = candidates[str(pairs[place][1])], candidates.get(str(pairs[place][0]))
        gap = None if ours_there is None else round(best - ours_there, 3)
        if gap is None or gap > NEAR_TIE:
            raise Defect(f"answer {row} differs at token {place}: {pairs[place]}, log-probabilities {gap} apart")
        ties.append(gap)
    return {"answers": len(found), "equal": equal, "left_at_near_ties": ties, "tokens_compared": compared}


def main() -> None:
    """A reference engine: read the job, answer, write."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    answers = phases(start(job["options"]), job["phases"], top=5)
    Path(sys.argv[2]).write_text(json.dumps(answers), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
