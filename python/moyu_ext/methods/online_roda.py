"""OnlineRODA: RODA whose predictor follows the running sequence (arXiv 2406.12569, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.weights import MlpWeights
from ..routers.router import LayerRouter
from .base import AdaptiveRule, Method, check_count, check_density
from .roda import check_router, check_router_fits

PRIOR = 32.0
"""Tokens that the training text counts as."""
_RARE = 1e-3  # no neuron is taken for rarer, or for less often silent, than this


@dataclass(frozen=True, eq=False, repr=False)
class OnlineRODA(Method):
    """Per token, the neurons that RODA's predictor names once it knows how often each is active in
    this sequence.

    score_i(x) + logit(p_i') - logit(p_i) >= threshold, where p_i is how often neuron i was active
    in training and p_i' = (k_i + m p_i) / (t + m): it was active on k_i of the t tokens of this
    sequence that ran with all neurons (m = 32). Those are the prompt, and every `refresh`-th
    decoded token. The shift is what a logistic classifier needs where the classes' frequencies
    change (Saerens et al. 2002); no weight is touched, the state hangs on the cache.

    router, density: as for RODA. refresh: 1 or more, where 1 leaves nothing out; None: learn from
    the prompt alone. The refreshed tokens count with all their neurons in the realised density.

    Raises ConfigurationError for values outside these, ArtifactError for a router of another model.
    """

    router: Any
    density: float | None = None
    refresh: int | None = 32
    min_prompt: int = 1

    name = "roda-online"
    level = "sequence"

    def __post_init__(self) -> None:
        check_router(self.router)
        if self.density is not None:
            object.__setattr__(self, "density", check_density(self.density))
        if self.refresh is not None:
            check_count("refresh", self.refresh)
        check_count("min_prompt", self.min_prompt)

    def __repr__(self) -> str:
        count = len(self.router.layers)
        return f"OnlineRODA(<{count} layers>, density={self.density}, refresh={self.refresh})"

    @property
    def plan(self) -> str:
        """See `Method`."""
        return "given"

    def validate(self, layers: int, fingerprint: Callable[[], str]) -> None:
        """See `Method`."""
        check_router_fits(self.router, layers, fingerprint)

    def bind(self, index: int, weights: MlpWeights) -> AdaptiveRule:
        """See `Method`."""
        return _Shifted(self.router.layers[index], self.density, weights)


class _Shifted(AdaptiveRule):
    def __init__(self, layer: LayerRouter, density: float | None, weights: MlpWeights) -> None:
        device, dtype = weights.device, weights.dtype
        self.first = layer.first.to(device, dtype)
        self.second = layer.second.to(device, dtype)
        threshold = layer.threshold if density is None else layer.threshold_for(density)
        self.rate = layer.rate.to(device, torch.float32).clamp(_RARE, 1 - _RARE)
        # All that does not depend on the token or the sequence.
        self.bias = layer.bias.to(device, torch.float32) - threshold - self.rate.logit()
        read = (self.first, self.second, self.bias, self.rate)
        self.added_bytes = sum(tensor.nbytes for tensor in read)
        self.norms = weights.column_norms()
        self.epsilon = layer.epsilon

    def statistic(self, a: Tensor) -> Tensor:
        return (a.float().abs() * self.norms >= self.epsilon).float()

    def active(self, x: Tensor, running_sum: Tensor, tokens: Tensor) -> Tensor:
        seen = (running_sum + PRIOR * self.rate) / (tokens + PRIOR)
        scores = F.linear(F.linear(x, self.first), self.second).float() + self.bias
        # Written so that a NaN counts as active and reaches the output.
        return torch.logical_not(scores + seen.clamp(_RARE, 1 - _RARE).logit() < 0)
