"""TDA: threshold-determined activation, token by token (arXiv 2406.12569, section 3.2.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.weights import MlpWeights
from .base import (
    Compiled,
    Method,
    TokenRule,
    check_choice,
    check_thresholds,
    describe,
    epsilon_of,
    epsilons,
)


@dataclass(frozen=True, eq=False, repr=False)
class TDA(Method):
    """Per token, neuron i is active where its score is not below the layer's epsilon.

    score="product": ||n_i(x)||_2 = |act(g_i) u_i| c_i (eq. 11-14), skips down. score="gate":
    |act(g_i)| (CATS' rule, arXiv 2404.08763), skips up and down. Where the MLP is ungated, both
    start from act(W_in x)_i. `thresholds`: Thresholds from `calibrate`, one epsilon for all layers,
    or one per layer, in units of the score. prefill=True: multi-token forwards obey the rule too.

    Raises ConfigurationError for NaN or negative epsilon, another score, a wrong layer count.
    """

    thresholds: Any
    score: str = "product"
    prefill: bool = False

    name = "tda"
    level = "token"

    def __post_init__(self) -> None:
        check_choice("score", self.score, ("product", "gate"))
        epsilons(self.thresholds)

    def __repr__(self) -> str:
        return f"TDA({describe(self.thresholds)}, score={self.score!r}, prefill={self.prefill})"

    @property
    def plan(self) -> str:
        """See `Method`."""
        return self.score

    def validate(self, layers: int, fingerprint: Callable[[], str]) -> None:
        """See `Method`."""
        check_thresholds(self.thresholds, self.score, layers, fingerprint)

    def bind(self, index: int, weights: MlpWeights) -> TokenRule:
        """See `Method`."""
        epsilon = epsilon_of(self.thresholds, index, weights.device)
        return _Threshold(self.score, epsilon, weights)


class _Threshold(TokenRule):
    def __init__(self, plan: str, epsilon: Tensor, weights: MlpWeights) -> None:
        self.plan = plan
        self.epsilon = epsilon
        self.scale = weights.column_norms() if plan == "product" else None

    def apply(self, x: Tensor, weights: MlpWeights) -> tuple[Tensor, Tensor]:
        return weights.by_threshold(x, self.plan, self.scale, self.epsilon)

    def compiled(self) -> Compiled:
        return Compiled(self.plan, self.scale, self.epsilon)

    def active(self, x: Tensor, gate: Tensor, product: Tensor) -> Tensor:
        score = gate.float().abs() if self.scale is None else product.float().abs() * self.scale
        # Written so that a NaN counts as active and reaches the output.
        return torch.logical_not(score < self.epsilon)
