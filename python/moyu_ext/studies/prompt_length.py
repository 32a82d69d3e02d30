"""Does a method lose more behind a short prompt (section 4.4, Table 4)?

The same tokens are scored behind the last 16 to 192 tokens before them. The prompt runs dense, as
in generation; the method governs the scored tokens. What changes with the prompt's length is thus
the set that STDA and SRIDA take from it; for TDA and QRIDA, which have none, only the context.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..evaluation.statistics import bootstrap, sign_of
from ..methods.base import Method
from ..methods.dense import Dense
from ..methods.qrida import QRIDA
from ..methods.srida import SRIDA
from ..methods.stda import STDA
from ..methods.tda import TDA
from .attention import losses
from .report import Report
from .setting import CETT, Setting, Subject

LENGTHS = (16, 32, 64, 128, 192)
DENSITY = 0.33
SEQUENCE = ("sTDA", "sRIDA")  # methods whose set comes from the prompt


def run(setting: Setting, report: Report) -> None:
    """Write the study into `report`."""
    lengths = LENGTHS[: setting.size(len(LENGTHS), 2)]
    scored, count = setting.size(64, 16), setting.size(40, 4)
    for subject in setting.subjects():
        report.models[subject.name] = subject.describe()
        rows = setting.rows(subject, lengths[-1] + scored, count)
        report.numbers[subject.name] = _of_model(setting, subject, rows, lengths)
    _report(report, lengths, scored, count)


def behind(rows: Tensor, prompt: int, scored: int) -> Tensor:
    """Each row's first token and the last `prompt - 1 + scored` others: [rows, prompt + scored]."""
    return torch.cat([rows[:, :1], rows[:, 1 - prompt - scored :]], 1)


def _of_model(
    setting: Setting, subject: Subject, rows: Tensor, lengths: tuple[int, ...]
) -> dict[str, Any]:
    thresholds = setting.thresholds(subject)
    methods: dict[str, Method] = {
        "sTDA": STDA(thresholds),
        "sRIDA": SRIDA(DENSITY),
        "TDA": TDA(thresholds),
        "qRIDA": QRIDA(DENSITY),
    }
    scored = rows.shape[1] - lengths[-1]
    inputs = {length: behind(rows, length, scored) for length in lengths}
    dense = {n: losses(subject, Dense(), ids, n, None)[0] for n, ids in inputs.items()}
    found: dict[str, Any] = {}
    for name, method in methods.items():
        setting.log(f"{subject.name}: {name} behind {lengths[0]} to {lengths[-1]} tokens")
        rise, density = {}, {}
        for length, ids in inputs.items():
            loss, density[str(length)] = losses(subject, method, ids, length, None)
            rise[length] = loss - dense[length]
        found[name] = {
            "rise": {str(n): vars(bootstrap(r, setting.seed)) for n, r in rise.items()},
            "density": density,
            "shortest less longest": vars(
                bootstrap(rise[lengths[0]] - rise[lengths[-1]], setting.seed)
            ),
        }
    return found


def _report(report: Report, lengths: tuple[int, ...], scored: int, count: int) -> None:
    rows = []
    for model, methods in report.numbers.items():
        for method, m in methods.items():
            values = [(m["rise"][str(n)]["mean"], m["density"][str(n)]) for n in lengths]
            cells = [f"{_percent(rise)} ({density:.2f})" for rise, density in values]
            rows.append([model, method, *cells])
    report.table(
        "Perplexity over dense behind prompts of several lengths (realised density)",
        ["model", "method", *(f"{n} tokens" for n in lengths)],
        rows,
        f"The same {scored} tokens of {count} texts behind each length. sTDA and TDA at CETT "
        f"{CETT}, sRIDA and qRIDA at density {DENSITY}.",
    )
    caption = "Rise of the loss over dense, for the same tokens, against the prompt's length"
    with report.figure("curves", caption, 10, 3.6) as figure:
        axes = figure.subplots(1, len(report.numbers), squeeze=False, sharey=True)[0]
        for ax, (model, methods) in zip(axes, report.numbers.items(), strict=True):
            for method, m in methods.items():
                points = [m["rise"][str(n)] for n in lengths]
                means = [p["mean"] for p in points]
                below = [p["mean"] - p["low"] for p in points]
                above = [p["high"] - p["mean"] for p in points]
                ax.errorbar(lengths, means, [below, above], marker="o", markersize=3, label=method)
            ax.set_xscale("log", base=2)
            ax.set_yscale("symlog", linthresh=0.01)
            ax.set_xlabel("tokens of prompt")
            ax.set_title(f"{model} ({report.models[model]['activation']})", fontsize=9)
        axes[0].set_ylabel("nats per token over dense")
        axes[-1].legend(fontsize=7)
    for method in SEQUENCE:
        gaps = {model: m[method]["shortest less longest"] for model, m in report.numbers.items()}
        report.judged(
            "section 4.4, Table 4",
            f"{method} loses more behind shorter prompts",
            f"rise of the loss behind {lengths[0]} tokens less that behind {lengths[-1]}: "
            + "; ".join(
                f"{model} {m['mean']:+.3f} [{m['low']:+.3f}, {m['high']:+.3f}]"
                for model, m in gaps.items()
            ),
            {model: sign_of(m) for model, m in gaps.items()},
        )


def _percent(rise: float) -> str:
    return f"{100 * torch.tensor(rise).expm1().item():+.1f} %"
