"""One forward over all windows of text in which something else answers for the MLPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import PatchStateError, UnsupportedModelError
from ..packing.rows import native
from .families import MlpSite
from .text import Batch

# (layer, its inputs at the real tokens [tokens, d]) -> what the MLP puts out there [tokens, d]
Visit = Callable[[int, Tensor], Tensor]


class _Finished(Exception):
    """Leaves the model's forward behind the last MLP: the logits are not needed."""


def answer_mlps(model: nn.Module, sites: list[MlpSite], batch: Batch, visit: Visit) -> None:
    """Run the batch through the model; each MLP in turn answers with `visit`, padding with zeros.

    The forward ends behind the last MLP. The MLPs' forwards are replaced rather than hooked, so
    that nothing is computed for all tokens at once on [tokens, f]; they are put back on any exit.

    Raises UnsupportedModelError where the model does not run each MLP once, in order, on all
    tokens.
    """
    with _answered(sites, batch.real, visit):
        try:
            model(input_ids=batch.ids, attention_mask=batch.real.long(), use_cache=False)
        except _Finished:
            return
    raise UnsupportedModelError(
        f"a forward of {type(model).__name__} did not reach all of its {len(sites)} MLPs; it "
        "cannot be calibrated"
    )


@contextmanager
def _answered(sites: list[MlpSite], real: Tensor, visit: Visit) -> Iterator[None]:
    rows = real.flatten()
    visited = 0

    def answer(index: int, x: Tensor) -> Tensor:
        nonlocal visited
        if index != visited or x.numel() != rows.numel() * x.shape[-1]:
            raise UnsupportedModelError(
                f"{sites[index].name} ran out of order, or on {list(x.shape)} rather than on all "
                f"tokens [{', '.join(map(str, real.shape))}, d]; it cannot be calibrated"
            )
        visited += 1
        flat = x.reshape(-1, x.shape[-1])
        here = rows.to(x.device)
        out = torch.zeros_like(flat)
        out[here] = visit(index, flat[here])
        if visited == len(sites):
            raise _Finished
        return out.view(x.shape)

    def replace(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        replaced.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for site in sites:
            replace(site.entry, partial(answer, site.index))
            if site.family.inline:  # fc1 has answered for all three
                replace(site.linear(site.family.activation), lambda x: x)
                replace(site.linear(site.family.down), lambda x: x)
        yield
    finally:
        for module, forward in reversed(replaced):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


class _WideProduct(torch.autograd.Function):
    """x W^T + b in float32, rounded to x's dtype; with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        out = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad.float() @ ctx.weight.float()).to(grad.dtype), None, None


@contextmanager
def wide_products(model: nn.Module) -> Iterator[None]:
    """Within the block, linear layers of dtypes that this processor has no products for multiply in
    float32: torch's own take 3 times as long there, and 13 times backward (AVX2, bfloat16)."""
    # A patched MLP multiplies by itself, and refuses forwards of its parts' own.
    stand_ins = [m for m in model.modules() if getattr(m, "is_stand_in", False)]
    taken = {id(part) for stand_in in stand_ins for part in stand_in.modules()}
    slow = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and id(module) not in taken
        and not native(module.weight)
        and "forward" not in module.__dict__
    ]

    def product(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda x: _WideProduct.apply(x, layer.weight, layer.bias)

    try:
        for module in slow:
            module.__dict__["forward"] = product(module)
        yield
    finally:
        for module in slow:
            module.__dict__.pop("forward", None)


def require_plain(model: nn.Module, sites: Sequence[MlpSite]) -> None:
    """Raise PatchStateError for a patched model, or one in training mode."""
    if any(getattr(site.entry, "is_stand_in", False) for site in sites):
        raise PatchStateError("the model is patched; call moyu_ext.unpatch(model) first")
    if model.training:
        raise PatchStateError("the model is in training mode; call model.eval() first")
