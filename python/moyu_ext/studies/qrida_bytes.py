"""What QRIDA gets for its bytes: top-k against thresholds.

Two things may vary when as many neurons are computed on average: how many each layer gets, and how
many each token gets. The four combinations at one mean density tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..calibration.calibrate import calibrate
from ..methods.qrida import QRIDA
from .parts import once
from .qrida_rankings import layer_inputs
from .qrida_text import Text, percent
from .report import Report
from .setting import Setting, Subject

TARGETS = (0.1, 0.2, 0.3)  # of CETT; each gives a density at which the four are compared
_BITS = 2
THRESHOLDS, TOP_K = "thresholds at one CETT", "top-k, one density"
LAYERS_ONLY, TOKENS_ONLY = "top-k, the layers' densities as there", "thresholds at one density"
_VERSION = 2


def run(setting: Setting, report: Report) -> None:
    """Write the study into `report`."""
    for subject in setting.subjects():
        report.models[subject.name] = subject.describe()
        found = report.numbers[subject.name] = {}
        key = setting.describe() | {
            "study": report.name,
            "part": "choice",
            "model": subject.fingerprint,
            "version": _VERSION,
        }
        found["choice"] = once(
            report.directory,
            key,
            lambda subject=subject: _choice(setting, subject),  # type: ignore[misc]
        )
        _tables(report, subject, found)
    _claims(report)


def _choice(setting: Setting, subject: Subject) -> dict[str, Any]:
    text = Text(setting, subject, setting.corpus.domains()[0])
    method = QRIDA(bits=_BITS)
    inputs = layer_inputs(subject, text.other, text.context)
    scores = []
    for site, x in zip(subject.sites, inputs, strict=True):
        with torch.no_grad():
            values = method.scorer(site.index, site.weights())(x[: setting.size(2048, 256)])
        scores.append(values.flatten().sort(descending=True).values)
    found: dict[str, Any] = {}
    for target in TARGETS:
        setting.log(f"{subject.name}: thresholds and top-k at CETT {target}")
        thresholds = calibrate(
            subject.model,
            subject.tokenizer,
            text.documents,
            cett=target,
            method=method,
            sequential=False,
            progress=False,
            max_tokens=setting.size(4096, 512),
        )
        first = text.increase(QRIDA(thresholds, guard="off"))
        layers, mean = text.layers, first["density"]
        places = [min(round(mean * len(s)), len(s) - 1) for s in scores]
        # Not 0, which keeps every neuron: fewer have a score than are asked for, with ReLU.
        epsilon = [
            max(s[place].item(), s[s > 0].min().item())
            for s, place in zip(scores, places, strict=True)
        ]
        arms = {
            LAYERS_ONLY: QRIDA(layers, guard="off"),
            TOKENS_ONLY: QRIDA(thresholds=epsilon, guard="off"),
            TOP_K: QRIDA(mean, guard="off"),
        }
        points = {THRESHOLDS: first} | {name: text.increase(arm) for name, arm in arms.items()}
        found[str(target)] = {"layers": layers, "arms": points}
    return found


def _tables(report: Report, subject: Subject, found: dict[str, Any]) -> None:
    rows: list[Sequence[Any]] = []
    for target, values in found["choice"].items():
        for arm, point in values["arms"].items():
            rows.append([target, arm, f"{point['density']:.3f}", percent(point)])
    report.table(
        f"Top-k against thresholds, {subject.name}, {_BITS} bits",
        ["CETT", "rule", "density", "perplexity over dense"],
        rows,
        "Thresholds from other text of the same kind; densities realised on the text measured. The "
        "first rule of each four varies per layer and token, the second per layer, the third per "
        "token, the fourth neither.",
    )


def _claims(report: Report) -> None:
    for source, claim, one, other in (
        ("QRIDA", "thresholds (counts vary per token) lose less than top-k", TOKENS_ONLY, TOP_K),
        (
            "section 3.2.3",
            "one CETT for all layers shares neurons among them better than one density does",
            THRESHOLDS,
            TOKENS_ONLY,
        ),
    ):
        pairs = {
            f"{name} at CETT {target}, density {values['arms'][one]['density']:.2f}": (
                values["arms"][one],
                values["arms"][other],
            )
            for name, found in report.numbers.items()
            for target, values in found["choice"].items()
        }
        report.judged(
            source,
            claim,
            "; ".join(f"{at} {percent(a)} against {percent(b)}" for at, (a, b) in pairs.items()),
            {at: _lower(a, b) for at, (a, b) in pairs.items()},
        )


def _lower(a: dict[str, float], b: dict[str, float]) -> int:
    """Whether a rises perplexity less than b (+1) or more (-1), by one standard error of each (they
    are of the same rows, so that of their difference is smaller), else 0."""
    if a["increase"] + a["error"] < b["increase"]:
        return 1
    return -1 if b["increase"] + b["error"] < a["increase"] else 0
