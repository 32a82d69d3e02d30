"""Which neurons a model uses for which tokens: what several studies look at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..evaluation.statistics import top_mask
from ..models.families import MlpSite, record_inputs
from .setting import Setting, Subject

_ROWS = 8  # texts of one forward


def neuron_norms(subject: Subject, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """||n_i(x_t)|| of the dense model, float32 [layers, rows, length, f], for ids [rows, length].

    attention_mask: additive, [rows, 1, length, length], or None.
    """
    parts = []
    for start in range(0, len(ids), _ROWS):
        batch = slice(start, start + _ROWS)
        layers: list[Tensor] = [torch.empty(0)] * len(subject.sites)

        def keep(index: int, x: Tensor, layers: list[Tensor] = layers) -> None:
            layers[index] = norms_of(subject.sites[index], x)

        extra = mask_arguments(attention_mask, batch)
        with torch.no_grad(), record_inputs(subject.model, subject.sites, keep):
            subject.model(input_ids=ids[batch], use_cache=False, **extra)
        shape = (*ids[batch].shape, subject.sites[0].f)
        parts.append(torch.stack([layer.view(shape) for layer in layers]))
    return torch.cat(parts, 1)


def mask_arguments(mask: Tensor | None, rows: slice) -> dict[str, Any]:
    """A model's arguments for a 4-D mask, of which these rows are taken; nothing for None.

    Positions go along: some models (OPT) would count them off the mask.
    """
    if mask is None:
        return {}
    positions = torch.arange(mask.shape[-1], device=mask.device).unsqueeze(0)
    return {"attention_mask": mask[rows], "position_ids": positions.expand(len(mask[rows]), -1)}


def norms_of(site: MlpSite, x: Tensor) -> Tensor:
    """||n_i(x)|| = |a_i(x)| c_i of one MLP, float32 [..., f]."""
    return site.weights().norms(x)


def active(setting: Setting, subject: Subject, norms: Tensor) -> Tensor:
    """The neurons that TDA keeps at CETT 0.2: bool, as norms [layers, ...]."""
    epsilon = setting.thresholds(subject).epsilon
    return norms >= epsilon.view(-1, *[1] * (norms.dim() - 1))


def typical_size(setting: Setting, subject: Subject) -> int:
    """How many neurons of a layer CETT 0.2 keeps on average."""
    return max(1, round(setting.thresholds(subject).density * subject.sites[0].f))


def strongest(norms: Tensor, count: int) -> Tensor:
    """The `count` neurons of largest norm for each token, fewer where the rest is exactly zero."""
    return top_mask(norms, count) & (norms > 0)


def prompt_statistic(norms: Tensor) -> Tensor:
    """s_i = root mean square over the tokens, [..., length, f] -> [..., f]."""
    return norms.square().mean(-2).sqrt()
