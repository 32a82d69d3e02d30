"""Small models of every family that the compiled decode step takes, and what it is measured by."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.patching.patch import report
from torch import Tensor
from transformers import PreTrainedModel

COMMON: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 101, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
# What tells a family from Llama, in sizes that a short text meets.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True},
    "Mistral": {"sliding_window": 9},
    "Ministral": {"sliding_window": 9},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {},
    "Gemma2": {"sliding_window": 9, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
    "Gemma3": {"sliding_window": 9, "query_pre_attn_scalar": 4},
    "SmolLM3": {"no_rope_layers": [1, 0, 1]},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 9},
    "Granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3,
    },
}  # fmt: skip


def family(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """A small random model with norms and biases that are not the identity."""
    config = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        kwargs = {**COMMON, **FAMILIES[name], **settings}
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, config)(**kwargs))
        for key, parameter in model.named_parameters():
            spread = 0.2 if parameter.dim() == 1 else 0.1
            if "embed" not in key:
                parameter.data += spread * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


@torch.no_grad()
def steps(model: PreTrainedModel, ids: Tensor, more: Tensor, cut: list[int], **kw: Any) -> Tensor:
    """Logits of `more` [batch, n] behind a prompt, fed in pieces of these lengths."""
    cache = cache_of(model(input_ids=ids, use_cache=True, **kw))
    found, at = [], 0
    for n in cut:
        past = passing(model, cache)
        found.append(model(input_ids=more[:, at : at + n], use_cache=True, **past).logits)
        at += n
    return torch.cat(found, 1)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def decoded(model: PreTrainedModel) -> int:
    used = report(model).step
    assert used.left == {}, used
    return used.tokens
