"""Random weights that answer: each tensor from a seed made of its name, wide enough that outputs depend on inputs.

vLLM's own dummy weights are so small that a model repeats one token whatever its KV cache holds. This is a vLLM plugin
(group ``vllm.general_plugins``), so that every process of an engine has it; it takes the place of vLLM's loader for
``--load-format dummy``.
"""

from __future__ import annotations

import zlib
from typing import Any

STD = 0.12
ONES = ("norm.weight", "layernorm.weight", "k_scale", "v_scale", "q_scale", "prob_scale", "scale")
ZEROS = ("bias", "A_log")


def register() -> None:
    """What vLLM calls in each process."""
    from vllm.model_executor.model_loader import dummy_loader

    def load_weights(self: Any, model: Any, model_config: Any) -> None:
        fill(model)

    dummy_loader.DummyModelLoader.load_weights = load_weights


def fill(model: Any) -> None:
    """Fill all floating-point tensors of *model* in place; norms with 1, biases with 0."""
    import torch

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not torch.is_floating_point(tensor) or tensor.device.type == "meta":
                continue
            if ("norm" in name.rsplit(".", 2)[-2] and name.endswith("weight")) or name.endswith(ONES):
                tensor.fill_(1)
            elif name.endswith(ZEROS):
                tensor.zero_()
            else:
                _draw(name, tensor)


def _draw(name: str, tensor: Any) -> None:
    import torch

    generator = torch.Generator(device=tensor.device).manual_seed(zlib.crc32(name.encode()))
    drawn = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32)
    tensor.copy_((drawn * STD).to(tensor.dtype))
