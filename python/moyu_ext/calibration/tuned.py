"""What `tune` found, and its files."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from .._artifact import folder_of
from .._cpu import cpu_name
from .._files import write_atomically
from .._load import _C
from ..errors import ArtifactError
from ..methods.base import Method
from ..methods.lossless import Lossless
from ..methods.qrida import QRIDA
from ..patching.report import BudgetReport
from ..shadow.store import Shadows

FILE = "moyu_tune.json"
FORMAT_VERSION = 1
_AGAIN = "run moyu tune again"
_LONGEST = 1 << 24  # bytes of a file that we wrote ourselves


@dataclass(frozen=True)
class LayerTuning:
    """One layer: its price (0: dense), the shares of its neurons that are exact and estimated at
    it, nats a token that it is predicted to lose, and seconds a token that it takes."""

    price: float
    exact: float
    estimated: float
    loss: float
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """What `tune` found: for `method()`.

    budget: nats allowed; kl, error: mean KL(dense || sparse) per token on held-out text and its
    standard error, agreement: of the likeliest token, on `tokens` tokens. dense_seconds: of one
    token in all MLPs, on `machine`. shadows: the routers, None where all layers stay dense.
    """

    layers: tuple[LayerTuning, ...]
    budget: float
    dense_seconds: float
    fingerprint: str
    model: str
    machine: str
    kl: float = 0.0
    error: float = 0.0
    agreement: float = 1.0
    tokens: int = 0
    shadows: Shadows | None = None

    @property
    def sparse(self) -> bool:
        """Whether any layer leaves out anything."""
        return any(layer.price > 0 for layer in self.layers)

    @property
    def predicted(self) -> float:
        """Nats a token, from one forward and backward on the text that was tuned on."""
        return sum(layer.loss for layer in self.layers)

    @property
    def seconds(self) -> float:
        """One token in all MLPs."""
        return sum(layer.seconds for layer in self.layers)

    def method(self) -> Method:
        """The method with what was found, for `patch`."""
        if self.shadows is None:
            return Lossless()
        return QRIDA(price=[layer.price for layer in self.layers], shadows=self.shadows)

    def report(self) -> BudgetReport:
        """What `moyu_ext.report` says of it."""
        return BudgetReport(
            self.budget,
            self.kl,
            self.error,
            self.tokens,
            self.seconds,
            self.dense_seconds,
            sum(layer.price > 0 for layer in self.layers),
        )

    def as_dict(self) -> dict[str, Any]:
        """All but the shadows, in what JSON knows."""
        content = asdict(replace(self, shadows=None))
        content.pop("shadows")
        return content

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `moyu_tune.json`, and the shadows beside it where there are any."""
        folder = folder_of(directory, "tuning")
        folder.mkdir(parents=True, exist_ok=True)
        content = {"kind": "moyu tuning", "format_version": FORMAT_VERSION, **self.as_dict()}
        content["shadows"] = "" if self.shadows is None else self.shadows.key
        if self.shadows is not None:
            self.shadows.save_pretrained(directory)
        write_atomically(folder / FILE, (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Tuned:
        """What `save_pretrained` wrote. Raises ArtifactError where that is not what lies there."""
        path = folder_of(directory, "tuning") / FILE
        try:
            if not path.is_file() or path.stat().st_size > _LONGEST:
                raise ArtifactError(f"{path} is no tuning's file; {_AGAIN}")
            content = json.loads(path.read_bytes())
            return _read(content, directory)
        except OSError as error:
            raise ArtifactError(f"cannot read {path} ({error.strerror}); {_AGAIN}") from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if isinstance(error, ArtifactError):
                raise
            raise ArtifactError(f"{path} holds no usable tuning ({error}); {_AGAIN}") from error


def machine() -> str:
    """What the times of a layer depend on: processor or GPU, instruction set, threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {_C.isa_name()}, {torch.get_num_threads()} threads"


def _read(content: Any, directory: str | os.PathLike[str]) -> Tuned:
    if content.pop("kind") != "moyu tuning" or content.pop("format_version") != FORMAT_VERSION:
        raise ValueError("another kind of file, or of another version")
    key = content.pop("shadows")
    layers = tuple(LayerTuning(**layer) for layer in content.pop("layers"))
    numbers = [value for layer in layers for value in asdict(layer).values()]
    tuned = Tuned(layers=layers, **content)
    numbers += [getattr(tuned, f.name) for f in fields(tuned) if f.type in ("float", "int")]
    for value in numbers:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{value!r} where a number is expected")
        if not 0 <= value < math.inf:
            raise ValueError(f"{value!r} where a number >= 0 is expected")
    for name in ("fingerprint", "model", "machine"):
        if not isinstance(getattr(tuned, name), str):
            raise ValueError(f"{name} is no text")
    if not key:
        if tuned.sparse:
            raise ValueError("prices without routers")
        return tuned
    shadows = Shadows.from_pretrained(directory)
    if shadows.key != key or len(shadows.layers) != len(layers):
        raise ValueError("the routers beside it are of another tuning")
    return replace(tuned, shadows=shadows)
