"""Calibrated thresholds: what `calibrate` returns, what `TDA` and `STDA` take, and their files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .._files import write_atomically
from ..errors import ArtifactError, ConfigurationError, UnsupportedModelError

FORMAT_VERSION = 1
CONFIG_FILE = "moyu_config.json"
TENSOR_FILE = "moyu.safetensors"
_SAMPLES_PER_TENSOR = 256


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


@dataclass(frozen=True)
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
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigurationError(
                    f"thresholds: {name} is {getattr(self, name)!r}; expected one of {allowed}"
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

        The configuration carries the checksum of the tensors, so that an interrupted save over an
        older artefact is found when it is loaded.
        """
        tensors = safetensors.torch.save({"epsilon": self.epsilon})
        config = dataclasses.asdict(self)
        config["kind"] = "thresholds"
        config["tensors_sha256"] = hashlib.sha256(tensors).hexdigest()
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / TENSOR_FILE, tensors)
        write_atomically(folder / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Thresholds:
        """Read what `save_pretrained` wrote.

        Raises ArtifactError where a file is missing, truncated, corrupt, from another save, or of
        a format that this version does not read.
        """
        folder = Path(directory)
        config = _read_config(folder)
        epsilon = _read_epsilon(folder, config.pop("tensors_sha256"))
        try:
            layers = tuple(LayerThreshold(**layer) for layer in config.pop("layers"))
            thresholds = cls(layers=layers, **config)
        except (TypeError, ConfigurationError) as error:
            raise ArtifactError(
                f"{folder / CONFIG_FILE} does not describe thresholds ({error}); calibrate again"
            ) from error
        if not torch.equal(epsilon, thresholds.epsilon):
            raise ArtifactError(
                f"{folder}: epsilon in {TENSOR_FILE} and in {CONFIG_FILE} differ; calibrate again"
            )
        return thresholds


def fingerprint(model: nn.Module) -> str:
    """A short hash of the weights of a model's layers.

    Hashed are name, shape and up to 256 evenly spaced values, rounded to bfloat16, of each
    parameter below a numbered module (`layers.0.…`), or of all parameters if none is numbered. So
    it is the same before and after `patch`, with and without a language-model head or a resized
    vocabulary, and for float32 and bfloat16 copies of one checkpoint.

    Raises UnsupportedModelError for parameters without values (meta, offloaded).
    """
    everything = dict(model.named_parameters())
    numbered = {_below_number(name): p for name, p in everything.items() if _below_number(name)}
    digest = hashlib.sha256()
    for name, parameter in sorted((numbered or everything).items()):
        if parameter.device.type == "meta":
            raise UnsupportedModelError(
                f"parameter {name} is on the meta device and has no values; load the whole model "
                "into memory (no device_map with offloading)"
            )
        digest.update(f"{name} {list(parameter.shape)}\n".encode())
        digest.update(_sample(parameter.detach()))
    return digest.hexdigest()[:32]


def _below_number(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `3.mlp.up_proj.weight`; "" without a number."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[first:])


def _sample(tensor: Tensor) -> bytes:
    count = min(tensor.numel(), _SAMPLES_PER_TENSOR)
    flat = torch.arange(count, device=tensor.device) * tensor.numel() // max(count, 1)
    # Logical positions, never memory order: a patched W_down has other strides.
    values = tensor[torch.unravel_index(flat, tensor.shape)] if tensor.dim() else tensor
    return values.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path} ({error.strerror}); expected a folder written by save_pretrained "
            f"with {CONFIG_FILE} and {TENSOR_FILE}"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(_read_bytes(path))
    except ValueError as error:
        raise ArtifactError(
            f"{path} is truncated or not JSON ({error}); calibrate again"
        ) from error
    if not isinstance(config, dict) or config.pop("kind", None) != "thresholds":
        raise ArtifactError(f"{path} does not describe thresholds; calibrate again")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {version!r}, this moyu_ext reads {FORMAT_VERSION}; "
            "calibrate again, or use the moyu_ext that wrote it"
        )
    missing = {"layers", "cett", "fingerprint", "tensors_sha256"} - config.keys()
    if missing:
        raise ArtifactError(f"{path} lacks {sorted(missing)}; calibrate again")
    return config


def _read_epsilon(folder: Path, expected_sha256: str) -> Tensor:
    path = folder / TENSOR_FILE
    content = _read_bytes(path)
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected_sha256:
        raise ArtifactError(
            f"{path} is truncated, corrupt or from another save: its SHA-256 is {actual}, "
            f"{CONFIG_FILE} expects {expected_sha256}; calibrate again"
        )
    try:
        return safetensors.torch.load(content)["epsilon"]
    except (SafetensorError, KeyError) as error:
        raise ArtifactError(f"{path} holds no epsilon ({error}); calibrate again") from error
