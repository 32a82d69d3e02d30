"""What `moyu demo` measures on one model: calibration, then every method against dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import embedded
from ..calibration.calibrate import calibrate
from ..calibration.cett import LayerTokens
from ..calibration.thresholds import Thresholds
from ..evaluation.agreement import agreement, choices, dense_text
from ..evaluation.perplexity import generation_perplexity
from ..methods import METHODS, SRIDA, STDA, TDA, Dense, Method
from ..models.families import find_mlps, record_inputs
from ..models.text import encode, write_own
from ..patching.patch import patch, report, unpatch

CETT = 0.2
DENSITY = 0.5  # of the methods that rank neurons by the prompt
PROMPT = "Once upon a time, there was a little girl named Lily. One day, she went to the"

Step = Callable[[str], None]
Calibrations = dict[str, Thresholds]


@dataclass(frozen=True)
class Size:
    """How much text a demo works on, in tokens: for calibration, per prompt, per story."""

    calibration: int = 2048
    context: int = 48
    story: int = 72


@dataclass
class Row:
    """One method on the held-out text.

    `density` is realised, `densities` the same per layer. `perplexity`: of the continuations, in
    the regime of generation; `increase` over dense. `agreement`: share of the dense model's greedy
    tokens that the method would choose too, given the same text so far (see `agreement`).
    """

    name: str
    target: str
    method: str
    density: float
    perplexity: float
    increase: float
    agreement: float
    densities: list[float]
    story: str


@dataclass
class ModelResult:
    """All that the demo has to say about one model.

    `curves`: per layer, thresholds and the mean CETT at each, on held-out text.
    """

    model: str
    activation: str
    parameters: int
    layers: int
    neurons: int
    heldout_tokens: int
    calibration: Calibrations
    rows: list[Row] = field(default_factory=list)
    curves: list[tuple[list[float], list[float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """A row to be: its name, its target, and how the method is made from the calibrations."""

    name: str
    target: str
    make: Callable[[Calibrations], Method]


def cases() -> list[Case]:
    """Dense, the methods that need no preparation, then the paper's others."""
    cett, density = f"CETT {CETT}", f"density {DENSITY}"
    return [
        Case("Dense", "-", lambda _: Dense()),
        *(
            case
            for name, kind in METHODS.items()
            if name not in ("lossless", "dense", "tda", "stda", "srida")
            for case in _without_preparation(name, kind)
        ),
        Case("TDA, product", cett, lambda t: TDA(t["tda, product"])),
        Case("TDA, gate", cett, lambda t: TDA(t["tda, gate"], score="gate")),
        Case("STDA", cett, lambda t: STDA(t["stda"])),
        Case("SRIDA, contribution", density, lambda _: SRIDA(DENSITY)),
        Case("SRIDA, griffin", density, lambda _: SRIDA(DENSITY, score="griffin")),
    ]


def _without_preparation(name: str, kind: type[Method]) -> list[Case]:
    try:
        method = kind()
    except TypeError:  # it wants something trained: a router, experts
        return []
    density = getattr(method, "density", None)
    target = f"density {density:g}" if isinstance(density, float) else "-"
    return [Case(name.upper(), target, lambda _: method)]


def count_steps() -> int:
    """How often `measure` calls its `step`."""
    return 6 + len(cases())


def measure(name: str, model: Any, tokenizer: Any, size: Size, step: Step) -> ModelResult:
    """Calibrate, then run every case on the held-out stories; `step` is told what begins."""
    sites = find_mlps(model)
    texts = [encode(tokenizer, story) for story in embedded.heldout()]
    length = min(map(len, texts))
    ids = torch.tensor([row[:length] for row in texts])
    scored = {"context": size.context, "continuation": length - size.context}
    step("the model writes its calibration text")
    rows = write_own(model, tokenizer, size.calibration, window=min(256, size.calibration), seed=0)
    written = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    result = ModelResult(
        model=name,
        activation=str(model.config.hidden_act),
        parameters=sum(p.numel() for p in model.parameters()),
        layers=len(sites),
        neurons=sites[0].f,
        heldout_tokens=len(texts) * scored["continuation"],
        calibration=_calibrate(model, tokenizer, written, size, step),
    )
    step("CETT against the threshold")
    result.curves = _curves(model, ids, result.calibration["tda, product"])
    step("the dense model")
    dense = generation_perplexity(model, ids, **scored).perplexity
    story = dense_text(model, ids[:, : size.context], size.story)
    dense_choices = choices(model, story, size.context)
    prompt = torch.tensor([encode(tokenizer, PROMPT)])
    for case in cases():
        step(case.name)
        method = case.make(result.calibration)
        patch(model, method)
        perplexity = generation_perplexity(model, ids, **scored).perplexity
        used = report(model)
        row = Row(
            name=case.name,
            target=case.target,
            method=repr(method),
            density=used.density,
            perplexity=perplexity,
            increase=perplexity / dense - 1,
            agreement=agreement(choices(model, story, size.context), dense_choices).mean().item(),
            densities=[layer.density for layer in used.layers],
            story=tokenizer.decode(_greedy(model, prompt, size.story)[0], True),
        )
        unpatch(model)
        result.rows.append(row)
    return result


def _calibrate(
    model: Any, tokenizer: Any, texts: list[str], size: Size, step: Step
) -> Calibrations:
    kinds: dict[str, dict[str, Any]] = {
        "tda, product": {"method": "tda"},
        "tda, gate": {"method": TDA(0.0, score="gate")},
        "stda": {"method": "stda", "on": "continuation"},
    }
    found = {}
    for name, settings in kinds.items():
        step(f"calibrate {name}, to CETT {CETT}")
        found[name] = calibrate(
            model,
            tokenizer,
            texts,
            cett=CETT,
            max_tokens=size.calibration,
            progress=False,
            **settings,
        )
    return found


def _greedy(model: Any, ids: Tensor, new: int) -> Tensor:
    """ids [rows, T] -> [rows, at most T + new]."""
    out: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new,
    )
    return out


def _curves(
    model: Any, ids: Tensor, thresholds: Thresholds, points: int = 25
) -> list[tuple[list[float], list[float]]]:
    """Mean CETT on ids [rows, T], the model dense, from 1/30 to 10 times each threshold."""
    sites = find_mlps(model)
    inputs: dict[int, Tensor] = {}

    def keep(index: int, x: Tensor) -> None:
        inputs[index] = x.reshape(-1, x.shape[-1])

    with torch.no_grad(), record_inputs(model, sites, keep):
        model(input_ids=ids[:4])
    curves = []
    for site in sites:
        chosen = max(thresholds.layers[site.index].epsilon, 1e-6)
        epsilons = [chosen * 10 ** (2.5 * k / (points - 1) - 1.5) for k in range(points)]
        ratios = LayerTokens(inputs[site.index], site.weights()).measure(epsilons)[0]
        curves.append((epsilons, ratios.double().mean(1).tolist()))
    return curves
