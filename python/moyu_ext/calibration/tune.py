"""`tune`: a loss that the user allows, turned into a price of weights, and what it buys."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigurationError, MoyuError
from ..methods.base import Method
from ..models.families import MlpSite, find_mlps
from ..models.fingerprint import fingerprint
from ..models.forward import require_plain, wide_products
from ..models.text import (
    check_ids,
    device,
    encode_texts,
    longest_window,
    read_texts,
    windows,
    write_own,
)
from ..patching.patch import layer_indices, patch, unpatch
from ..shadow.store import Shadows
from .continuation import continuation_logits, split_rows
from .pace import Pace, measure_pace
from .router_fit import Cost, between, fit_routers
from .sensitivity import sample_layers
from .tuned import LayerTuning, Tuned, machine

_TRIES = 4
# Tokens on which the shares and losses at each price are measured.
_LOOKED_AT = 512
# Of the budget that is aimed at: other text than that tuned on loses up to a quarter more.
_AIM = 0.8
# A layer is worth a router where it saves this share of its time.
_WORTH = 0.03
_PERCENT = re.compile(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*%\s*", re.IGNORECASE)

Progress = Callable[[str, int, int], None]


def nats(budget: Any) -> float:
    """The budget in nats of KL a token: a number as it is, "1%" of perplexity as log(1.01).

    Raises ConfigurationError for anything else, and for what is not above 0 and finite.
    """
    value: Any = budget
    if isinstance(budget, str):
        match = _PERCENT.fullmatch(budget)
        try:
            value = math.log1p(float(match[1]) / 100) if match else float(budget)
        except ValueError:
            value = None
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not 0 < value < math.inf:
        raise ConfigurationError(
            f"budget is {budget!r}; expected nats of KL per token above 0, such as 0.01, or a rise "
            'of perplexity, such as "1%"; patch(model) without a budget changes no answer'
        )
    return float(value)


def tune(
    model: nn.Module,
    tokenizer: Any = None,
    texts: Sequence[str] | str | os.PathLike[str] | None = None,
    *,
    budget: float | str = 0.01,
    layers: Sequence[int] | None = None,
    bits: int = 3,
    context: int = 64,
    continuation: int = 128,
    max_tokens: int = 4608,
    seed: int = 0,
    progress: Progress = lambda text, done, total: None,
) -> Tuned:
    """The price of weights at which generation loses `budget`, and the routers to it.

    A price says how many nats a row of weights has to save; each neuron of each token is then
    computed, estimated or skipped by that (`QRIDA(price=...)`), so that every layer and token gets
    the rows that matter for it. One forward and backward over two thirds of the text say what
    errors cost (`sensitivity`), and what each price loses and reads; this machine says how long
    that takes (`pace`). The largest price that keeps the budget is then verified on the last third,
    in the regime of generation: `context` tokens of prompt, dense, and `continuation` under the
    rule. A layer that gains no time at it stays dense, and all do where none gains.

    budget: mean KL(dense || sparse) per token in nats, or "1%" of perplexity. `texts`: as for
    `calibrate`; without them the model writes `max_tokens` tokens itself. layers: the MLPs that may
    become sparse, all by default. bits: of the routers, 1..4. `progress` is told each step: what
    begins, steps done, steps in all. The model is left as it was.

    Raises ConfigurationError for values or text that cannot be used, PatchStateError for a patched
    model or one in training mode, UnsupportedModelError for a model without MLPs of a known family.
    """
    limit = nats(budget)
    sites = find_mlps(model)
    require_plain(model, sites)
    chosen = set(layer_indices(layers, len(sites)))
    if not all(site.weights().device.type == "cpu" for site in sites):
        raise ConfigurationError(
            f"budgets work on the CPU alone so far, the model is on {sites[0].weights().device}; "
            "patch it there with QRIDA(exact=..., estimated=...), or move it: model.cpu()"
        )
    steps = itertools.count()
    total = 4 + _TRIES

    def begin(text: str) -> None:
        progress(text, min(next(steps), total - 1), total)

    begin("the model writes text" if texts is None else "text")
    with torch.no_grad():
        rows = _rows(model, tokenizer, texts, context, continuation, max_tokens, seed)
    held_out = len(rows) // 3
    begin("what errors cost")
    # Some of the rows held out say what prices do: routers lose less on what they were fitted to.
    looked_at = min(held_out, -(-_LOOKED_AT // continuation))
    seen = sample_layers(model, sites, rows[:looked_at], context, seed)
    samples = sample_layers(model, sites, rows[held_out:], context, seed + 1)
    with torch.no_grad():
        begin(f"routers of {len(sites)} layers")
        shadows, costs, prices = fit_routers(sites, samples, seen, limit, bits)
        inputs = [layer.x[-1:].contiguous() for layer in samples]
        del samples, seen
        store = Shadows(tuple(shadows), fingerprint(model), fitted=True)
        begin("how long layers take")
        pace = measure_pace(model, store, inputs)
        search = _Search(model, sites, chosen, store, costs, prices, pace)
        check = _HeldOut(model, rows[:held_out], context)
        return search.run(limit, check, begin)


def _rows(
    model: nn.Module,
    tokenizer: Any,
    texts: Any,
    context: int,
    continuation: int,
    max_tokens: int,
    seed: int,
) -> Tensor:
    length = context + continuation
    if not 1 <= context < length <= longest_window(model):
        raise ConfigurationError(
            f"context is {context} and continuation {continuation}; expected at least 1 each, and "
            f"together at most the {longest_window(model)} tokens that this model takes at once"
        )
    if texts is None:
        with _fast(model):
            how: dict[str, Any] = {"whole": True, "at_once": ops.MAX_ROWS}
            pieces = write_own(model, tokenizer, max_tokens, length, seed, **how)
    else:
        pieces = encode_texts(tokenizer, read_texts(texts, max_tokens), max_tokens, length)
    pieces = [p for p in windows(pieces, max_tokens, length) if len(p) == length]
    if len(pieces) < 3:
        raise ConfigurationError(
            f"texts: {len(pieces)} pieces of {length} tokens within max_tokens = {max_tokens}; "
            "tuning needs at least 3, and some 15 to be sure of a budget: pass more or longer "
            "texts, or a shorter context and continuation"
        )
    rows = torch.tensor(pieces)
    check_ids(model, rows.flatten().tolist())
    # Every third row is held out: the parts are then of the same kind.
    return torch.cat([rows[::3][: len(rows) // 3], rows[1::3], rows[2::3]]).to(device(model))


@contextmanager
def _fast(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes the same by our kernels, where they take it."""
    try:
        patch(model, projections=True)
    except MoyuError:
        yield
        return
    try:
        yield
    finally:
        unpatch(model)


class _HeldOut:
    """KL of the dense model's next tokens on rows of their own."""

    def __init__(self, model: nn.Module, rows: Tensor, context: int) -> None:
        self.model, self.parts, self.context = model, split_rows(rows), context
        self.dense = [self._log_probabilities(part) for part in self.parts]

    def _log_probabilities(self, rows: Tensor) -> Tensor:
        # The first scored token follows from the prompt, which is dense under any rule.
        with wide_products(self.model):
            return continuation_logits(self.model, rows, self.context)[:, 1:].log_softmax(-1)

    def divergence(self, method: Method) -> tuple[float, float, float, int]:
        """Mean KL in nats, its standard error over rows of text (over tokens where there is one
        row), agreement of the likeliest token, and tokens."""
        kl, same = [], []
        with _patched(self.model, method):
            for rows, before in zip(self.parts, self.dense, strict=True):
                after = self._log_probabilities(rows)
                kl.append(F.kl_div(after, before, reduction="none", log_target=True).sum(-1))
                same.append(before.argmax(-1) == after.argmax(-1))
        each = torch.cat(kl).double()
        means = each.mean(1) if len(each) > 1 else each.flatten()
        error = means.std().item() / math.sqrt(len(means))
        agreement = torch.cat(same).double().mean().item()
        return each.mean().item(), error, agreement, each.numel()


@contextmanager
def _patched(model: nn.Module, method: Method) -> Iterator[None]:
    patch(model, method, decode_step=False)
    try:
        yield
    finally:
        unpatch(model)


class _Search:
    """Looks for the largest price that keeps the budget."""

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[MlpSite],
        chosen: set[int],
        shadows: Shadows,
        costs: list[list[Cost]],
        prices: list[float],
        pace: Pace,
    ) -> None:
        self.model, self.shadows, self.pace = model, shadows, pace
        self.chosen, self.costs, self.prices = chosen, costs, prices
        sizes = [float(site.weights().nbytes) for site in sites]
        self.shares = [size / sum(sizes) for size in sizes]  # of the MLPs' time

    def at(self, price: float) -> list[LayerTuning]:
        """What each layer does at a price; price 0 where it is dense."""
        found = []
        for index, (costs, share) in enumerate(zip(self.costs, self.shares, strict=True)):
            dense = share * self.pace.dense
            layer = LayerTuning(0.0, 1.0, 0.0, 0.0, dense)
            if index in self.chosen and price > 0:
                cost = between(self.prices, costs, price)
                seconds = share * self.pace.seconds(cost.exact, cost.estimated)
                if seconds < (1 - _WORTH) * dense:
                    layer = LayerTuning(price, cost.exact, cost.estimated, cost.loss, seconds)
            found.append(layer)
        return found

    def price_for(self, loss: float) -> float:
        """The largest price at which this loss is predicted, within those looked at."""
        low, high = math.log(self.prices[0]), math.log(self.prices[-1])
        for _ in range(40):
            middle = (low + high) / 2
            total = sum(layer.loss for layer in self.at(math.exp(middle)))
            low, high = (middle, high) if total <= loss else (low, middle)
        return math.exp(low)

    def run(self, budget: float, check: _HeldOut, begin: Callable[[str], None]) -> Tuned:
        aim = _AIM * budget
        best = self._tuned(budget, self.at(0.0))
        for _ in range(_TRIES):
            layers = self.at(self.price_for(aim))
            tuned = self._tuned(budget, layers)
            if not tuned.sparse:
                break
            begin("held-out text")
            kl, error, agreement, tokens = check.divergence(tuned.method())
            tuned = replace(tuned, kl=kl, error=error, agreement=agreement, tokens=tokens)
            if kl <= 0.9 * budget and tuned.seconds < best.seconds:
                best = tuned
            if 0.7 * budget <= kl <= 0.9 * budget:
                break
            aim *= min(max(_AIM * budget / max(kl, 1e-12), 0.2), 3.0)
        return best

    def _tuned(self, budget: float, layers: list[LayerTuning]) -> Tuned:
        sparse = any(layer.price > 0 for layer in layers)
        config = getattr(self.model, "config", None)
        name = str(getattr(config, "_name_or_path", "") or type(self.model).__name__)
        return Tuned(
            layers=tuple(layers),
            budget=budget,
            dense_seconds=self.pace.dense,
            fingerprint=self.shadows.fingerprint,
            model=os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name,
            machine=machine(),
            shadows=self.shadows if sparse else None,
        )
