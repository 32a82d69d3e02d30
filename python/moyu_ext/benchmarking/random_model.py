"""A whole model of a named geometry with random weights, built without initialising it twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel

from ..errors import ConfigurationError
from .geometries import Geometry
from .machine import require_memory
from .weights import Filler

_DEVIATION = 0.02  # what these models are initialised with


def random_model(
    geometry: Geometry,
    dtype: torch.dtype = torch.bfloat16,
    *,
    layers: int | None = None,
    positions: int = 4096,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """A Llama (or OPT, where the MLP is ungated) in evaluation mode, its weights in `dtype`.

    layers: fewer than the geometry has, to try something quickly. Llama-2-7B in bfloat16 takes
    13.5 GB. Raises ConfigurationError where the host has not that much memory, or the geometry is
    that of an MLP only.
    """
    config = _config(geometry, layers, positions)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    size = weight_bytes(model)
    # One W_down more while it is patched, and room for the cache, the logits, the memory that tells
    # the bandwidth, and a twelfth of the model for qRIDA's shadows.
    spare = geometry.d * geometry.f * dtype.itemsize + (1 << 30) + size // 12
    if torch.device(device).type == "cpu":
        require_memory(size + spare, f"{geometry.name} with {config.num_hidden_layers} layers")
    # The values of buffers are lost on meta. They do not depend on the number of layers.
    config.num_hidden_layers, kept = 0, config.num_hidden_layers
    buffers = dict(AutoModelForCausalLM.from_config(config, dtype=dtype).named_buffers())
    config.num_hidden_layers = kept
    model = model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        filler = Filler(dtype, seed, device)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                filler.fill(parameter.data, _DEVIATION)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.eval()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters, each counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _config(geometry: Geometry, layers: int | None, positions: int) -> LlamaConfig | OPTConfig:
    g = geometry
    if g.layers is None:
        raise ConfigurationError(
            f"geometry {g.name} is that of one MLP; a whole model needs one that is named, such as "
            "llama-2-7b"
        )
    common: dict[str, Any] = {
        "vocab_size": g.vocabulary,
        "hidden_size": g.d,
        "num_hidden_layers": layers or g.layers,
        "num_attention_heads": g.heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": g.tied,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if g.gated:
        return LlamaConfig(
            **common,
            intermediate_size=g.f,
            num_key_value_heads=g.kv_heads,
            hidden_act=g.activation,
        )
    return OPTConfig(
        **common, ffn_dim=g.f, word_embed_proj_dim=g.d, activation_function=g.activation
    )
