"""SRIDA: a router in the loop, per sequence (arXiv 2406.12569, section 3.2.3, Figures 5-6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.weights import MlpWeights
from .base import Method, SequenceRule, check_choice, check_count, check_density
from .stda import contribution


@dataclass(frozen=True, eq=False)
class SRIDA(Method):
    """Per sequence, the top round(density * f) neurons (at least one) by a prompt statistic.

    score="contribution": s_i = sqrt(mean over prompt tokens of ||n_i(x_t)||_2^2).
    score="griffin": s_i = sqrt(sum over prompt tokens of (a_i / ||a||_2)^2) (GRIFFIN, arXiv
    2404.01365). Ties go to the lower index. A sequence runs dense until `min_prompt` tokens were
    seen. No calibration, no training.

    Raises ConfigurationError for a density outside (0, 1] or an unknown score.
    """

    density: float = 0.5
    score: str = "contribution"
    min_prompt: int = 8

    name = "srida"
    level = "sequence"

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_density(self.density))
        check_choice("score", self.score, ("contribution", "griffin"))
        check_count("min_prompt", self.min_prompt)

    @property
    def plan(self) -> str:
        """See `Method`."""
        return "given"

    def bind(self, index: int, weights: MlpWeights) -> SequenceRule:
        """See `Method`."""
        count = max(1, round(self.density * weights.f))
        norms = weights.column_norms() if self.score == "contribution" else None
        return _Top(count, norms)


class _Top(SequenceRule):
    def __init__(self, count: int, column_norms: Tensor | None) -> None:
        self.count = count
        self.column_norms = column_norms

    def statistic(self, a: Tensor) -> Tensor:
        if self.column_norms is not None:
            return contribution(a, self.column_norms)
        a = a.float()
        # A token whose activations are all zero ranks nothing, rather than spreading NaN.
        norm = torch.linalg.vector_norm(a, dim=-1, keepdim=True).clamp_min(1e-30)
        return (a / norm).square_()

    def choose(self, running_sum: Tensor, tokens: Tensor | int) -> Tensor:
        # The mean and the root keep the order, so the sum itself is ranked.
        order = torch.sort(running_sum, dim=-1, descending=True, stable=True).indices
        active = torch.zeros_like(running_sum, dtype=torch.bool)
        return active.scatter_(-1, order[..., : self.count], True)
