"""Lossless: every neuron that can change the output, which is what `patch` does by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models.weights import MlpWeights
from ..reference import ACTIVATIONS
from .base import Method, TokenRule
from .dense import Dense
from .tda import TDA

# Below this an activation, times any weight, is far below the rounding of a sum.
_ZERO = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Lossless(Method):
    """All neurons, or where the activation is exactly zero for much of its input (ReLU and its
    square), all but those whose activation is: nothing but rounding changes."""

    name = "lossless"
    level = "token"

    @property
    def plan(self) -> str:
        """See `Method`."""
        return "gate"

    def bind(self, index: int, weights: MlpWeights) -> TokenRule:
        """See `Method`."""
        if has_zeros(weights.activation):
            return TDA(_ZERO, score="gate").bind(index, weights)
        return Dense().bind(index, weights)


def has_zeros(activation: str) -> bool:
    """Whether this key of `reference.ACTIVATIONS` gives 0 for all of what lies below 0."""
    below = torch.linspace(-8, -0.125, 64)
    return not ACTIVATIONS[activation](below).any()
