"""Which places of a cache a row of a decode step sees, from the masks of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .stack import NotTaken


def first_places(
    mask: Any, batch: int, length: int, past: int, held: int, window: int
) -> list[int]:
    """The first place that each of batch * length rows sees; the last one is its own.

    mask: what the decoder got: None, [batch, past + length] with 0 for padding, or [batch or 1, 1,
    length, columns] (bool, or numbers with 0 for what is seen). past: tokens before this forward,
    of which the cache holds the last `held` ones. window: tokens that a row sees at most, 0: all.
    Raises NotTaken where a row does not see one unbroken range that ends with itself.
    """
    dropped = past - held
    own = [held + r % length for r in range(batch * length)]
    first = [max(0, place - window + 1) if window else 0 for place in own]
    if mask is None:
        return first
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise NotTaken("an attention mask of another kind")
    if mask.dim() == 2:
        seen = _padding(mask, batch, length, past)
        return (
            first
            if seen is None
            else [max(f, s - dropped) for f, s in zip(first, seen, strict=True)]
        )
    if mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[2] != length:
        raise NotTaken("an attention mask of another shape")
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    allowed = allowed.expand(batch, length, -1).reshape(batch * length, -1)
    # A static cache's mask has all of its columns, a dynamic one's those that it holds.
    if allowed.shape[-1] < held + length:
        raise NotTaken("an attention mask of another shape")
    begins = allowed.to(torch.uint8).argmax(-1)
    counts = allowed.sum(-1)
    for row, (begin, count) in enumerate(zip(begins.tolist(), counts.tolist(), strict=True)):
        if count != own[row] + 1 - begin or not bool(allowed[row, begin : begin + count].all()):
            raise NotTaken("an attention mask with gaps")
    return [max(f, b) for f, b in zip(first, begins.tolist(), strict=True)]


def _padding(mask: Tensor, batch: int, length: int, past: int) -> list[int] | None:
    """The first column that is no padding of each row; None where nothing is padding."""
    if mask.shape != (batch, past + length):
        raise NotTaken("an attention mask of another shape")
    real = mask != 0
    if bool(real.all()):
        return None
    begins = real.to(torch.uint8).argmax(-1)
    if not torch.equal(real.sum(-1), mask.shape[1] - begins):
        raise NotTaken("an attention mask with gaps")
    return [begin for begin in begins.tolist() for _ in range(length)]
