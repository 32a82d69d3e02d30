"""What routers are trained on: the inputs of a model's MLPs while it reads text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..models.families import MlpSite, record_inputs
from ..models.text import (
    check_ids,
    device,
    encode_texts,
    longest_window,
    read_texts,
    windows,
    write_own,
)
from ..models.weights import MlpWeights

MEMORY = 2 << 30  # bytes of inputs that are held at once
_PARTS = (0.8, 0.1, 0.1)  # of the windows: training, choosing thresholds, reporting
_FEW = 10  # texts below which windows of one text may be in two parts
_CHUNK = 1024  # tokens whose [tokens, f] norms are held at once


@dataclass(frozen=True)
class Windows:
    """Windows of ids. The parts share no text, unless there are fewer than ten of them."""

    train: list[list[int]]
    validation: list[list[int]]
    test: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens to train on."""
        return sum(map(len, self.train))


def read_windows(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str] | str | os.PathLike[str] | None,
    max_tokens: int,
    seed: int,
) -> Windows:
    """Windows of at most 512 tokens, 80 % to train, 10 % for thresholds, 10 % to report.

    texts: as for `calibrate`; None: the model writes its own. Raises ConfigurationError for fewer
    than three windows.
    """
    window = longest_window(model)
    if texts is None:
        rows = write_own(model, tokenizer, max_tokens, window, seed)
    else:
        rows = encode_texts(tokenizer, read_texts(texts, max_tokens), max_tokens, window)
    check_ids(model, (i for row in rows for i in row))
    while len(rows) < _FEW and window > 16:  # few texts: their windows stand in for them
        window //= 2
        rows = windows(rows, max_tokens, window)
    if len(rows) < 3:
        raise ConfigurationError(
            f"texts give {len(rows)} windows of up to {window} tokens, at least 3 are needed "
            "(to train, to choose thresholds, to report); pass more text or more tokens"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [rows[i] for i in order]
    held = [max(1, round(part * len(rows))) for part in _PARTS[1:]]
    first, second = len(rows) - sum(held), len(rows) - held[1]
    parts = (rows[:first], rows[first:second], rows[second:])
    budgets = [max(1, round(part * max_tokens)) for part in _PARTS]
    return Windows(*(windows(p, b, window) for p, b in zip(parts, budgets, strict=True)))


@dataclass(frozen=True)
class LayerInputs:
    """The MLP inputs of one layer, [tokens, d] each, in the model's dtype on the CPU."""

    train: Tensor
    validation: Tensor
    test: Tensor


def record(
    model: nn.Module, sites: Sequence[MlpSite], wanted: Sequence[int], parts: Windows
) -> Iterator[tuple[int, LayerInputs]]:
    """The inputs of the wanted layers, in order; as many layers per reading as fit in memory."""
    total = sum(len(row) for part in (parts.train, parts.validation, parts.test) for row in part)
    each = max(1, total * sites[0].d * sites[0].weights().dtype.itemsize)
    group = max(1, MEMORY // each)
    for start in range(0, len(wanted), group):
        chosen = [sites[i] for i in wanted[start : start + group]]
        read = [_read(model, chosen, part) for part in (parts.train, parts.validation, parts.test)]
        for site in chosen:
            yield site.index, LayerInputs(*(part.pop(site.index) for part in read))


def _read(
    model: nn.Module, sites: Sequence[MlpSite], rows: Sequence[list[int]]
) -> dict[int, Tensor]:
    found: dict[int, list[Tensor]] = {site.index: [] for site in sites}

    def keep(index: int, x: Tensor) -> None:
        found[index].append(x.detach().reshape(-1, x.shape[-1]).cpu())

    place = device(model)
    with torch.no_grad(), record_inputs(model, sites, keep):
        for row in rows:
            model(input_ids=torch.tensor([row], device=place), use_cache=False)
    return {index: torch.cat(parts) for index, parts in found.items()}


def neuron_norms(x: Tensor, weights: MlpWeights) -> Tensor:
    """||n_i(x)|| of x [tokens, d], float32 [tokens, f] on the weights' device."""
    return weights.norms(x.to(weights.device))


def chunks(x: Tensor) -> Iterator[Tensor]:
    """x in pieces whose norms fit in memory."""
    yield from x.split(_CHUNK)
