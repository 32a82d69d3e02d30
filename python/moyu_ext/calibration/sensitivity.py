"""What an error in one MLP's output costs, for all MLPs from one forward and one backward.

With g the gradient of the summed loss, of labels drawn from the model, at an MLP's output for one
token, an error e of that output costs half of E[(g . e)^2] nats of KL to second order: labels drawn
from the model make the second moment of g the Fisher information (Amari 1998, eq. 3). Errors of
different tokens and layers are taken as uncorrelated, so their costs add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.families import MlpSite
from ..models.forward import wide_products
from ..models.text import device

# Tokens whose graph is held at once: 2 MB each for a model of 135M parameters, 5 MB at 1.1B.
_TOKENS = 768


@dataclass
class LayerSamples:
    """One layer over the rows of text: inputs x [tokens, d], of all tokens, and of those behind
    the context (`governed`, bool [tokens]) the gradient g [governed tokens, d] of the loss."""

    x: Tensor
    g: Tensor
    governed: Tensor


def sample_layers(
    model: nn.Module,
    sites: Sequence[MlpSite],
    rows: Tensor,
    context: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LayerSamples]:
    """Inputs and gradients of each MLP over rows [n, length], in the dtype of the activations.

    Columns before `context` are the prompt; the loss is that of the tokens behind them, and its
    labels are drawn from the model. The parameters get no gradient.
    """
    inputs: list[list[Tensor]] = [[] for _ in sites]
    gradients: list[list[Tensor]] = [[] for _ in sites]
    generator = torch.Generator(device(model)).manual_seed(seed)
    parts = rows.split(max(1, _TOKENS // rows.shape[1]))
    for done, part in enumerate(parts):
        progress(done, len(parts))
        with wide_products(model), _outputs(model, sites) as seen, torch.enable_grad():
            logits = model(input_ids=part.to(device(model)), use_cache=False).logits
            logits = logits[:, context - 1 : -1].flatten(0, 1).float()
            with torch.no_grad():
                # Gumbel's trick: far cheaper than a draw from a cumulative sum.
                noise = torch.empty_like(logits).uniform_(generator=generator)
                labels = (logits - noise.log_().neg_().log_()).argmax(-1)
                del noise
            loss = F.cross_entropy(logits, labels, reduction="sum")
            del logits
            grads = torch.autograd.grad(loss, [out for _, out in seen])
        for index, ((x, _), grad) in enumerate(zip(seen, grads, strict=True)):
            d = x.shape[-1]  # some layers flatten x
            inputs[index].append(x.reshape(-1, d))
            grad = grad.reshape(*part.shape, d)[:, context:]
            gradients[index].append(grad.reshape(-1, d))
    governed = (torch.arange(rows.shape[1]) >= context).repeat(len(rows)).to(device(model))
    return [
        LayerSamples(torch.cat(x), torch.cat(g), governed)
        for x, g in zip(inputs, gradients, strict=True)
    ]


@contextmanager
def _outputs(model: Any, sites: Sequence[MlpSite]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(input, output) of each MLP in the forward within, the outputs with a gradient."""
    inputs: dict[int, Tensor] = {}
    seen: list[tuple[Tensor, Tensor]] = []

    def start(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out.detach().requires_grad_()  # so that there is a graph, but none of parameters

    def note(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[index] = args[0].detach()

        return hook

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            seen.append((inputs[index], out))

        return hook

    handles = [model.get_input_embeddings().register_forward_hook(start)]
    for site in sites:
        handles.append(site.entry.register_forward_pre_hook(note(site.index)))
        down = site.linear(site.family.down)
        handles.append(down.register_forward_hook(keep(site.index)))
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield seen
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)
        for handle in handles:
            handle.remove()
