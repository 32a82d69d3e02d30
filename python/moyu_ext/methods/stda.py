"""STDA: one set per sequence, from a threshold on the prompt (arXiv 2406.12569, section 3.2.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.weights import MlpWeights
from .base import (
    Method,
    SequenceRule,
    check_count,
    check_thresholds,
    describe,
    epsilon_of,
    epsilons,
)


@dataclass(frozen=True, eq=False, repr=False)
class STDA(Method):
    """Per sequence, neuron i is active where s_i >= epsilon, for all tokens generated.

    s_i = sqrt(mean over prompt tokens t of ||n_i(x_t)||_2^2), ||n_i|| = |a_i| c_i (eq. 12).
    `thresholds` as for TDA, in units of the neuron norm. A sequence runs dense until `min_prompt`
    tokens were seen.

    Raises ConfigurationError for NaN or negative epsilon, another score, a wrong layer count.
    """

    thresholds: Any
    min_prompt: int = 8

    name = "stda"
    level = "sequence"

    def __post_init__(self) -> None:
        check_count("min_prompt", self.min_prompt)
        epsilons(self.thresholds)

    def validate(self, layers: int, fingerprint: Callable[[], str]) -> None:
        """See `Method`."""
        check_thresholds(self.thresholds, "product", layers, fingerprint)

    def __repr__(self) -> str:
        return f"STDA({describe(self.thresholds)}, min_prompt={self.min_prompt})"

    @property
    def plan(self) -> str:
        """See `Method`."""
        return "given"

    def bind(self, index: int, weights: MlpWeights) -> SequenceRule:
        """See `Method`."""
        epsilon = epsilon_of(self.thresholds, index, weights.device)
        return _RootMeanSquare(weights.column_norms(), epsilon)


class _RootMeanSquare(SequenceRule):
    def __init__(self, column_norms: Tensor, epsilon: Tensor) -> None:
        self.column_norms = column_norms
        self.epsilon = epsilon

    def statistic(self, a: Tensor) -> Tensor:
        return contribution(a, self.column_norms)

    def choose(self, running_sum: Tensor, tokens: Tensor | int) -> Tensor:
        return torch.logical_not((running_sum / tokens).sqrt() < self.epsilon)


def contribution(a: Tensor, column_norms: Tensor) -> Tensor:
    """||n_i(x)||_2^2 = (a_i c_i)^2, float32 [n, f]."""
    return (a * column_norms).square_()
