"""Thresholds on the inputs of the projections, as TEAL has them (arXiv 2408.14690): a masked
reference to compare quality with. It skips no work and is no method of `patch`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..models.families import MlpSite, find_mlps
from ..models.text import device

_SAMPLES = 1 << 20  # values of one projection's input that a quantile is taken of


def input_thresholds(model: Any, rows: Tensor, sparsity: float) -> list[list[float]]:
    """Per MLP and projection (gate, up, down) the |x| below which a share `sparsity` of the input's
    entries lies, on ids rows [n, length] read by the dense model."""
    sites = find_mlps(model)
    found: list[list[Tensor]] = [[] for _ in sites]

    def keep(index: int, place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            values = args[0].detach().abs().float().flatten()
            step = max(1, values.numel() // _SAMPLES)
            at = min(int(sparsity * len(values[::step])), len(values[::step]) - 1)
            found[index].append(values[::step].sort().values[at])

        return hook

    handles = [
        site.linear(name).register_forward_pre_hook(keep(site.index, place))
        for site in sites
        for place, name in enumerate(site.family.linears)
    ]
    try:
        with torch.no_grad():
            model(input_ids=rows.to(device(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [[value.item() for value in layer] for layer in found]


class Kept:
    """How much of the projections' inputs was kept at the governed positions."""

    def __init__(self) -> None:
        self.shares = 0.0
        self.projections = 0

    @property
    def density(self) -> float:
        """Mean share of kept entries over the projections. They have equally many weights, so this
        is the share of weights that is multiplied, as it is for methods that skip neurons."""
        return self.shares / self.projections if self.projections else float("nan")


@contextmanager
def masked_inputs(
    model: Any, thresholds: Sequence[Sequence[float]], context: int, length: int
) -> Iterator[Kept]:
    """Within the block, entries of the MLP projections' inputs up to their threshold are zero at
    positions >= context of every row of `length` tokens."""
    count = Kept()

    def mask(threshold: float) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            # OPT's projections get the rows of a batch behind each other.
            rows = x.view(-1, length, x.shape[-1])
            keep = rows.abs() > threshold  # a zero costs nothing, so it is never kept
            keep[:, :context] = True
            positions = keep[:, context:].numel() // keep.shape[-1]
            count.shares += keep[:, context:].sum().item() / keep.shape[-1]
            count.projections += positions
            return ((rows * keep).view(x.shape), *args[1:])

        return hook

    sites: list[MlpSite] = find_mlps(model)
    handles = [
        site.linear(name).register_forward_pre_hook(mask(layer[place]))
        for site, layer in zip(sites, thresholds, strict=True)
        for place, name in enumerate(site.family.linears)
    ]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()
