"""What a router trained on one history does for another (section 3.2.1), offline and online.

For each domain a router (RODA's, trained off the loop) learns which neurons CETT 0.2 keeps, and
serves every domain. All routers name the same number of neurons, twice as many as CETT 0.2 keeps
on average, so that recall and perplexity compare. Beside them: a router that went on learning from
a little of the new text ("online"), one trained on that text's domain, and a fixed set, those most
active in the router's training domain.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.train_router import train_router
from ..evaluation.agreement import compare, continuation_logits
from ..evaluation.statistics import bootstrap, covered, sign_at, sign_flip_p, top_mask
from ..methods.roda import RODA
from ..models.families import record_inputs
from ..routers.router import QUANTILES, LayerRouter, Router
from .activity import norms_of, prompt_statistic, typical_size
from .report import Report
from .setting import Setting, Subject

HEADROOM = 2  # neurons a router names, relative to those that CETT 0.2 keeps
SAME = 0.25  # density at which models of any activation are compared
MEASURES = {
    "recall": "each names twice as many neurons as are active",
    "recall at 25 %": "all name 25 % of the neurons",
}
WAYS = ("own history", "other history", "online", "fixed set of the other")
_STEPS = 40  # of the online router, over the whole stream
_RATE = 0.01


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the MLPs were given while a text was read, [tokens, d] per layer, and what they did:
    ||n_i|| [layers, tokens, f] and the neurons that CETT 0.2 keeps, bool."""

    inputs: list[Tensor]
    norms: Tensor
    active: Tensor


def read(setting: Setting, subject: Subject, rows: Tensor) -> Reading:
    """The dense model on rows [n, length]."""
    inputs: list[Tensor] = [torch.empty(0)] * len(subject.sites)

    def keep(index: int, x: Tensor) -> None:
        inputs[index] = x.detach().reshape(-1, x.shape[-1])

    with torch.no_grad(), record_inputs(subject.model, subject.sites, keep):
        subject.model(input_ids=rows, use_cache=False)
    norms = torch.stack([norms_of(s, x) for s, x in zip(subject.sites, inputs, strict=True)])
    epsilon = setting.thresholds(subject).epsilon.view(-1, 1, 1)
    return Reading(inputs, norms, norms >= epsilon)


def recall(router: Router, text: Reading, count: int) -> Tensor:
    """Share of the active neurons among the `count` that score highest, float64 [layers]."""
    found = []
    for layer, x, active in zip(router.layers, text.inputs, text.active, strict=True):
        found.append(_share(active, top_mask(layer.scores(x), count)))
    return torch.stack(found)


def _share(active: Tensor, chosen: Tensor) -> Tensor:
    """Of all active neurons [tokens, f], the share that was chosen."""
    hits = (active & chosen).sum().double()
    return hits / active.sum().clamp_min(1)


def online(router: Router, stream: Reading, steps: int = _STEPS, seed: int = 0) -> Router:
    """The router after it went on learning from a text that the dense model read: W_2 and b by
    the logistic loss, active neurons weighing as much as the others. Thresholds follow."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for layer, x, active in zip(router.layers, stream.inputs, stream.active, strict=True):
        share = active.double().mean().clamp(1e-6, 0.5)
        hidden = (x @ layer.first.t()).detach()
        second = layer.second.clone().requires_grad_()
        bias = layer.bias.clone().requires_grad_()
        optimiser = torch.optim.Adam([second, bias], lr=_RATE * second.abs().mean().item())
        with torch.enable_grad():
            for _ in range(steps):
                at = torch.randint(len(x), (min(256, len(x)),), generator=generator)
                labels = active[at].float()
                weight = 1 + labels * (((1 - share) / share).item() - 1)
                scores = hidden[at] @ second.t() + bias
                loss = F.binary_cross_entropy_with_logits(scores, labels, weight)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        layers.append(_requantiled(layer, second.detach(), bias.detach(), x))
    return dataclasses.replace(router, layers=tuple(layers))


def _requantiled(layer: LayerRouter, second: Tensor, bias: Tensor, x: Tensor) -> LayerRouter:
    moved = dataclasses.replace(layer, second=second, bias=bias)
    scores = moved.scores(x).flatten().sort().values
    places = torch.linspace(0, len(scores) - 1, QUANTILES, dtype=torch.float64).round().long()
    return dataclasses.replace(moved, quantiles=scores[places])


def routers(setting: Setting, report: Report, domains: list[str]) -> None:
    """The second part of the `history` study."""
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for subject in setting.subjects():
        found[subject.name] = _of_model(setting, report, subject, domains)
    _report(setting, report, found, domains)


def _of_model(
    setting: Setting, report: Report, subject: Subject, domains: list[str]
) -> dict[str, dict[str, Tensor]]:
    """Per way: recall and rise of loss, [pairs of domains] (layers meaned)."""
    count, length = setting.size(16, 4), setting.size(128, 32)
    context = length // 2
    thresholds = setting.thresholds(subject)
    f = subject.sites[0].f
    size = min(f, HEADROOM * typical_size(setting, subject))
    trained: dict[str, Router] = {}
    streams: dict[str, Reading] = {}
    tests: dict[str, Reading] = {}
    rows: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for domain in domains:
        setting.log(f"router of {subject.name} on {domain}")
        trained[domain] = train_router(
            subject.model,
            subject.tokenizer,
            setting.documents(domain, train=True),
            rank=max(1, subject.sites[0].d // 4),
            max_tokens=setting.size(8192, 512),
            epochs=setting.size(4, 1),
            thresholds=thresholds,
            progress=False,
            seed=setting.seed,
        )
        ids = setting.rows(subject, length, 2 * count, domain)
        rows[domain] = ids[count:]
        streams[domain] = read(setting, subject, ids[:count])
        tests[domain] = read(setting, subject, ids[count:])
        dense[domain] = continuation_logits(subject.model, rows[domain], context)
    grid = {name: torch.zeros(len(domains), len(domains)) for name in ("recall", "loss rise")}
    values: dict[str, dict[str, list[Any]]] = {
        way: {"recall": [], "recall at 25 %": [], "loss rise": [], "density": []} for way in WAYS
    }
    own: dict[str, tuple[Tensor, Tensor]] = {}

    def measure(way: str, router: Router, served: str) -> tuple[Tensor, Tensor]:
        share = recall(router, tests[served], size)
        ours = compare(subject.model, RODA(router, size / f), rows[served], context, dense[served])
        rise = ours.loss - ours.dense_loss
        values[way]["recall"].append(share)
        values[way]["recall at 25 %"].append(recall(router, tests[served], round(SAME * f)))
        values[way]["loss rise"].append(rise.mean())
        values[way]["density"].append(torch.tensor(ours.density))
        return share.mean(), rise.mean()

    for place, domain in enumerate(domains):
        own[domain] = measure("own history", trained[domain], domain)
        grid["recall"][place, place], grid["loss rise"][place, place] = own[domain]
    for (i, a), (j, b) in itertools.permutations(enumerate(domains), 2):
        grid["recall"][i, j], grid["loss rise"][i, j] = measure("other history", trained[a], b)
        measure("online", online(trained[a], streams[b], seed=setting.seed), b)
        for key, named in (("recall", size), ("recall at 25 %", round(SAME * f))):
            fixed = top_mask(prompt_statistic(streams[a].norms), named)  # [layers, f]
            shares = covered(tests[b].active, fixed.unsqueeze(1).expand_as(tests[b].active))
            values["fixed set of the other"][key].append(shares.mean(1))
    report.numbers[subject.name]["routers"] = {
        "trained on (row), serves (column)": domains,
        "recall": grid["recall"],
        "loss rise": grid["loss rise"],
        "neurons named": size / f,
        "neurons active": {d: tests[d].active.double().mean().item() for d in domains},
    }
    return {
        way: {name: torch.stack(list(map(torch.as_tensor, v))) for name, v in columns.items() if v}
        for way, columns in values.items()
    }


def _report(
    setting: Setting,
    report: Report,
    found: dict[str, dict[str, dict[str, Tensor]]],
    domains: list[str],
) -> None:
    table = []
    for model, ways in found.items():
        numbers = report.numbers[model]["routers"]
        for way, columns in ways.items():
            share = vars(bootstrap(columns["recall"].mean(1), setting.seed))
            numbers[way] = {"recall": share}
            same = vars(bootstrap(columns["recall at 25 %"].mean(1), setting.seed))
            numbers[way]["recall at 25 %"] = same
            cells = [_text(same), "-", "-"]
            if "loss rise" in columns:
                rise = vars(bootstrap(columns["loss rise"], setting.seed))
                numbers[way]["loss rise"] = rise
                numbers[way]["density"] = columns["density"].mean().item()
                grown = torch.tensor(rise["mean"]).expm1().item()
                cells = [_text(same), f"{grown:+.1%}", f"{numbers[way]['density']:.3f}"]
            named = f"{numbers['neurons named']:.3f}"
            table.append([model, way, named, _text(share), *cells])
    report.table(
        "Routers on the history they were trained on, and on another",
        [
            "model",
            "router",
            "neurons named",
            "recall",
            "recall if 25 % are named",
            "change of perplexity",
            "realised density",
        ],
        table,
        f"Domains: {', '.join(domains)}. Recall: of the neurons that CETT 0.2 keeps, among "
        f"{HEADROOM} times as many, mean over tokens and layers with 95 % bootstrap interval over "
        "pairs of domains. Perplexity of continuations under RODA at that density (its thresholds "
        "come from the text it was trained on). online: the other history's router after "
        f"{_STEPS} steps on 16 texts of the served domain. fixed set: no router.",
    )
    with report.figure("routers", "Recall: trained on (row), serves (column)", 10, 3.6) as figure:
        axes = figure.subplots(1, len(found), squeeze=False)[0]
        for ax, model in zip(axes, found, strict=True):
            grid = report.numbers[model]["routers"]["recall"]
            image = ax.imshow(grid.numpy(), vmin=0, vmax=1, cmap="viridis")
            for i, j in itertools.product(range(len(domains)), repeat=2):
                color = "black" if grid[i, j] > 0.6 else "white"
                ax.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", color=color)
            ax.set_xticks(range(len(domains)), domains, fontsize=7)
            ax.set_yticks(range(len(domains)), domains, fontsize=7)
            ax.set_xlabel("serves")
            ax.set_title(f"{model} ({report.models[model]['activation']})", fontsize=9)
        axes[0].set_ylabel("trained on")
        figure.colorbar(image, ax=axes.tolist(), shrink=0.8)
    _claims(setting, report, found)


def _claims(
    setting: Setting, report: Report, found: dict[str, dict[str, dict[str, Tensor]]]
) -> None:
    numbers = {model: report.numbers[model]["routers"] for model in found}

    def both(way: str) -> str:
        return "; ".join(
            f"{m} recall {n[way]['recall']['mean']:.2f}, loss {n[way]['loss rise']['mean']:+.3f}"
            for m, n in numbers.items()
        )

    relu = [m for m in found if report.models[m]["activation"].startswith("relu")]
    rest = [m for m in found if m not in relu]
    gain: dict[str, dict[str, Tensor]] = {}  # measure -> model -> over the fixed set, per pair
    lost: dict[str, dict[str, Tensor]] = {}
    for key in MEASURES:
        gain[key], lost[key] = {}, {}
        for model, ways in found.items():
            own = ways["own history"][key].mean(1)
            # In `permutations` order: served domain j of pair (i, j).
            own = own[[j for i, j in itertools.permutations(range(len(own)), 2)]]
            gain[key][model] = own - ways["fixed set of the other"][key].mean(1)
            lost[key][model] = own - ways["other history"][key].mean(1)

    def against(values: dict[str, dict[str, Tensor]], side: int) -> tuple[str, dict[str, int]]:
        """ReLU less others (side 1) or the reverse (-1), paired by domains: in words, signs."""
        texts, signs = [], {}
        for key, words in MEASURES.items():
            groups = [
                torch.stack([values[key][m] for m in group]).mean(0) for group in (relu, rest)
            ]
            gap = side * (groups[0] - groups[1])
            p = sign_flip_p(gap, setting.seed)
            signs[words] = sign_at(gap.mean().item(), p)
            each = ", ".join(f"{m} {v.mean():.3f}" for m, v in values[key].items())
            texts.append(f"{each}, difference {gap.mean():+.3f} (p = {p:.2g}) if {words}")
        return "; ".join(texts), signs

    for claim, what, values, side in (
        (
            "an offline router finds the active neurons of ReLU models better than of others",
            "recall over that of a fixed set: ",
            gain,
            1,
        ),
        (
            "another history is what keeps RODA from other activations: it costs more than with "
            "ReLU",
            "loss of recall: ",
            lost,
            -1,
        ),
    ):
        if relu and rest:
            text, signs = against(values, side)
            report.judged("section 3.2.1", claim, what + text, signs, where="")
        else:
            missing = "a ReLU model and one with another activation have to be studied together"
            text = ", ".join(f"{m} {v.mean():.3f}" for m, v in values["recall"].items())
            report.claim("section 3.2.1", claim, what + text, "open", missing)
    report.judged(
        "section 3.2.1",
        "a router trained on one history serves another worse",
        "loss of recall: "
        + "; ".join(f"{m} {_p(gap, setting.seed)}" for m, gap in lost["recall"].items())
        + ". Own history: " + both("own history") + ". Other history: " + both("other history"),
        {m: bootstrap(gap, setting.seed).sign for m, gap in lost["recall"].items()},
    )  # fmt: skip
    repaired = {
        m: (ways["online"]["recall"] - ways["other history"]["recall"]).mean(1)
        for m, ways in found.items()
    }
    report.judged(
        "section 1 (RIDA adjusts in real time)",
        "a router that goes on learning from the running text regains recall",
        "gain of recall: "
        + "; ".join(f"{m} {_p(gap, setting.seed)}" for m, gap in repaired.items())
        + ". Online: " + both("online"),
        {m: bootstrap(gap, setting.seed).sign for m, gap in repaired.items()},
    )  # fmt: skip


def _p(gap: Tensor, seed: int) -> str:
    return f"{_text(vars(bootstrap(gap, seed)))} (p = {sign_flip_p(gap, seed):.2g})"


def _text(m: dict[str, float]) -> str:
    return f"{m['mean']:.3f} [{m['low']:.3f}, {m['high']:.3f}]"
