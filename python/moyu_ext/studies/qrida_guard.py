"""The guard on text of another kind than the calibration's: does CETT drift, and is it held?

Thresholds are calibrated on the main domain. Then texts of every domain (and Chinese, where the
data folder has it) are decoded token by token, once with a guard that only watches and once with
one that holds. The true CETT of every token and layer is measured beside, so that what the guard
sees on one token in 64 can be compared with what happens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.calibrate import calibrate
from ..evaluation.perplexity import generation_perplexity
from ..guard import LayerGuard
from ..methods.qrida import QRIDA
from ..models.cache import cache_of, passing
from ..models.text import encode, windows
from ..models.weights import MlpWeights
from ..patching.patch import patch, unpatch
from ..patching.patch import report as usage
from .parts import once
from .report import Report
from .setting import CETT, Setting, Subject

MODES = (("watch", 64), ("hold", 64))
WITHIN = 0.15
OTHERS = ("web", "code")  # domains of the data folder that the calibration does not see
CHINESE = "chinese"
_PROMPT = 16
_LENGTH = 256
_SMOOTH = 256  # tokens that a curve is averaged over
_VERSION = 2  # of what is measured; a change makes kept parts void


def run(setting: Setting, report: Report) -> None:
    """Write the study into `report`."""
    for subject in setting.subjects():
        report.models[subject.name] = subject.describe()
        key = setting.describe() | {
            "study": report.name,
            "model": subject.fingerprint,
            "version": _VERSION,
        }
        found = once(
            report.directory,
            key,
            lambda subject=subject: _measure(setting, subject),  # type: ignore[misc]
        )
        report.numbers[subject.name] = found
        _table(report, subject.name, found)
        _figure(report, subject.name, found)
    _claims(report)
    report.note(
        "CETT: of every token behind the prompts, mean over layers; the mean is over the second "
        "half of the tokens, when the controller has settled. Target: what the calibration reached "
        "on its own text. seen: the mean of what the guard measured on its tokens, from the start."
    )


def _measure(setting: Setting, subject: Subject) -> dict[str, Any]:
    count = setting.size(16, 2)
    thresholds = calibrate(
        subject.model,
        subject.tokenizer,
        setting.corpus.documents(train=True),
        cett=CETT,
        method=QRIDA(bits=2),
        progress=False,
        max_tokens=setting.size(4096, 512),
    )
    targets = [layer.cett for layer in thresholds.layers]
    found: dict[str, Any] = {"target": sum(targets) / len(targets)}
    found |= {"targets": targets, "texts": {}}
    for name, rows in _texts(setting, subject, count).items():
        dense = generation_perplexity(
            subject.model, rows, context=_PROMPT, continuation=_LENGTH - _PROMPT
        ).loss
        found["texts"][name] = {}
        for mode, every in MODES:
            setting.log(f"{subject.name}, {name}: {mode}, one token in {every}")
            method = QRIDA(thresholds, guard=mode, guard_every=every)
            found["texts"][name][f"{mode} {every}"] = _decode(subject, method, rows, dense)
    return found


def _texts(setting: Setting, subject: Subject, count: int) -> dict[str, Tensor]:
    """Rows of the main domain, of others (all of the user's own), and of Chinese."""
    found = {}
    main, *others = setting.corpus.domains()
    for domain in (main, *(o for o in others if o in OTHERS or setting.texts)):
        found[domain] = setting.rows(subject, _LENGTH, count, domain)
    file = None if setting.data is None else setting.data / CHINESE / "gaokao-chinese.jsonl"
    if file is not None and file.is_file() and not setting.texts:
        lines = file.read_text(encoding="utf-8").splitlines()
        passages = list(dict.fromkeys(json.loads(line)["passage"] for line in lines))
        ids = [encode(subject.tokenizer, text) for text in passages if text]
        rows = [row for row in windows(ids, 1 << 30, _LENGTH) if len(row) == _LENGTH]
        if len(rows) >= count:
            found[CHINESE] = torch.tensor(rows[:count])
    return found


def _decode(subject: Subject, method: QRIDA, rows: Tensor, dense: float) -> dict[str, Any]:
    """Decode rows one after the other, a token at a time, each behind a dense prompt."""
    model = subject.model
    patch(model, method, decode_step=False)  # the rules' own Python is watched
    try:
        meters = [_watched(site.entry.rule) for site in subject.sites]
        losses: list[float] = []
        with torch.no_grad():
            for row in rows:
                out = model(input_ids=row[None, :_PROMPT], use_cache=True)
                for t in range(_PROMPT, len(row)):
                    losses.append(F.cross_entropy(out.logits[:, -1], row[t : t + 1]).item())
                    past = passing(model, cache_of(out))
                    out = model(input_ids=row[None, t : t + 1], **past)
        used = usage(model)
    finally:
        unpatch(model)
    every = torch.tensor([meter for meter in meters if meter], dtype=torch.float64)
    tail = every[:, every.shape[1] // 2 :]
    return {
        "cett": tail.mean().item(),
        "layers": tail.mean(1).tolist(),
        "seen": used.cett,
        "recall": used.recall,
        "density": used.density,
        "tokens": every.shape[1],
        "increase": math.exp(sum(losses) / len(losses) - dense) - 1,
        "curves": [_smooth(layer).tolist() for layer in every],
    }


def _watched(rule: Any) -> list[float]:
    """Let a rule note the true CETT of each of its tokens, without a word to its guard."""
    found: list[float] = []
    if not hasattr(rule, "router"):
        return found  # a layer that runs dense
    apply: Callable[[Tensor, MlpWeights], Any] = rule.apply
    meter = LayerGuard(1, len(rule.router.norms), torch.device("cpu"), None, None)

    def watched(x: Tensor, weights: MlpWeights) -> Any:
        meter.reset()
        meter.measure(x, weights, rule.router.norms, rule.chosen(x, weights))
        found.append(meter.report().cett)
        return apply(x, weights)

    rule.apply = watched
    return found


def _smooth(values: Tensor) -> Tensor:
    """Means over the last `_SMOOTH` tokens, one every 64."""
    sums = F.pad(values.cumsum(0), (1, 0))
    ends = torch.arange(min(_SMOOTH, len(values)), len(values) + 1, 64)
    starts = (ends - _SMOOTH).clamp_min(0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _table(report: Report, name: str, found: dict[str, Any]) -> None:
    target = found["target"]
    rows: list[Sequence[Any]] = []
    for text, modes in found["texts"].items():
        for mode, values in modes.items():
            layers = values["layers"]
            rows.append(
                [
                    text,
                    mode,
                    values["cett"],
                    f"{100 * _mean(values, found):+.0f} %",
                    f"{100 * _worst(values, found):+.0f} %",
                    f"{min(layers):.3f}..{max(layers):.3f}",
                    values["seen"],
                    values["recall"],
                    values["density"],
                    f"{100 * values['increase']:+.2f} %",
                ]
            )
    first = next(iter(found["texts"].values()))["watch 64"]
    report.table(
        f"CETT by text, {name}, target {target:.3f}",
        [
            "text",
            "guard, every",
            "CETT",
            "off target",
            "worst layer",
            "layers",
            "seen",
            "recall",
            "density",
            "perplexity over dense",
        ],
        rows,
        f"Calibrated on the first text. {first['tokens']} tokens decoded of each text.",
    )


def _figure(report: Report, name: str, found: dict[str, Any]) -> None:
    caption = f"CETT over its target, {name}, mean over {_SMOOTH} tokens; one line per layer"
    texts = found["texts"]
    with report.figure(f"cett_{name}", caption, 9, 2.0 * len(texts) + 0.5) as figure:
        grid = figure.subplots(len(texts), len(MODES), squeeze=False, sharex=True, sharey=True)
        for row, (text, modes) in zip(grid, texts.items(), strict=True):
            for axes, (mode, values) in zip(row, modes.items(), strict=True):
                for layer, (curve, target) in enumerate(
                    zip(values["curves"], found["targets"], strict=True)
                ):
                    place = [_SMOOTH + 64 * i for i in range(len(curve))]
                    axes.plot(place, [value / target for value in curve], label=f"layer {layer}")
                axes.axhspan(1 - WITHIN, 1 + WITHIN, color="grey", alpha=0.2)
                axes.set_title(f"{text}; guard: {mode}", fontsize=9)
                axes.set_ylim(0.3, 1.8)
        grid[0][0].legend(fontsize=6, ncols=2)
        for axes in grid[-1]:
            axes.set_xlabel("tokens decoded")
        for row in grid:
            row[0].set_ylabel("CETT / target")


def _claims(report: Report) -> None:
    """Drift without, and none with."""
    drift = f"without the guard the CETT of some layer leaves its target by more than {WITHIN:.0%}"
    hold = (
        f"with guard=hold, one token in 64, the mean CETT stays within {WITHIN:.0%} of the target"
    )
    every = f"with guard=hold the CETT of every layer stays within {WITHIN:.0%} of its target"
    for mode, claim, value, wanted in (
        ("watch 64", drift, _worst, False),
        ("hold 64", hold, _mean, True),
        ("hold 64", every, _worst, True),
    ):
        off = {
            f"{name} on {text}": value(modes[mode], found)
            for name, found in report.numbers.items()
            for text, modes in list(found["texts"].items())[1:]
        }
        report.judged(
            "QRIDA, guard",
            claim,
            "; ".join(f"{where} {share:+.0%}" for where, share in off.items()),
            {at: 1 if (abs(share) <= WITHIN) == wanted else -1 for at, share in off.items()},
        )


def _mean(values: dict[str, Any], found: dict[str, Any]) -> float:
    return float(values["cett"] / found["target"] - 1)


def _worst(values: dict[str, Any], found: dict[str, Any]) -> float:
    off = [a / b - 1 for a, b in zip(values["layers"], found["targets"], strict=True)]
    return float(max(off, key=abs))
