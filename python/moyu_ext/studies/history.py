"""History (eq. 7-10): is a neuron's importance a matter of what was read before?

Equation 10 with V the last layer of an MLP and L_x the loss on text x of a history H: neuron i,
with column v_i of W_down, has the importance

    Theta_i(H) = sum_{x in H} |<v_i, dL_x/dv_i>|,   <v_i, dL_x/dv_i> = sum_t a_i(t) dL_x/da_i(t)

The loss is the language model's (eq. 7 writes a squared one). A router predicts activity rather
than importance, so A_i(H) = root mean square of ||n_i|| over the tokens of H stands beside it.
Histories are domains of text, two halves of one domain (what chance leaves), and two orders of the
same texts. What a router trained on one history does for another is in `history_routers`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluation.statistics import (
    bootstrap,
    jaccard,
    pearson,
    permutation_p,
    sign_at,
    spearman,
    top_mask,
)
from .activation_gradients import recorded_activations
from .history_routers import routers
from .report import Report
from .setting import Setting, Subject

KINDS = ("importance", "activity")
DOMAINS = 4  # at most; pairs of them are compared
TOP = 0.2  # share of a layer that counts as its important neurons
_ROWS = 8


def run(setting: Setting, report: Report) -> None:
    """Write the study into `report`."""
    domains = setting.domains()[:DOMAINS]
    units: dict[str, dict[str, Tensor]] = {}
    for subject in setting.subjects():
        report.models[subject.name] = subject.describe()
        setting.log(f"importance over histories of {subject.name}")
        numbers, units[subject.name] = _histories(setting, subject, domains)
        report.numbers[subject.name] = numbers
    _report(setting, report, units, domains)
    routers(setting, report, domains)


def pulls_of_texts(subject: Subject, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per text of rows [n, length]: <v_i, dL/dv_i>, mean ||n_i||^2, and the share of a_i > 0; each
    float64 [n, layers, f]. L is the sum of the text's losses."""
    parts: list[list[Tensor]] = []
    norms = [site.weights().column_norms() for site in subject.sites]
    for batch in rows.split(_ROWS):
        with torch.enable_grad(), recorded_activations(subject.sites) as held:
            logits = subject.model(input_ids=batch, use_cache=False).logits
            loss = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
            )
            gradients = torch.autograd.grad(loss, held)
        found: list[list[Tensor]] = [[], [], []]
        for a, gradient, c in zip(held, gradients, norms, strict=True):
            shape = (len(batch), -1, len(c))
            a, gradient = a.detach().view(shape).double(), gradient.view(shape).double()
            found[0].append((a * gradient).sum(1))
            found[1].append((a * c).square().mean(1))
            found[2].append((a > 0).double().mean(1))
        parts.append([torch.stack(one, 1) for one in found])
    first, second, third = (torch.cat(column) for column in zip(*parts, strict=True))
    return first, second, third


def theta(pulls: Tensor) -> Tensor:
    """Equation 10 accumulated over texts: [n, layers, f] -> [layers, f]."""
    return pulls.abs().sum(0)


def activity(squares: Tensor) -> Tensor:
    """Root mean square of ||n_i|| over texts of one length: [n, layers, f] -> [layers, f]."""
    return squares.mean(0).sqrt()


def _histories(
    setting: Setting, subject: Subject, domains: list[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    count, length = setting.size(24, 4), setting.size(128, 24)
    rows = {domain: setting.rows(subject, length, count, domain) for domain in domains}
    measured = {domain: pulls_of_texts(subject, ids) for domain, ids in rows.items()}
    scores: dict[str, dict[str, tuple[Tensor, Tensor]]] = {
        kind: {
            domain: (read(values[place][::2]), read(values[place][1::2]))
            for domain, values in measured.items()
        }
        for place, (kind, read) in enumerate(zip(KINDS, (theta, activity), strict=True))
    }
    numbers: dict[str, Any] = {}
    units: dict[str, Tensor] = {}
    for kind in KINDS:
        for name, compare in (("rank correlation", spearman), ("top overlap", _top_overlap)):
            same = torch.stack([compare(*halves) for halves in scores[kind].values()])
            other = torch.stack(
                [
                    (compare(a[0], b[1]) + compare(a[1], b[0])) / 2
                    for a, b in itertools.combinations(scores[kind].values(), 2)
                ]
            )
            order = _orders(subject, rows, compare, kind)
            numbers[f"{kind}, {name}"] = {
                "halves of one domain": vars(bootstrap(same, setting.seed)),
                "two domains": vars(bootstrap(other, setting.seed)),
                "two orders": vars(bootstrap(order, setting.seed)),
                "two domains, pair by pair": {
                    f"{a} / {b}": value.mean().item()
                    for (a, b), value in zip(itertools.combinations(domains, 2), other, strict=True)
                },
            }
            # What a change of history costs, beyond what chance does: per pair and layer.
            units[f"{kind}, {name}"] = (same.mean(0) - other).flatten()
    pulls, _, positive = (torch.cat([m[i] for m in measured.values()]) for i in range(3))
    c = torch.stack([site.weights().column_norms() for site in subject.sites]).double()
    whole = theta(pulls)
    numbers["cancellation"] = (pulls.sum(0).abs().sum() / pulls.abs().sum()).item()
    numbers["correlation with ||v_i||"] = vars(bootstrap(pearson(whole, c), setting.seed))
    numbers["correlation with ||v_i|| times share of a_i > 0"] = vars(
        bootstrap(pearson(whole, c * positive.mean(0)), setting.seed)
    )
    return numbers, units


def _top_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Jaccard index of the most important neurons of a and b [layers, f]: [layers]."""
    count = max(1, round(TOP * a.shape[-1]))
    return jaccard(top_mask(a, count), top_mask(b, count))


def _orders(subject: Subject, rows: dict[str, Tensor], compare: Any, kind: str) -> Tensor:
    """The same tokens of two domains, read in either order: one value per pair and layer."""
    found = []
    place = KINDS.index(kind)
    for a, b in list(itertools.combinations(rows.values(), 2))[:3]:
        half = a.shape[1] // 2
        first, second = a[:, :half], b[:, :half]
        both = [torch.cat(pair, 1) for pair in ((first, second), (second, first))]
        values = [pulls_of_texts(subject, ids)[place] for ids in both]
        read = theta if kind == "importance" else activity
        found.append(compare(*(read(value) for value in values)))
    return torch.stack(found)


def _report(
    setting: Setting, report: Report, units: dict[str, dict[str, Tensor]], domains: list[str]
) -> None:
    names = ("halves of one domain", "two domains", "two orders")
    keys = [f"{kind}, {name}" for kind in KINDS for name in ("rank correlation", "top overlap")]
    report.table(
        "A neuron's importance and activity in two histories",
        ["model", "activation", "compared", *names],
        [
            [model, report.models[model]["activation"], key, *(_text(n[key][k]) for k in names)]
            for model, n in report.numbers.items()
            for key in keys
        ],
        f"Domains: {', '.join(domains)}. Rank correlation: Spearman's over the neurons of a layer; "
        f"top overlap: Jaccard index of the {TOP:.0%} ranked first. Mean and 95 % bootstrap "
        "interval over pairs of histories and layers; all histories that are compared are of one "
        "size. Two orders: texts of two domains joined either way round.",
    )
    report.table(
        "Equation 10's steps",
        ["model", "|sum of pulls| / sum of |pulls|", "Pearson with size of v_i",
         "Pearson with size of v_i times share of a_i > 0"],
        [
            [
                model,
                n["cancellation"],
                _text(n["correlation with ||v_i||"]),
                _text(n["correlation with ||v_i|| times share of a_i > 0"]),
            ]
            for model, n in report.numbers.items()
        ],
    )  # fmt: skip
    _figure(report, names)
    cancel = {model: n["cancellation"] for model, n in report.numbers.items()}
    report.claim(
        "eq. 10",
        "importance accumulates as Theta_i = |V| . grad L_i + Theta_{i-1}",
        "what remains of the sum over texts when the absolute value is dropped, as the third line "
        "does: " + ", ".join(f"{model} {share:.2f}" for model, share in cancel.items()),
        "holds only if" if max(cancel.values()) < 0.9 else "holds",
        "the absolute value stays on each text's gradient: the pulls of texts differ in sign"
        if max(cancel.values()) < 0.9
        else "",
    )
    key = "importance, rank correlation"
    orders = {model: n[key] for model, n in report.numbers.items()}
    report.judged(
        "eq. 9-10",
        "importance depends on the order of the history: less alike in two orders than in two "
        "domains",
        "rank correlation between two orders of the same texts: "
        + "; ".join(f"{m} {_text(n['two orders'])}" for m, n in orders.items())
        + " (two domains: "
        + ", ".join(f"{n['two domains']['mean']:.2f}" for n in orders.values())
        + "). The sum itself has no order; only the context of each token changes",
        {m: _below(n["two orders"], n["two domains"]) for m, n in orders.items()},
    )
    _magnitude(report)
    _activations(setting, report, units)


def _magnitude(report: Report) -> None:
    relu = [m for m, d in report.models.items() if d["activation"].startswith("relu")]
    text = "Pearson with ||v_i||, and with ||v_i|| times the share of a_i > 0: " + "; ".join(
        f"{model} {n['correlation with ||v_i||']['mean']:.2f}, "
        f"{n['correlation with ||v_i|| times share of a_i > 0']['mean']:.2f}"
        for model, n in report.numbers.items()
    )
    if not relu:
        report.claim(
            "section 3.2.1",
            "with ReLU importance is linear in the size of the weights",
            text,
            "open",
            "a model with ReLU has to be among those studied",
        )
        return
    values = [report.numbers[m]["correlation with ||v_i||"]["mean"] for m in relu]
    report.claim(
        "section 3.2.1",
        "with ReLU importance is linear in the size of the weights (a correlation of at least 0.8)",
        text,
        "holds" if min(values) >= 0.8 else "fails",
    )


def _activations(setting: Setting, report: Report, units: dict[str, dict[str, Tensor]]) -> None:
    relu = [m for m in units if report.models[m]["activation"].startswith("relu")]
    rest = [m for m in units if m not in relu]
    for kind in KINDS:
        key = f"{kind}, rank correlation"
        text = "loss of rank correlation from halves of a domain to two domains: " + "; ".join(
            f"{m} {_text(vars(bootstrap(units[m][key], setting.seed)))}" for m in units
        )
        claim = f"{kind} shifts between histories more with other activations than with ReLU"
        if not (relu and rest):
            missing = "a ReLU model and one with another activation have to be studied together"
            report.claim("section 3.2.1", claim, text, "open", missing)
            continue
        a = torch.cat([units[m][key] for m in rest])
        b = torch.cat([units[m][key] for m in relu])
        p = permutation_p(a, b, setting.seed)
        gap = (a.mean() - b.mean()).item()
        report.numbers.setdefault("shift, others less ReLU", {})[kind] = {"mean": gap, "p": p}
        report.judged(
            "section 3.2.1",
            claim,
            f"{text}. Others less ReLU: {gap:+.3f} (p = {p:.2g})",
            {"all": sign_at(gap, p)},
            "more domains and models: the difference is within chance",
        )


def _below(a: dict[str, float], b: dict[str, float]) -> int:
    """+1 where a's interval lies below b's, -1 above, 0 where they overlap."""
    return 1 if a["high"] < b["low"] else -1 if a["low"] > b["high"] else 0


def _figure(report: Report, names: tuple[str, ...]) -> None:
    models = list(report.models)
    with report.figure("importance", "Rank correlation between two histories") as figure:
        axes = figure.subplots(1, len(KINDS), sharey=True)
        width = 0.8 / len(models)
        for ax, kind in zip(axes, KINDS, strict=True):
            for i, model in enumerate(models):
                found = report.numbers[model][f"{kind}, rank correlation"]
                place = [k + i * width for k in range(len(names))]
                means = [found[name]["mean"] for name in names]
                low = [found[name]["mean"] - found[name]["low"] for name in names]
                high = [found[name]["high"] - found[name]["mean"] for name in names]
                label = f"{model} ({report.models[model]['activation']})"
                ax.bar(place, means, width, yerr=[low, high], label=label)
            ax.set_xticks([k + 0.4 - width / 2 for k in range(len(names))], names, fontsize=7)
            ax.set_title(kind, fontsize=9)
        axes[0].set_ylabel("Spearman's rank correlation")
        axes[0].set_ylim(0, 1.19)
        axes[0].legend(fontsize=7, ncols=2, loc="upper center")


def _text(m: dict[str, float]) -> str:
    return f"{m['mean']:.3f} [{m['low']:.3f}, {m['high']:.3f}]"
