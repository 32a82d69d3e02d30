"""Heavy hitters (section 3.2.2, Table 5): the tokens that attention dwells on, and what their
removal does to the methods and to the active sets.

As in H2O (arXiv 2306.14048) a token's score is the attention it receives, summed over queries,
heads and layers; here per text, over its context. Early tokens are seen by more queries, so the
mean over queries is a second score. A removed token is masked from the attention of every later
token in every layer. Compared is the removal of as many random tokens, and of the tokens where
another text has its heavy hitters, since position alone matters. The text's first token is kept,
except where it is removed on purpose: attention sinks there in many models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedModelError
from ..evaluation.statistics import bootstrap, jaccard, sign_flip_p, spearman
from ..methods.base import Method
from ..methods.dense import Dense
from ..methods.qrida import QRIDA
from ..methods.srida import SRIDA
from ..methods.stda import STDA
from ..methods.tda import TDA
from ..patching.patch import patch, scoring, unpatch
from ..patching.patch import report as density_report
from .activity import active, mask_arguments, neuron_norms
from .report import Report
from .setting import Setting, Subject

BUDGETS = (0.1, 0.2)  # share of the context's tokens that are removed
REMOVALS = ("heavy", "heavy per query", "random", "other's places")
OTHERS = ("random tokens", "tokens in like places")  # the last two removals, in words
SPARSE = ("TDA", "sTDA", "sRIDA")
_ROWS = 8
Pick = Callable[[dict[str, Any]], dict[str, dict[str, float]]]


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
    "other's places" (where the text before has its "heavy" ones).
    """
    if kind == "other's places":
        return chosen_tokens(scores, budget, "heavy", generator).roll(1, 0)
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
    patch(subject.model, method)
    parts = []
    try:
        with torch.no_grad(), scoring(subject.model, context):
            for start in range(0, len(rows), _ROWS):
                batch = rows[start : start + _ROWS]
                extra = mask_arguments(mask, slice(start, start + _ROWS))
                logits = subject.model(input_ids=batch, **extra).logits[:, context - 1 : -1]
                loss = F.cross_entropy(
                    logits.float().flatten(0, 1), batch[:, context:].flatten(), reduction="none"
                )
                parts.append(loss.view(len(batch), -1).double().mean(1))
        return torch.cat(parts), density_report(subject.model).density
    finally:
        unpatch(subject.model)


def run(setting: Setting, report: Report) -> None:
    """Write the study into `report`."""
    count, context = setting.size(32, 4), setting.size(96, 24)
    length = context + setting.size(64, 16)
    for subject in setting.subjects():
        report.models[subject.name] = subject.describe()
        rows = setting.rows(subject, length, count)
        setting.log(f"heavy hitters of {subject.name}")
        scores = received_attention(subject.model, rows[:, :context])
        report.numbers[subject.name] = {
            "where": _where(setting, subject, rows[:, :context], scores),
            "sets": _sets(setting, subject, rows[:, :context], scores),
            "quality": _quality(setting, subject, rows, context, scores),
        }
    _report(report, context)


def _where(setting: Setting, subject: Subject, rows: Tensor, scores: Tensor) -> dict[str, Any]:
    """What the heavy hitters are: position, token, or meaning?"""
    order = torch.rand(rows[:, 1:].shape, generator=setting.generator(2)).argsort(1)
    shuffled = torch.cat([rows[:, :1], rows[:, 1:].gather(1, order)], 1)
    again = per_query(received_attention(subject.model, shuffled))[:, 1:]
    mean = per_query(scores)[:, 1:]
    tokens = rows[:, 1:]
    of_token = torch.zeros_like(mean)
    for token in tokens.unique():
        of_token[tokens == token] = mean[tokens == token].mean()
    position = torch.arange(mean.shape[1], dtype=torch.float64).expand_as(mean)
    names = subject.tokenizer.convert_ids_to_tokens(list(range(int(rows.max()) + 1)))
    wordless = torch.tensor([not any(c.isalnum() for c in name) for name in names])
    heavy = chosen_tokens(scores, BUDGETS[0], "heavy per query", setting.generator(1))
    values, counts = rows[heavy].unique(return_counts=True)
    common = values[counts.argsort(dim=0, descending=True, stable=True)][:10].tolist()
    return {
        "attention of the first token": (scores[:, 0] / rows.shape[1]).mean().item(),
        # The same occurrence of a token, before and after the shuffle.
        "rank correlation with itself in the shuffled text": vars(
            bootstrap(spearman(mean.gather(1, order), again), setting.seed)
        ),
        "rank correlation with position": spearman(mean, position).mean().item(),
        "rank correlation with the token's own mean": spearman(mean, of_token).mean().item(),
        "sum: rank correlation with position": spearman(scores[:, 1:], position).mean().item(),
        "punctuation among heavy per query": wordless[rows[heavy]].double().mean().item(),
        "punctuation among all": wordless[tokens].double().mean().item(),
        "most frequent heavy per query": [names[token] for token in common],
    }


def _sets(setting: Setting, subject: Subject, rows: Tensor, scores: Tensor) -> dict[str, Any]:
    """How far the active sets of the tokens that stay move when others are removed."""
    before = active(setting, subject, neuron_norms(subject, rows))
    found: dict[str, Any] = {}
    shift: dict[str, Tensor] = {}
    for kind in REMOVALS:
        removed = chosen_tokens(scores, BUDGETS[0], kind, setting.generator(3))
        norms = neuron_norms(subject, rows, mask_without(removed, rows.shape[1]))
        after = active(setting, subject, norms)
        stay = ~removed
        stay[:, 0] = False
        same = jaccard(before, after).mean(0)  # [rows, length]
        shift[kind] = 1 - (same * stay).sum(1) / stay.sum(1)
        neighbours = jaccard(after[:, :, 1:-1], after[:, :, 2:]).mean((0, 2))
        found[kind] = {
            "shift": vars(bootstrap(shift[kind], setting.seed)),
            "overlap of neighbours": neighbours.mean().item(),
        }
    found["none"] = {
        "overlap of neighbours": jaccard(before[:, :, 1:-1], before[:, :, 2:]).mean().item()
    }
    for other in REMOVALS[2:]:
        gap = shift["heavy"] - shift[other]
        found[f"heavy over {other}"] = vars(bootstrap(gap, setting.seed)) | {
            "p": sign_flip_p(gap, setting.seed)
        }
    return found


def _quality(
    setting: Setting, subject: Subject, rows: Tensor, context: int, scores: Tensor
) -> dict[str, Any]:
    """Loss of the continuation for every method and removal."""
    thresholds = setting.thresholds(subject)
    methods: dict[str, Method] = {
        "dense": Dense(),
        "TDA": TDA(thresholds),
        "sTDA": STDA(thresholds),
        "sRIDA": SRIDA(0.5),
        "qRIDA": QRIDA(0.33),
    }
    found: dict[str, Any] = {}
    for name, method in methods.items():
        whole, density = losses(subject, method, rows, context, None)
        rise: dict[str, Any] = {"density": density, "loss": whole.mean().item()}
        for budget in BUDGETS:
            gaps: dict[str, Tensor] = {}
            for kind in REMOVALS:
                removed = chosen_tokens(scores, budget, kind, setting.generator(3))
                mask = mask_without(removed, rows.shape[1])
                gaps[kind] = losses(subject, method, rows, context, mask)[0] - whole
                rise[f"{kind} {budget}"] = gaps[kind]
            for other in REMOVALS[2:]:
                for kind in REMOVALS[:2]:
                    rise[f"{kind} over {other} {budget}"] = gaps[kind] - gaps[other]
        found[name] = rise
        first = torch.zeros_like(scores, dtype=torch.bool)
        first[:, 0] = True
        mask = mask_without(first, rows.shape[1])
        rise["first token"] = losses(subject, method, rows, context, mask)[0] - whole
        found[name] = {
            key: vars(bootstrap(value, setting.seed)) | {"p": sign_flip_p(value, setting.seed)}
            if isinstance(value, Tensor)
            else value
            for key, value in rise.items()
        }
    return found


def _report(report: Report, context: int) -> None:
    _where_report(report)
    _sets_report(report)
    rows = []
    for model, numbers in report.numbers.items():
        for method, rise in numbers["quality"].items():
            cells = [
                f"{rise[f'{kind} {budget}']['mean']:+.3f}"
                for budget in BUDGETS
                for kind in REMOVALS
            ]
            rows.append(
                [
                    *(model, method, rise["density"], rise["loss"], *cells),
                    f"{rise['first token']['mean']:+.3f}",
                ]
            )
    columns = [f"{kind} {budget:.0%}" for budget in BUDGETS for kind in REMOVALS]
    report.table(
        "Rise of the continuation's loss (nats per token) when tokens of the context are removed",
        ["model", "method", "density", "loss", *columns, "first token"],
        rows,
        f"Context of {context} tokens; the method governs the continuation. "
        "heavy: largest sum of attention (H2O); heavy per query: largest mean.",
    )
    budget = BUDGETS[-1]
    caption = f"Rise of the continuation's loss when {budget:.0%} of the context's tokens go"
    with report.figure("quality", caption, 11, 3.8) as figure:
        axes = figure.subplots(1, len(report.numbers), squeeze=False)[0]
        width = 0.8 / len(REMOVALS)
        for ax, (model, numbers) in zip(axes, report.numbers.items(), strict=True):
            for i, kind in enumerate(REMOVALS):
                found = [rise[f"{kind} {budget}"] for rise in numbers["quality"].values()]
                place = [k + i * width for k in range(len(found))]
                means = [m["mean"] for m in found]
                low = [m["mean"] - m["low"] for m in found]
                high = [m["high"] - m["mean"] for m in found]
                ax.bar(place, means, width, yerr=[low, high], label=kind)
            ticks = [k + 0.4 - width / 2 for k in range(len(numbers["quality"]))]
            ax.set_xticks(ticks, list(numbers["quality"]), fontsize=8)
            ax.set_title(model, fontsize=9)
        axes[0].set_ylabel("rise of loss, nats per token")
        axes[-1].legend(fontsize=7)
    for kind, rank in zip(REMOVALS[:2], ("H2O's sum", "mean attention per query"), strict=True):
        for other, what in zip(REMOVALS[2:], OTHERS, strict=True):
            _claim(
                report,
                "section 4.4, Table 5",
                f"removing heavy hitters (by {rank}) hurts the methods more than removing {what}",
                _quality_of(f"{kind} over {other} {budget}"),
                lambda found: all(m["low"] > 0 for m in found.values()),
                f"rise of loss, {kind} less {other}, {budget:.0%} removed: ",
            )
    _claim(
        report,
        "section 4.4, Table 5",
        "TDA suffers most from the removal and sRIDA least",
        lambda numbers: {m: numbers["quality"][m][f"heavy {budget}"] for m in SPARSE},
        lambda found: found["TDA"]["mean"] > found["sTDA"]["mean"] > found["sRIDA"]["mean"],
        f"rise of loss, {budget:.0%} heavy hitters removed: ",
    )


def _quality_of(key: str) -> Pick:
    return lambda numbers: {method: numbers["quality"][method][key] for method in SPARSE}


def _shift_of(key: str) -> Pick:
    return lambda numbers: {"difference": numbers["sets"][key]}


def _where_report(report: Report) -> None:
    keys = [key for key in next(iter(report.numbers.values()))["where"]]
    report.table(
        "What the heavy hitters are",
        ["model", *keys],
        [[model, *map(_cell, n["where"].values())] for model, n in report.numbers.items()],
    )
    _claim(
        report,
        "section 3.2.2",
        "whether a token is a heavy hitter is not a matter of meaning",
        lambda n: {"shuffled": n["where"]["rank correlation with itself in the shuffled text"]},
        lambda found: found["shuffled"]["low"] > 0.8,
        "rank correlation of a token's attention with its own after shuffling the text (at least "
        "0.8 counts as irrelevant to meaning): ",
    )


def _sets_report(report: Report) -> None:
    report.table(
        f"Shift of the other tokens' active sets (1 - Jaccard index) when {BUDGETS[0]:.0%} are "
        "removed, and overlap of neighbours afterwards",
        ["model", *(f"shift, {k}" for k in REMOVALS), "neighbours, none removed"]
        + [f"neighbours, {kind}" for kind in REMOVALS],
        [
            [model, *(n["sets"][k]["shift"]["mean"] for k in REMOVALS)]
            + [n["sets"][k]["overlap of neighbours"] for k in ("none", *REMOVALS)]
            for model, n in report.numbers.items()
        ],
    )
    for other, what in zip(REMOVALS[2:], OTHERS, strict=True):
        _claim(
            report,
            "section 3.2.2",
            f"heavy hitters decide the activation pattern more than {what}",
            _shift_of(f"heavy over {other}"),
            lambda found: found["difference"]["low"] > 0,
            f"shift of active sets, heavy hitters less {other} removed: ",
        )


def _claim(
    report: Report,
    source: str,
    claim: str,
    pick: Pick,
    holds: Callable[[dict[str, dict[str, float]]], bool],
    prefix: str,
) -> None:
    """A claim judged model by model."""
    found = {model: pick(numbers) for model, numbers in report.numbers.items()}
    held = [model for model, values in found.items() if holds(values)]
    text = "; ".join(
        f"{model} " + ", ".join(f"{name} {_cell(value)}" for name, value in values.items())
        for model, values in found.items()
    )
    report.judged(source, claim, prefix + text, held, found)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"
    if isinstance(value, float):
        return f"{value:.3f}"
    return " ".join(value) if isinstance(value, list) else str(value)
