"""The methods at several densities each: the points of the Pareto picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..calibration.calibrate import calibrate
from ..calibration.split_experts import SPLITS, split_experts
from ..calibration.thresholds import Thresholds
from ..calibration.train_router import train_router
from ..errors import ConfigurationError
from ..methods.base import Method
from ..methods.dense import Dense
from ..methods.online_roda import OnlineRODA
from ..methods.qrida import QRIDA
from ..methods.rida import RIDA
from ..methods.roda import RODA
from ..methods.srida import SRIDA
from ..methods.stda import STDA
from ..methods.tda import TDA
from ..models.families import find_mlps, record_inputs
from ..models.text import encode_texts, longest_window, windows
from ..reference import ACTIVATIONS
from ..routers.experts import Experts
from ..routers.router import Router
from ..shadow.store import Shadows

TARGETS = (0.05, 0.1, 0.2, 0.35, 0.5)  # of CETT
DENSITIES = (0.1, 0.2, 0.33, 0.5, 0.7)
TRAINED = ("roda", "roda-online", "rida")  # curves whose methods need training


@dataclass(frozen=True)
class Point:
    """One configuration: `curve` it belongs to, `setting` in words, how to make the method, and
    `basis`, which artefact of the user's it is made of."""

    curve: str
    setting: str
    make: Callable[[], Method]
    basis: str = ""

    @property
    def label(self) -> str:
        """Curve and setting."""
        return f"{self.curve}, {self.setting}" if self.setting else self.curve


@dataclass
class Workshop:
    """Makes what methods need on one model, when it is asked for, once.

    texts: to calibrate and train on, a list of strings or None for the model's own. router and
    experts: where they are at hand already. densities, targets of CETT: the points of each curve,
    where they are not the usual ones.
    """

    model: Any
    tokenizer: Any
    texts: Sequence[str] | None
    seed: int = 0
    tokens: int = 4096
    router_tokens: int = 16384
    router: Router | None = None
    experts: Experts | None = None
    densities: Sequence[float] = ()
    targets: Sequence[float] = ()
    log: Callable[[str], None] = lambda text: None
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def identity(self) -> str:
        """What all that is made here depends on, but for the model and the user's artefacts."""
        content = json.dumps([self.texts, self.seed, self.tokens, self.router_tokens])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value for the key, made the first time."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def thresholds(self, cett: float, method: str = "tda", on: str = "token") -> Thresholds:
        """Calibrated at this target."""

        def make() -> Thresholds:
            self.log(f"calibrating {method} at CETT {cett}")
            return calibrate(
                self.model,
                self.tokenizer,
                self.texts,
                cett=cett,
                method=method,
                on=on,
                max_tokens=self.tokens,
                progress=False,
                seed=self.seed,
            )

        found: Thresholds = self.once((cett, method, on), make)
        return found

    def gate_quantiles(self, density: float) -> list[float]:
        """CATS' thresholds: per layer the |act(gate x)| that a share `density` reaches. Where more
        than the rest is exactly zero (ReLU), the least positive number: zeros are never kept."""
        gates: Tensor = self.once("gates", self._gates)
        at = round((1 - density) * (gates.shape[1] - 1))
        return gates[:, at].clamp_min(torch.finfo(torch.float32).tiny).tolist()

    def _gates(self) -> Tensor:
        """1001 quantiles of |act(gate x)| per layer, on the calibration texts: [layers, 1001]."""
        sites = find_mlps(self.model)
        found: list[Tensor] = [torch.empty(0)] * len(sites)

        def keep(index: int, x: Tensor) -> None:
            w = sites[index].weights()
            gate = w.project(x, w.first)
            values = ACTIVATIONS[w.activation](gate).abs().float().flatten().sort().values
            places = torch.linspace(0, len(values) - 1, 1001, dtype=torch.float64).round().long()
            found[index] = values[places]

        with torch.no_grad(), record_inputs(self.model, sites, keep):
            self.model(input_ids=self.rows(), use_cache=False)
        return torch.stack(found)

    def rows(self, length: int = 128, count: int = 16) -> Tensor:
        """Ids [<= count, <= length] of the calibration texts; shorter where all texts are."""
        if self.texts is None:
            raise ConfigurationError("gate quantiles need calibration texts; pass --text or --data")
        window = min(length, longest_window(self.model))
        ids = encode_texts(self.tokenizer, self.texts, 4 * count * window, window)
        window = min(window, max(map(len, ids)))
        whole = [row for row in windows(ids, 1 << 30, window) if len(row) == window][:count]
        return torch.tensor(whole)

    def trained_router(self) -> Router:
        """The router at hand, or one trained here."""

        def make() -> Router:
            self.log("training a router")
            return train_router(
                self.model,
                self.tokenizer,
                self.texts,
                max_tokens=self.router_tokens,
                progress=False,
                seed=self.seed,
            )

        found: Router = self.once("router", lambda: self.router or make())
        return found

    def fitted(self) -> Shadows:
        """Shadows of 2 bits, fitted to the texts."""

        def make() -> Shadows:
            self.log("fitting shadows")
            return Shadows.fit(
                self.model, 2, self.tokenizer, self.texts, max_tokens=self.tokens, seed=self.seed,
                progress=False,
            )  # fmt: skip

        found: Shadows = self.once("fitted", make)
        return found

    def split(self, how: str) -> Experts:
        """The experts at hand, if split like this, or a split made here."""
        if self.experts is not None and self.experts.split == how:
            return self.experts

        def make() -> Experts:
            self.log(f"splitting into experts: {how}")
            return split_experts(
                self.model,
                self.tokenizer,
                self.texts,
                experts=_experts(find_mlps(self.model)[0].f),
                split=how,
                max_tokens=self.router_tokens,
                seed=self.seed,
            )

        found: Experts = self.once(("experts", how), make)
        return found


def _experts(f: int) -> int:
    """The number of experts nearest to 16 that f neurons can be divided into."""
    divisors = [n for n in range(1, f + 1) if f % n == 0]
    return min(divisors, key=lambda n: max(n, 16) / min(n, 16))


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigurationError unless all are in `CURVES`."""
    for name in names:
        if name not in CURVES:
            raise ConfigurationError(f"method is {name!r}; expected one of {', '.join(CURVES)}")


def points(shop: Workshop, names: Sequence[str]) -> list[Point]:
    """The curves named, each once. Raises ConfigurationError for unknown names."""
    check_names(names)
    basis = {
        "roda": _digest(shop.router),
        "roda-online": _digest(shop.router),
        "rida": _digest(shop.experts),
    }
    return [
        replace(point, basis=basis.get(name, ""))
        for name in dict.fromkeys(names)
        for point in CURVES[name](shop)
    ]


def _digest(artefact: Router | Experts | None) -> str:
    """Of the user's artefact; "" where there is none and one is made."""
    if artefact is None:
        return ""
    sha = hashlib.sha256(artefact.fingerprint.encode())
    for layer in artefact.layers:
        for value in vars(layer).values():
            if isinstance(value, Tensor):
                sha.update(value.contiguous().numpy().tobytes())
            else:
                sha.update(repr(value).encode())
    return sha.hexdigest()[:16]


def _by_target(shop: Workshop, curve: str, make: Callable[[float], Method]) -> list[Point]:
    targets = shop.targets or TARGETS
    return [Point(curve, f"CETT {cett}", lambda cett=cett: make(cett)) for cett in targets]  # type: ignore[misc]


def _by_density(
    shop: Workshop,
    curve: str,
    make: Callable[[float], Method],
    usual: Sequence[float] = DENSITIES,
) -> list[Point]:
    densities = shop.densities or usual
    return [Point(curve, f"density {d}", lambda d=d: make(d)) for d in densities]  # type: ignore[misc]


CURVES: dict[str, Callable[[Workshop], list[Point]]] = {
    "dense": lambda shop: [Point("dense", "", Dense)],
    "tda": lambda shop: _by_target(shop, "TDA", lambda cett: TDA(shop.thresholds(cett))),
    "cats": lambda shop: _by_density(
        shop, "TDA gate (CATS)", lambda d: TDA(shop.gate_quantiles(d), score="gate")
    ),
    "stda": lambda shop: [
        *_by_target(shop, "sTDA, token eps", lambda cett: STDA(shop.thresholds(cett))),
        *_by_target(
            shop,
            "sTDA, continuation eps",
            lambda cett: STDA(shop.thresholds(cett, "stda", "continuation")),
        ),
    ],
    "srida": lambda shop: _by_density(shop, "sRIDA", lambda d: SRIDA(d)),
    "griffin": lambda shop: _by_density(
        shop, "sRIDA, GRIFFIN score", lambda d: SRIDA(d, "griffin")
    ),
    "qrida": lambda shop: _by_density(shop, "QRIDA, 2 bits", lambda d: QRIDA(d)),
    "qrida-fitted": lambda shop: _by_density(
        shop, "QRIDA, 2 bits, fitted", lambda d: QRIDA(d, shadows=shop.fitted())
    ),
    "roda": lambda shop: [
        Point("RODA", "trained recall", lambda: RODA(shop.trained_router())),
        *_by_density(shop, "RODA", lambda d: RODA(shop.trained_router(), d)),
    ],
    "roda-online": lambda shop: [
        Point("RODA online", "trained recall", lambda: OnlineRODA(shop.trained_router())),
        *_by_density(shop, "RODA online", lambda d: OnlineRODA(shop.trained_router(), d)),
    ],
    "rida": lambda shop: [
        point
        for how in ((shop.experts.split,) if shop.experts is not None else SPLITS)
        for point in _by_density(
            shop,
            f"RIDA, {how}",
            lambda d, how=how: RIDA(shop.split(how), d),  # type: ignore[misc]
            (0.25, 0.5, 0.75),
        )
    ],
}
