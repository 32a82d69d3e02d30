"""RODA: a router off the loop, per token (arXiv 2406.12569, section 1; DejaVu, 2310.17157)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArtifactError, ConfigurationError
from ..models.weights import MlpWeights
from ..routers.router import LayerRouter
from .base import Method, PredictedRule, TokenRule, check_density


@dataclass(frozen=True, eq=False, repr=False)
class RODA(Method):
    """Per token, the neurons that a predictor trained offline names from the MLP's input x.

    score_i(x) = (W_2 W_1 x + b)_i, W_1 [r, d], W_2 [f, r]; neuron i is active where its score is at
    least the layer's threshold. The set is known before the MLP: gate, up and down are skipped.

    router: from `moyu_ext.calibration.train_router.train_router`, or `Router.from_pretrained`.
    density: None for the thresholds that the router was trained to (a target recall); a number in
    (0, 1] for thresholds that gave this mean density on validation text.
    prefill: multi-token forwards obey the rule too.

    Raises ConfigurationError for a density outside (0, 1] or a wrong number of layers,
    ArtifactError for a router of another model.
    """

    router: Any
    density: float | None = None
    prefill: bool = False

    name = "roda"
    level = "token"

    def __post_init__(self) -> None:
        check_router(self.router)
        if self.density is not None:
            object.__setattr__(self, "density", check_density(self.density))

    def __repr__(self) -> str:
        layers = self.router.layers
        ranks = sorted({layer.rank for layer in layers})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"
        return (
            f"RODA(<{len(layers)} layers, rank {shown}>, density={self.density}, "
            f"prefill={self.prefill})"
        )

    @property
    def plan(self) -> str:
        """See `Method`."""
        return "given"

    def validate(self, layers: int, fingerprint: Callable[[], str]) -> None:
        """See `Method`."""
        check_router_fits(self.router, layers, fingerprint)

    def bind(self, index: int, weights: MlpWeights) -> TokenRule:
        """See `Method`."""
        return _Predicted(self.router.layers[index], self.density, weights)


class _Predicted(PredictedRule):
    def __init__(self, layer: LayerRouter, density: float | None, weights: MlpWeights) -> None:
        device, dtype = weights.device, weights.dtype
        self.first = layer.first.to(device, dtype)
        self.second = layer.second.to(device, dtype)
        self.bias = layer.bias.to(device, torch.float32)
        self.added_bytes = self.first.nbytes + self.second.nbytes + self.bias.nbytes
        threshold = layer.threshold if density is None else layer.threshold_for(density)
        self.threshold = torch.tensor([threshold], dtype=torch.float32, device=device)

    def choose(self, x: Tensor) -> Tensor:
        """x [rows, d] -> bool [rows, f]; a NaN counts as active and so reaches the output."""
        scores = F.linear(F.linear(x, self.first), self.second).float() + self.bias
        return torch.logical_not(scores < self.threshold)


def check_router(router: Any) -> None:
    """Raise ConfigurationError unless it is a router, as far as can be told without a model."""
    if not getattr(router, "layers", None):
        raise ConfigurationError(
            f"router is {router!r}; expected a Router from train_router() or "
            "Router.from_pretrained(directory)"
        )


def check_router_fits(router: Any, layers: int, fingerprint: Callable[[], str]) -> None:
    """Raise ConfigurationError unless the router is for this number of layers, ArtifactError where
    it was trained on another model."""
    count = len(router.layers)
    if count != layers:
        raise ConfigurationError(
            f"the router has {count} layers, the model has {layers} MLPs; train a router on "
            "this model"
        )
    actual = fingerprint()
    if actual != router.fingerprint:
        raise ArtifactError(
            "the router was trained on another model: its fingerprint is "
            f"{router.fingerprint}, this model's is {actual}; train one on this model"
        )
