"""The statistics that results rest on, in plain PyTorch and seeded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """+1 or -1 where the whole interval lies on that side of zero, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean_interval(samples: Tensor, z: float = 2.576) -> Interval:
    """Mean of independent samples with a normal confidence interval (99 % by default)."""
    values = samples.double().flatten()
    mean = values.mean().item()
    error = z * values.std().item() / len(values) ** 0.5 if len(values) > 1 else float("inf")
    return Interval(mean, mean - error, mean + error)


def bootstrap(units: Tensor, seed: int = 0, rounds: int = 2000, level: float = 0.95) -> Interval:
    """Mean over independent units (texts, seeds) with a percentile bootstrap interval."""
    values = units.double().flatten().cpu()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(values), (rounds, len(values)), generator=generator)
    means = values[draws].mean(1)
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(values.mean().item(), low, high)


def crossed_bootstrap(values: Tensor, seed: int = 0, rounds: int = 2000) -> Interval:
    """Mean of values [seeds, texts] with a 95 % interval where both are samples: each is drawn on
    its own, since the seeds share their texts (the pigeonhole bootstrap, Owen 2007)."""
    table = values.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (
        torch.randint(size, (rounds, size), generator=generator) for size in table.shape
    )
    means = table[rows.unsqueeze(2), columns.unsqueeze(1)].mean((1, 2))
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(table.mean().item(), low, high)


def sign_of(found: Mapping[str, Any]) -> int:
    """`Interval.sign` of an interval as results keep it."""
    return Interval(found["mean"], found["low"], found["high"]).sign


def sign_at(gap: float, p: float, alpha: float = 0.05) -> int:
    """The sign of a difference that a test finds significant, else 0."""
    return 0 if p >= alpha or gap == 0 else 1 if gap > 0 else -1


def ranks(values: Tensor) -> Tensor:
    """Ranks along the last axis, ties sharing their mean rank, float64."""
    ordered, order = values.double().sort(-1)
    place = torch.arange(values.shape[-1], dtype=torch.float64).expand_as(ordered)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    group = new.cumsum(-1) - 1
    size = torch.zeros_like(ordered).scatter_add_(-1, group, torch.ones_like(ordered))
    total = torch.zeros_like(ordered).scatter_add_(-1, group, place)
    shared = (total / size.clamp_min(1)).gather(-1, group)
    return torch.empty_like(ordered).scatter_(-1, order, shared)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation along the last axis, float64; 0 where one side is constant."""
    a, b = a.double(), b.double()
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    norm = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(norm > 0, (a * b).sum(-1) / norm.clamp_min(1e-300), torch.zeros_like(norm))


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation along the last axis, float64."""
    return pearson(ranks(a), ranks(b))


def permutation_p(first: Tensor, second: Tensor, seed: int = 0, rounds: int = 5000) -> float:
    """Two-sided p-value that two independent samples have one mean, by permutation."""
    a, b = first.double().flatten(), second.double().flatten()
    pool = torch.cat([a, b])
    observed = (a.mean() - b.mean()).abs()
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(rounds, len(pool), generator=generator, dtype=torch.float64)
    shuffled = pool[keys.argsort(1)]
    gaps = (shuffled[:, : len(a)].mean(1) - shuffled[:, len(a) :].mean(1)).abs()
    # The observed order counts as one of the permutations: p is never 0.
    return (1 + int((gaps >= observed - 1e-15).sum())) / (rounds + 1)


def sign_flip_p(differences: Tensor, seed: int = 0, rounds: int = 5000) -> float:
    """Two-sided p-value that paired differences have mean zero, by flipping their signs."""
    values = differences.double().flatten()
    observed = values.mean().abs()
    generator = torch.Generator().manual_seed(seed)
    flips = torch.randint(2, (rounds, len(values)), generator=generator) * 2 - 1
    means = (values * flips).mean(1).abs()
    return (1 + int((means >= observed - 1e-15).sum())) / (rounds + 1)


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """|a and b| / |a or b| along the last axis of bool sets; 1 for two empty sets."""
    union = (a | b).sum(-1).double()
    return torch.where(union > 0, (a & b).sum(-1).double() / union.clamp_min(1), 1.0)


def covered(later: Tensor, by: Tensor) -> Tensor:
    """Share of the set `later` that lies in the set `by`, along the last axis; 1 if empty."""
    size = later.sum(-1).double()
    return torch.where(size > 0, (later & by).sum(-1).double() / size.clamp_min(1), 1.0)


def top_mask(scores: Tensor, count: int) -> Tensor:
    """Bool, the `count` largest along the last axis (ties to the lower index)."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
