"""Methods that reach a wanted density on a model with random weights, without calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..methods import METHODS, STDA, TDA, Dense
from ..methods.base import Method, check_count, check_density
from ..models.families import find_mlps, record_inputs

MakeMethod = Callable[[nn.Module], Method]
"""Makes a method for an unpatched model."""


def method_at(name: str, density: float, tokens: int = 32) -> MakeMethod:
    """The method of this name such that about `density` of the neurons are active.

    Names: those of `METHODS`, and "tda-gate" for TDA with the gate score. Threshold methods get
    each layer's quantile on `tokens` random tokens; for STDA as many as the prompt will have, since
    a statistic over more tokens spreads less. Raises ConfigurationError for an unknown name, a
    density outside (0, 1] or no tokens.
    """
    check_density(density)
    check_count("tokens", tokens)
    if name == "dense":
        return lambda model: Dense()
    if name in ("tda", "tda-gate"):
        score = "gate" if name == "tda-gate" else "product"
        return lambda model: TDA(_quantiles(model, density, score, tokens), score=score)
    if name == "stda":
        return lambda model: STDA(_quantiles(model, density, "rms", tokens))
    known = ["dense", "tda", "tda-gate", "stda", *(n for n, m in METHODS.items() if _ranks(m))]
    if name in known:
        make = partial(METHODS[name], **{"density": density})
        return lambda model: make()
    raise ConfigurationError(f"method is {name!r}; expected one of {', '.join(known)}")


def _ranks(kind: type[Method]) -> bool:
    """Whether a density is all that the method needs: nothing trained, nothing calibrated."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    required = any(field.default is dataclasses.MISSING for field in fields)
    return not required and any(field.name == "density" for field in fields)


def _quantiles(model: nn.Module, density: float, score: str, tokens: int) -> list[float]:
    """Per layer, the threshold that `density` of the scores reach on random tokens."""
    sites = find_mlps(model)
    found = [0.0] * len(sites)

    def look(index: int, x: Tensor) -> None:
        w = sites[index].weights().to_float32()
        gate, product = w.activations(x.reshape(-1, w.d).float())
        a = (gate if score == "gate" else product).abs()
        if score != "gate":
            a = a * w.column_norms()
        if score == "rms":
            a = a.square().mean(0).sqrt()
        place = round((1 - density) * (a.numel() - 1))
        found[index] = 0.0 if density >= 1 else float(a.flatten().kthvalue(place + 1).values)

    table: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    positions: int = model.config.max_position_embeddings  # type: ignore[union-attr, assignment]
    length = min(tokens, positions)
    ids = torch.randint(3, table.shape[0], (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), record_inputs(model, sites, look):
        model(input_ids=ids.to(table.device), use_cache=False)
    return found
