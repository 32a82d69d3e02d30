"""Hooks on a model's MLPs, patched or not: how long they take, and what goes in and comes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import TokenRule
from ..models.families import MlpSite
from ..patching.projections import Projection
from ..patching.sparse_mlp import SparseMLP

Hook = Callable[..., None]
ROWS = 4  # of a forward whose results are kept


@dataclass(frozen=True)
class Seen:
    """x and out [rows, d], the first ROWS rows of one MLP's forward; active: bool [rows, f]."""

    site: MlpSite
    x: Tensor
    out: Tensor
    active: Tensor


@contextmanager
def clock(parts: list[tuple[nn.Module, nn.Module]]) -> Iterator[list[float]]:
    """Within the block, collects the seconds from each (first, last) module's begin to its end."""
    seconds: list[float] = []
    began = 0.0

    def begin(*_: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def end(*_: Any) -> None:
        seconds.append(time.perf_counter() - began)

    with _hooked([(part, (begin, end)) for part in parts]):
        yield seconds


def mlp_clock(sites: list[MlpSite]) -> AbstractContextManager[list[float]]:
    """Within the block, collects the seconds that each MLP of each forward takes."""
    return clock([_ends(site) for site in sites])


@contextmanager
def recorded(sites: list[MlpSite], governed: bool) -> Iterator[list[Seen]]:
    """Within the block, collects what each MLP of each forward got, gave and used.

    governed: whether a patched model's tokens obey its method in these forwards; all neurons are
    in use where they do not.
    """
    found: list[Seen] = []

    def pair(site: MlpSite) -> tuple[Hook, Hook]:
        kept: list[tuple[Tensor, Tensor]] = []

        def begin(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, site.d)[:ROWS].clone()
            kept.append((x, active_neurons(site, x, governed)))

        def end(_: nn.Module, __: Any, out: Tensor) -> None:
            x, active = kept.pop()
            found.append(Seen(site, x, out.reshape(-1, site.d)[:ROWS].clone(), active))

        return begin, end

    with _hooked([(_ends(site), pair(site)) for site in sites]):
        yield found


@contextmanager
def products(model: nn.Module) -> Iterator[list[tuple[str, Projection, Tensor, Tensor]]]:
    """Within the block, collects (name, layer, x [rows, k], out [rows, n]) of each product that a
    `Projection` computes, of the first ROWS rows."""
    found: list[tuple[str, Projection, Tensor, Tensor]] = []

    def hook_for(name: str) -> Callable[..., None]:
        def end(layer: Projection, args: tuple[Tensor, ...], out: Tensor) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])[:ROWS].clone()
            found.append((name, layer, x, out.reshape(-1, out.shape[-1])[:ROWS].clone()))

        return end

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, Projection)]
    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in linears]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def active_neurons(site: MlpSite, x: Tensor, governed: bool = True) -> Tensor:
    """Which neurons the MLP uses for x [rows, d] in the forward that is under way: [rows, f].

    As the rule chooses from x, or from the sequence's set.
    """
    mlp = site.entry
    if not governed or not isinstance(mlp, SparseMLP):
        return torch.ones(x.shape[0], site.f, dtype=torch.bool, device=x.device)
    if not isinstance(mlp.rule, TokenRule):
        current = mlp.context.current
        assert current is not None and current.state is not None
        return current.state.layers[mlp.slot].mask.bool().clone()
    return mlp.rule.chosen(x, site.weights())


@contextmanager
def _hooked(
    parts: list[tuple[tuple[nn.Module, nn.Module], tuple[Hook, Hook]]],
) -> Iterator[None]:
    """((first, last), (begin, end)): what to call where a part begins and where it ends."""
    handles = []
    for (first, last), (begin, end) in parts:
        handles += [first.register_forward_pre_hook(begin), last.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ends(site: MlpSite) -> tuple[nn.Module, nn.Module]:
    # An MLP spread over its layer (OPT) begins at the first projection, ends at the last.
    return site.entry, site.linear(site.family.down) if site.family.inline else site.entry
