"""What QRIDA gets for its bytes: top-k against thresholds, and all methods at one quality.

Two things may vary when as many neurons are computed on average: how many each layer gets, and how
many each token gets. The four combinations at one mean density tell them apart. Then `tune` finds,
for each method, the fewest bytes at which perplexity rises by one per cent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..calibration.calibrate import calibrate
from ..calibration.tune import tune
from ..errors import ConfigurationError
from ..methods.qrida import QRIDA
from ..methods.tda import TDA
from ..models.weights import read_share
from .parts import once
from .qrida_rankings import layer_inputs, shadow_share
from .qrida_text import Text, percent
from .report import Report
from .setting import Setting, Subject

TARGETS = (0.1, 0.2, 0.3)  # of CETT; each gives a density at which the four are compared
LIMIT = 0.01
_BITS = 2
THRESHOLDS, TOP_K = "thresholds at one CETT", "top-k, one density"
LAYERS_ONLY, TOKENS_ONLY = "top-k, the layers' densities as there", "thresholds at one density"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "QRIDA, bits chosen": ("given", {}),
    "QRIDA, 2 bits": ("given", {"bits": [(2, 2)]}),
    "TDA, exact norm": ("product", {"method": "tda"}),
    "TDA, gate (CATS)": ("gate", {"method": TDA(0.0, score="gate")}),
}
_VERSION = 2


def run(setting: Setting, report: Report) -> None:
    """Write the study into `report`."""
    for subject in setting.subjects():
        report.models[subject.name] = subject.describe()
        found = report.numbers[subject.name] = {}
        for name, measure in (("choice", _choice), ("budget", _budget)):
            key = setting.describe() | {
                "study": report.name,
                "part": name,
                "model": subject.fingerprint,
                "version": _VERSION,
            }
            found[name] = once(
                report.directory,
                key,
                lambda subject=subject, measure=measure: measure(setting, subject),  # type: ignore[misc]
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


def _budget(setting: Setting, subject: Subject) -> dict[str, Any]:
    documents = setting.corpus.documents()
    found: dict[str, Any] = {}
    for label, (plan, arguments) in METHODS.items():
        setting.log(f"{subject.name}: {label}, perplexity +{LIMIT:.0%}")
        try:
            tuned = tune(
                subject.model,
                subject.tokenizer,
                documents,
                max_perplexity_increase=LIMIT if not setting.quick else 0.2,
                context=setting.size(64, 16),
                continuation=setting.size(192, 32),
                max_tokens=setting.size(12288, 768),
                seed=setting.seed,
                **arguments,
            )
        except ConfigurationError as error:
            found[label] = {"cannot": str(error)}
            continue
        layers = tuned.thresholds.layers
        matrices = 3 if subject.sites[0].weights().gated else 2
        share = sum(read_share(plan, layer.density, matrices) for layer in layers) / len(layers)
        bits = [list(pair) for pair in tuned.thresholds.bits]
        for layer, pair in zip(layers, bits, strict=False):
            if layer.epsilon > 0:
                share += shadow_share(pair[0], pair[1], matrices) / len(layers)
        found[label] = {
            "increase": tuned.increase,
            "error": tuned.error,
            "density": tuned.thresholds.density,
            "bytes": share,
            "layers": [layer.density for layer in layers],
            "bits": bits,
            "tokens": tuned.tokens,
        }
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
    rows = []
    for label, values in found["budget"].items():
        if "cannot" in values:
            rows.append([label, "-", "-", "-", values["cannot"]])
            continue
        used = {"/".join(map(str, pair)) for pair in values["bits"]}
        rows.append(
            [
                label,
                values["density"],
                values["bytes"],
                ", ".join(sorted(used)) or "-",
                percent(values),
            ]
        )
    report.table(
        f"At perplexity +1 %, {subject.name}",
        ["method", "density", "bytes", "bits (gate/up)", "perplexity over dense, held out"],
        rows,
        "Per-layer thresholds by `moyu tune` on one half of the text, verified on the other. "
        "bytes: of the dense MLPs' in bfloat16, for a hidden size that is a multiple of 256.",
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
    ratios = {}
    for name, found in report.numbers.items():
        shares = {k: v["bytes"] for k, v in found["budget"].items() if "bytes" in v}
        others = [share for k, share in shares.items() if k.startswith("TDA")]
        mine = [share for k, share in shares.items() if k.startswith("QRIDA")]
        if mine and others:
            ratios[name] = min(others) / min(mine)
    if ratios:
        report.judged(
            "QRIDA",
            "at perplexity +1 % QRIDA reads 1.3 times fewer bytes than the best of TDA and CATS",
            "; ".join(f"{name} {ratio:.2f} times fewer" for name, ratio in ratios.items()),
            {name: 1 if ratio >= 1.3 else -1 for name, ratio in ratios.items()},
        )


def _lower(a: dict[str, float], b: dict[str, float]) -> int:
    """Whether a rises perplexity less than b (+1) or more (-1), by one standard error of each (they
    are of the same rows, so that of their difference is smaller), else 0."""
    if a["increase"] + a["error"] < b["increase"]:
        return 1
    return -1 if b["increase"] + b["error"] < a["increase"] else 0
