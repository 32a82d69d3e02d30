"""RIDA: a router in the loop over experts, per token (arXiv 2406.12569, section 2.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArtifactError, ConfigurationError
from ..models.weights import MlpWeights
from ..routers.experts import LayerExperts
from .base import Method, PredictedRule, TokenRule, check_density


@dataclass(frozen=True, eq=False, repr=False)
class RIDA(Method):
    """Per token, the neurons of the experts that a router scores highest (MoEfication).

    score(x) = W_2 tanh(W_1 x) + b, [E]; the round(density * E) experts (at least one) of largest
    score are active, ties going to the lower index. The set is known before the MLP: gate, up and
    down are skipped.

    experts: from `moyu_ext.calibration.split_experts.split_experts`, or `Experts.from_pretrained`.
    prefill: multi-token forwards obey the rule too.

    Raises ConfigurationError for a density outside (0, 1] or a wrong number of layers,
    ArtifactError for experts of another model.
    """

    experts: Any
    density: float = 0.5
    prefill: bool = False

    name = "rida"
    level = "token"

    def __post_init__(self) -> None:
        if not getattr(self.experts, "layers", None):
            raise ConfigurationError(
                f"experts is {self.experts!r}; expected Experts from split_experts() or "
                "Experts.from_pretrained(directory)"
            )
        object.__setattr__(self, "density", check_density(self.density))

    def __repr__(self) -> str:
        layers = self.experts.layers
        return (
            f"RIDA(<{len(layers)} layers, {layers[0].experts} experts by {self.experts.split}>, "
            f"density={self.density}, prefill={self.prefill})"
        )

    @property
    def plan(self) -> str:
        """See `Method`."""
        return "given"

    def validate(self, layers: int, fingerprint: Callable[[], str]) -> None:
        """See `Method`."""
        count = len(self.experts.layers)
        if count != layers:
            raise ConfigurationError(
                f"the experts have {count} layers, the model has {layers} MLPs; split this model"
            )
        actual = fingerprint()
        if actual != self.experts.fingerprint:
            raise ArtifactError(
                "the experts were split from another model: their fingerprint is "
                f"{self.experts.fingerprint}, this model's is {actual}; split this model"
            )

    def bind(self, index: int, weights: MlpWeights) -> TokenRule:
        """See `Method`."""
        return _Routed(self.experts.layers[index], self.density, weights)


class _Routed(PredictedRule):
    def __init__(self, layer: LayerExperts, density: float, weights: MlpWeights) -> None:
        device, dtype = weights.device, weights.dtype
        self.first = layer.first.to(device, dtype)
        self.second = layer.second.to(device, dtype)
        self.bias = layer.bias.to(device, dtype)
        self.assignment = layer.assignment.to(device, torch.long)
        self.added_bytes = self.first.nbytes + self.second.nbytes + self.bias.nbytes
        self.count = max(1, round(density * layer.experts))

    def choose(self, x: Tensor) -> Tensor:
        """x [rows, d] -> bool [rows, f]."""
        scores = F.linear(torch.tanh(F.linear(x, self.first)), self.second, self.bias).float()
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen = chosen.scatter(-1, order[:, : self.count], True)
        return chosen[:, self.assignment]
