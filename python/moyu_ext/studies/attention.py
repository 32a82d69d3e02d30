"""The attention that tokens receive, and a model's loss when some of them are removed from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.continuation import continuation_losses
from ..errors import UnsupportedModelError
from ..evaluation.agreement import patched
from ..methods.base import Method
from ..patching.patch import report
from .activity import mask_arguments
from .setting import Subject

_ROWS = 8


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Within the block the model computes attention weights that it can return."""
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    try:
        model.set_attn_implementation("eager")
    except (AttributeError, ValueError) as error:
        raise UnsupportedModelError(
            f"heavy-hitters needs attention weights, but {type(model).__name__} has no eager "
            f"attention ({error}); use a model whose attention transformers can compute eagerly"
        ) from error
    try:
        yield
    finally:
        if before is not None:
            model.set_attn_implementation(before)


def received_attention(model: Any, rows: Tensor) -> Tensor:
    """Attention that each token receives from all later ones and itself, [rows, length] float64,
    summed over queries and meaned over heads and layers.

    Raises UnsupportedModelError where the model returns no attention weights.
    """
    parts = []
    with eager_attention(model), torch.no_grad():
        for batch in rows.split(_ROWS):
            output = model(input_ids=batch, use_cache=False, output_attentions=True)
            weights = getattr(output, "attentions", None)
            if not weights or any(w is None for w in weights):
                raise UnsupportedModelError(
                    f"heavy-hitters needs attention weights, but {type(model).__name__} returned "
                    "none; use a model with softmax attention in every layer"
                )
            parts.append(torch.stack([w.double().mean(1) for w in weights]).mean(0).sum(1))
    return torch.cat(parts)


def per_query(scores: Tensor) -> Tensor:
    """The mean over the queries that could see a token, from their sum [rows, length]."""
    return scores / torch.arange(scores.shape[1], 0, -1, dtype=torch.float64)


def chosen_tokens(scores: Tensor, budget: float, kind: str, generator: torch.Generator) -> Tensor:
    """Which tokens of the context are removed: bool [rows, context], the first one never.

    kind: "heavy" (largest sum of attention), "heavy per query" (largest mean), "random", or
    "places of heavy", "places of heavy per query" (where the text before has them).
    """
    if kind.startswith("places of "):
        return chosen_tokens(scores, budget, kind.removeprefix("places of "), generator).roll(1, 0)
    count = max(1, round(budget * scores.shape[1]))
    if kind == "random":
        keys = torch.rand(scores.shape, generator=generator, dtype=torch.float64)
    else:
        keys = scores.clone() if kind == "heavy" else per_query(scores)
    keys[:, 0] = -torch.inf
    order = keys.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def mask_without(removed: Tensor, length: int) -> Tensor:
    """Additive causal mask [rows, 1, length, length] in which only a removed token sees itself."""
    rows, context = removed.shape
    gone = F.pad(removed, (0, length - context))
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    seen = allowed & ~gone.view(rows, 1, 1, length)
    seen |= torch.eye(length, dtype=torch.bool)
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def losses(
    subject: Subject, method: Method, rows: Tensor, context: int, mask: Tensor | None
) -> tuple[Tensor, float]:
    """Mean loss of each row's continuation under the method, [rows] float64, and its density."""
    model = subject.model
    with patched(model, method):
        loss = continuation_losses(model, rows, context, partial(mask_arguments, mask))
        return loss.mean(1), report(model).density
