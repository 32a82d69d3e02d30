"""Fixtures for every test: the data folder, and tiny models with seeded random weights."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

# name -> (class prefix, settings beside the common ones)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "llama-bias": ("Llama", {"num_key_value_heads": 2, "mlp_bias": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 16}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    "gemma": ("Gemma", {"num_key_value_heads": 2, "head_dim": 8}),
    "llama-relu": ("Llama", {"num_key_value_heads": 2, "hidden_act": "relu"}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 32}),
}


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """MOYU_DATA, or ../shared/data beside the repository; skips where neither is there."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MOYU_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set MOYU_DATA to the folder with models/ and text/")
    return folder


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """tiny(name, seed=0, dtype=torch.float32, **config) -> a new tiny model in eval mode.

    Names: those of FAMILIES. Hidden size 32, 96 neurons, 3 layers, vocabulary 101, positions 256.
    """

    def make(
        name: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
    ) -> PreTrainedModel:
        prefix, extra = FAMILIES[name]
        settings: dict[str, Any] = {
            "vocab_size": 101,
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            # Wide enough that neurons differ and greedy text does not get stuck.
            "initializer_range": 0.25,
            "init_std": 0.25,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        }
        kwargs = {**settings, **extra, **config}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(transformers, f"{prefix}ForCausalLM")(
                getattr(transformers, f"{prefix}Config")(**kwargs)
            )
            for parameter in model.parameters():  # biases start at zero
                if parameter.dim() == 1 and not bool(parameter.any()):
                    torch.nn.init.normal_(parameter, std=0.1)
        model.generation_config.eos_token_id = None
        return model.to(dtype).eval()

    return make


@pytest.fixture
def prompt() -> Callable[..., torch.Tensor]:
    """prompt(length, batch=1, seed=0) -> ids [batch, length] without the pad and bos tokens."""

    def make(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randint(3, 101, (batch, length), generator=g)

    return make
