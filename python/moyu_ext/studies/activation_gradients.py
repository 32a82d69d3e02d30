"""The sign of the loss' gradient for a real model's activations, untrained and trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..evaluation.statistics import Interval, bootstrap
from ..models.families import MlpSite, find_mlps
from ..models.text import write_own
from .report import Report
from .setting import Setting, Subject

OWN = "trained, on its own text"


@contextmanager
def recorded_activations(sites: list[MlpSite]) -> Iterator[list[Tensor]]:
    """Within the block, the list holds each MLP's activations a [batch, length, f] of the last
    forward, in the autograd graph with their gradients retained."""
    held: list[Tensor] = [torch.empty(0)] * len(sites)

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            held[index] = args[0]
            if args[0].requires_grad:
                args[0].retain_grad()

        return hook

    handles = [
        site.linear(site.family.down).register_forward_pre_hook(keep(site.index)) for site in sites
    ]
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


def pulls(model: Any, sites: list[MlpSite], rows: Tensor) -> dict[str, Tensor]:
    """Per text and layer, [rows, layers] float64:

    "positive": mean gradient over activations a > 0, relative to the mean size of the gradient
    there; "shrink": mean of sign(a) * gradient over a != 0, likewise; "active": share of a > 0.
    """
    out = {
        name: torch.zeros(len(rows), len(sites), dtype=torch.float64)
        for name in ("positive", "shrink", "active")
    }
    with torch.enable_grad():
        for i, row in enumerate(rows):
            with recorded_activations(sites) as held:
                logits = model(input_ids=row.unsqueeze(0), use_cache=False).logits
                F.cross_entropy(logits[0, :-1].float(), row[1:], reduction="sum").backward()
            for site in sites:
                a, grad = held[site.index].detach(), held[site.index].grad
                assert grad is not None
                above, alive = a > 0, a != 0
                size = grad.abs()
                layer = site.index
                out["positive"][i, layer] = grad[above].mean() / size[above].mean()
                out["shrink"][i, layer] = (grad * a.sign())[alive].mean() / size[alive].mean()
                out["active"][i, layer] = above.double().mean()
            model.zero_grad(set_to_none=True)
    return out


def untrained(subject: Subject, seed: int) -> nn.Module:
    """The same architecture with fresh weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = type(subject.model)(copy.deepcopy(subject.model.config))
    return fresh.float().eval()


def own_text(subject: Subject, length: int, count: int, seed: int) -> Tensor:
    """Ids [<= count, length] that the model writes at temperature 1: y is drawn from its own p."""
    rows = write_own(subject.model, subject.tokenizer, 2 * count * length, length, seed)
    return torch.tensor([row for row in rows if len(row) == length][:count])


def of_models(setting: Setting, report: Report) -> None:
    """The last part of the `gradient` study."""
    count, length, seeds = setting.size(24, 4), setting.size(64, 32), setting.size(8, 2)
    found: dict[str, dict[str, Any]] = {"trained": {}, OWN: {}, "untrained": {}}
    for subject in setting.subjects():
        report.models[subject.name] = subject.describe()
        rows = setting.rows(subject, length, count, human=True)
        setting.log(f"gradients of {subject.name}")
        # The unit of chance is the text for one trained model, and the draw of the weights, over
        # which the theorem takes its expectation, for untrained ones.
        found["trained"][subject.name] = pulls(subject.model, subject.sites, rows)
        found[OWN][subject.name] = pulls(
            subject.model, subject.sites, own_text(subject, length, count, setting.seed)
        )
        draws = []
        for seed in range(seeds):
            fresh = untrained(subject, setting.seed + seed)
            draws.append(pulls(fresh, find_mlps(fresh), rows[: setting.size(4, 1)]))
        found["untrained"][subject.name] = {
            name: torch.stack([draw[name].mean(0) for draw in draws]) for name in draws[0]
        }
    _report(setting, report, found, f"{count} texts of {length} tokens, {seeds} untrained draws")


def _report(setting: Setting, report: Report, found: dict[str, dict[str, Any]], sizes: str) -> None:
    table = []
    for state, models in found.items():
        signs = {}
        for name, measured in models.items():
            positive, shrink = (
                bootstrap(measured[key].mean(1), setting.seed) for key in ("positive", "shrink")
            )
            layers = measured["positive"].mean(0)
            signs[name] = positive
            report.numbers.setdefault("models", {})[f"{name} {state}"] = {
                "positive": vars(positive),
                "shrink": vars(shrink),
                "positive_by_layer": layers,
                "share_positive": measured["active"].mean().item(),
            }
            activation = report.models[name]["activation"]
            share = measured["active"].mean().item()
            above = f"{int((layers > 0).sum())} of {len(layers)}"
            table.append([name, activation, state, share, str(positive), str(shrink), above])
        text = "; ".join(f"{name} {_short(m)}" for name, m in signs.items())
        if state == OWN:
            report.judged(
                "eq. 4",
                "where y is drawn from the model's own distribution, the expected gradient of "
                "positive activations is zero (this project's prediction, not the paper's)",
                text,
                {name: -1 if m.sign else 1 for name, m in signs.items()},
            )
            continue
        report.judged(
            "section 3.1",
            f"in a language model ({state}) the mean gradient of positive activations is positive",
            text,
            {name: m.sign for name, m in signs.items()},
        )
    report.table(
        "Gradient of the language-model loss for the activations of real models",
        [
            "model",
            "activation",
            "state",
            "share a > 0",
            "mean gradient where a > 0",
            "mean gradient along sign(a)",
            "layers with a positive mean",
        ],
        table,
        "Human text, save where the model's own is named. In units of the mean size of the "
        "gradient; 95 % bootstrap interval over texts (trained) or draws of the weights "
        f"(untrained); {sizes}. The theorem predicts positive values.",
    )
    with report.figure("models", "Mean gradient of positive activations, layer by layer") as figure:
        ax = figure.subplots()
        for state, models in found.items():
            for name, measured in models.items():
                layers = measured["positive"].mean(0)
                style = {"trained": "o-", OWN: "+:", "untrained": "x--"}[state]
                color = f"C{list(models).index(name)}"
                ax.plot(layers.tolist(), style, color=color, label=f"{name} {state}")
        ax.axhline(0, color="grey", linewidth=0.8)
        ax.set_xlabel("layer")
        ax.set_ylabel("mean gradient / mean size")
        ax.legend(fontsize=7)


def _short(m: Interval) -> str:
    return f"{m.mean:+.4f} [{m.low:+.4f}, {m.high:+.4f}]"
