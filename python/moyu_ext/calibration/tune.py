"""`tune`: thresholds per layer that spend a budget of perplexity where it saves the most bytes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._files import write_atomically
from ..errors import ConfigurationError
from ..methods.base import Method
from ..methods.qrida import QRIDA, shadow_scorer
from ..methods.tda import TDA
from ..models.families import MlpSite, find_mlps
from ..models.fingerprint import fingerprint
from ..models.forward import answer_mlps, require_plain
from ..models.text import (
    Batch,
    check_ids,
    device,
    encode_texts,
    longest_window,
    read_texts,
    windows,
    write_own,
)
from ..patching.patch import patch, unpatch
from ..shadow.feedback import build_each_for
from ..shadow.pack import Shadow, record_bytes
from ..shadow.store import Shadows
from .continuation import continuation_logits, continuation_losses, split_rows
from .curves import Level, LossCurve, allocate, levels
from .thresholds import LayerThreshold, Thresholds

FILE = "moyu_tune.json"
BITS = ((1, 1), (2, 1), (2, 2), (3, 3))
# What a layer's probe should lose of the MLP's output: enough to be seen above rounding, little
# enough to be like what the budget allows.
_PROBES = (0.2, 0.45)
_PROBE_ROWS = 8
# Of the budget, tried for the frontier; then _REFINE steps look for the largest that keeps it.
_FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_REFINE = 3
_WIDER = 8
# Saving less than this is no choice to offer.
_WORTH = 0.02


@dataclass(frozen=True)
class Point:
    """One allocation tried: `increase` of perplexity over dense, its standard error, the mean of
    `density`, `share` of the dense MLPs' bytes and predicted `speedup` of a decode step that reads
    its weights at bandwidth. `budget`: the nats that the allocation was given."""

    budget: float
    increase: float
    error: float
    density: float
    share: float
    speedup: float


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    thresholds, and for QRIDA shadows fitted to the text: for `method()`; increase, error: of
    perplexity over dense on held-out rows (error: one standard error of the paired difference);
    point: the chosen allocation as measured on the rows it was chosen on; frontier: all that were
    tried, by bytes; losses: per layer, nats = alpha * cett^power; tokens: scored on each half of
    the text.
    """

    thresholds: Thresholds
    max_increase: float
    increase: float
    error: float
    point: Point
    frontier: tuple[Point, ...]
    losses: tuple[LossCurve, ...]
    tokens: int
    shadows: Shadows | None = None

    def method(self) -> Method:
        """The method with what was found, for `patch`."""
        if self.thresholds.score == "shadow":
            return QRIDA(thresholds=self.thresholds, shadows=self.shadows)
        return TDA(self.thresholds, score=self.thresholds.score)

    def as_dict(self) -> dict[str, Any]:
        """All but the shadows, in what JSON knows."""
        content = dataclasses.asdict(dataclasses.replace(self, shadows=None))
        content.pop("shadows")
        return content

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the thresholds and shadows (see their `save_pretrained`) and `moyu_tune.json`."""
        self.thresholds.save_pretrained(directory)
        if self.shadows is not None:
            self.shadows.save_pretrained(directory)
        content = self.as_dict()
        content.pop("thresholds")
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(Path(directory) / FILE, text.encode())


def tune(
    model: nn.Module,
    tokenizer: Any = None,
    texts: Sequence[str] | str | os.PathLike[str] | None = None,
    *,
    max_perplexity_increase: float = 0.01,
    method: Any = "qrida",
    bits: Sequence[tuple[int, int]] = BITS,
    context: int = 64,
    continuation: int = 192,
    max_tokens: int = 16384,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda text, done, total: None,
) -> Tuned:
    """Per-layer thresholds whose perplexity in generation is at most `max_perplexity_increase`
    (0.01: one per cent) above dense, for the fewest bytes.

    Per layer: density and CETT at 15 thresholds and for each of `bits` (QRIDA; shadows are fitted
    to the half of the text that is tuned on, see `Shadows.fit`), and the divergence
    (nats) of the model's output where that layer alone is sparse. Budgets of nats are then spent
    greedily where a nat saves the most bytes; allocations are tried on one half of the text until
    the largest is found that keeps the limit, and the other half has the last word.

    Memory (QRIDA): shadows of all `bits` at once, a third of the MLPs' bfloat16 bytes.

    `texts`: as for `calibrate`. They are cut into rows of `context` tokens, which run dense, and
    `continuation` tokens, which are scored under the rule; shorter ones where the model has fewer
    positions. `method`: "qrida", "tda", or a `TDA` (its score counts). `progress` is told
    each step: what begins, steps done, steps in all. The model is left as it was.

    Raises ConfigurationError for values or text that cannot be used, and where no allocation that
    saves anything keeps the limit: it then names what the smallest one costs. PatchStateError for a
    patched model or one in training mode.
    """
    score = _score(method)
    if not 0 < max_perplexity_increase < math.inf:
        raise ConfigurationError(
            f"max_perplexity_increase is {max_perplexity_increase!r}; expected a number above 0, "
            "such as 0.01 for one per cent"
        )
    sites = find_mlps(model)
    require_plain(model, sites)
    steps = itertools.count()
    total = len(sites) + len(_FACTORS) + _REFINE + 3  # text, curves, held-out text

    def begin(text: str) -> None:
        progress(text, min(next(steps), total - 1), total)

    with torch.no_grad():
        begin("the model writes text" if texts is None else "text")
        rows = _rows(model, tokenizer, texts, context + continuation, max_tokens, seed)
        half = len(rows) // 2
        run = _Run(model, sites, rows[:half], context, score, bits)
        begin(f"curves of {len(sites)} layers")
        run.measure_levels()
        for site in sites:
            begin(f"loss of layer {site.index + 1} of {len(sites)}")
            run.probe(site.index)
        limit = max_perplexity_increase
        point, chosen = run.search(limit, begin)
        begin("held-out text")
        check = _Losses(model, rows[half:], context)
        increase, error = check.increase(run.method(chosen))
        while increase > limit:
            smaller = [p for p in run.tried if p.budget < point.budget and 1 - p.share >= _WORTH]
            if not smaller:
                raise _unmet(limit, increase, point, "on held-out text")
            point = max(smaller, key=lambda p: p.budget)
            chosen = run.allocate(point.budget)
            increase, error = check.increase(run.method(chosen))
    return Tuned(
        thresholds=run.thresholds(chosen),
        max_increase=limit,
        increase=increase,
        error=error,
        point=point,
        frontier=tuple(sorted(run.tried, key=lambda p: p.share)),
        losses=tuple(run.losses),
        tokens=half * continuation,
        shadows=run.shadows(chosen),
    )


def _score(method: Any) -> str:
    """The score that thresholds are for: "shadow", or TDA's."""
    name = method if isinstance(method, str) else getattr(method, "name", None)
    if name == "qrida":
        return "shadow"
    if name == "tda":
        return str(getattr(method, "score", "product"))
    raise ConfigurationError(f"method is {method!r}; tune serves QRIDA and TDA")


def _rows(
    model: nn.Module, tokenizer: Any, texts: Any, length: int, max_tokens: int, seed: int
) -> Tensor:
    if length > longest_window(model):
        raise ConfigurationError(
            f"context + continuation is {length} tokens; this model takes {longest_window(model)}"
        )
    if texts is None:
        pieces = write_own(model, tokenizer, max_tokens, length, seed)
    else:
        pieces = encode_texts(tokenizer, read_texts(texts, max_tokens), max_tokens, length)
    pieces = [p for p in windows(pieces, max_tokens, length) if len(p) == length]
    if len(pieces) < 2:
        raise ConfigurationError(
            f"texts: {len(pieces)} pieces of {length} tokens within max_tokens = {max_tokens}; "
            "tuning needs at least 2, and some 30 to tell one per cent: pass more or longer texts, "
            "or a shorter context and continuation"
        )
    rows = torch.tensor(pieces)
    check_ids(model, rows.flatten().tolist())
    # Every other row: the halves are then of the same kind.
    return torch.cat([rows[::2][: len(rows) // 2], rows[1::2]]).to(device(model))


def _unmet(limit: float, increase: float, point: Point, where: str) -> ConfigurationError:
    return ConfigurationError(
        f"max_perplexity_increase = {100 * limit:.3g}% cannot be met: the most careful choice "
        f"tried saves {1 - point.share:.1%} of the MLPs' bytes (density {point.density:.2f}) and "
        f"raises the perplexity by {increase:.3%} {where}. Allow {_ceil(increase):.2%}, or tune on "
        "more text if that is within its noise"
    )


def _ceil(value: float) -> float:
    return math.ceil(value * 1e4) / 1e4


class _Losses:
    """Negative log likelihood of the continuations of rows, dense and under a method."""

    def __init__(self, model: nn.Module, rows: Tensor, context: int) -> None:
        self.model, self.rows, self.context = model, rows, context
        self.dense = self._losses()

    def _log_probabilities(self, rows: Tensor) -> Tensor:
        return continuation_logits(self.model, rows, self.context).log_softmax(-1)

    def _losses(self) -> Tensor:
        return continuation_losses(self.model, self.rows, self.context).flatten()

    def increase(self, method: Method) -> tuple[float, float]:
        """Of perplexity over dense, and one standard error of it."""
        with _patched(self.model, method):
            change = self._losses() - self.dense
        ratio = math.exp(change.mean().item())
        return ratio - 1, ratio * change.std().item() / math.sqrt(len(change))

    def divergences(self, methods: Sequence[Method], layer: int, count: int) -> list[float]:
        """KL(dense || method in one layer) of the next token, mean over `count` rows' tokens.

        To second order it is the loss that the error costs, and its noise is far smaller than that
        of a difference of losses.
        """
        totals = [0.0] * len(methods)
        rows = self.rows[:count]
        for part in split_rows(rows):
            dense = self._log_probabilities(part)
            for i, method in enumerate(methods):
                with _patched(self.model, method, [layer]):
                    other = self._log_probabilities(part)
                totals[i] += F.kl_div(other, dense, reduction="sum", log_target=True).item()
        return [total / (len(rows) * (rows.shape[1] - self.context)) for total in totals]


@contextmanager
def _patched(
    model: nn.Module, method: Method, layers: Sequence[int] | None = None
) -> Iterator[None]:
    patch(model, method, layers=layers)
    try:
        yield
    finally:
        unpatch(model)


class _Run:
    """The state of one tuning: levels and loss curves of each layer, allocations tried."""

    def __init__(
        self,
        model: nn.Module,
        sites: list[MlpSite],
        rows: Tensor,
        context: int,
        score: str,
        bits: Sequence[tuple[int, int]],
    ) -> None:
        self.model, self.sites, self.rows = model, sites, rows
        self.context, self.score = context, score
        self.bits: list[tuple[int, int]] = list(bits) if score == "shadow" else []
        self.fitted: list[dict[tuple[int, int], Shadow]] = []  # per layer, for each of bits
        self.fingerprint = fingerprint(model)
        self.levels: list[list[Level]] = []
        self.losses: list[LossCurve] = []
        self.tried: list[Point] = []
        self.scorer = _Losses(model, rows, context)

    def measure_levels(self) -> None:
        """Levels of every layer, on the inputs that the dense model gives it."""
        count, length = self.rows.shape

        def visit(index: int, x: Tensor) -> Tensor:
            governed = x.view(count, length, -1)[:, self.context :].flatten(0, 1)
            if self.bits:
                shadows = build_each_for(x, self.sites[index].weights(), self.bits)
                self.fitted.append(dict(zip(self.bits, shadows, strict=True)))
            self.levels.append(self._levels(self.sites[index], governed))
            return self.sites[index].weights().output(x)

        batch = Batch(self.rows, torch.ones_like(self.rows, dtype=torch.bool), [length] * count)
        answer_mlps(self.model, self.sites, batch, visit)

    def _levels(self, site: MlpSite, x: Tensor) -> list[Level]:
        weights = site.weights()
        if not self.bits:
            return levels(x, weights, self.score, self._share(site, None))
        found: list[Level] = []
        for pair in self.bits:
            scores = shadow_scorer(self.fitted[site.index][pair], weights)
            found += levels(x, weights, scores, self._share(site, pair), pair)
        return found

    def _share(self, site: MlpSite, bits: tuple[int, int] | None) -> Callable[[float], float]:
        weights = site.weights()
        if bits is None:
            return lambda density: weights.share_read(self.score, density)
        added = weights.f * record_bytes(weights.d, bits[0] if weights.gated else 0, bits[1])
        return lambda density: weights.share_read("given", density, added)

    def probe(self, index: int) -> None:
        """Measure what this layer's CETT costs."""
        options = [level for level in self.levels[index] if level.bits in (None, self._probe_bits)]
        chosen = {min(options, key=lambda o: abs(o.cett - c)) for c in _PROBES} if options else {}
        ordered = sorted(chosen, key=lambda level: level.cett)
        methods = [self._uniform(level) for level in ordered]
        losses = self.scorer.divergences(methods, index, _PROBE_ROWS) if methods else []
        cetts = [level.cett for level in ordered]
        self.losses.append(LossCurve.through(list(zip(cetts, losses, strict=True))))

    @property
    def _probe_bits(self) -> tuple[int, int] | None:
        return max(self.bits) if self.bits else None

    def _uniform(self, level: Level) -> Method:
        return self.method([level] * len(self.sites))

    def allocate(self, budget: float) -> list[Level]:
        return allocate(self.levels, self.losses, budget)

    def method(self, chosen: Sequence[Level]) -> Method:
        epsilon = [level.epsilon for level in chosen]
        if self.score == "shadow":
            return QRIDA(thresholds=epsilon, shadows=self.shadows(chosen), guard="off")
        return TDA(epsilon, score=self.score)

    def shadows(self, chosen: Sequence[Level]) -> Shadows | None:
        """Those of the bits chosen for each layer; None for TDA."""
        if self.score != "shadow":
            return None
        pairs = [level.bits or self.bits[0] for level in chosen]
        layers = (fitted[pair] for fitted, pair in zip(self.fitted, pairs, strict=True))
        return Shadows(tuple(layers), self.fingerprint, fitted=True)

    def try_budget(self, budget: float) -> Point:
        """Measure the allocation of this many nats on the tuning rows."""
        chosen = self.allocate(budget)
        share = sum(level.share for level in chosen) / len(chosen)
        increase, error = self.scorer.increase(self.method(chosen)) if share < 1 else (0.0, 0.0)
        density = sum(level.density for level in chosen) / len(chosen)
        point = Point(budget, increase, error, density, share, self._speedup(share))
        self.tried.append(point)
        return point

    def _speedup(self, share: float) -> float:
        """Of a decode step that reads every weight once at the same bandwidth."""
        mlp = sum(s.linear(name).weight.numel() for s in self.sites for name in s.family.linears)
        total = sum(p.numel() for p in self.model.parameters())
        embedding = self.model.get_input_embeddings().weight  # type: ignore[operator]
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        if head is not None and head.weight is not embedding:
            total -= embedding.numel()  # one row of it is read
        return total / (total - mlp + share * mlp)

    def search(self, limit: float, progress: Callable[[str], None]) -> tuple[Point, list[Level]]:
        """The allocation with the fewest bytes that keeps the limit on the tuning rows."""
        budget = math.log1p(limit)
        for factor in _FACTORS:
            progress(f"frontier, {factor:g} of the budget")
            self.try_budget(budget * factor)
        for _ in range(_REFINE):
            good = [p.budget for p in self.tried if p.increase <= limit]
            low = max(good, default=0.0)
            above = [p.budget for p in self.tried if p.budget > low]
            if not above:
                middle = 2 * low
            elif low == 0:
                middle = min(above) / 4
            else:
                middle = math.sqrt(low * min(above))
            progress("the largest budget that keeps the limit")
            self.try_budget(middle)
        for _ in range(_WIDER):  # a budget too small for any step says nothing of what can be met
            if any(1 - p.share >= _WORTH for p in self.tried):
                break
            progress("the smallest budget that saves anything")
            self.try_budget(16 * max(p.budget for p in self.tried))
        worth = [p for p in self.tried if 1 - p.share >= _WORTH]
        if not worth:
            raise ConfigurationError(
                f"max_perplexity_increase = {100 * limit:.3g}% leaves nothing to save: no layer of "
                f"this model can skip {_WORTH:.0%} of its bytes at any loss; it cannot be tuned"
            )
        kept = [p for p in worth if p.increase <= limit]
        if not kept:
            careful = min(worth, key=lambda p: p.increase)
            raise _unmet(limit, careful.increase, careful, "on the tuning text")
        best = min(kept, key=lambda p: p.share)
        return best, self.allocate(best.budget)

    def thresholds(self, chosen: Sequence[Level]) -> Thresholds:
        config = getattr(self.model, "config", None)
        shadows = self.shadows(chosen)
        name = str(getattr(config, "_name_or_path", "") or type(self.model).__name__)
        fields = [field.name for field in dataclasses.fields(LayerThreshold)]
        return Thresholds(
            layers=tuple(LayerThreshold(**{f: getattr(c, f) for f in fields}) for c in chosen),
            cett=sum(level.cett for level in chosen) / len(chosen),
            fingerprint=self.fingerprint,
            score=self.score,
            method="tda" if shadows is None else "qrida",
            sequential=False,
            tokens=self.rows.shape[0] * (self.rows.shape[1] - self.context),
            model=os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name,
            dtype=str(self.sites[0].weights().dtype).removeprefix("torch."),
            bits=() if shadows is None else shadows.bits,
            shadows="" if shadows is None else shadows.key,
        )
