"""Splitting dense MLPs into experts, and routers for them (MoEfication, arXiv 2110.01786)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..methods.base import check_choice, check_count
from ..models.families import find_mlps
from ..models.fingerprint import fingerprint
from ..models.forward import require_plain
from ..models.weights import MlpWeights
from ..routers.experts import Experts, LayerExperts
from .router_data import LayerInputs, chunks, neuron_norms, read_windows, record

SPLITS = ("kmeans", "coactivation", "random")
_ROUNDS = 10  # of balanced k-means
_SAMPLE = 2048  # tokens whose activity groups neurons
_BATCH = 256
_RATE = 0.003


def split_experts(
    model: nn.Module,
    tokenizer: Any = None,
    texts: Sequence[str] | str | os.PathLike[str] | None = None,
    *,
    experts: int = 16,
    split: str = "kmeans",
    max_tokens: int = 16384,
    epochs: int = 6,
    seed: int = 0,
) -> Experts:
    """Group each MLP's neurons into experts of one size and train a router for them.

    split: "kmeans": balanced k-means on the rows of W_gate (W_up without a gate), of unit length;
    "coactivation": a balanced spectral partition of the graph whose edges say how much two neurons
    are active on the same tokens (k-means on the leading eigenvectors, never forming the [f, f]
    graph); "random". The router, second tanh(first x) + bias, is trained to predict
    each expert's share of the squared neuron norms. The weights stay where they are: an expert is a
    list of neurons. texts and max_tokens as for `train_router`.

    Raises ConfigurationError for values or texts that cannot be used (experts must divide f),
    PatchStateError for a patched model or one in training mode, UnsupportedModelError where the
    MLPs are not known.
    """
    for name, count in (("experts", experts), ("max_tokens", max_tokens), ("epochs", epochs)):
        check_count(name, count)
    check_choice("split", split, SPLITS)
    sites = find_mlps(model)
    require_plain(model, sites)
    for site in sites:
        if site.f % experts or experts > site.f:
            raise ConfigurationError(
                f"experts is {experts}, but {site.name} has {site.f} neurons; expected a divisor"
            )
    parts = read_windows(model, tokenizer, texts, max_tokens, seed)
    layers = [
        split_layer(inputs, sites[index].weights(), experts, split, epochs, seed)
        for index, inputs in record(model, sites, range(len(sites)), parts)
    ]
    config = getattr(model, "config", None)
    return Experts(
        layers=tuple(layers),
        fingerprint=fingerprint(model),
        split=split,
        tokens=parts.tokens,
        seed=seed,
        model=os.path.basename(getattr(config, "_name_or_path", "") or type(model).__name__),
    )


def split_layer(
    inputs: LayerInputs, weights: MlpWeights, experts: int, split: str, epochs: int, seed: int
) -> LayerExperts:
    """The experts of one layer and their router; see `split_experts`."""
    generator = torch.Generator().manual_seed(seed)
    if split == "random":
        order = torch.randperm(weights.f, generator=generator)
        assignment = torch.empty(weights.f, dtype=torch.long)
        assignment[order] = torch.arange(weights.f) % experts
    else:
        assignment = balanced_kmeans(_features(inputs, weights, split, experts), experts, generator)
    assignment = assignment.to(weights.device)
    first, second, bias = _train(inputs.train, weights, assignment, experts, epochs, generator)
    captured, oracle = _captured(inputs.test, weights, assignment, first, second, bias)
    return LayerExperts(
        assignment=assignment.to(torch.int32).cpu(),
        first=first.cpu(),
        second=second.cpu(),
        bias=bias.cpu(),
        captured=captured,
        oracle=oracle,
        chance=max(1, round(experts / 2)) / experts,
    )


def _features(inputs: LayerInputs, weights: MlpWeights, split: str, experts: int) -> Tensor:
    """One row per neuron, of unit length: what neurons of one expert should share."""
    if split == "kmeans":
        rows = weights.rows(weights.first).float().cpu()
    else:
        norms = neuron_norms(inputs.train[:_SAMPLE], weights).cpu()
        # Unit columns: neurons of one pattern meet whatever their size.
        pattern = F.normalize(norms, dim=0)
        with torch.random.fork_rng(devices=[]):  # svd_lowrank draws from the global generator
            torch.manual_seed(0)
            _, s, v = torch.svd_lowrank(pattern, q=min(2 * experts, *pattern.shape))
        rows = v * s
    return F.normalize(rows, dim=1)


def balanced_kmeans(rows: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """Group ids int64 [n] of rows [n, k] in groups of one size n / groups.

    Lloyd's iterations in which rows choose in the order of their distance to the nearest centre,
    each the nearest centre that has room.
    """
    n = len(rows)
    room = n // groups
    centres = rows[torch.randperm(n, generator=generator)[:groups]].clone()
    assignment = torch.zeros(n, dtype=torch.long)
    for _ in range(_ROUNDS):
        distances = torch.cdist(rows, centres)
        preferences = distances.argsort(1).tolist()
        left = [room] * groups
        chosen = [0] * n
        for row in distances.min(1).values.argsort().tolist():
            group = next(g for g in preferences[row] if left[g])
            left[group] -= 1
            chosen[row] = group
        before, assignment = assignment, torch.tensor(chosen)
        if torch.equal(before, assignment):
            break
        centres = torch.zeros_like(centres).index_add_(0, assignment, rows) / room
    return assignment


def expert_energy(norms: Tensor, assignment: Tensor, experts: int) -> Tensor:
    """Squared norms [tokens, f] summed by expert: [tokens, E]."""
    energy = torch.zeros(len(norms), experts, device=norms.device)
    return energy.index_add_(1, assignment, norms.square())


def _train(
    inputs: Tensor,
    weights: MlpWeights,
    assignment: Tensor,
    experts: int,
    epochs: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    place = weights.device
    x = inputs.to(place).float()
    width = 4 * experts
    scale = x.norm(dim=1).mean().clamp_min(1e-30)
    parameters = [
        nn.Parameter((torch.randn(width, weights.d, generator=generator).to(place)) / scale),
        nn.Parameter(torch.zeros(experts, width, device=place)),
        nn.Parameter(torch.zeros(experts, device=place)),
    ]
    optimiser = torch.optim.Adam(parameters, lr=_RATE)
    steps = epochs * -(-len(x) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps + 1)
    first, second, bias = parameters
    with torch.enable_grad():
        for _ in range(epochs):
            for batch in torch.randperm(len(x), generator=generator).split(_BATCH):
                rows = x[batch.to(place)]
                energy = expert_energy(neuron_norms(rows, weights), assignment, experts)
                share = energy / energy.sum(1, keepdim=True).clamp_min(1e-30)
                scores = torch.tanh(rows @ first.t()) @ second.t() + bias
                loss = -(share * F.log_softmax(scores, 1)).sum(1).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    return first.detach(), second.detach(), bias.detach()


def _captured(
    x: Tensor, weights: MlpWeights, assignment: Tensor, first: Tensor, second: Tensor, bias: Tensor
) -> tuple[float, float]:
    """Share of the energy in the router's half of the experts, and in the best half."""
    experts = len(bias)
    count = max(1, round(experts / 2))
    found = torch.zeros(3, dtype=torch.float64)
    for part in chunks(x):
        energy = expert_energy(neuron_norms(part, weights), assignment, experts)
        rows = part.to(first.device).float()
        scores = torch.tanh(rows @ first.t()) @ second.t() + bias
        total = energy.sum(1).clamp_min(1e-30)
        ours = energy.gather(1, scores.topk(count, 1).indices).sum(1) / total
        best = energy.topk(count, 1).values.sum(1) / total
        found += torch.tensor([ours.sum().item(), best.sum().item(), len(part)]).double()
    return (found[0] / found[2]).item(), (found[1] / found[2]).item()
