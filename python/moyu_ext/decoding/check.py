"""Whether the compiled step computes what a decoder's own forward does, tried out layer by layer.

The decoder's own forward runs on random tokens, with something else in the place of each MLP. Every
layer of the step then gets what the decoder's layer got, so that no rounding adds up.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .. import ops
from .._load import _C
from ..models.cache import NAMES, cache_of
from ..models.decoder import Arguments
from .compiled import DTYPES, attention_dict, norm_tuple
from .places import first_places
from .room import extend, make_room
from .stack import NotTaken, Rotations, Stack

_PROMPT, _PIECES = 5, (1, 3)  # tokens of two sequences


class _Probe(nn.Module):
    """Stands in for an MLP: keeps what it gets, gives always the same."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Row by row a row of its own."""
        self.seen.append(x.detach().clone())
        rows = x.reshape(-1, x.shape[-1]).shape[0]
        return self.out[:rows].view(x.shape)


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def check_stack(stack: Stack, mlps: Sequence[Any], original: Callable[..., Any]) -> Any:
    """An output of the decoder's own forward; NotTaken where the step would compute something else.

    mlps: of each layer, as they are now; original: the decoder's forward.
    """
    generator = torch.Generator().manual_seed(0)
    count = _PROMPT + sum(_PIECES)
    vocabulary = stack.decoder.embed_tokens.num_embeddings
    ids = torch.randint(vocabulary, (2, count), generator=generator)
    shape = (ops.MAX_ROWS * 2, stack.d)
    probes = [
        _Probe(torch.randn(shape, generator=generator).to(stack.dtype)).eval() for _ in mlps
    ]  # fmt: skip
    known = Arguments(stack.decoder)
    with _in_place(stack, mlps, probes), _recorded(stack) as (inputs, outputs):
        cache: Any = cache_of(original(input_ids=ids[:, :_PROMPT], use_cache=True))
        if not isinstance(cache, DynamicCache):
            raise NotTaken("it makes a cache of another kind")
        own = copy.deepcopy(cache)
        at = _PROMPT
        for length in _PIECES:
            for kept in (inputs, outputs, *(probe.seen for probe in probes)):
                kept.clear()
            past = {name: cache for name in NAMES if known.knows(name)}
            out = original(input_ids=ids[:, at : at + length], use_cache=True, **past)
            embedded = stack.embed(ids[:, at : at + length], None)
            _compare("its embedding", embedded, inputs[0], stack.dtype)
            for i, (x, mlp_x, y) in enumerate(_steps(stack, own, inputs, probes, at, length)):
                where = f"its layer {i}"
                _compare(where, mlp_x, probes[i].seen[0], stack.dtype)
                _compare(where, y, outputs[i], stack.dtype)
                del x
            last = _normed(stack, outputs[-1])
            _compare("its last norm", last, out.last_hidden_state, stack.dtype)
            at += length
    return out


def _steps(
    stack: Stack, cache: Any, inputs: list[Tensor], probes: list[_Probe], past: int, length: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per layer its input, and by the step its MLP's input and its output."""
    rotations = Rotations(stack.decoder, stack.kinds).at(
        inputs[0], torch.arange(past, past + length).unsqueeze(0)
    )
    rows = 2 * length
    for spec, layer, x, probe in zip(stack.layers, cache.layers, inputs, probes, strict=True):
        a = spec.attention
        held, places = make_room(layer, length, stack.dtype, (2, a.kv_heads, a.head_dim))
        first = first_places(None, 2, length, past, held, stack.windows[spec.kind])
        cos, sin = rotations[spec.kind]
        kind = (held, first, cos.data_ptr(), sin.data_ptr(), cos.shape[-1], 0)
        step = _C.DecodeStep(DTYPES[stack.dtype], stack.d, norm_tuple(None))
        around = {"before": norm_tuple(spec.before_mlp), "after": norm_tuple(spec.after_mlp)}
        step.add_layer(attention_dict(spec), {"plan": "outside", **around})
        step.set_cache(0, places.keys, places.values, places.sequence_stride, places.head_stride)
        y, mlp_x = (torch.empty(rows, stack.d, dtype=stack.dtype) for _ in range(2))
        x = x.contiguous()
        kinds = [kind] * len(stack.kinds)
        step.start(x.data_ptr(), y.data_ptr(), mlp_x.data_ptr(), rows, length, kinds, True)
        step.resume(probe.out.data_ptr())
        extend(layer, length)
        yield x, mlp_x, y


def _normed(stack: Stack, x: Tensor) -> Tensor:
    step = _C.DecodeStep(DTYPES[stack.dtype], stack.d, norm_tuple(stack.last))
    x = x.contiguous()
    out = torch.empty_like(x)
    rows = x.numel() // stack.d
    step.start(x.data_ptr(), out.data_ptr(), 0, rows, rows, [], True)
    return out


def _compare(where: str, got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """NotTaken where rows differ by more than the rounding of a layer's few steps."""
    allowed = max(8 * torch.finfo(dtype).eps, 2e-5)
    a, b = (t.float().reshape(-1, t.shape[-1]) for t in (got, want))
    error = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)
    if not bool((error <= allowed).all()):
        raise NotTaken(f"{where} computes something else (relative error {error.max():.1e})")


@contextmanager
def _in_place(stack: Stack, mlps: Sequence[Any], probes: list[_Probe]) -> Iterator[None]:
    """Within the block, probes in the place of the MLPs."""
    put = []
    try:
        for spec, mlp, probe in zip(stack.layers, mlps, probes, strict=True):
            (name,) = [name for name, child in spec.layer._modules.items() if child is mlp]
            put.append((spec.layer._modules, name, mlp))
            spec.layer._modules[name] = probe
        yield
    finally:
        for children, name, mlp in put:
            children[name] = mlp


@contextmanager
def _recorded(stack: Stack) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Within the block, collects what each layer gets and gives."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def get(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    def give(_: nn.Module, args: Any, out: Any) -> None:
        outputs.append(out[0] if isinstance(out, tuple) else out)

    handles = []
    for spec in stack.layers:
        handles.append(spec.layer.register_forward_pre_hook(get, with_kwargs=True))
        handles.append(spec.layer.register_forward_hook(give))
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()
