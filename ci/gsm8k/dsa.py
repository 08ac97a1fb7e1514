"""DeepSeek-V3.2's own parts for the tiny model: a trained multi-token-prediction layer, and the sparse indexer.

The library's code has no MTP layer and never trains the indexer, so:

- the model is trained as DeepSeek-V3, whose attention is the same while a context has fewer tokens than `index_topk`:
  then the indexer selects every one of them, whatever its weights are;
- the MTP layer is one more decoder layer of the same kind behind DeepSeek's two norms and projection, with a loss of
  its own, fed as vLLM feeds it: normed state of token t, embedding of token t+1 (zeros at position 0), position t;
- both get their names in DeepSeek-V3.2's checkpoints, the indexer with its initial, random weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

INDEXER = {"index_n_heads": 32, "index_head_dim": 128, "index_topk": 2048}
ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "ep_size": 1}  # unused, but read


class MtpLayer(nn.Module):
    """Predicts the token after the next; parameters named as in the checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        config = model.config
        self.enorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = DeepseekV3DecoderLayer(config, config.num_hidden_layers)
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=config.initializer_range)

    def loss(
        self, model: PreTrainedModel, hidden: torch.Tensor, ids: torch.Tensor, counted: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy of ids[t + 2] from *hidden* (B, L, H), of ids[:, :L]; *counted* (B, L) is of ids[:, 1:]."""
        after = model.get_input_embeddings()(ids[:, 1:-1])
        place = torch.arange(after.shape[1], device=ids.device)[None]
        after = after * (place > 0)[..., None]
        state = self.eh_proj(torch.cat([self.enorm(after), self.hnorm(hidden[:, :-1])], dim=-1))
        rotary = model.model.rotary_emb(state, position_ids=place)
        state = self.block(state, attention_mask=None, position_ids=place, position_embeddings=rotary)
        wanted = counted[:, 1:]
        logits = model.lm_head(self.norm(state))[wanted]
        return functional.cross_entropy(logits.float(), ids[:, 2:][wanted])


def export(model: PreTrainedModel, mtp: MtpLayer, out: Path, seed: int) -> None:
    """Write *model* and *mtp* into *out* as a DeepSeek-V3.2 checkpoint in bfloat16."""
    config, last = model.config, model.config.num_hidden_layers
    weights = dict(model.state_dict())
    for name, tensor in mtp.state_dict().items():
        place = "shared_head.norm.weight" if name == "norm.weight" else name.removeprefix("block.")
        weights[f"model.layers.{last}.{place}"] = tensor
    weights[f"model.layers.{last}.embed_tokens.weight"] = model.get_input_embeddings().weight
    weights[f"model.layers.{last}.shared_head.head.weight"] = model.lm_head.weight
    generator = torch.Generator().manual_seed(seed)
    for layer in range(last + 1):
        weights |= _indexer(f"model.layers.{layer}.self_attn.indexer", config, generator)
    plain = {name: tensor.detach().cpu().to(torch.bfloat16).clone() for name, tensor in weights.items()}
    save_file(plain, out / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads(config.to_json_string()) | INDEXER | ROUTING | {"dtype": "bfloat16"}
    fields |= {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "num_nextn_predict_layers": 1}
    (out / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _indexer(prefix: str, config: object, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights of one indexer, of the library's shapes."""
    hidden, heads, size = config.hidden_size, INDEXER["index_n_heads"], INDEXER["index_head_dim"]  # type: ignore[attr-defined]
    rank: int = config.q_lora_rank  # type: ignore[attr-defined]
    shapes = {"wq_b": (heads * size, rank), "wk": (size, hidden), "weights_proj": (heads, hidden)}
    made = {
        f"{prefix}.{name}.weight": torch.randn(shape, generator=generator) * shape[1] ** -0.5
        for name, shape in shapes.items()
    }
    return made | {f"{prefix}.k_norm.weight": torch.ones(size), f"{prefix}.k_norm.bias": torch.zeros(size)}
