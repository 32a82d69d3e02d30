"""A layer's router that knows what its errors cost, and what it then costs at a price."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..methods.qrida import ShadowRouter
from ..models.families import MlpSite
from ..models.weights import MlpWeights
from ..shadow.feedback import damped_moment, elimination, quantise_for
from ..shadow.pack import Shadow, pack
from ..shadow.reference import dequantise
from .sensitivity import LayerSamples

_ROWS = 256
# Of the price at which every neuron saves the same share of the budget: far too careful to far too
# bold for all models tried.
_PRICES = tuple(4.0**power for power in range(-4, 5))


@dataclass(frozen=True)
class Cost:
    """What a layer does at a price: shares of its neurons that are exact and estimated, and nats a
    token that it loses, all other layers exact."""

    exact: float
    estimated: float
    loss: float


def fit_router(samples: LayerSamples, weights: MlpWeights, bits: tuple[int, int]) -> Shadow:
    """The shadow of one MLP fitted to its inputs, with `costs`.

    What an error of activation i costs is half of E[(g . W_down[:, i])^2] nats per unit squared, of
    what `sensitivity` says; the errors of g^ and u^ are those on the inputs' (damped) moment.
    """
    x = samples.x
    moment = damped_moment(x)
    order, factor = elimination(moment)
    unit = x.float().square().mean()  # of the moment's
    matrices = {"gate": bits[0], "up": bits[1]} if weights.gated else {"up": bits[1]}
    codes, errors = {}, []
    for name, b in matrices.items():
        rows = weights.rows(name)
        codes[name] = quantise_for(rows, b, order, factor)
        error = dequantise(codes[name])[:, : weights.d] - rows.float()
        errors.append(((error @ moment) * error).sum(1).clamp_min(0).mul(unit).sqrt())
    cost = torch.zeros(weights.f, device=x.device)
    down_t = weights.rows("down_t").float()
    for g in samples.g.split(_ROWS):
        cost += (g.float() @ down_t.t()).square().sum(0)
    cost = (cost / (2 * len(samples.g))).sqrt()
    shadow = pack(codes.get("gate"), codes["up"], weights.d)
    return replace(shadow, costs=torch.stack([cost, errors[0], errors[-1]]))


def cost_at(
    samples: LayerSamples, weights: MlpWeights, shadow: Shadow, prices: Sequence[float]
) -> list[Cost]:
    """What the layer does at each of `prices`, on the governed tokens."""
    router, wide = ShadowRouter(shadow, weights, priced=True), weights.to_float32()
    found = torch.zeros(len(prices), 3, dtype=torch.float64, device=samples.x.device)
    x = samples.x[samples.governed]
    for some, slope in zip(x.split(_ROWS), samples.g.split(_ROWS), strict=True):
        p = slope.float() @ wide.down_t.t()
        a = wide.activations(some.float())[1]
        for place, tiers in enumerate(router.by_prices(some, prices)):
            assert tiers.estimated is not None and tiers.values is not None
            lost = (a - tiers.values).masked_fill_(tiers.exact, 0.0).mul_(p).sum(-1)
            found[place] += _sums(tiers.exact, tiers.estimated, lost)
    return [
        Cost(exact / (len(x) * weights.f), estimated / (len(x) * weights.f), loss / (2 * len(x)))
        for exact, estimated, loss in found.tolist()
    ]


def _sums(exact: Tensor, estimated: Tensor, lost: Tensor) -> Tensor:
    values = (exact.sum(), estimated.sum(), lost.double().square().sum())
    return torch.stack([value.double() for value in values])


def fit_routers(
    sites: Sequence[MlpSite],
    samples: Sequence[LayerSamples],
    seen: Sequence[LayerSamples],
    budget: float,
    bits: int,
) -> tuple[list[Shadow], list[list[Cost]], list[float]]:
    """Each layer's router, fitted to `samples`, and its cost at each of the prices, on `seen`."""
    even = budget / sum(site.f for site in sites)
    prices = [even * factor for factor in _PRICES]
    shadows, costs = [], []
    for site, layer, look in zip(sites, samples, seen, strict=True):
        weights = site.weights()
        shadows.append(fit_router(layer, weights, (bits, bits)))
        costs.append(cost_at(look, weights, shadows[-1], prices))
    return shadows, costs, prices


def between(prices: Sequence[float], costs: Sequence[Cost], price: float) -> Cost:
    """The cost at a price between those measured: shares by its logarithm, the loss by both."""
    right = next((i for i, p in enumerate(prices) if p >= price), len(prices) - 1) or 1
    a, b = costs[right - 1], costs[right]
    place = math.log(price / prices[right - 1]) / math.log(prices[right] / prices[right - 1])
    place = min(max(place, 0.0), 1.0)
    losses = [max(cost.loss, 1e-15) for cost in (a, b)]
    return Cost(
        a.exact + place * (b.exact - a.exact),
        a.estimated + place * (b.estimated - a.estimated),
        losses[0] * (losses[1] / losses[0]) ** place,
    )
