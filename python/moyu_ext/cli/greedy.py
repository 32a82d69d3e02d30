"""Which token a dense or patched model would choose next, position by position."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..patching.patch import is_patched, scoring


def choices(model: Any, ids: Tensor, context: int) -> Tensor:
    """The greedy next token after each prefix of `ids` [rows, T] that ends behind the context.

    The first `context` tokens are the prompt, as in generation (see `scoring`). Returns int64
    [rows, T - context - 1]: what the model puts in the place of ids[:, context + 1 :], where every
    prefix is that of `ids`. The token at `context` is left out: the dense prompt decides it.
    """
    with torch.no_grad(), scoring(model, context) if is_patched(model) else nullcontext():
        logits = model(input_ids=ids).logits
    return logits[:, context:-1].argmax(-1)


def agreement(ours: Tensor, dense: Tensor) -> float:
    """Share of the positions where both chose the same token."""
    return (ours == dense).double().mean().item()
