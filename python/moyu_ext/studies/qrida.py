"""QRIDA's router against every other that is at hand: quality, bytes, recall and precision.

Quality is that of generation: a prompt runs dense, the tokens behind it are scored with every layer
sparse. Sets have one size for all rankings, so that density explains nothing; `qrida-bytes` asks
what each method needs for one quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..calibration.calibrate import calibrate
from ..calibration.thresholds import Thresholds
from ..methods.qrida import QRIDA
from ..methods.srida import SRIDA
from .parts import once
from .qrida_rankings import (
    BITS,
    CATS,
    EXACT,
    OWN,
    ROUTER,
    SIGNS,
    STATIC,
    Ranked,
    Ranking,
    highest,
    layer_inputs,
    rankings,
    size,
)
from .qrida_text import Text, domains_of, percent
from .report import Report
from .setting import CETT, Setting, Subject

DENSITIES = (0.5, 0.33, 0.2)
# Perplexity over dense at density 0.33.
TARGETS = {"shadow 4 bits": 0.010, "shadow 2 bits": 0.015, OWN: 0.015}
RECALL = 0.85
PROMPT = "prompt-chosen (sRIDA)"
SHOWN = (EXACT, CATS, SIGNS, "SVD, bytes of 2 bits", ROUTER, PROMPT, STATIC)
FITTED = "shadow 2 bits, fitted to text"
SHADOWS = ("shadow 4 bits", "shadow 2 bits", OWN, FITTED, "shadow 1 bit")
_RECALL_ROWS = 4
_VERSION = 2  # of what is measured; a change makes kept parts void


def run(setting: Setting, report: Report) -> None:
    """Write the study into `report`."""
    for subject in setting.subjects():
        report.models[subject.name] = subject.describe()
        found = report.numbers[subject.name] = {}
        for domain in domains_of(setting, subject):
            key = setting.describe() | {
                "study": report.name,
                "model": subject.fingerprint,
                "domain": domain,
                "densities": DENSITIES,
                "version": _VERSION,
            }
            first = not found
            found[domain] = once(
                report.directory,
                key,
                lambda subject=subject, domain=domain, first=first: _measure(  # type: ignore[misc]
                    setting, subject, domain, first
                ),
            )
            _quality_report(report, subject.name, domain, found[domain])
            if first:
                _recall_report(report, subject.name, domain, found[domain])
    _claims(report)
    _trinity(report)
    report.note(
        "Quality: a prompt of 64 tokens runs dense, the 192 behind it are scored with every layer "
        "sparse; the same number of neurons for each token and layer. The standard error is that "
        "of the paired difference to dense over texts. bytes: read per token, of the dense MLPs in "
        "bfloat16, for a hidden size that is a multiple of 256."
    )


def _measure(setting: Setting, subject: Subject, domain: str, main: bool) -> dict[str, Any]:
    """Of the main domain all there is, of another one the rankings that figures show."""
    setting.log(f"{subject.name} on {domain}")
    text = Text(setting, subject, domain)
    candidates = rankings(setting, subject, text.documents if main else None, text.other)
    if not main:
        candidates = [r for r in candidates if r.label in (*SHADOWS, *SHOWN)]
    found: dict[str, Any] = {
        "dense perplexity": text.perplexity,
        "texts": len(text.rows),
        "tokens scored of each": text.rows.shape[1] - text.context,
    }
    if main:
        found["recall"] = _recall(text, candidates)
        found["at CETT 0.2"] = _at_cett(setting, text)
    quality: dict[str, Any] = {}
    for ranking in candidates:
        setting.log(f"{subject.name}, {domain}: {ranking.label}")
        quality[ranking.label] = [
            {"asked": density, "bytes": ranking.share(density)}
            | text.increase(Ranked(ranking, density))
            for density in DENSITIES
        ]
    for label, score in ((PROMPT, "contribution"), ("prompt-chosen (GRIFFIN)", "griffin")):
        quality[label] = [
            {"asked": density, "bytes": density} | text.increase(SRIDA(density, score=score))
            for density in DENSITIES
        ]
    return found | {"quality": quality}


def _quality_report(report: Report, name: str, domain: str, found: dict[str, Any]) -> None:
    quality = found["quality"]
    rows = [
        [label, *(percent(p) for p in points), *(f"{p['bytes']:.3f}" for p in points)]
        for label, points in quality.items()
    ]
    report.table(
        f"Perplexity over dense, {name}, {domain}",
        [
            "who ranks",
            *(f"density {density}" for density in DENSITIES),
            *(f"bytes at {density}" for density in DENSITIES),
        ],
        rows,
        f"Dense perplexity {found['dense perplexity']:.2f}; {found['texts']} texts of "
        f"{found['tokens scored of each']} scored tokens; +- one standard error.",
    )
    _frontier(report, name, domain, quality)


def _frontier(report: Report, name: str, domain: str, found: dict[str, Any]) -> None:
    caption = f"Perplexity over dense against bytes read per token, {name}, {domain}"
    with report.figure(f"frontier_{name}_{domain}".replace(" ", "_"), caption) as figure:
        axes = figure.subplots()
        for label in (*SHADOWS, *SHOWN):
            points = found.get(label)
            if points is None:
                continue
            axes.plot(
                [p["bytes"] for p in points],
                # A change within noise below 0 has no place on this axis.
                [max(100 * p["increase"], 0.05) for p in points],
                marker="o" if label in SHADOWS else "x",
                linestyle="-" if label in SHADOWS else "--",
                color="black" if label == STATIC else None,
                label=label,
            )
        axes.set_yscale("log")
        axes.set_xlabel("bytes read per token, of the dense MLPs'")
        axes.set_ylabel("perplexity over dense, %")
        axes.set_title(f"{name}, {domain}; densities {', '.join(map(str, DENSITIES))}")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _recall(text: Text, candidates: Sequence[Ranking]) -> dict[str, Any]:
    """Share of the exact top-k that a ranking's top-k holds, per layer; with sets of one size,
    precision is the same number. And the share of the exact set's squared norms that it holds."""
    subject = text.subject
    inputs = layer_inputs(subject, text.rows[:_RECALL_ROWS], text.context)
    found: dict[str, Any] = {}
    for ranking in candidates[1:]:
        found[ranking.label] = {str(density): {"recall": [], "energy": []} for density in DENSITIES}
    for index, x in enumerate(inputs):
        w = subject.sites[index].weights()
        with torch.no_grad():
            gate, a = w.activations(x)
            truth = candidates[0].scorers[index](x, gate, a)
            exact = {d: highest(truth, size(d, w.f)) for d in DENSITIES}
            for ranking in candidates[1:]:
                score = ranking.scorers[index](x, gate, a).expand_as(truth)
                for density, want in exact.items():
                    got = highest(score, size(density, w.f))
                    # Neurons at exactly 0 add nothing: a ReLU layer has fewer than k others.
                    want = want & (truth > 0)
                    squares = truth.square()
                    values = found[ranking.label][str(density)]
                    values["recall"].append(((want & got).sum() / want.sum()).item())
                    energy = (squares * got).sum(1) / (squares * want).sum(1).clamp_min(1e-30)
                    values["energy"].append(energy.mean().item())
    return found


def _at_cett(setting: Setting, text: Text) -> dict[str, Any]:
    """Recall and precision of the set by threshold, both calibrated to CETT 0.2."""
    subject = text.subject

    def calibrated(method: Any) -> Thresholds:
        tokens = setting.size(4096, 512)
        return calibrate(
            subject.model,
            subject.tokenizer,
            text.documents,
            cett=CETT,
            method=method,
            sequential=False,
            progress=False,
            max_tokens=tokens,
        )

    exact = calibrated("tda").epsilon
    inputs = layer_inputs(subject, text.rows[:_RECALL_ROWS], text.context)
    found: dict[str, Any] = {}
    for bits in BITS:
        method = QRIDA(bits=bits)
        epsilon = calibrated(method).epsilon
        layers: list[dict[str, float]] = []
        for site, x in zip(subject.sites, inputs, strict=True):
            w = site.weights()
            with torch.no_grad():
                want = w.activations(x)[1].abs() * w.column_norms() >= exact[site.index]
                got = method.scorer(site.index, w)(x) >= epsilon[site.index]
            hits = (want & got).sum().item()
            layers.append(
                {
                    "recall": hits / max(want.sum().item(), 1),
                    "precision": hits / max(got.sum().item(), 1),
                    "density": got.double().mean().item(),
                    "exact density": want.double().mean().item(),
                }
            )
        found[f"{bits[0]}/{bits[1]}"] = layers
    return found


def _recall_report(report: Report, name: str, domain: str, numbers: dict[str, Any]) -> None:
    found = numbers["recall"]
    rows = []
    for label, values in found.items():
        layers = values["0.33"]["recall"]
        means = [_mean(values[str(density)]["recall"]) for density in DENSITIES]
        energy = _mean(values["0.33"]["energy"])
        rows.append([label, *means, min(layers), max(layers), energy])
    report.table(
        f"Recall of the exact top-k, {name}, {domain}",
        ["who ranks", *(f"at {d}" for d in DENSITIES), "worst layer", "best layer", "energy"],
        rows,
        "Mean over layers, of the neurons whose norm is not 0; worst and best layer and energy "
        "(share of the exact set's squared norms) at density 0.33. Precision equals recall where "
        "both sets have k neurons.",
    )
    caption = f"Recall of the exact top-k by layer at density 0.33, {name}, {domain}"
    with report.figure(f"recall_{name}", caption) as figure:
        axes = figure.subplots()
        for label in (*SHADOWS, *SHOWN):
            if label in found:
                axes.plot(
                    found[label]["0.33"]["recall"],
                    marker="o" if label in SHADOWS else "x",
                    linestyle="-" if label in SHADOWS else "--",
                    color="black" if label == STATIC else None,
                    label=label,
                )
        axes.set_xlabel("layer")
        axes.set_ylabel("recall at density 0.33")
        axes.set_ylim(0, 1)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    table = []
    for bits, layers in numbers["at CETT 0.2"].items():
        table.append([bits, *(_mean([layer[key] for layer in layers]) for key in layers[0])])
    report.table(
        f"Sets by threshold at CETT 0.2, {name}, {domain}",
        ["bits (gate/up)", "recall", "precision", "density", "density of the exact set"],
        table,
        "Both thresholds are calibrated to CETT 0.2 on other text, QRIDA's against the true CETT "
        "of what it drops: a poorer estimate keeps more neurons. Mean over layers.",
    )


def _claims(report: Report) -> None:
    """The targets that were set for the method."""
    at = DENSITIES.index(0.33)
    for label, limit in TARGETS.items():
        points = {
            f"{name} on {domain}": found["quality"][label][at]
            for name, domains in report.numbers.items()
            for domain, found in domains.items()
        }
        report.judged(
            "QRIDA, target",
            f"{label}: perplexity at density 0.33 at most {limit:.1%} above dense",
            "; ".join(f"{where} {percent(point)}" for where, point in points.items()),
            {at: 1 if point["increase"] <= limit else -1 for at, point in points.items()},
        )
    for label in ("shadow 2 bits", OWN, FITTED):
        recalls = {
            name: _mean(next(iter(domains.values()))["recall"][label]["0.33"]["recall"])
            for name, domains in report.numbers.items()
        }
        report.judged(
            "QRIDA, target",
            f"{label}: recall of the exact top-k at density 0.33 at least {RECALL}",
            "; ".join(f"{name} {value:.3f}" for name, value in recalls.items()),
            {name: 1 if value >= RECALL else -1 for name, value in recalls.items()},
        )


def _trinity(report: Report) -> None:
    """The paper: token-level prediction without history works for ReLU models and MoE alone."""
    at = DENSITIES.index(0.33)
    measured, beaten = [], []
    for name, domains in report.numbers.items():
        if report.models[name]["activation"] == "relu":
            continue
        for domain, found in domains.items():
            wanted = [k for k in ("shadow 2 bits", EXACT, ROUTER, PROMPT) if k in found["quality"]]
            points = {k: found["quality"][k][at] for k in wanted}
            measured.append(
                f"{name}, {domain}: "
                + ", ".join(f"{label} {percent(point)}" for label, point in points.items())
            )
            shadow, _, *others = (point["increase"] for point in points.values())
            beaten.append(shadow < min(others))
    if measured:
        report.claim(
            "section 1",
            "for models without ReLU and without experts only sequence-level strategies are left",
            "at density 0.33, " + "; ".join(measured),
            "fails" if all(beaten) else "open",
            "" if all(beaten) else "the shadow does not beat the trained and the prompt's router",
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
