"""Dense: all neurons through the same operator, the baseline that the sparse methods compare to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.weights import MlpWeights
from .base import Compiled, Method, TokenRule


@dataclass(frozen=True, eq=False)
class Dense(Method):
    """Every neuron for every token: MLP(x) = sum_i n_i(x) (arXiv 2406.12569, eq. 13)."""

    name = "dense"
    level = "none"

    @property
    def plan(self) -> str:
        """See `Method`."""
        return "dense"

    def bind(self, index: int, weights: MlpWeights) -> TokenRule:
        """See `Method`."""
        return _AllNeurons()


class _AllNeurons(TokenRule):
    def apply(self, x: Tensor, weights: MlpWeights) -> tuple[Tensor, Tensor]:
        counts = torch.full((x.shape[0],), weights.f, dtype=torch.int32, device=x.device)
        return weights.given(x), counts

    def compiled(self) -> Compiled:
        return Compiled("given")

    def active(self, x: Tensor, gate: Tensor, product: Tensor) -> Tensor:
        return torch.ones_like(product, dtype=torch.bool)
