"""QRIDA: a router in the loop, per token, made of the weights themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..guard import LayerGuard
from ..models.weights import MlpWeights
from ..shadow.build import build_shadow
from ..shadow.pack import Shadow, pair_of
from ..shadow.reference import (
    choose,
    expected_gains,
    product,
    projections,
    tiers,
    tiers_by_price,
)
from ..shadow.store import Shadows
from .base import (
    Compiled,
    Method,
    Tiers,
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
ESTIMATE_BITS = 3


@dataclass(frozen=True, eq=False, repr=False)
class QRIDA(Method):
    """Per token, in tiers by what a low-bit shadow of W_gate and W_up estimates.

    a^_i = act(g^_i) u^_i with g^, u^ from b-bit weights and an 8-bit input, n^_i = |a^_i| c_i. The
    neurons with the round(exact * f) largest n^ are computed exactly (three rows of weights each);
    the round(estimated * f) next ones add a^_i W_down[:, i] (one row); the others add nothing. With
    `thresholds` the exact ones are those with n^_i >= epsilon, and no others add anything. It needs
    no training, no prompt and no state, and takes any activation and ungated MLPs (where a^_i =
    act(u^_i)).

    density, or by its other name exact (kept as density): the share that is computed, a number in
        (0, 1], or one per layer; 0.33 where neither it nor thresholds is given. A layer with 1 (or
        epsilon 0) runs without a shadow. exact may be 0 where estimated is not.
    estimated: the share of neurons behind them whose estimate is used, a number in [0, 1 - exact],
        or one per layer. Half as many exact neurons and twice as many estimated ones read as much,
        and lose less where the shadow has 3 bits and is fitted (docs/findings_qrida.md).
    price: with shadows from `tune`: neurons are exact or estimated wherever that saves at least so
        many nats per row of weights read, by what the router expects of its own errors
        (`shadow.reference.tiers_by_price`); a number >= 0, or one per layer. 0: all neurons.
    bits: 1..4 for both matrices, or a pair (gate, up), or a list with one of these per layer. By
        default those of the thresholds or shadows, else 2, and 3 with estimated neurons.
    thresholds: from `calibrate(..., method=QRIDA(bits=...))` or `tune`, in units of the estimated
        neuron norm, or one number, or one per layer. May also be passed in the place of density.
    prefill: multi-token forwards obey the rule too.
    guard: "watch" measures the true CETT and recall on one token in `guard_every`, see
        `moyu_ext.guard`; "hold" also moves epsilon so that CETT stays where calibration put it;
        "off".
    shadows: from `Shadows.fit`, which finds more of the right neurons, or `from_pretrained`, rather
        than built when the model is patched.

    Memory: per neuron and matrix d * b / 8 bytes and two for each 256 elements.

    Raises ConfigurationError for shares that are none, bits outside 1..4, a wrong number of
    layers, thresholds of other bits; ArtifactError for thresholds or shadows of another model.
    """

    density: Any = None
    bits: Any = None
    thresholds: Any = None
    prefill: bool = False
    guard: str = "watch"
    guard_every: int = 64
    shadows: Shadows | None = None
    exact: Any = None
    estimated: Any = None
    price: Any = None

    name = "qrida"
    level = "token"

    def __post_init__(self) -> None:
        if self.exact is not None:
            if self.density is not None:
                raise ConfigurationError(
                    f"exact is {self.exact!r} and density {self.density!r}; they are one thing, "
                    "the share of neurons that is computed: give one of them"
                )
            object.__setattr__(self, "density", self.exact)
            object.__setattr__(self, "exact", None)  # one place, also for dataclasses.replace
        if hasattr(self.density, "epsilon") and self.thresholds is None:
            object.__setattr__(self, "thresholds", self.density)
            object.__setattr__(self, "density", None)
        if self.price is not None:
            self._settle_price()
        elif self.thresholds is not None:
            if self.density is not None:
                raise ConfigurationError(
                    f"density is {self.density!r} and thresholds are given too; expected one of "
                    "them: thresholds already say how many neurons stay"
                )
            if self.estimated is not None:
                raise ConfigurationError(
                    f"estimated is {self.estimated!r} beside thresholds; tiers go by shares: "
                    "QRIDA(exact=0.2, estimated=0.4)"
                )
            epsilons(self.thresholds)
        elif self.density is None:
            if self.estimated is not None:
                raise ConfigurationError(
                    f"estimated is {self.estimated!r}, and exact is not given; expected both, as "
                    "in QRIDA(exact=0.2, estimated=0.4)"
                )
            object.__setattr__(self, "density", DENSITY)
        self._settle_shares()
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

    def _settle_price(self) -> None:
        price = plain(self.price)
        price = list(price) if isinstance(price, (list, tuple)) else price
        for one in price if isinstance(price, list) else [price]:
            number = isinstance(one, (int, float)) and not isinstance(one, bool)
            if not number or not 0 <= one < math.inf:
                raise ConfigurationError(
                    f"price is {self.price!r}; expected nats >= 0 that a row of weights has to "
                    "save, or one number per layer (0: all neurons)"
                )
        object.__setattr__(self, "price", price)
        for name in ("density", "thresholds", "exact", "estimated"):
            if getattr(self, name) is not None:
                raise ConfigurationError(
                    f"price and {name} are given; a price says by itself which neurons are exact "
                    "and which estimated: give one of them"
                )
        if self.shadows is None or any(layer.costs is None for layer in self.shadows.layers):
            raise ConfigurationError(
                "price needs shadows that know what errors cost; pass those of tune: "
                "moyu_ext.tune(model, tokenizer).method()"
            )

    def _settle_shares(self) -> None:
        more = plain(self.estimated)
        more = list(more) if isinstance(more, (list, tuple)) else more
        for one in more if isinstance(more, list) else [more]:
            if one is not None and not _is_share(one):
                raise ConfigurationError(
                    f"estimated is {self.estimated!r}; expected a share of the neurons in [0, 1], "
                    "or one per layer"
                )
        object.__setattr__(self, "estimated", more)
        value = plain(self.density)
        many = isinstance(value, (list, tuple))
        for index, one in enumerate(value if many else [value]):
            if one is None:
                continue
            behind = self.estimated_of(index)
            if not (behind and _is_share(one)):
                check_density(one)
            if behind and one + behind > 1 + 1e-6:
                raise ConfigurationError(
                    f"exact is {one!r} and estimated {behind!r}; expected shares of the neurons "
                    "that make at most 1 together"
                )
        value = list(value) if many else value
        object.__setattr__(self, "density", value)

    def estimated_of(self, index: int) -> float:
        """The share of neurons that is estimated in layer `index`."""
        more = self.estimated
        if isinstance(more, list):
            more = more[index] if index < len(more) else 0
        return more or 0

    def _settle_bits(self) -> None:
        sources = {"thresholds": self.thresholds, "shadows": self.shadows}
        known = {name: getattr(s, "bits", ()) for name, s in sources.items()}
        known = {name: tuple(map(tuple, bits)) for name, bits in known.items() if bits}
        bits = self.bits
        if bits is None:
            bits = list(next(iter(known.values()))) if known else self._usual_bits
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

    @property
    def _usual_bits(self) -> int:
        more = self.estimated
        return ESTIMATE_BITS if (any(more) if isinstance(more, list) else more) else BITS

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
        if self.price is not None:
            what = f"price={describe(self.price)}"
        elif self.thresholds is None:
            what = f"density={_shares(self.density)}"
            if self._usual_bits != BITS:
                what = f"exact={_shares(self.density)}, estimated={_shares(self.estimated)}"
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
        shares = {"density": self.density, "estimated": self.estimated, "price": self.price}
        per_layer = {**shares, "bits": self.bits}
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
        if self.price is not None and device.type != "cpu":
            raise ConfigurationError(
                f"a price, and so a budget, works on the CPU alone so far, not on {device}; patch "
                "with QRIDA(exact=..., estimated=..., shadows=...)"
            )
        epsilon, k, more, target = None, 0, 0, None
        if self.price is not None:
            epsilon = epsilon_of(self.price, index, device)
        elif self.thresholds is None:
            exact = self.density[index] if isinstance(self.density, list) else self.density
            k = round(exact * weights.f)
            more = min(round(self.estimated_of(index) * weights.f), weights.f - k)
            k = max(k, 0 if more else 1)
        else:
            epsilon = epsilon_of(self.thresholds, index, device)
            if self.guard == "hold":
                target = self.thresholds.layers[index].cett
        if k == weights.f or (epsilon is not None and not bool(epsilon > 0)):
            return Dense().bind(index, weights)
        guard = None
        if self.guard != "off":
            guard = LayerGuard(self.guard_every, weights.f, device, epsilon, target)
        router = ShadowRouter(self._shadow(index, weights), weights, self.price is not None)
        return _ShadowRule(router, epsilon, k, more, guard)

    def _shadow(self, index: int, weights: MlpWeights) -> Shadow:
        if self.shadows is not None:
            return self.shadows.layer(index, weights)
        return build_shadow(weights, *self.bits_of(index))


def shadow_scorer(shadow: Shadow, weights: MlpWeights) -> Callable[[Tensor], Tensor]:
    """The estimate from one layer's shadow: x [n, d] -> n^ float32 [n, f]."""
    return ShadowRouter(shadow, weights).scores


class ShadowRouter:
    """The shadow of one layer and what else an estimate needs."""

    def __init__(self, shadow: Shadow, weights: MlpWeights, priced: bool = False) -> None:
        self.shadow = shadow
        costs = shadow.costs if priced else None
        self.norms = weights.column_norms() if costs is None else costs[0].contiguous()
        self.errors = None if costs is None else costs[1:].contiguous()
        # A neuron that costs nothing adds nothing, whatever its activation is.
        self.inverse = torch.where(self.norms > 0, 1 / self.norms, torch.zeros_like(self.norms))
        # Not the weights: patch lays W_down out anew, and they would keep the old one in memory.
        self.biases = (weights.gate_bias, weights.up_bias)
        self.activation = weights.activation

    @property
    def bits(self) -> tuple[int, int]:
        """Of gate and up, as operators take them."""
        return self.shadow.bits_gate, self.shadow.bits_up

    def projections(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """g^ and u^ of x [rows, d] in plain PyTorch, float32 [rows, f]: for many rows."""
        s = self.shadow
        return projections(x, s.data, *self.biases, s.gated, s.bits_gate, s.bits_up)

    def signed(self, x: Tensor) -> Tensor:
        """a^_i c_i."""
        return product(*self.projections(x), self.activation) * self.norms

    def scores(self, x: Tensor) -> Tensor:
        """n^, their size."""
        return self.signed(x).abs_()

    def by_prices(self, x: Tensor, prices: Iterable[Tensor | float]) -> Iterator[Tiers]:
        """For each price the tiers in which every row of weights that is read saves as much."""
        gate, up = self.projections(x)
        assert self.errors is not None
        values = product(gate, up, self.activation)
        gains = expected_gains(gate, up, self.activation, self.norms, self.errors)
        for price in prices:
            exact, estimated = tiers_by_price(*gains, price, gate is not None)
            yield Tiers(exact, estimated, torch.where(estimated, values, torch.zeros_like(values)))

    def by_rank(self, x: Tensor, k: int, more: int) -> Tiers:
        """The k largest exact, the next ones estimated."""
        signed = self.signed(x)
        exact, estimated = tiers(signed.abs(), k, more)
        values = torch.where(estimated, signed * self.inverse, torch.zeros_like(signed))
        return Tiers(exact, estimated, values)


class _ShadowRule(TokenRule):
    """Estimate, choose by price, epsilon or rank, compute what is chosen."""

    def __init__(
        self,
        router: ShadowRouter,
        epsilon: Tensor | None,
        k: int,
        more: int,
        guard: LayerGuard | None,
    ) -> None:
        self.router = router
        self.added_bytes = router.shadow.nbytes
        self.epsilon = epsilon
        self.k, self.more = k, more
        self.guard = guard

    def apply(self, x: Tensor, weights: MlpWeights) -> tuple[Tensor, Tensor]:
        router = self.router
        how = (self.epsilon, self.k, self.more, router.inverse, router.errors)
        out, counts = weights.by_shadow(x, router.shadow.data, router.bits, router.norms, *how)
        row = None if self.guard is None else self.guard.due(x.shape[0])
        if row is not None:
            assert self.guard is not None
            x = x[row : row + 1]
            chosen = self.judge(x)
            if chosen.values is None:
                # By the operator's own scores: of two nearly equal ones PyTorch may keep another.
                chosen = Tiers(self.chosen(x, weights))
            self.guard.measure(x, weights, router.norms, chosen.exact, chosen.values)
        return out, counts

    def compiled(self) -> Compiled:
        router = self.router
        how = (self.epsilon, router.shadow.data, router.bits, self.k, self.more)
        return Compiled("shadow", router.norms, *how, router.inverse, router.errors)

    def chosen(self, x: Tensor, weights: MlpWeights) -> Tensor:
        router = self.router
        if router.errors is not None:
            return self.judge(x).exact
        scores = weights.shadow_scores(x, router.shadow.data, router.bits, router.norms)
        return choose(scores, self.epsilon, self.k)

    def active(self, x: Tensor, gate: Tensor, product: Tensor) -> Tensor:
        return self.judge(x).exact

    def judge(self, x: Tensor, gate: Tensor | None = None, product: Tensor | None = None) -> Tiers:
        if self.router.errors is not None:
            assert self.epsilon is not None
            return next(self.router.by_prices(x, [self.epsilon]))
        if self.more:
            return self.router.by_rank(x, self.k, self.more)
        return Tiers(choose(self.router.scores(x), self.epsilon, self.k))


def _check_device(device: torch.device) -> None:
    key = "CUDA" if device.type == "cuda" else "CPU"
    if not torch._C._dispatch_has_kernel_for_dispatch_key("moyu_ext::shadow_mlp", key):
        raise ConfigurationError(
            f"QRIDA has no operator for {device} in this build of moyu_ext; install it again "
            "beside a CUDA build of torch where nvcc is found, or move the model to the CPU"
        )


def _is_share(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value <= 1


def _shares(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    return f"<{len(value)} layers, mean {sum(value) / len(value):.3f}>"


def _which(key: str) -> str:
    return f"fitted shadows {key[:8]}" if key else "the shadows that QRIDA builds"


def _brief(bits: Sequence[Any]) -> str:
    different = sorted({pair_of(pair) for pair in bits})
    return str(different[0]) if len(different) == 1 else f"<{len(bits)} layers, {different}>"
