"""The tiny models: one configuration per architecture that a fix concerns, each within 20 MB in bfloat16.

Sizes that vLLM's kernels fix (head sizes, MLA's latent, the indexer) are as in the real models; the rest is small.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from gsm8k.tokens import VOCABULARY

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "dtype": "bfloat16",
}

SHAPES: dict[str, dict[str, Any]] = {
    "dense": {
        "model_type": "qwen3",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    # A gated-delta-net layer to each layer of full attention. vLLM 0.20 loads no Qwen3-Next without a layer of experts,
    # and none with tied embeddings.
    "hybrid": {
        "model_type": "qwen3_next",
        "tie_word_embeddings": False,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "mlp_only_layers": [0, 1, 2],
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
    },
    # Trained as DeepSeek-V3 and written as DeepSeek-V3.2: see dsa.py. Few heads, as the indexer takes its share of the
    # 20 MB; queries, keys and values have one size, as flash attention wants it in training. There is no norm on the
    # queries' and keys' heads: at a range of 0.02 the attention would be flat (scores of 0.1) and its gradient tiny.
    "dsa": {
        "model_type": "deepseek_v3",
        "tie_word_embeddings": False,
        "initializer_range": 0.0625,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": 99,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 256,
    },
}


def configuration(name: str, initializer_range: float = 0.0) -> PretrainedConfig:
    """The configuration of one of `SHAPES`; *initializer_range* in place of its own, unless 0."""
    fields = _COMMON | SHAPES[name]
    if initializer_range:
        fields["initializer_range"] = initializer_range
    return AutoConfig.for_model(fields["model_type"], **{k: v for k, v in fields.items() if k != "model_type"})
