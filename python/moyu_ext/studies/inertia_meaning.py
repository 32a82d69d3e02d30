"""Is inertia irrelevant to meaning? Sets of similar and dissimilar texts, fed separately."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..evaluation.statistics import bootstrap, jaccard, sign_flip_p, sign_of
from ..models.text import encode
from .activity import neuron_norms, prompt_statistic, strongest
from .paraphrases import PAIRS
from .report import Report
from .setting import Setting, Subject

DENSITY = 0.33


def across_meaning(setting: Setting, report: Report) -> None:
    """Overlap of texts' sets: two parts of one text against parts of different texts, a text
    against its own words in another order, and paraphrases against unrelated sentences."""
    found: dict[str, dict[str, Any]] = {}
    for subject in setting.subjects():
        setting.log(f"inertia of {subject.name}: meaning")
        found[subject.name] = _parts(setting, subject) | _paraphrases(setting, subject)
        report.numbers[subject.name]["meaning"] = found[subject.name]
    _report(report, found)


def text_sets(subject: Subject, rows: Tensor) -> Tensor:
    """The strongest neurons of each text by its prompt statistic, bool [layers, rows, f]."""
    statistic = prompt_statistic(neuron_norms(subject, rows)[:, :, 1:])
    return strongest(statistic, max(1, round(DENSITY * statistic.shape[-1])))


def pair_overlap(a: Tensor, b: Tensor) -> Tensor:
    """Jaccard index of every set of `a` with every set of `b`, mean over layers: [rows, rows]."""
    return jaccard(a.unsqueeze(2), b.unsqueeze(1)).mean(0)


def shared_tokens(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    """Jaccard index of the texts' vocabularies, [rows, rows] float64, first tokens left out."""
    sizes = [[set(row[1:].tolist()) for row in rows] for rows in (a, b)]
    table = [[len(x & y) / max(1, len(x | y)) for y in sizes[1]] for x in sizes[0]]
    return torch.tensor(table, dtype=torch.float64)


def _parts(setting: Setting, subject: Subject) -> dict[str, Any]:
    count, length = setting.size(40, 6), setting.size(64, 16)
    rows = setting.rows(subject, 2 * length, count)
    # The second part starts like the first one: with the text's first token, not with its past.
    first = rows[:, :length]
    second = torch.cat([rows[:, :1], rows[:, length + 1 :]], 1)
    order = torch.rand(first[:, 1:].shape, generator=setting.generator(3)).argsort(1)
    shuffled = torch.cat([first[:, :1], first[:, 1:].gather(1, order)], 1)
    sets = text_sets(subject, first)
    pairs = pair_overlap(sets, text_sets(subject, second))
    words = shared_tokens(first, second)
    same = torch.eye(count, dtype=torch.bool)
    own = pair_overlap(sets, text_sets(subject, shuffled))[same]
    # What shared words alone would give: a straight line fitted to pairs of different texts.
    x, y = words[~same], pairs[~same]
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    beyond = pairs[same] - (y.mean() + slope * (words[same] - x.mean()))
    # Rows of `pairs` share texts; one mean per text keeps the units independent enough.
    different = (pairs.sum(1) - pairs[same]) / (count - 1)
    return {
        "same text": pairs[same].mean().item(),
        "different texts": different.mean().item(),
        "own words shuffled": own.mean().item(),
        "gap": vars(bootstrap(pairs[same] - different, setting.seed))
        | {"p": sign_flip_p(pairs[same] - different, setting.seed)},
        "gap beyond shared words": vars(bootstrap(beyond, setting.seed)),
        "shared words, same text": words[same].mean().item(),
        "shared words, different texts": words[~same].mean().item(),
    }


def _paraphrases(setting: Setting, subject: Subject) -> dict[str, Any]:
    pairs = PAIRS[: setting.size(len(PAIRS), 6)]
    sets, tokens = [], []
    for side in range(2):
        rows = [torch.tensor([encode(subject.tokenizer, pair[side])]) for pair in pairs]
        sets.append(torch.cat([text_sets(subject, row) for row in rows], 1))
        tokens.append([row[0] for row in rows])
    table, words = pair_overlap(*sets), shared_tokens(*tokens)
    same = torch.eye(len(pairs), dtype=torch.bool)
    different = (table.sum(1) - table[same]) / (len(pairs) - 1)
    return {
        "paraphrases": table[same].mean().item(),
        "unrelated sentences": different.mean().item(),
        "shared words, paraphrases": words[same].mean().item(),
        "shared words, unrelated": words[~same].mean().item(),
        "paraphrase gap": vars(bootstrap(table[same] - different, setting.seed))
        | {"p": sign_flip_p(table[same] - different, setting.seed)},
    }


def _report(report: Report, found: dict[str, dict[str, Any]]) -> None:
    kinds = (
        "same text",
        "different texts",
        "own words shuffled",
        "paraphrases",
        "unrelated sentences",
    )
    report.table(
        f"Overlap of two texts' sets (Jaccard index, sets of {DENSITY:.0%} by prompt statistic)",
        ["model", *kinds, "gap same - different", "gap beyond shared words", "paraphrase gap"],
        [
            [
                name,
                *(m[kind] for kind in kinds),
                _text(m["gap"]),
                _text(m["gap beyond shared words"]),
                _text(m["paraphrase gap"]),
            ]
            for name, m in found.items()
        ],
        "Texts are fed separately. Paraphrases share "
        + ", ".join(f"{m['shared words, paraphrases']:.3f}" for m in found.values())
        + " of their tokens (Jaccard index), unrelated sentences "
        + ", ".join(f"{m['shared words, unrelated']:.3f}" for m in found.values())
        + ". Beyond shared words: what the share of common tokens predicts, by a "
        "line fitted to pairs of different texts, is taken off.",
    )
    with report.figure("meaning", "Overlap of the sets of two texts") as figure:
        ax = figure.subplots()
        width = 0.8 / len(found)
        for i, (name, m) in enumerate(found.items()):
            place = [k + i * width for k in range(len(kinds))]
            ax.bar(place, [m[kind] for kind in kinds], width, label=name)
        ax.set_xticks([k + 0.4 - width / 2 for k in range(len(kinds))], kinds, fontsize=8)
        ax.set_ylabel("Jaccard index")
        ax.legend()
    report.judged(
        "section 3.2.2",
        "which neurons a sequence activates is irrelevant to its meaning",
        "overlap of paraphrases, which share as few words as unrelated sentences, against the "
        "latter's: "
        + "; ".join(
            f"{n} {m['paraphrases']:.3f} against {m['unrelated sentences']:.3f}, "
            f"{_text(m['paraphrase gap'])}"
            for n, m in found.items()
        )
        + ". Words weigh more: a text and its own words shuffled "
        + "; ".join(f"{n} {m['own words shuffled']:.3f}" for n, m in found.items()),
        {n: -sign_of(m["paraphrase gap"]) for n, m in found.items()},
    )
    report.judged(
        "section 3.2.2",
        "what similar texts share goes beyond their common words",
        "overlap of two parts of a text beyond what common tokens predict: "
        + "; ".join(f"{n} {_text(m['gap beyond shared words'])}" for n, m in found.items())
        + ". Parts of one text overlap by "
        + "; ".join(
            f"{n} {m['same text']:.3f}, of different texts by {m['different texts']:.3f}"
            for n, m in found.items()
        ),
        {n: sign_of(m["gap beyond shared words"]) for n, m in found.items()},
    )


def _text(m: dict[str, float]) -> str:
    return f"{m['mean']:+.3f} [{m['low']:+.3f}, {m['high']:+.3f}]"
