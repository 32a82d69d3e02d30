"""QRIDA: a router in the loop, per token, made of the weights themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import ConfigurationError
from ..guard import LayerGuard
from ..models.weights import MlpWeights
from ..shadow.build import build_shadow
from ..shadow.pack import Shadow, pair_of
from ..shadow.reference import choose
from ..shadow.reference import shadow_scores as plain_scores
from ..shadow.store import Shadows
from .base import (
    Compiled,
    Method,
    TokenRule,
    check_choice,
    check_count,
    check_density,
    check_thresholds,
    describe,
    epsilon_of,
    epsilons,
    plain,
)
from .dense import Dense

DENSITY = 0.33
BITS = 2


@dataclass(frozen=True, eq=False, repr=False)
class QRIDA(Method):
    """Per token, the neurons whose norm a low-bit shadow of W_gate and W_up estimates as large.

    n^_i = |act(g^_i) u^_i| c_i with g^, u^ from b-bit weights and an 8-bit input; neuron i is
    active where n^_i is among the round(density * f) largest, or with `thresholds` where n^_i >=
    epsilon. Only the active neurons are then computed, exactly. It needs no training, no prompt and
    no state, and takes any activation and ungated MLPs (where n^_i = |act(u^_i)| c_i).

    density: a number in (0, 1], or one per layer; 0.33 where neither it nor thresholds is given. A
        layer with density 1 (or epsilon 0) runs without a shadow.
    bits: 1..4 for both matrices, or a pair (gate, up), or a list with one of these per layer. By
        default those of the thresholds or shadows, else 2.
    thresholds: from `calibrate(..., method=QRIDA(bits=...))` or `tune`, in units of the estimated
        neuron norm, or one number, or one per layer. May also be passed in the place of density.
    prefill: multi-token forwards obey the rule too.
    guard: "watch" measures the true CETT and recall on one token in `guard_every`, see
        `moyu_ext.guard`; "hold" also moves epsilon so that CETT stays where calibration put it;
        "off".
    shadows: from `Shadows.fit`, which finds more of the right neurons, or `from_pretrained`, rather
        than built when the model is patched.

    Memory: per neuron and matrix d * b / 8 bytes and two for each 256 elements.

    Raises ConfigurationError for a density outside (0, 1], bits outside 1..4, a wrong number of
    layers, thresholds of other bits; ArtifactError for thresholds or shadows of another model.
    """

    density: Any = None
    bits: Any = None
    thresholds: Any = None
    prefill: bool = False
    guard: str = "watch"
    guard_every: int = 64
    shadows: Shadows | None = None

    name = "qrida"
    level = "token"

    def __post_init__(self) -> None:
        if hasattr(self.density, "epsilon") and self.thresholds is None:
            object.__setattr__(self, "thresholds", self.density)
            object.__setattr__(self, "density", None)
        if self.thresholds is not None:
            if self.density is not None:
                raise ConfigurationError(
                    f"density is {self.density!r} and thresholds are given too; expected one of "
                    "them: thresholds already say how many neurons stay"
                )
            epsilons(self.thresholds)
        elif self.density is None:
            object.__setattr__(self, "density", DENSITY)
        self._settle_density()
        if self.shadows is not None and not isinstance(self.shadows, Shadows):
            raise ConfigurationError(
                f"shadows is {self.shadows!r}; expected Shadows: from Shadows.fit(model), or what "
                "was saved, Shadows.from_pretrained(directory)"
            )
        self._settle_bits()
        check_choice("guard", self.guard, ("off", "watch", "hold"))
        check_count("guard_every", self.guard_every)
        if self.guard == "hold" and not getattr(self.thresholds, "layers", None):
            raise ConfigurationError(
                'guard="hold" moves epsilon towards the CETT of the calibration, but the method '
                "has no calibrated thresholds; pass thresholds=calibrate(model, tokenizer, texts, "
                'method=QRIDA(...)), or use guard="watch"'
            )

    def _settle_density(self) -> None:
        value = plain(self.density)
        if isinstance(value, (list, tuple)):
            value = [check_density(one) for one in value]
        elif value is not None:
            value = check_density(value)
        object.__setattr__(self, "density", value)

    def _settle_bits(self) -> None:
        sources = {"thresholds": self.thresholds, "shadows": self.shadows}
        known = {name: getattr(s, "bits", ()) for name, s in sources.items()}
        known = {name: tuple(map(tuple, bits)) for name, bits in known.items() if bits}
        bits = self.bits
        if bits is None:
            bits = list(next(iter(known.values()))) if known else BITS
            object.__setattr__(self, "bits", bits)
        for pair in bits if isinstance(bits, list) else [bits]:
            pair_of(pair)
        for name, made_for in known.items():
            mine = tuple(self.bits_of(i) for i in range(len(made_for)))
            if mine != made_for:
                raise ConfigurationError(
                    f"the method uses bits {bits!r} (gate, up), its {name} are made for "
                    f"{_brief(made_for)}; leave bits out, or make {name} with these bits"
                )

    def bits_of(self, index: int) -> tuple[int, int]:
        """Bits of (gate, up) in layer `index`."""
        if not isinstance(self.bits, list):
            return pair_of(self.bits)
        if index >= len(self.bits):
            raise ConfigurationError(
                f"bits has {len(self.bits)} entries, the model has more MLPs; pass one entry per "
                "layer, or a number or pair for all"
            )
        return pair_of(self.bits[index])

    def __repr__(self) -> str:
        if self.thresholds is None:
            what = f"density={self.density}"
        else:
            what = f"thresholds={describe(self.thresholds)}"
        bits = _brief(tuple(self.bits)) if isinstance(self.bits, list) else self.bits
        return f"QRIDA({what}, bits={bits}, prefill={self.prefill}, guard={self.guard!r})"

    @property
    def plan(self) -> str:
        """See `Method`."""
        return "given"

    def validate(self, layers: int, fingerprint: Callable[[], str]) -> None:
        """See `Method`."""
        if self.thresholds is not None:
            check_thresholds(self.thresholds, "shadow", layers, fingerprint)
        per_layer = {"density": self.density, "bits": self.bits}
        for name, value in per_layer.items():
            if isinstance(value, list) and len(value) != layers:
                raise ConfigurationError(
                    f"{name} has {len(value)} entries, the model has {layers} MLPs; pass one "
                    "per layer (also when only some layers are patched), or one for all"
                )
        if self.shadows is not None:
            self.shadows.check(layers, fingerprint)
        made_for = getattr(self.thresholds, "shadows", None)
        if made_for is None:  # no thresholds, or plain numbers
            return
        mine = "" if self.shadows is None else self.shadows.key
        if made_for != mine:
            raise ConfigurationError(
                f"thresholds were found with {_which(made_for)}, the method has {_which(mine)}; "
                "pass the same (moyu tune saves them beside the thresholds: "
                "shadows=moyu_ext.Shadows.from_pretrained(DIR)), or calibrate again"
            )

    def scorer(self, index: int, weights: MlpWeights) -> Callable[[Tensor], Tensor]:
        """What the thresholds of layer `index` compare: x [n, d] -> n^ float32 [n, f]."""
        return shadow_scorer(self._shadow(index, weights), weights)

    def bind(self, index: int, weights: MlpWeights) -> TokenRule:
        """See `Method`."""
        device = weights.device
        _check_device(device)
        epsilon, k, target = None, 0, None
        if self.thresholds is None:
            many = isinstance(self.density, list)
            k = max(1, round((self.density[index] if many else self.density) * weights.f))
        else:
            epsilon = epsilon_of(self.thresholds, index, device)
            if self.guard == "hold":
                target = self.thresholds.layers[index].cett
        if k == weights.f or (epsilon is not None and not bool(epsilon > 0)):
            return Dense().bind(index, weights)
        guard = None
        if self.guard != "off":
            guard = LayerGuard(self.guard_every, weights.f, device, epsilon, target)
        router = _Router(self._shadow(index, weights), weights)
        return _ShadowRule(router, epsilon, k, guard)

    def _shadow(self, index: int, weights: MlpWeights) -> Shadow:
        if self.shadows is not None:
            return self.shadows.layer(index, weights)
        return build_shadow(weights, *self.bits_of(index))


def shadow_scorer(shadow: Shadow, weights: MlpWeights) -> Callable[[Tensor], Tensor]:
    """The estimate from one layer's shadow: x [n, d] -> n^ float32 [n, f]."""
    return _Router(shadow, weights).scores


class _Router:
    """The shadow of one layer and what else an estimate needs."""

    def __init__(self, shadow: Shadow, weights: MlpWeights) -> None:
        self.shadow = shadow
        self.norms = weights.column_norms()
        # Not the weights: patch lays W_down out anew, and they would keep the old one in memory.
        self.biases = (weights.gate_bias, weights.up_bias)
        self.activation = weights.activation

    def scores(self, x: Tensor) -> Tensor:
        """n^ of x [rows, d] in plain PyTorch, float32 [rows, f]: for many rows."""
        s = self.shadow
        return plain_scores(
            x,
            s.data,
            self.norms,
            *self.biases,
            s.gated,
            s.bits_gate,
            s.bits_up,
            self.activation,
        )


class _ShadowRule(TokenRule):
    """Estimate, choose by epsilon or as the top k, compute what is chosen."""

    def __init__(
        self, router: _Router, epsilon: Tensor | None, k: int, guard: LayerGuard | None
    ) -> None:
        self.router = router
        self.added_bytes = router.shadow.data.numel()
        self.epsilon = epsilon
        self.k = k
        self.guard = guard

    def apply(self, x: Tensor, weights: MlpWeights) -> tuple[Tensor, Tensor]:
        s, norms = self.router.shadow, self.router.norms
        bits = (s.bits_gate, s.bits_up)
        out, counts = weights.by_shadow(x, s.data, bits, norms, self.epsilon, self.k)
        row = None if self.guard is None else self.guard.due(x.shape[0])
        if row is not None:
            assert self.guard is not None
            x = x[row : row + 1]
            self.guard.measure(x, weights, norms, self.chosen(x, weights))
        return out, counts

    def compiled(self) -> Compiled:
        s = self.router.shadow
        bits = (s.bits_gate, s.bits_up)
        return Compiled("shadow", self.router.norms, self.epsilon, s.data, bits, self.k)

    def chosen(self, x: Tensor, weights: MlpWeights) -> Tensor:
        """By the operator's own scores: of two nearly equal ones plain PyTorch may keep another."""
        w, s = weights, self.router.shadow
        scores = ops.shadow_scores(
            x,
            s.data,
            self.router.norms,
            w.gate_bias,
            w.up_bias,
            s.gated,
            s.bits_gate,
            s.bits_up,
            w.activation,
        )
        return choose(scores, self.epsilon, self.k)

    def active(self, x: Tensor, gate: Tensor, product: Tensor) -> Tensor:
        return choose(self.router.scores(x), self.epsilon, self.k)


def _check_device(device: torch.device) -> None:
    key = "CUDA" if device.type == "cuda" else "CPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("moyu_ext::shadow_mlp", key):
        raise ConfigurationError(
            f"QRIDA has no operator for {device} in this build of moyu_ext; install it again "
            "beside a CUDA build of torch where nvcc is found, or move the model to the CPU"
        )


def _which(key: str) -> str:
    return f"fitted shadows {key[:8]}" if key else "the shadows that QRIDA builds"


def _brief(bits: Sequence[Any]) -> str:
    different = sorted({pair_of(pair) for pair in bits})
    return str(different[0]) if len(different) == 1 else f"<{len(bits)} layers, {different}>"
