"""`Router`: the trained predictors of RODA, one per layer, and their files."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import Tensor

from .. import _artifact
from ..errors import ConfigurationError

FORMAT_VERSION = 1
QUANTILES = 201  # of the scores, kept so that a density can be asked for later
_AGAIN = "train the router again (`moyu train-router MODEL`)"
_TENSORS = ("first", "second", "bias", "quantiles", "rate")


@dataclass(frozen=True, repr=False)
class LayerRouter:
    """The predictor of one layer: scores(x) = second (first x) + bias, a logit per neuron.

    first: [r, d]; second: [f, r]; bias: [f]; quantiles: `QUANTILES` evenly spaced quantiles of the
    scores on validation text; rate: [f], how often each neuron was active in training; all float32.
    Neuron i is active in truth where ||n_i(x)|| >= epsilon, and predicted active where its score
    is at least `threshold`. `recall`, `precision` and `density` are those at the threshold on
    held-out text; `energy` the share of the active neurons' squared norms that was found; `labels`
    the share of neurons that are active in truth.
    """

    first: Tensor
    second: Tensor
    bias: Tensor
    quantiles: Tensor
    rate: Tensor
    epsilon: float
    threshold: float
    recall: float
    precision: float
    density: float
    energy: float
    labels: float

    def __repr__(self) -> str:
        (f, rank), d = self.second.shape, self.first.shape[1]
        return (
            f"LayerRouter(<rank {rank}, d {d}, f {f}>, recall={self.recall:.4g}, "
            f"precision={self.precision:.4g}, density={self.density:.4g})"
        )

    @property
    def rank(self) -> int:
        """r, the width between the two linear layers."""
        return self.first.shape[0]

    def scores(self, x: Tensor) -> Tensor:
        """x [..., d] -> float32 [..., f], computed in float32."""
        return x.float() @ self.first.t() @ self.second.t() + self.bias

    def threshold_for(self, density: float) -> float:
        """The score that a share `density` of the scores on validation text reached."""
        place = (1 - density) * (len(self.quantiles) - 1)
        low = int(place)
        high = min(low + 1, len(self.quantiles) - 1)
        a, b = self.quantiles[low].item(), self.quantiles[high].item()
        return a + (b - a) * (place - low)


@dataclass(frozen=True, repr=False)
class Router:
    """The routers of one model, layer by layer, and how they were trained.

    cett: the labels are the neurons that TDA keeps at this target; recall: the target for choosing
    the thresholds; tokens: number trained on; `fingerprint` that of the model's weights.
    """

    layers: tuple[LayerRouter, ...]
    fingerprint: str
    cett: float
    recall: float
    tokens: int
    seed: int = 0
    model: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ConfigurationError("router: expected at least one layer, got none")

    def __repr__(self) -> str:
        ranks = sorted({layer.rank for layer in self.layers})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"
        return (
            f"Router(<{len(self.layers)} layers, rank {shown}>, cett={self.cett}, "
            f"recall={self.recall}, model={self.model!r}, fingerprint={self.fingerprint!r})"
        )

    def mean(self, field: str) -> float:
        """Mean over layers of a number of `LayerRouter`, such as "recall"."""
        return sum(getattr(layer, field) for layer in self.layers) / len(self.layers)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `moyu_config.json` and `moyu.safetensors`, each atomically.

        Raises ArtifactError where thresholds or experts are saved in the directory.
        """
        _artifact.save_layers(directory, "router", self, _TENSORS)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Router:
        """Read what `save_pretrained` wrote.

        Raises ArtifactError where a file is missing, truncated, corrupt, from another save, or of
        a format that this version does not read, ConfigurationError where `directory` is no path.
        """
        return _artifact.load_layers(
            directory, "router", cls, LayerRouter, _TENSORS, FORMAT_VERSION, _AGAIN
        )
