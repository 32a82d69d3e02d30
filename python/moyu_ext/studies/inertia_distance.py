"""Inertia over distance: do later tokens use the neurons that earlier ones, or the prompt, used?"""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from ..evaluation.statistics import (
    bootstrap,
    covered,
    jaccard,
    sign_flip_p,
    sign_of,
    top_mask,
)
from .activity import active, neuron_norms, prompt_statistic, strongest, typical_size
from .report import Report
from .setting import Setting

LAGS = (1, 2, 4, 8, 16, 32, 64)
SIZES = (0.2, 0.33, 0.5)  # densities of the prompt's set
BINS = (1, 9, 17, 33, 65, 129)  # distances from the prompt's end; the last one is the end


def across_distance(setting: Setting, report: Report) -> None:
    """Overlap of tokens against their distance, and coverage of later tokens by the prompt."""
    length, prompt = setting.size(192, 48), setting.size(64, 16)
    lags = [lag for lag in LAGS if lag < prompt]
    bins = [b for b in BINS if b - 1 <= length - prompt]
    overlaps: dict[str, Any] = {}
    coverage: dict[str, Any] = {}
    for subject in setting.subjects():
        setting.log(f"inertia of {subject.name}: distance")
        rows = setting.rows(subject, length, setting.size(24, 4))
        norms = neuron_norms(subject, rows)
        sets = strongest(norms, typical_size(setting, subject))
        overlaps[subject.name] = _overlap(setting, sets[:, :, 1:], lags)
        coverage[subject.name] = _coverage(
            norms, active(setting, subject, norms), prompt, bins, setting
        )
        report.numbers[subject.name]["overlap by distance"] = overlaps[subject.name]
        report.numbers[subject.name]["coverage by prompt"] = coverage[subject.name]
    _overlap_report(report, overlaps, lags)
    _coverage_report(report, coverage, bins, prompt)


def _overlap(setting: Setting, sets: Tensor, lags: list[int]) -> dict[str, Any]:
    """Mean Jaccard index of sets at each distance, in one text and across two."""
    by_lag = {lag: jaccard(sets[:, :, :-lag], sets[:, :, lag:]).mean((0, 2)) for lag in lags}
    # At the same distance, since texts begin alike and positions have habits of their own.
    others = sets.roll(1, 1)
    across = {lag: jaccard(sets[:, :, :-lag], others[:, :, lag:]).mean((0, 2)) for lag in lags}
    first, last = (by_lag[lag] - across[lag] for lag in (lags[0], lags[-1]))
    other = across[lags[0]]
    return {
        "distances": lags,
        "overlap": [value.mean().item() for value in by_lag.values()],
        "of different texts": other.mean().item(),
        "next token over other text": vars(bootstrap(first, setting.seed))
        | {"p": sign_flip_p(first, setting.seed)},
        f"distance {lags[-1]} over other text": vars(bootstrap(last, setting.seed))
        | {"p": sign_flip_p(last, setting.seed)},
    }


def _coverage(
    norms: Tensor, at_threshold: Tensor, prompt: int, bins: list[int], setting: Setting
) -> dict[str, Any]:
    """How much of the later tokens' active neurons, and of their squared norms, a set holds."""
    statistic = prompt_statistic(norms[:, :, :prompt])  # [layers, rows, f]
    later, sets = norms[:, :, prompt:], at_threshold[:, :, prompt:]
    total = later.square().sum(-1)
    f = norms.shape[-1]
    # The static set of a text comes from all other texts, so that it knows nothing of this one.
    squares = statistic.square()
    others = (squares.sum(1, keepdim=True) - squares).sqrt()
    found: dict[str, Any] = {"bins": bins}
    for size in SIZES:
        count = max(1, round(size * f))
        for name, scores in (("prompt", statistic), ("static", others)):
            chosen = top_mask(scores, count).unsqueeze(2)  # [layers, rows, 1, f]
            neurons = covered(sets, chosen.expand_as(sets)).mean(0)  # [rows, tokens]
            energy = ((later.square() * chosen).sum(-1) / total.clamp_min(1e-30)).mean(0)
            found[f"{name} {size}"] = {
                "neurons": _by_bin(neurons, bins),
                "energy": _by_bin(energy, bins),
                "all": neurons.mean().item(),
            }
            if name == "prompt":
                own = neurons.mean(1)
            else:
                gain = own - neurons.mean(1)
                found[f"gain {size}"] = vars(bootstrap(gain, setting.seed)) | {
                    "p": sign_flip_p(gain, setting.seed)
                }
    return found


def _by_bin(values: Tensor, bins: list[int]) -> list[float]:
    return [
        values[:, start - 1 : stop - 1].mean().item() for start, stop in itertools.pairwise(bins)
    ]


def _overlap_report(report: Report, overlaps: dict[str, Any], lags: list[int]) -> None:
    with report.figure("distance", "Overlap of two tokens' sets against their distance") as figure:
        ax = figure.subplots()
        for name, found in overlaps.items():
            (line,) = ax.plot(found["distances"], found["overlap"], "o-", label=name)
            ax.axhline(found["of different texts"], color=line.get_color(), linestyle=":")
        ax.set_xscale("log", base=2)
        ax.set_xlabel("distance in tokens (dotted: tokens of different texts)")
        ax.set_ylabel("Jaccard index, sets of one size")
        ax.legend()
    report.table(
        "Overlap of the sets of two tokens (Jaccard index, sets of one size per model)",
        ["model", *(f"distance {lag}" for lag in lags), "different texts"],
        [[name, *m["overlap"], m["of different texts"]] for name, m in overlaps.items()],
    )
    gains = {name: m["next token over other text"] for name, m in overlaps.items()}
    report.judged(
        "section 3.2.2",
        "inertia: consecutive tokens share more active neurons than unrelated ones",
        "; ".join(
            f"{name} {overlaps[name]['overlap'][0]:.3f} against "
            f"{overlaps[name]['of different texts']:.3f} (difference {m['mean']:+.3f}, "
            f"p = {m['p']:.2g})"
            for name, m in gains.items()
        ),
        {name: sign_of(m) for name, m in gains.items()},
    )


def _coverage_report(
    report: Report, coverage: dict[str, Any], bins: list[int], prompt: int
) -> None:
    names = [f"tokens {a}-{b - 1}" for a, b in itertools.pairwise(bins)]
    rows = [
        [model, kind, size, *found[f"{kind} {size}"]["neurons"]]
        for model, found in coverage.items()
        for size in SIZES
        for kind in ("prompt", "static")
    ]
    report.table(
        f"Share of later tokens' active neurons (CETT 0.2) inside a set from a {prompt}-token "
        "prompt, by distance from the prompt",
        ["model", "set from", "density", *names],
        rows,
        "static: the set of the same size from the other texts' prompts.",
    )
    with report.figure("coverage", "Coverage of later tokens by the prompt's set") as figure:
        axes = figure.subplots(1, len(SIZES), sharey=True)
        middles = [(a + b - 1) / 2 for a, b in itertools.pairwise(bins)]
        for ax, size in zip(axes, SIZES, strict=True):
            for model, found in coverage.items():
                (line,) = ax.plot(middles, found[f"prompt {size}"]["neurons"], "o-", label=model)
                static = found[f"static {size}"]["neurons"]
                ax.plot(middles, static, ":", color=line.get_color())
            ax.set_title(f"set of {size:.0%}", fontsize=9)
            ax.set_xlabel("distance from the prompt")
        axes[0].set_ylabel("active neurons covered (dotted: static set)")
        axes[0].legend(fontsize=7)
    half = {name: found[f"prompt {SIZES[-1]}"]["all"] for name, found in coverage.items()}
    gains = {name: found[f"gain {SIZES[-1]}"] for name, found in coverage.items()}
    report.judged(
        "section 3.2.3",
        "the neurons that a prompt uses are those that the text after it needs",
        f"share of later active neurons in the prompt's top {SIZES[-1]:.0%} (0.9 asked): "
        + "; ".join(
            f"{name} {share:.2f} (a static set of that size: {share - gains[name]['mean']:.2f}, "
            f"p = {gains[name]['p']:.2g})"
            for name, share in half.items()
        ),
        {name: 1 if share >= 0.9 else -1 for name, share in half.items()},
    )
