"""What `measure_mlp` can time: one class per way of running an MLP, found by its plan's name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError
from ..shadow.reference import choose
from ..shadow.reference import shadow_scores as plain_scores
from .check import verify
from .rows import BenchmarkError
from .weights import MlpLayer


class Case(ABC):
    """One way of running the MLPs `layers` on x [rows, d], prepared at a density.

    operator: what does the work. active[k]: bool [rows, f], the neurons that each row uses in layer
    k.
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

    def verify(self, k: int, out: Tensor) -> float:
        """The relative error of the last call of layer k; BenchmarkError where it is wrong."""
        return verify(str(self), out, self.x, self.layers[k].weights, self.active[k])

    def all_active(self) -> None:
        """Let every row use every neuron."""
        f = self.layers[0].weights.f
        everyone = torch.ones(self.x.shape[0], f, dtype=torch.bool, device=self.x.device)
        self.active = [everyone] * len(self.layers)

    @property
    def density(self) -> float:
        """The realised density, mean over rows and layers."""
        return float(torch.stack([a.float().mean() for a in self.active]).mean())

    @property
    def bytes(self) -> int:
        """The weights that one call must read, mean over layers."""
        return self._bytes(self.plan)

    def _bytes(self, plan: str) -> int:
        w = self.layers[0].weights
        return round(w.share_read(plan, self.union / w.f) * w.nbytes)

    @property
    def union(self) -> float:
        """Neurons that some row uses, mean over layers."""
        return sum(int(a.any(0).sum()) for a in self.active) / len(self.active)

    def __str__(self) -> str:
        return f"{self.plan} at density {self.density:.3f}, {self.x.shape[0]} rows"


class TorchDense(Case):
    """The baseline: torch's own linear on the weights as Hugging Face stores them."""

    plan = "dense"
    operator = "torch"

    def prepare(self, generator: torch.Generator) -> None:
        """See `Case`."""
        self.all_active()
        self.downs = [layer.down for layer in self.layers]

    def call(self, k: int) -> Tensor:
        """See `Case`."""
        w = self.layers[k].plain
        return F.linear(w.activations(self.x)[1], self.downs[k], w.down_bias)

    def verify(self, k: int, out: Tensor) -> float:
        """See `Case`."""
        return verify(str(self), out, self.x, self.layers[k].plain, self.active[k])

    @property
    def bytes(self) -> int:
        """See `Case`."""
        return self.layers[0].plain.nbytes


class TorchDenseNeuronMajor(TorchDense):
    """torch's linear on W_down as a patched model keeps it: what prefill then runs on."""

    plan = "dense-neuron-major"

    def prepare(self, generator: torch.Generator) -> None:
        """See `Case`."""
        self.all_active()
        self.downs = [layer.plain.down_t.t() for layer in self.layers]


class Given(Case):
    """sparse_mlp over random sets known in advance, one set per row."""

    plan = "given"
    operator = "sparse_mlp"

    def prepare(self, generator: torch.Generator) -> None:
        """See `Case`."""
        f, device = self.layers[0].weights.f, self.x.device
        rows = self.x.shape[0]
        kept = max(1, round(self.asked * f))
        self.indices, self.counts = [], []
        self.masks: list[Tensor | None] = []
        for _ in self.layers:
            active = torch.zeros(rows, f, dtype=torch.bool)
            for r in range(rows):
                active[r, torch.randperm(f, generator=generator)[:kept]] = True
            union = active.any(0).nonzero().flatten().to(torch.int32)
            self.indices.append(F.pad(union, (0, f - union.numel())).to(device))
            self.counts.append(torch.tensor([union.numel()], dtype=torch.int32, device=device))
            self.active.append(active.to(device))
            masked = rows > 1 and kept < f
            self.masks.append(self.active[-1].to(torch.uint8) if masked else None)

    def call(self, k: int) -> Tensor:
        """See `Case`."""
        w = self.layers[k].weights
        return w.given(self.x, self.indices[k], self.counts[k], self.masks[k])


class Gate(Case):
    """threshold_mlp, decided behind the gate projection: abs(act(gate x)) >= epsilon."""

    plan = "gate"
    operator = "threshold_mlp"

    def prepare(self, generator: torch.Generator) -> None:
        """See `Case`."""
        self.epsilons, self.scales = [], []
        for layer in self.layers:
            score, scale = self._score(layer)
            ordered = score.flatten().sort().values
            epsilon = _between(ordered, round((1 - self.asked) * (ordered.numel() - 1)))
            if self.asked >= 1:
                epsilon = 0.0
            self.epsilons.append(torch.tensor([epsilon], dtype=torch.float32, device=score.device))
            self.scales.append(scale)
            self.active.append(score >= epsilon)

    def _score(self, layer: MlpLayer) -> tuple[Tensor, Tensor | None]:
        wide = layer.weights.to_float32()
        return wide.activations(self.x.float())[0].abs(), None

    def call(self, k: int) -> Tensor:
        """See `Case`."""
        w = self.layers[k].weights
        out, self.last_counts = w.by_threshold(self.x, self.plan, self.scales[k], self.epsilons[k])
        return out

    def verify(self, k: int, out: Tensor) -> float:
        """See `Case`; the numbers of active neurons must agree, too."""
        _check_counts(str(self), self.last_counts, self.active[k])
        return super().verify(k, out)


class Product(Gate):
    """threshold_mlp, decided behind gate and up: the neuron's norm, eq. 14 of the paper."""

    plan = "product"

    def _score(self, layer: MlpLayer) -> tuple[Tensor, Tensor | None]:
        scale = layer.weights.column_norms()
        return layer.weights.norms(self.x), scale


def _between(ordered: Tensor, place: int, reach: int = 16) -> float:
    """A threshold near ordered[place] in the widest gap around it, so that rounding moves no value
    across it."""
    low = max(0, place - reach)
    near = ordered[low : place + reach + 2]
    if near.numel() < 2:
        return float(near[0])
    widest = int((near[1:] - near[:-1]).argmax())
    return float(near[widest] + near[widest + 1]) / 2


class ShadowMlp(Case):
    """shadow_mlp: a shadow of `bits` bits names the top k, the exact MLP runs on them (qRIDA).

    The set is the one that the operator's own scores give, and those are compared with plain
    PyTorch's; two of nearly equal score may swap places between them.
    """

    plan = "shadow"
    operator = "shadow_mlp"
    bits: ClassVar[int] = 2

    def prepare(self, generator: torch.Generator) -> None:
        """See `Case`."""
        self.kept = max(1, round(self.asked * self.layers[0].weights.f))
        self.norms = [layer.weights.column_norms() for layer in self.layers]
        self.shadows = [layer.shadow(self.bits) for layer in self.layers]
        self.epsilons: list[Tensor | None] = [None] * len(self.layers)
        self.active = [choose(self.scores(k), None, self.kept) for k in range(len(self.layers))]

    def scores(self, k: int) -> Tensor:
        """The operator's estimate of every neuron's norm, float32 [rows, f]."""
        s = self.shadows[k]
        bits = (s.bits_gate, s.bits_up)
        return self.layers[k].weights.shadow_scores(self.x, s.data, bits, self.norms[k])

    def call(self, k: int) -> Tensor:
        """See `Case`."""
        w, s = self.layers[k].weights, self.shadows[k]
        bits = (s.bits_gate, s.bits_up)
        out, counts = w.by_shadow(self.x, s.data, bits, self.norms[k], self.epsilons[k], self.kept)
        self.last_counts = counts[0]
        return out

    def verify(self, k: int, out: Tensor) -> float:
        """See `Case`; the scores and the numbers of active neurons are checked, too."""
        self.verify_scores(k, self.scores(k))
        _check_counts(str(self), self.last_counts, self.active[k])
        return super().verify(k, out)

    def verify_scores(self, k: int, scores: Tensor) -> float:
        """Their relative error; BenchmarkError where float32 rounding does not explain it."""
        w, s = self.layers[k].weights, self.shadows[k]
        right = plain_scores(
            self.x, s.data, self.norms[k], w.gate_bias, w.up_bias, s.gated,
            s.bits_gate, s.bits_up, w.activation,
        )  # fmt: skip
        error = float((scores - right).abs().max() / right.abs().max())
        if not error <= 1e-4:
            raise BenchmarkError(
                f"{self}: the scores are off by {error:.3e} of the largest; the row is not written"
            )
        return error

    @property
    def bytes(self) -> int:
        """The shadow, and all three matrices' rows of the active neurons."""
        return self.shadows[0].data.numel() + self._bytes("given")


class ShadowThreshold(ShadowMlp):
    """shadow_mlp with a threshold on the estimated norm instead of a top k."""

    plan = "shadow-eps"

    def prepare(self, generator: torch.Generator) -> None:
        """See `Case`."""
        super().prepare(generator)
        for k in range(len(self.layers)):
            scores = self.scores(k)
            ordered = scores.flatten().sort().values
            value = _between(ordered, round((1 - self.asked) * (ordered.numel() - 1)))
            epsilon = torch.tensor([0.0 if self.asked >= 1 else value], device=scores.device)
            self.epsilons[k] = epsilon
            self.active[k] = choose(scores, epsilon, 0)


class ShadowScores(ShadowMlp):
    """shadow_scores alone: what a router of `bits` bits costs."""

    plan = "scores"
    operator = "shadow_scores"

    def prepare(self, generator: torch.Generator) -> None:
        """See `Case`."""
        super().prepare(generator)
        self.all_active()  # every neuron gets its score

    def call(self, k: int) -> Tensor:
        """See `Case`."""
        return self.scores(k)

    def verify(self, k: int, out: Tensor) -> float:
        """See `Case`."""
        return self.verify_scores(k, out)

    @property
    def bytes(self) -> int:
        """The shadow alone."""
        return self.shadows[0].data.numel()


def _check_counts(what: str, counts: Tensor, active: Tensor) -> None:
    wanted = active.sum(1)
    if not torch.equal(counts.long(), wanted):
        raise BenchmarkError(
            f"{what}: active neurons per row are {counts.tolist()}, the reference has "
            f"{wanted.tolist()}; the row is not written"
        )


PLANS: dict[str, type[Case]] = {
    case.plan: case for case in (TorchDense, TorchDenseNeuronMajor, Given, Gate, Product)
}
for _bits in (1, 2, 3, 4):
    for _kind in (ShadowMlp, ShadowThreshold, ShadowScores):
        _plan = f"{_kind.plan}-{_bits}"
        PLANS[_plan] = type(_kind.__name__, (_kind,), {"plan": _plan, "bits": _bits})


def takes_density(kind: type[Case]) -> bool:
    """Whether a case exists at several densities."""
    return not issubclass(kind, (TorchDense, ShadowScores))


def find_plan(name: str) -> type[Case]:
    """The case of this plan; ConfigurationError lists the known ones."""
    if name not in PLANS:
        raise ConfigurationError(f"plan is {name!r}; expected one of {', '.join(PLANS)}")
    return PLANS[name]
