"""What each layer of a model saves and loses at each density: the tuner's raw material.

A level of a layer is a threshold (and the bits of a shadow). Measured for each level: density and
CETT, on the layer's dense inputs. The loss that a CETT costs is measured per layer at a few levels
and interpolated, as loss = alpha cett^p: it depends on how much of the MLP's output is missing, not
on who chose what is missing, so one curve serves all bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.weights import MlpWeights
from .cett import LayerTokens

DENSITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.42, 0.36, 0.3, 0.25, 0.2, 0.16, 0.12, 0.09, 0.06, 0.04)
_FLOOR = 1e-7  # nats; a probe that shows less says nothing about the slope


@dataclass(frozen=True)
class Level:
    """One way to run a layer: epsilon 0 is dense. `share`: bytes read, of the dense MLP's."""

    epsilon: float
    density: float
    cett: float
    p50: float
    p95: float
    max: float
    share: float
    bits: tuple[int, int] | None = None


DENSE = Level(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def levels(
    x: Tensor,
    weights: MlpWeights,
    score: str | Callable[[Tensor], Tensor],
    share: Callable[[float], float],
    bits: tuple[int, int] | None = None,
) -> list[Level]:
    """Levels of one layer for inputs x [tokens, d], densest first.

    `score`: as `LayerTokens` takes it; `share`: bytes at a density.
    """
    tokens = LayerTokens(x, weights, score)
    # Of the scores above 0: a ReLU layer has few of them, and no threshold parts the others.
    positive = tokens.quantiles(101)[:-1].tolist()
    if not positive:
        return []
    cuts = sorted({positive[round(100 * (1 - density))] for density in DENSITIES})
    ratios, densities = tokens.measure(cuts)
    ratios = ratios.double().cpu()
    quantiles = ratios.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64), dim=1)
    return [
        Level(
            epsilon=cut,
            density=densities[i].item(),
            cett=ratios[i].mean().item(),
            p50=quantiles[0, i].item(),
            p95=quantiles[1, i].item(),
            max=ratios[i].max().item(),
            share=share(densities[i].item()),
            bits=bits,
        )
        for i, cut in enumerate(cuts)
    ]


@dataclass(frozen=True)
class LossCurve:
    """Nats that a layer's CETT costs: alpha * cett^power, through the probes measured."""

    alpha: float
    power: float

    @classmethod
    def through(cls, probes: Sequence[tuple[float, float]]) -> LossCurve:
        """Fit (cett, nats) probes. One probe, or probes too small to tell a slope, give power 2:
        a small error in a minimum of the loss costs its square."""
        points = [(c, max(loss, _FLOOR)) for c, loss in probes if c > 0]
        if not points:
            return cls(_FLOOR, 2.0)
        (low, first), (high, last) = min(points), max(points)
        power = 2.0
        if high > 1.05 * low and first > 10 * _FLOOR:
            # Noise in a small probe must not turn the curve over.
            power = min(4.0, max(1.0, math.log(last / first) / math.log(high / low)))
        return cls(last / high**power, power)

    def __call__(self, cett: float) -> float:
        """Nats at this CETT."""
        return self.alpha * cett**self.power


def allocate(
    layers: Sequence[Sequence[Level]], losses: Sequence[LossCurve], budget: float
) -> list[Level]:
    """One level per layer: greedily the most bytes per nat, until `budget` nats are spent.

    All layers are equally large. Each starts dense and moves along the lower convex hull of its
    (loss, bytes) points; steps are taken in the order of bytes saved per nat. A step that no longer
    fits ends its layer, and others go on.
    """
    chosen = [DENSE] * len(layers)
    steps: list[tuple[float, int, int, float, Level]] = []
    for index, (options, loss) in enumerate(zip(layers, losses, strict=True)):
        before = (0.0, DENSE)
        for place, (cost, level) in enumerate(_hull(options, loss)):
            saved = before[1].share - level.share
            nats = cost - before[0]
            steps.append((-saved / max(nats, _FLOOR**2), index, place, nats, level))
            before = (cost, level)
    ended: set[int] = set()
    left = budget
    for _, index, _, nats, level in sorted(steps, key=lambda step: step[:3]):
        if index in ended:
            continue
        if nats > left + _FLOOR**2:  # rounding of the sums before
            ended.add(index)
            continue
        left -= nats
        chosen[index] = level
    return chosen


def _hull(options: Sequence[Level], loss: LossCurve) -> list[tuple[float, Level]]:
    """The lower convex hull of (loss, bytes) from dense on, by rising loss, dense left out."""
    points = [(0.0, DENSE)]
    for cost, level in sorted(
        ((loss(level.cett), level) for level in options), key=lambda p: (p[0], p[1].share)
    ):
        if level.share >= points[-1][1].share:
            continue
        while len(points) > 1 and _slope(points[-1], (cost, level)) <= _slope(
            points[-2], points[-1]
        ):
            points.pop()
        points.append((cost, level))
    return points[1:]


def _slope(a: tuple[float, Level], b: tuple[float, Level]) -> float:
    """Bytes per nat, negative."""
    return (b[1].share - a[1].share) / max(b[0] - a[0], _FLOOR**2)
