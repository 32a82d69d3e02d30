"""`load`: a model and its tokenizer from a directory, a hub id or a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigurationError


def load(
    path: str | Path,
    *,
    bits: int | Mapping[str, int] | None = None,
    group: int | None = None,
    dtype: torch.dtype | str = "auto",
    progress: bool = True,
) -> tuple[Any, Any]:
    """(model, tokenizer), in evaluation mode.

    path: a Hugging Face directory or hub id, whose linear layers are packed while they are read
    where `bits` says so (as `moyu_ext.pack` takes it; memory peaks at the packed model and one
    layer), one that a packed model was saved to, or a .gguf file (`load_gguf`: its codes as they
    are). dtype: of what is not packed; "auto" is the checkpoint's, and bfloat16 for a GGUF file.

    Raises ConfigurationError, ArtifactError and UnsupportedModelError as these do.
    """
    if str(path).endswith(".gguf"):
        if bits is not None:
            raise ConfigurationError(
                f"bits is {bits!r}, but {path} has its own codes, which load keeps; leave bits out"
            )
        from .gguf import load_gguf

        exact = torch.bfloat16 if isinstance(dtype, str) else dtype
        return load_gguf(path, exact, progress=progress)
    import transformers

    extra: dict[str, Any] = {}
    from .quantizer import PackConfig  # also registers it, for directories of packed models

    if bits is not None:
        extra["quantization_config"] = PackConfig(
            dict(bits) if isinstance(bits, Mapping) else bits, group
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **extra)
    return model.eval(), tokenizer
