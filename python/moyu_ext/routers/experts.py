"""`Experts`: the groups of neurons and the router of RIDA, one per layer, and their files."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _artifact
from ..errors import ConfigurationError

FORMAT_VERSION = 1
_AGAIN = "split the model again (`moyu split-experts MODEL`)"
_TENSORS = ("assignment", "first", "second", "bias")


@dataclass(frozen=True, repr=False)
class LayerExperts:
    """Experts of one layer and the router that scores them: second tanh(first x) + bias.

    assignment: int32 [f], the expert of each neuron; first: [h, d]; second: [E, h]; bias: [E].
    `captured`: share of the squared neuron norms inside the half of the experts that the router
    scores highest, on held-out text; `oracle`: inside the best half; `chance`: inside half of the
    neurons at random.
    """

    assignment: Tensor
    first: Tensor
    second: Tensor
    bias: Tensor
    captured: float
    oracle: float
    chance: float

    def __repr__(self) -> str:
        d, f = self.first.shape[1], len(self.assignment)
        return (
            f"LayerExperts(<{self.experts} experts, d {d}, f {f}>, captured={self.captured:.4g}, "
            f"oracle={self.oracle:.4g}, chance={self.chance:.4g})"
        )

    @property
    def experts(self) -> int:
        """E."""
        return self.second.shape[0]

    def scores(self, x: Tensor) -> Tensor:
        """x [..., d] -> float32 [..., E]."""
        return torch.tanh(x.float() @ self.first.t()) @ self.second.t() + self.bias


@dataclass(frozen=True, repr=False)
class Experts:
    """The experts of one model, layer by layer; `split` says how neurons were grouped."""

    layers: tuple[LayerExperts, ...]
    fingerprint: str
    split: str
    tokens: int
    seed: int = 0
    model: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ConfigurationError("experts: expected at least one layer, got none")

    def __repr__(self) -> str:
        return (
            f"Experts(<{len(self.layers)} layers, {self.layers[0].experts} experts by "
            f"{self.split}>, model={self.model!r}, fingerprint={self.fingerprint!r})"
        )

    def mean(self, field: str) -> float:
        """Mean over layers of a number of `LayerExperts`, such as "captured"."""
        return sum(getattr(layer, field) for layer in self.layers) / len(self.layers)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `moyu_config.json` and `moyu.safetensors`, each atomically.

        Raises ArtifactError where thresholds or a router are saved in the directory.
        """
        _artifact.save_layers(directory, "experts", self, _TENSORS)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Experts:
        """Read what `save_pretrained` wrote.

        Raises ArtifactError where a file is missing, truncated, corrupt, from another save, or of
        a format that this version does not read, ConfigurationError where `directory` is no path.
        """
        return _artifact.load_layers(
            directory, "experts", cls, LayerExperts, _TENSORS, FORMAT_VERSION, _AGAIN
        )
