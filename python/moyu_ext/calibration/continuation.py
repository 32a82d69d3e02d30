"""Logits and losses of continuations: rows of text whose first columns are the prompt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.text import device
from ..patching.patch import scoring

_TOKENS_PER_FORWARD = 4096


def split_rows(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows [n, length] in parts that one forward takes."""
    return rows.split(max(1, _TOKENS_PER_FORWARD // rows.shape[1]))


def continuation_logits(model: Any, rows: Tensor, context: int, **inputs: Any) -> Tensor:
    """Logits that predict columns `context`... of rows [n, length], as generation would have them:
    float32 [n, length - context, vocabulary], in one forward.

    The model may be patched or not. inputs: what else its forward gets.
    """
    governed = any(getattr(module, "is_stand_in", False) for module in model.modules())
    with torch.no_grad(), scoring(model, context) if governed else nullcontext():
        logits: Tensor = model(input_ids=rows.to(device(model)), **inputs).logits
    return logits[:, context - 1 : -1].float()


def continuation_losses(
    model: Any,
    rows: Tensor,
    context: int,
    inputs: Callable[[slice], dict[str, Any]] = lambda part: {},
) -> Tensor:
    """-log p of the columns `context`... of rows, see `continuation_logits`: float64
    [n, length - context] on the CPU. inputs: what else a forward of these rows gets."""
    found = []
    start = 0
    for part in split_rows(rows):
        more = inputs(slice(start, start + len(part)))
        start += len(part)
        logits = continuation_logits(model, part, context, **more)
        target = part[:, context:].to(logits.device)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        found.append(loss.view(target.shape).double().cpu())
    return torch.cat(found)
