"""Perplexity: over a sliding window, and in the regime of generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.continuation import continuation_losses
from ..errors import ConfigurationError
from ..models.text import check_ids, device, encode, longest_window

_TOKENS_PER_FORWARD = 4096


@dataclass(frozen=True)
class Perplexity:
    """`loss`: mean negative log likelihood in nats, `perplexity`: exp(loss), over `tokens`."""

    loss: float
    perplexity: float
    tokens: int


def perplexity(
    model: nn.Module,
    tokenizer_or_ids: Any,
    text: str | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
) -> Perplexity:
    """Perplexity of a text under a sliding window.

    Windows of `window` tokens (the model's positions, at most 512) begin every `stride` tokens
    (half a window). Each token but the first is scored once, in the first window that holds it
    with a token before it, so later tokens see at least `window - stride` tokens of context.

    `tokenizer_or_ids`: a tokenizer for `text`, or the ids themselves (1-D) with `text` left out.
    A model patched with a method that governs decoding alone scores like the dense one here: use
    `generation_perplexity`.

    Raises ConfigurationError for fewer than two tokens, ids outside the vocabulary, or a window or
    stride that leaves tokens unscored.
    """
    ids = _ids(model, tokenizer_or_ids, text)
    window = longest_window(model) if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    if window < 2 or not 1 <= stride < window:
        raise ConfigurationError(
            f"window is {window} and stride {stride}; expected window >= 2 and 1 <= stride < window"
        )
    if len(ids) < 2:
        raise ConfigurationError(f"perplexity needs at least 2 tokens, got {len(ids)}")
    losses: list[Tensor] = []
    scored = 1
    with torch.no_grad():
        for start in range(0, len(ids), stride):
            piece = ids[start : start + window].unsqueeze(0)
            new = start + piece.shape[1] - scored
            losses.append(_losses(model(input_ids=piece, use_cache=False).logits, piece, new))
            scored += new
            if scored == len(ids):
                break
    return _summary(losses)


def generation_perplexity(
    model: nn.Module,
    ids: Tensor | Sequence[int],
    *,
    context: int,
    continuation: int,
) -> Perplexity:
    """Perplexity of continuations as generation would see them.

    Each row of `ids` ([rows, at least context + continuation], or 1-D: cut into such rows, the
    remainder left out) is a prompt of `context` tokens, which runs dense and feeds sequence-level
    methods, and `continuation` tokens that are scored while they run under the method. The first
    of them is predicted by the prompt's last token, which is dense, as in `generate`.
    A model that is not patched is scored dense.

    Raises ConfigurationError for lengths below 1, rows that are too short, or ids outside the
    vocabulary.
    """
    if context < 1 or continuation < 1:
        raise ConfigurationError(
            f"context is {context} and continuation {continuation}; expected both at least 1"
        )
    rows = torch.as_tensor(ids, dtype=torch.long)
    length = context + continuation
    if rows.shape[-1] < length or rows.dim() not in (1, 2) or rows.numel() == 0:
        raise ConfigurationError(
            f"ids have shape {list(rows.shape)}; expected rows of at least context + continuation "
            f"= {length} tokens"
        )
    if rows.dim() == 1:
        rows = rows[: len(rows) // length * length].view(-1, length)
    rows = rows[:, :length]
    check_ids(model, rows.flatten().tolist())
    return _summary([continuation_losses(model, rows, context).flatten()])


def _ids(model: nn.Module, tokenizer_or_ids: Any, text: str | None) -> Tensor:
    if text is not None:
        ids = torch.tensor(encode(tokenizer_or_ids, text), dtype=torch.long)
    elif isinstance(tokenizer_or_ids, (Tensor, Sequence)):
        ids = torch.as_tensor(tokenizer_or_ids, dtype=torch.long).flatten()
    else:
        raise ConfigurationError(
            f"expected token ids, or a tokenizer and a text; got "
            f"{type(tokenizer_or_ids).__name__} without a text"
        )
    check_ids(model, ids.tolist())
    return ids.to(device(model))


def _losses(logits: Tensor, ids: Tensor, last: int) -> Tensor:
    """-log p of the last `last` tokens of each row, float32 [rows * last]."""
    predictions = logits[:, -last - 1 : -1].float()
    return F.cross_entropy(
        predictions.flatten(0, 1), ids[:, -last:].flatten(), reduction="none"
    ).cpu()


def _summary(losses: list[Tensor]) -> Perplexity:
    values = torch.cat(losses).double()
    loss = values.mean().item()
    # exp overflows a double at 710 nats; only a broken model gets there
    return Perplexity(loss, math.exp(loss) if loss < 700 else math.inf, len(values))
