"""Which weights a model has, in a short hash: what artefacts of one model are recognised by."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

_SAMPLES_PER_TENSOR = 256


def fingerprint(model: nn.Module) -> str:
    """A short hash of the weights of a model's layers.

    Hashed are name, shape and up to 256 evenly spaced values, rounded to bfloat16, of each
    parameter below a numbered module (`layers.0.…`), or of all parameters if none is numbered. So
    it is the same before and after `patch`, with and without a language-model head or a resized
    vocabulary, and for float32 and bfloat16 copies of one checkpoint.

    Raises UnsupportedModelError for parameters without values (meta, offloaded).
    """
    everything = dict(model.named_parameters())
    numbered = {_below_number(name): p for name, p in everything.items() if _below_number(name)}
    digest = hashlib.sha256()
    for name, parameter in sorted((numbered or everything).items()):
        if parameter.device.type == "meta":
            raise UnsupportedModelError(
                f"parameter {name} is on the meta device and has no values; load the whole model "
                "into memory (no device_map with offloading)"
            )
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        digest.update(_sample(parameter.detach()))
    return digest.hexdigest()[:32]


def _below_number(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `3.mlp.up_proj.weight`; "" without a number."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[first:])


def _sample(tensor: Tensor) -> bytes:
    count = min(tensor.numel(), _SAMPLES_PER_TENSOR)
    flat = torch.arange(count, device=tensor.device) * tensor.numel() // max(count, 1)
    # Logical positions, never memory order: a patched W_down has other strides.
    values = tensor[torch.unravel_index(flat, tensor.shape)] if tensor.dim() else tensor
    return values.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes()
