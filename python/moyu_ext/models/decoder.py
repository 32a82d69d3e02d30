"""The module of a model that takes ids and a cache, and how its forward's arguments are read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cache import NAMES, argument


class Arguments:
    """Reads arguments of a decoder's forward, however they were passed."""

    def __init__(self, decoder: nn.Module) -> None:
        self._position = {
            name: i for i, name in enumerate(inspect.signature(decoder.forward).parameters)
        }

    def knows(self, name: str) -> bool:
        """Whether the forward has an argument of this name."""
        return name in self._position

    def get(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The argument `name`, or None."""
        if name in kwargs:
            return kwargs[name]
        position = self._position.get(name)
        return args[position] if position is not None and position < len(args) else None

    def cache(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The cache that the forward continues, or None."""
        found = (self.get(name, args, kwargs) for name in NAMES)
        return next((cache for cache in found if cache is not None), None)

    def shape(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """(batch, new tokens per sequence)."""
        tokens = self.get("input_ids", args, kwargs)
        if tokens is None:
            tokens = self.get("inputs_embeds", args, kwargs)
        return (1, tokens.shape[0]) if tokens.dim() == 1 else (tokens.shape[0], tokens.shape[1])


def find_decoder(model: nn.Module, stack: str) -> nn.Module | None:
    """The innermost module around the stack of layers whose forward takes ids and a cache."""
    parts = stack.split(".")
    for end in range(len(parts), -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        takes_ids = "input_ids" in inspect.signature(module.forward).parameters
        if takes_ids and argument(module) is not None:
            return module
    return None


def real_tokens(mask: Any, batch: int, length: int, past: int) -> Tensor | None:
    """Which of the new tokens are no padding: bool [batch, length], or None for all.

    `mask` is what the decoder got: [batch, past + length] (0 is padding), or the 4-D mask that
    static caches get (bool, or additive floats), where a token is real if it sees itself, or a
    dictionary of those. Anything else (flex attention's block masks) says nothing: all are real.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None
    # A cache of fixed size has columns past the new tokens; a sliding one lacks the first.
    start = past if mask.shape[-1] >= past + length else mask.shape[-1] - length
    if mask.dim() == 2:
        return (mask[:, start : start + length] != 0).expand(batch, length)
    if mask.dim() == 4:
        columns = mask[:, 0, -length:, start : start + length]
        seen = columns.diagonal(dim1=-2, dim2=-1)
        seen = seen if seen.dtype == torch.bool else seen > -1
        return seen.expand(batch, length)
    return None
