"""Heavy hitters (section 3.2.2, Table 5): the tokens that attention dwells on, and what their
removal does to the methods and to the active sets.

As in H2O (arXiv 2306.14048) a token's score is the attention it receives, summed over queries,
heads and layers; here per text, over its context. Early tokens are seen by more queries, so the
mean over queries is a second score. A removed token is masked from the attention of every later
token in every layer. Compared is the removal of as many random tokens, and of the tokens where
another text has its heavy hitters by the same score, since position alone matters. The text's
first token is kept, except where it is removed on purpose: attention sinks there in many models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..evaluation.statistics import bootstrap, jaccard, sign_flip_p, sign_of, spearman
from ..methods.base import Method
from ..methods.dense import Dense
from ..methods.qrida import QRIDA
from ..methods.srida import SRIDA
from ..methods.stda import STDA
from ..methods.tda import TDA
from .activity import active, neuron_norms
from .attention import chosen_tokens, losses, mask_without, per_query, received_attention
from .report import Report
from .setting import Setting, Subject

BUDGETS = (0.1, 0.2)  # share of the context's tokens that are removed
HEAVY = {"heavy": "H2O's sum", "heavy per query": "mean attention per query"}
# By kind of heavy hitters: what they are compared with, in words.
CONTROLS = {
    kind: {"random": "random tokens", f"places of {kind}": "tokens in like places"}
    for kind in HEAVY
}
REMOVALS = (*HEAVY, "random", *(f"places of {kind}" for kind in HEAVY))
SPARSE = ("TDA", "sTDA", "sRIDA")
ORDER = (("TDA", "sTDA"), ("sTDA", "sRIDA"))  # who loses more, by the paper
MATTERS = 0.1  # a rank correlation
Pick = Callable[[dict[str, Any]], dict[str, dict[str, float]]]


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
    mean = per_query(scores)[:, 1:]
    tokens = rows[:, 1:]
    # Of the same occurrences of tokens, in two orders that are as meaningless as one another.
    shuffles = [_shuffled(subject, rows, setting.generator(2 + k)) for k in range(2)]
    of_text = spearman(mean, shuffles[0])
    of_shuffle = spearman(shuffles[1], shuffles[0])
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
        "rank correlation with itself in the shuffled text": vars(bootstrap(of_text, setting.seed)),
        "rank correlation of two shuffles": vars(bootstrap(of_shuffle, setting.seed)),
        "lost to meaning": vars(bootstrap(of_shuffle - of_text, setting.seed)),
        "rank correlation with position": spearman(mean, position).mean().item(),
        "rank correlation with the token's own mean": spearman(mean, of_token).mean().item(),
        "sum: rank correlation with position": spearman(scores[:, 1:], position).mean().item(),
        "punctuation among heavy per query": wordless[rows[heavy]].double().mean().item(),
        "punctuation among all": wordless[tokens].double().mean().item(),
        "most frequent heavy per query": [names[token] for token in common],
    }


def _shuffled(subject: Subject, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Attention per query of each token behind the first when their order is drawn, given back in
    the order of the text."""
    order = torch.rand(rows[:, 1:].shape, generator=generator).argsort(1)
    shuffled = torch.cat([rows[:, :1], rows[:, 1:].gather(1, order)], 1)
    found = per_query(received_attention(subject.model, shuffled))[:, 1:]
    return torch.zeros_like(found).scatter_(1, order, found)


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
    for kind, controls in CONTROLS.items():
        for other in controls:
            gap = shift[kind] - shift[other]
            found[f"{kind} over {other}"] = vars(bootstrap(gap, setting.seed)) | {
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
    worst: dict[str, Tensor] = {}  # each method's rise when H2O's heavy hitters go
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
            for kind, controls in CONTROLS.items():
                for other in controls:
                    rise[f"{kind} over {other} {budget}"] = gaps[kind] - gaps[other]
            worst[name] = gaps["heavy"]
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
    for more, less in ORDER:
        gap = worst[more] - worst[less]
        found[more][f"over {less}"] = vars(bootstrap(gap, setting.seed))
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
    for kind, rank in HEAVY.items():
        for other, what in CONTROLS[kind].items():
            _claim(
                report,
                "section 4.4, Table 5",
                f"removing heavy hitters (by {rank}) hurts the methods more than removing {what}",
                _quality_of(f"{kind} over {other} {budget}"),
                _all,
                f"rise of loss, {kind} less {other}, {budget:.0%} removed: ",
            )
    _claim(
        report,
        "section 4.4, Table 5",
        "TDA suffers most from the removal and sRIDA least",
        lambda numbers: {f"{a} less {b}": numbers["quality"][a][f"over {b}"] for a, b in ORDER},
        _all,
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
        lambda n: {
            "text and shuffle": n["where"]["rank correlation with itself in the shuffled text"],
            "two shuffles": n["where"]["rank correlation of two shuffles"],
            "difference": n["where"]["lost to meaning"],
        },
        lambda found: _within(found["difference"]),
        f"rank correlation of tokens' attention in two orders of the text (a difference below "
        f"{MATTERS} counts as no matter of meaning): ",
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
    for kind, rank in HEAVY.items():
        for other, what in CONTROLS[kind].items():
            _claim(
                report,
                "section 3.2.2",
                f"heavy hitters (by {rank}) decide the activation pattern more than {what}",
                _shift_of(f"{kind} over {other}"),
                _all,
                f"shift of active sets, {kind} less {other} removed: ",
            )


def _all(found: dict[str, dict[str, float]]) -> int:
    """+1 where every interval is above zero, -1 where one is below, else 0."""
    signs = {sign_of(m) for m in found.values()}
    return 1 if signs == {1} else -1 if -1 in signs else 0


def _within(m: dict[str, float]) -> int:
    """+1 where the interval lies below `MATTERS`, -1 where it lies above, else 0."""
    return 1 if m["high"] < MATTERS else -1 if m["low"] > MATTERS else 0


def _claim(
    report: Report,
    source: str,
    claim: str,
    pick: Pick,
    sign: Callable[[dict[str, dict[str, float]]], int],
    prefix: str,
) -> None:
    """A claim judged model by model."""
    found = {model: pick(numbers) for model, numbers in report.numbers.items()}
    text = "; ".join(
        f"{model} " + ", ".join(f"{name} {_cell(value)}" for name, value in values.items())
        for model, values in found.items()
    )
    report.judged(source, claim, prefix + text, {m: sign(values) for m, values in found.items()})


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"
    if isinstance(value, float):
        return f"{value:.3f}"
    return " ".join(value) if isinstance(value, list) else str(value)
