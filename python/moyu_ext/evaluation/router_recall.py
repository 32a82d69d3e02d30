"""How many of the active neurons a router finds on a text, offline and online."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..methods.base import AdaptiveRule, TokenRule
from ..methods.online_roda import OnlineRODA
from ..methods.roda import RODA
from ..models.families import find_mlps, record_inputs
from ..models.text import device


@dataclass(frozen=True)
class RouterRecall:
    """Per layer, over the tokens behind the prompts that are not refreshed; density over all."""

    recall: list[float]
    precision: list[float]
    density: list[float]

    def mean(self, field: str) -> float:
        """Over layers, of "recall", "precision" or "density"."""
        values: list[float] = getattr(self, field)
        return sum(values) / len(values)


def router_recall(
    model: Any, method: RODA | OnlineRODA, rows: Tensor, context: int
) -> RouterRecall:
    """Compare the sets that the method's router names with the true ones, ||n_i(x)|| >= epsilon.

    rows: ids [n, length]; the first `context` of each are the prompt. All layers see what the dense
    model gives them, so that one layer's misses do not change the next one's truth. The model comes
    unpatched.

    Raises ConfigurationError for a context that leaves nothing to measure, ArtifactError for a
    router of another model.
    """
    if not 1 <= context < rows.shape[1]:
        raise ConfigurationError(
            f"context is {context}; expected between 1 and {rows.shape[1] - 1}, so that rows of "
            f"{rows.shape[1]} tokens have something to measure"
        )
    from ..models.fingerprint import fingerprint

    sites = find_mlps(model)
    method.validate(len(sites), lambda: fingerprint(model))
    every = method.refresh
    place = torch.arange(rows.shape[1]) - context + 1  # 1 for the first token behind the prompt
    again = (place > 0) & (place % every == 0) if every else torch.zeros_like(place).bool()
    known = (again | (place <= 0)).view(1, -1, 1).to(device(model))
    counted = ((place > 0) & ~again).to(device(model))
    found: list[tuple[float, float, float]] = []

    def look(index: int, x: Tensor) -> None:
        w = sites[index].weights()
        a = w.to_float32().activations(x.float())[1]
        labels = a.float().abs() * w.column_norms() >= method.router.layers[index].epsilon
        rule = method.bind(index, w)
        if isinstance(rule, AdaptiveRule):
            s = rule.statistic(a) * known
            tokens = known.long()
            active = rule.active(x, s.cumsum(1) - s, tokens.cumsum(1) - tokens)
        else:
            assert isinstance(rule, TokenRule)
            active = rule.active(x, a, a)
        hits = (labels & active)[:, counted].sum().item()
        positives, chosen = (t[:, counted].sum().item() for t in (labels, active))
        active = active | known
        density = active[:, context:].float().mean().item()
        found.append((hits / max(positives, 1), hits / max(chosen, 1), density))

    with torch.no_grad(), record_inputs(model, sites, look):
        model(input_ids=rows.to(device(model)), use_cache=False)
    recall, precision, density = (list(values) for values in zip(*found, strict=True))
    return RouterRecall(recall, precision, density)
