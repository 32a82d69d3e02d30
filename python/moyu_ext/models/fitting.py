"""Packed rows of a model's layers, each fitted to what it is given when those below are packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..packing.fitted import Elimination, pack_fitted, second_moment
from ..packing.rows import Format, unpack_rows
from .text import Batch, encode_texts, longest_window, make_batch, read_texts, write_own

# Tokens of text that layers are fitted to.
TOKENS = 16384


def fitting_batch(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str] | str | PathLike[str] | None,
    seed: int = 0,
) -> Batch:
    """TOKENS tokens of the texts, or of what the model writes."""
    window = longest_window(model)
    if texts is None:
        rows = write_own(model, tokenizer, TOKENS, window, seed)
    else:
        rows = encode_texts(tokenizer, read_texts(texts, TOKENS), TOKENS, window)
    return make_batch(model, rows, TOKENS, 1)


class _Fitter:
    """Answers for each layer in turn with its fitted weights."""

    def __init__(
        self,
        formats: dict[str, Format],
        transposed: set[str],
        real: Tensor,
        report: Callable[[str, int, int], None],
    ) -> None:
        self.formats = formats
        self.transposed = transposed
        self.real = real
        self.report = report
        self.rows: dict[str, Tensor] = {}
        self._x: Tensor | None = None  # what the last layer got: q, k and v get the same
        self._moment: Tensor | None = None
        self._eliminations: dict[int, Elimination] = {}

    def _elimination(self, x: Tensor, group: int) -> Elimination:
        if x is not self._x:
            tokens = x[self.real] if x.shape[:-1] == self.real.shape else x
            self._x, self._moment, self._eliminations = x, second_moment(tokens), {}
        assert self._moment is not None
        if group not in self._eliminations:
            self._eliminations[group] = Elimination.of(self._moment, group)
        return self._eliminations[group]

    def answer(self, name: str, module: nn.Linear, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        (x,), fmt, transposed = args, self.formats[name], name in self.transposed
        if name not in self.rows:
            self.report(name, len(self.rows), len(self.formats))
            weight = module.weight.t() if transposed else module.weight
            inputs = self._elimination(x, 1 if transposed else fmt.group)
            self.rows[name] = pack_fitted(weight, inputs, fmt, transposed=transposed)
        d = module.out_features if transposed else module.in_features
        wide = unpack_rows(self.rows[name], d, x.dtype)
        return F.linear(x, wide.t() if transposed else wide, module.bias)


def fitted_rows(
    model: nn.Module,
    formats: dict[str, Format],
    transposed: set[str],
    batch: Batch,
    report: Callable[[str, int, int], None],
) -> dict[str, Tensor]:
    """Packed rows by layer name, of the layers that a forward of the batch reaches.

    One forward: each layer is fitted to its inputs from the fitted layers below, and answers with
    what its packed rows give. The model is left as it was.
    """
    fitter = _Fitter(formats, transposed, batch.real, report)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    body: Any = getattr(model, "base_model", model)
    handles = []
    try:
        for name in formats:
            layer = model.get_submodule(name)
            if layer is not head:
                handles.append(layer.register_forward_hook(partial(fitter.answer, name)))
        body(input_ids=batch.ids, attention_mask=batch.real.long(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return fitter.rows
