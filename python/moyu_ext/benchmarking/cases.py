"""What `measure_mlp` can time: one class per way of running an MLP, found by its plan's name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops, reference
from ..errors import ConfigurationError
from .rows import BenchmarkError
from .weights import MlpLayer


class Case(ABC):
    """One way of running the MLPs `layers` on x [rows, d], prepared at a density.

    operator: what does the work. active[k]: bool [rows, f], the neurons that each row uses in layer
    k. bytes: the weights that one call must read, mean over layers.
    """

    plan: ClassVar[str]
    operator: ClassVar[str]

    def __init__(self, layers: list[MlpLayer], x: Tensor, density: float, seed: int) -> None:
        self.layers = layers
        self.x = x
        self.asked = density
        self.active: list[Tensor] = []
        self.prepare(torch.Generator().manual_seed(seed))

    @abstractmethod
    def prepare(self, generator: torch.Generator) -> None:
        """Choose each layer's active set and whatever `call` needs."""

    @abstractmethod
    def call(self, k: int) -> Tensor:
        """Run layer k; this is what is timed."""

    def verify_set(self, k: int) -> None:  # noqa: B027
        """Raise BenchmarkError where the last call of layer k used another set than `active`."""

    def all_active(self) -> None:
        """Let every row use every neuron."""
        f = self.layers[0].weights.f
        self.active = [torch.ones(self.x.shape[0], f, dtype=torch.bool)] * len(self.layers)

    @property
    def density(self) -> float:
        """The realised density, mean over rows and layers."""
        return float(torch.stack([a.float().mean() for a in self.active]).mean())

    @property
    def bytes(self) -> int:
        w = self.layers[0].weights
        union = sum(int(a.any(0).sum()) for a in self.active) / len(self.active)
        neurons = mlp_neurons(self.plan, union, w.f, w.gated)
        return round(neurons * w.d * w.up.element_size())

    def __str__(self) -> str:
        return f"{self.plan} at density {self.density:.3f}, {self.x.shape[0]} rows"


def mlp_neurons(plan: str, active: float, f: int, gated: bool) -> float:
    """Weight rows that a plan reads: those of all neurons before it decides, then the active."""
    before = {"given": 0, "gate": 1, "product": 2 if gated else 1}.get(plan)
    matrices = 3 if gated else 2
    if before is None:
        return matrices * f
    return before * f + (matrices - before) * active


class TorchDense(Case):
    """The baseline: torch's own linear on the weights as Hugging Face stores them."""

    plan = "dense"
    operator = "torch"

    def prepare(self, generator: torch.Generator) -> None:
        self.all_active()
        self.downs = [layer.down for layer in self.layers]

    def call(self, k: int) -> Tensor:
        w = self.layers[k].weights
        act = reference.ACTIVATIONS[w.activation]
        h = F.linear(self.x, w.up, w.up_bias)
        a = act(h) if w.gate is None else act(F.linear(self.x, w.gate, w.gate_bias)) * h
        return F.linear(a, self.downs[k], w.down_bias)


class TorchDenseNeuronMajor(TorchDense):
    """torch's linear on W_down as a patched model keeps it: what prefill then runs on."""

    plan = "dense-neuron-major"

    def prepare(self, generator: torch.Generator) -> None:
        self.all_active()
        self.downs = [layer.weights.down_t.t() for layer in self.layers]


class Given(Case):
    """sparse_mlp over random sets known in advance, one set per row."""

    plan = "given"
    operator = "sparse_mlp"

    def prepare(self, generator: torch.Generator) -> None:
        f = self.layers[0].weights.f
        rows = self.x.shape[0]
        kept = max(1, round(self.asked * f))
        self.indices, self.counts = [], []
        self.masks: list[Tensor | None] = []
        for _ in self.layers:
            active = torch.zeros(rows, f, dtype=torch.bool)
            for r in range(rows):
                active[r, torch.randperm(f, generator=generator)[:kept]] = True
            union = active.any(0).nonzero().flatten().to(torch.int32)
            self.indices.append(F.pad(union, (0, f - union.numel())))
            self.counts.append(torch.tensor([union.numel()], dtype=torch.int32))
            self.masks.append(active.to(torch.uint8) if rows > 1 and kept < f else None)
            self.active.append(active)

    def call(self, k: int) -> Tensor:
        w = self.layers[k].weights
        return ops.sparse_mlp(
            self.x, w.gate, w.up, w.down_t, w.gate_bias, w.up_bias, w.down_bias,
            self.indices[k], self.counts[k], self.masks[k], w.activation,
        )  # fmt: skip


class Gate(Case):
    """threshold_mlp, decided behind the gate projection: abs(act(gate x)) >= epsilon."""

    plan = "gate"
    operator = "threshold_mlp"

    def prepare(self, generator: torch.Generator) -> None:
        self.epsilons, self.scales = [], []
        for layer in self.layers:
            score, scale = self._score(layer)
            ordered = score.flatten().sort().values
            epsilon = _between(ordered, round((1 - self.asked) * (ordered.numel() - 1)))
            if self.asked >= 1:
                epsilon = 0.0
            self.epsilons.append(torch.tensor([epsilon], dtype=torch.float32))
            self.scales.append(scale)
            self.active.append(score >= epsilon)

    def _score(self, layer: MlpLayer) -> tuple[Tensor, Tensor | None]:
        w = layer.weights
        gate, bias = (w.up, w.up_bias) if w.gate is None else (w.gate, w.gate_bias)
        bias = None if bias is None else bias.float()
        h = F.linear(self.x.float(), gate.float(), bias)
        return reference.ACTIVATIONS[w.activation](h).abs(), None

    def call(self, k: int) -> Tensor:
        w = self.layers[k].weights
        out, self.last_counts = ops.threshold_mlp(
            self.x, w.gate, w.up, w.down_t, w.gate_bias, w.up_bias, w.down_bias,
            self.scales[k], self.epsilons[k], w.activation, self.plan,
        )  # fmt: skip
        return out

    def verify_set(self, k: int) -> None:
        wanted = self.active[k].sum(1)
        if not torch.equal(self.last_counts.long(), wanted):
            raise BenchmarkError(
                f"{self}: active neurons per row are {self.last_counts.tolist()}, the reference "
                f"has {wanted.tolist()}; the row is not written"
            )


class Product(Gate):
    """threshold_mlp, decided behind gate and up: the neuron's norm, eq. 14 of the paper."""

    plan = "product"

    def _score(self, layer: MlpLayer) -> tuple[Tensor, Tensor | None]:
        w = layer.weights
        a = reference.activations(self.x, w.gate, w.up, w.gate_bias, w.up_bias, w.activation)
        scale = reference.column_norms(w.down_t)
        return a.abs() * scale, scale


def _between(ordered: Tensor, place: int, reach: int = 16) -> float:
    """A threshold near ordered[place] in the widest gap around it, so that rounding moves no value
    across it."""
    low = max(0, place - reach)
    near = ordered[low : place + reach + 2]
    if near.numel() < 2:
        return float(near[0])
    widest = int((near[1:] - near[:-1]).argmax())
    return float(near[widest] + near[widest + 1]) / 2


PLANS: dict[str, type[Case]] = {
    case.plan: case for case in (TorchDense, TorchDenseNeuronMajor, Given, Gate, Product)
}


def find_plan(name: str) -> type[Case]:
    """The case of this plan; ConfigurationError lists the known ones."""
    if name not in PLANS:
        raise ConfigurationError(f"plan is {name!r}; expected one of {', '.join(PLANS)}")
    return PLANS[name]
