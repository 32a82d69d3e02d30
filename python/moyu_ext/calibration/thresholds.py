"""Calibrated thresholds: what `calibrate` returns, what `TDA` and `STDA` take, and their files."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _artifact
from ..errors import ArtifactError, ConfigurationError

FORMAT_VERSION = 1
_AGAIN = "calibrate again"


@dataclass(frozen=True)
class LayerThreshold:
    """One layer's threshold and what it did on the calibration tokens.

    `epsilon`: in units of the score; `density`: active neurons / f; `cett` (mean), `p50`, `p95`
    and `max`: CETT(x; epsilon) (arXiv 2406.12569, eq. 14) over the calibration tokens.
    """

    epsilon: float
    density: float
    cett: float
    p50: float
    p95: float
    max: float


@dataclass(frozen=True, repr=False)
class Thresholds:
    """Thresholds of one model, layer by layer, and how they were found.

    `cett` is the target. `score` is "product" (epsilon in units of the neuron norm), "gate" (in
    units of |act(g_i)|) or "shadow" (in units of the norm that a shadow of `bits` estimates; (gate,
    up) of each layer; `shadows` is the `Shadows.key` of fitted ones, "" for those that QRIDA
    builds). `method`, `on`, `granularity` and `sequential` are the arguments of
    `calibrate`; `tokens` is the number of tokens measured; `dtype` the model's; `model` its id and
    `fingerprint` that of its weights (see `fingerprint`).

    Raises ConfigurationError where a value is impossible.
    """

    layers: tuple[LayerThreshold, ...]
    cett: float
    fingerprint: str
    score: str = "product"
    method: str = "tda"
    on: str = "token"
    granularity: str = "layer"
    sequential: bool = True
    tokens: int = 0
    model: str = ""
    dtype: str = "float32"
    bits: tuple[tuple[int, int], ...] = ()
    shadows: str = ""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "bits", tuple(tuple(pair) for pair in self.bits))
        if not self.layers:
            raise ConfigurationError("thresholds: expected at least one layer, got none")
        for index, layer in enumerate(self.layers):
            if not (math.isfinite(layer.epsilon) and layer.epsilon >= 0):
                raise ConfigurationError(
                    f"thresholds: layer {index} has epsilon {layer.epsilon}; expected a finite "
                    "value >= 0 (0 keeps every neuron)"
                )
        choices = {
            "score": ("product", "gate", "shadow"),
            "on": ("token", "continuation"),
            "granularity": ("layer", "model"),
        }
        if len(self.bits) != (len(self.layers) if self.score == "shadow" else 0):
            raise ConfigurationError(
                f"thresholds: bits has {len(self.bits)} entries for {len(self.layers)} layers and "
                f'score {self.score!r}; expected one per layer for "shadow", else none'
            )
        for name in ("fingerprint", "shadows"):
            # Anything else would pass for "made by hand", whose model is not checked.
            if not isinstance(getattr(self, name), str):
                raise ConfigurationError(
                    f"thresholds: {name} is {getattr(self, name)!r}; expected a string"
                )
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigurationError(
                    f"thresholds: {name} is {getattr(self, name)!r}; expected one of {allowed}"
                )

    def __repr__(self) -> str:
        low = min(layer.epsilon for layer in self.layers)
        high = max(layer.epsilon for layer in self.layers)
        return (
            f"Thresholds(<{len(self.layers)} layers, epsilon {low:.4g}..{high:.4g}>, "
            f"method={self.method!r}, score={self.score!r}, cett={self.cett}, "
            f"density={self.density:.4g}, model={self.model!r}, fingerprint={self.fingerprint!r})"
        )

    @property
    def epsilon(self) -> Tensor:
        """The thresholds as float32 [layers]."""
        return torch.tensor([layer.epsilon for layer in self.layers], dtype=torch.float32)

    @property
    def density(self) -> float:
        """Mean density of the layers on the calibration tokens."""
        return sum(layer.density for layer in self.layers) / len(self.layers)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `moyu_config.json` and `moyu.safetensors`, each atomically.

        Raises ArtifactError where a router or experts are saved in the directory.
        """
        config = dataclasses.asdict(self)
        _artifact.save(directory, "thresholds", config, {"epsilon": self.epsilon})

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Thresholds:
        """Read what `save_pretrained` wrote.

        Raises ArtifactError where a file is missing, truncated, corrupt, from another save, or of
        a format that this version does not read, ConfigurationError where `directory` is no path.
        """
        config, tensors = _artifact.load(directory, "thresholds", FORMAT_VERSION, _AGAIN)
        try:
            layers = tuple(LayerThreshold(**layer) for layer in config.pop("layers"))
            thresholds = cls(layers=layers, **config)
            epsilon = tensors["epsilon"]
        except (TypeError, KeyError, ConfigurationError) as error:
            raise ArtifactError(
                f"{directory} does not describe thresholds ({error}); {_AGAIN}"
            ) from error
        if not torch.equal(epsilon, thresholds.epsilon):
            raise ArtifactError(
                f"{directory}: epsilon in {_artifact.TENSOR_FILE} and in {_artifact.CONFIG_FILE} "
                f"differ; {_AGAIN}"
            )
        return thresholds
