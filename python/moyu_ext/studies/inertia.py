"""Activation inertia, the paper's Figures 1-4 (section 3.2.2), measured rather than looked at.

Tokens of a text, or random ones, are fed alone ("in parallel": each behind the text's first token)
or as a sequence. Sets of active neurons are compared: does a sequence focus them, do consecutive
tokens share them, does the prompt's set cover later tokens, and has meaning anything to do with it?
Sets of one size per model (as many of the strongest neurons as CETT 0.2 keeps on average) keep
density out of the comparison.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..evaluation.statistics import bootstrap, sign_flip_p, sign_of
from .activity import active, neuron_norms, strongest, typical_size
from .inertia_distance import across_distance
from .inertia_meaning import across_meaning
from .report import Report
from .setting import Setting, Subject

CONDITIONS = ("sentence", "random")
WAYS = ("parallel", "sequence")


def run(setting: Setting, report: Report) -> None:
    """Write the study into `report`."""
    names = []
    for subject in setting.subjects():
        report.models[subject.name] = subject.describe()
        report.numbers[subject.name] = {}
        names.append(subject.name)
        setting.log(f"inertia of {subject.name}: figures 1-4")
        report.numbers[subject.name]["focus"] = _focus(setting, report, subject)
    _focus_claims(report, names)
    across_distance(setting, report)
    across_meaning(setting, report)


def random_like(rows: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of tokens drawn from all of `rows` alike, each row's first token (BOS) kept."""
    pool = rows[:, 1:].flatten()
    draw = torch.randint(len(pool), rows[:, 1:].shape, generator=generator)
    return torch.cat([rows[:, :1], pool[draw]], 1)


def in_sequence(subject: Subject, rows: Tensor) -> Tensor:
    """Norms of the tokens behind the first, [layers, rows, length - 1, f]."""
    return neuron_norms(subject, rows)[:, :, 1:]


def in_parallel(subject: Subject, rows: Tensor) -> Tensor:
    """The same tokens, each alone behind the row's first token: [layers, rows, length - 1, f]."""
    count, length = rows.shape
    first = rows[:, :1].expand(count, length - 1)
    pairs = torch.stack([first, rows[:, 1:]], -1).view(-1, 2)
    parts = [neuron_norms(subject, part)[:, :, 1] for part in pairs.split(256)]
    norms = torch.cat(parts, 1)
    return norms.view(len(subject.sites), count, length - 1, -1)


def focus(sets: Tensor) -> dict[str, Tensor]:
    """How alike the sets of a text's tokens are. sets bool [layers, rows, tokens, f] -> per row:

    "overlap": mean Jaccard index of pairs of tokens; "union": neurons that any token uses / f;
    "top": share of all uses that falls on the tenth of the neurons used most.
    """
    tokens = sets.shape[2]
    counts = sets.float().sum(2)  # [layers, rows, f]
    size = sets.float().sum(-1)  # [layers, rows, tokens]
    both = torch.einsum("lrtf,lrsf->lrts", sets.float(), sets.float())
    either = size.unsqueeze(-1) + size.unsqueeze(-2) - both
    pairs = torch.where(either > 0, both / either.clamp_min(1), 1.0)
    off = ~torch.eye(tokens, dtype=torch.bool)
    tenth = counts.sort(-1, descending=True).values[..., : max(1, sets.shape[-1] // 10)]
    return {
        "overlap": pairs[..., off].mean(-1).mean(0),
        "union": (counts > 0).float().mean(-1).mean(0),
        "top": (tenth.sum(-1) / counts.sum(-1).clamp_min(1)).mean(0),
    }


def _focus(setting: Setting, report: Report, subject: Subject) -> dict[str, Any]:
    count, length = setting.size(24, 4), setting.size(65, 17)
    rows = setting.rows(subject, length, count)
    texts = {"sentence": rows, "random": random_like(rows, setting.generator(1))}
    feeds = {"parallel": in_parallel, "sequence": in_sequence}
    maps, measured = {}, {}
    for condition in CONDITIONS:
        for way in WAYS:
            norms = feeds[way](subject, texts[condition])
            at_threshold = active(setting, subject, norms)
            middle = len(subject.sites) // 2
            maps[condition, way] = at_threshold[middle, 0]
            of_one_size = focus(strongest(norms, typical_size(setting, subject)))
            measured[condition, way] = of_one_size | {
                "density": at_threshold.double().mean((0, 2, 3)),
                "overlap at threshold": focus(at_threshold)["overlap"],
            }
    _maps(report, subject, maps)
    numbers: dict[str, Any] = {}
    table = []
    for (condition, way), values in measured.items():
        means = {name: value.mean().item() for name, value in values.items()}
        numbers[f"{condition} in {way}"] = means
        table.append([condition, way, *means.values()])
    for name in ("overlap", "overlap at threshold", "density"):
        for condition in CONDITIONS:
            gain = measured[condition, "sequence"][name] - measured[condition, "parallel"][name]
            interval = bootstrap(gain, setting.seed)
            numbers[f"{name}, gain of sequence, {condition}"] = vars(interval) | {
                "p": sign_flip_p(gain, setting.seed)
            }
        more = measured["random", "sequence"][name] - measured["sentence", "sequence"][name]
        numbers[f"{name}, random over sentence"] = vars(bootstrap(more, setting.seed)) | {
            "p": sign_flip_p(more, setting.seed)
        }
    report.table(
        f"Focus of active sets, {subject.name}",
        ["tokens of", "fed in", *next(iter(measured.values()))],
        table,
        f"{count} texts of {length - 1} tokens. overlap, union, top: sets of "
        f"{typical_size(setting, subject)} neurons; density and overlap at threshold: sets at "
        "CETT 0.2.",
    )
    return numbers


def _maps(report: Report, subject: Subject, maps: dict[tuple[str, str], Tensor]) -> None:
    middle = len(subject.sites) // 2
    # One order of neurons for all four maps, by how often the sentence in sequence uses them.
    order = maps["sentence", "sequence"].sum(0).argsort(descending=True, stable=True)
    caption = (
        f"Active neurons of {subject.name}, layer {middle}, at CETT 0.2 (the paper's Figures 1-4). "
        "Neurons sorted by how often the sentence in sequence uses them"
    )
    with report.figure(f"maps_{subject.name}", caption, 10, 7) as figure:
        axes = figure.subplots(2, 2, sharex=True, sharey=True)
        for i, condition in enumerate(CONDITIONS):
            for j, way in enumerate(WAYS):
                ax = axes[i][j]
                image = maps[condition, way][:, order].t()
                ax.imshow(image.numpy(), aspect="auto", cmap="Greys", interpolation="nearest")
                ax.set_title(f"{condition} tokens in {way}", fontsize=9)
        axes[0][0].set_ylabel("neuron")
        axes[1][0].set_ylabel("neuron")
        axes[1][0].set_xlabel("token")
        axes[1][1].set_xlabel("token")


# What "focused" may mean: the tokens' sets are more alike, or they are smaller.
READINGS = (("overlap", 1, "mean pairwise overlap, sets of one size"), ("density", -1, "density"))
CLAIMS = (
    ("gain of sequence, sentence", "fed in sequence, a sentence's tokens use {} than alone"),
    ("gain of sequence, random", "so do random words: {}"),
    ("random over sentence", "random words intensify the focus: {} than a sentence"),
)


def _focus_claims(report: Report, names: list[str]) -> None:
    for key, claim in CLAIMS:
        for name, direction, unit in READINGS:
            found = {n: report.numbers[n]["focus"][f"{name}, {key}"] for n in names}
            report.judged(
                "Figures 1-4",
                claim.format("more alike sets" if direction > 0 else "fewer neurons"),
                f"difference in {unit}: "
                + "; ".join(
                    f"{n} {m['mean']:+.3f} [{m['low']:+.3f}, {m['high']:+.3f}] (p = {m['p']:.2g})"
                    for n, m in found.items()
                ),
                {n: direction * sign_of(m) for n, m in found.items()},
            )
