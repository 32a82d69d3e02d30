"""Reads a decoder's layers as the compiled step wants them.

A decoder is taken where its class is one of `DECODERS`, whose forwards have one shape:

    x = embedding(ids) [* embedding_multiplier]
    h = [before](x)
    x = x + residual_multiplier * [after](o(attention([norm](q(h)), [norm](k(h)), v(h))))
    x = x + residual_multiplier * [after](mlp([before](x)))
    last norm

with rotary embeddings of the first part of a head, and where `check` finds that its own forward
computes the same.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.families import DTYPES
from ..packing.layer import PackedLinear
from ..packing.rows import format_of

DECODERS = frozenset(
    (
        "GemmaModel",
        "Gemma2Model",
        "Gemma3TextModel",
        "GraniteModel",
        "LlamaModel",
        "MinistralModel",
        "MistralModel",
        "Olmo2Model",
        "Olmo3Model",
        "Qwen2Model",
        "Qwen3Model",
        "SmolLM3Model",
    )
)
LAYER_TYPES = ("full_attention", "sliding_attention")
# Names of the norms around (attention, MLP): before and behind each.
_NORMS = (
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
     "post_feedforward_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    ("input_layernorm", None, "post_attention_layernorm", None),
)  # fmt: skip


class NotTaken(Exception):
    """Why the compiled step does not take a decoder, in a few words."""


@dataclass(frozen=True)
class Norm:
    """x / sqrt(mean(x^2) + eps) * (weight + offset); offset 0 or 1."""

    weight: Tensor
    eps: float
    offset: float


@dataclass(frozen=True)
class Projection:
    """A linear layer: weight T [n, d] or packed rows; bits and group are 0 for plain weights."""

    weight: Tensor
    bits: int
    group: int
    bias: Tensor | None
    n: int


@dataclass(frozen=True)
class AttentionSpec:
    """One layer's attention, see `Attention` in csrc/moyu.h."""

    q: Projection
    k: Projection
    v: Projection
    o: Projection
    before: Norm | None
    after: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    wide_norms: bool
    rotary: bool
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer. kind: the index of its layer type among the stack's."""

    layer: nn.Module
    attention: AttentionSpec
    before_mlp: Norm | None
    after_mlp: Norm | None
    residual_scale: float
    kind: int


@dataclass(frozen=True)
class Stack:
    """A decoder as the compiled step runs it. kinds: its layer types; windows: how many tokens each
    of them sees (0: all)."""

    decoder: Any
    layers: tuple[LayerSpec, ...]
    last: Norm
    kinds: tuple[str, ...]
    windows: tuple[int, ...]
    dtype: torch.dtype
    d: int

    def embed(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """Inputs of the first layer, [batch, n, d]."""
        x: Tensor = self.decoder.embed_tokens(ids) if embeds is None else embeds
        multiplier = getattr(self.decoder, "embedding_multiplier", None)
        return x if multiplier is None else x * multiplier


# Ways to scale rotary embeddings that look at a position alone, not at the length of the text.
_FIXED = {"default", "linear", "llama3", "yarn"}
_AHEAD = 64


class Rotations:
    """cos and sin of a decoder's positions, by its own module, some positions ahead."""

    def __init__(self, decoder: Any, kinds: Sequence[str]) -> None:
        self.rotary, self.kinds = decoder.rotary_emb, kinds
        types = getattr(self.rotary, "rope_type", None)
        types = types.values() if isinstance(types, dict) else [types]
        self.fixed = set(types) <= _FIXED
        self.by_type = "layer_type" in inspect.signature(type(self.rotary).forward).parameters
        self.first = 0
        self.table: list[tuple[Tensor, Tensor]] = []

    def at(self, x: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per kind, float32 [1 or batch, n, rotated]; x: the layers' input, for its dtype."""
        if not self.fixed or positions.dim() != 2:
            return self._compute(x, positions)
        wanted = positions.tolist()
        low, high = min(map(min, wanted)), max(map(max, wanted))
        if high - low >= _AHEAD:
            return self._compute(x, positions)
        if not self.table or low < self.first or high >= self.first + _AHEAD:
            self.first = low
            self.table = self._compute(x, torch.arange(low, low + _AHEAD).unsqueeze(0))
        if len(wanted) == 1 and high - low + 1 == len(wanted[0]):
            part = slice(low - self.first, high - self.first + 1)
            return [(cos[:, part], sin[:, part]) for cos, sin in self.table]
        index = positions - self.first
        return [(cos[0, index], sin[0, index]) for cos, sin in self.table]

    def _compute(self, x: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        found = []
        for kind in self.kinds if self.by_type else self.kinds[:1]:
            more = (kind,) if self.by_type else ()
            found.append(tuple(t.float().contiguous() for t in self.rotary(x, positions, *more)))
        return found if self.by_type else found * len(self.kinds)


def read_stack(decoder: Any, layers: Sequence[nn.Module]) -> Stack:
    """The decoder whose layers these are; NotTaken where it is none that the step can run."""
    name = type(decoder).__name__
    if name not in DECODERS or not type(decoder).__module__.startswith("transformers."):
        raise NotTaken(f"{name} is not a decoder that the compiled step knows")
    own = getattr(decoder, "layers", ())
    if list(own) != list(layers) or len(own) != decoder.config.num_hidden_layers:
        raise NotTaken("not all of its layers are known")
    config = decoder.config
    implementation = config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise NotTaken(f"attention by {implementation!r}")
    if getattr(config, "use_bidirectional_attention", False):
        raise NotTaken("attention in both directions")
    types = list(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not types:
        types = [LAYER_TYPES[window is not None]] * len(layers)
    if odd := set(types) - set(LAYER_TYPES):
        raise NotTaken(f"layers of {', '.join(sorted(odd))}")
    kinds = tuple(sorted(set(types)))
    if LAYER_TYPES[1] in kinds and not isinstance(window, int):
        raise NotTaken("a sliding window of no size")
    dtype = decoder.embed_tokens.weight.dtype
    if dtype not in DTYPES or not decoder.embed_tokens.weight.is_cpu:
        raise NotTaken("weights that are not on the CPU, or of another dtype")
    specs = tuple(
        _layer(layer, kinds.index(kind), dtype) for layer, kind in zip(layers, types, strict=True)
    )
    last = norm_of(decoder.norm, dtype)
    windows = tuple(int(window or 0) if kind == LAYER_TYPES[1] else 0 for kind in kinds)
    return Stack(decoder, specs, last, kinds, windows, dtype, last.weight.shape[0])


def _layer(layer: Any, kind: int, dtype: torch.dtype) -> LayerSpec:
    names = next(
        (names for names in _NORMS if all(n is None or hasattr(layer, n) for n in names)), None
    )
    attention = getattr(layer, "self_attn", None)
    if names is None or attention is None:
        raise NotTaken(f"{type(layer).__name__} has other parts")
    norms = [None if n is None else norm_of(getattr(layer, n), dtype) for n in names]
    q, k, v, o = (
        projection_of(getattr(attention, f"{n}_proj", None), dtype) for n in ("q", "k", "v", "o")
    )
    size = attention.head_dim
    q_norm, k_norm = (
        None if module is None else norm_of(module, dtype)
        for module in (getattr(attention, f"{n}_norm", None) for n in ("q", "k"))
    )
    wide = q_norm is not None and q_norm.weight.shape[0] != size
    spec = AttentionSpec(
        q, k, v, o, norms[0], norms[1], q_norm, k_norm, wide,
        rotary=bool(getattr(attention, "use_rope", True)),
        heads=q.n // size, kv_heads=k.n // size, head_dim=size, scale=float(attention.scaling),
        softcap=float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
    )  # fmt: skip
    scale = float(getattr(layer, "residual_multiplier", 1.0))
    return LayerSpec(layer, spec, norms[2], norms[3], scale, kind)


def norm_of(module: Any, dtype: torch.dtype) -> Norm:
    """An RMS norm, told by what it computes; NotTaken for anything else."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dtype != dtype or not isinstance(eps, float):
        raise NotTaken(f"a norm of class {type(module).__name__}")
    weight = weight.detach()
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(2, weight.shape[0], generator=generator)
    with torch.no_grad():
        # In float32: beside large weights half precision does not see an offset of one.
        got = copy.deepcopy(module).float().forward(x)
        plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        for offset in (0.0, 1.0):
            want = plain * (weight.float() + offset)
            if (got - want).norm() <= 1e-5 * want.norm():
                return Norm(weight, eps, offset)
    raise NotTaken(f"a norm of class {type(module).__name__}")


def projection_of(module: Any, dtype: torch.dtype) -> Projection:
    """A linear layer, plain, packed or behind the stand-in of one; NotTaken for anything else."""
    layer = module if type(module) in (nn.Linear, PackedLinear) else _behind(module)
    if type(layer) is PackedLinear and not layer.transposed and layer.dtype == dtype:
        fmt = format_of(layer.weight, layer.in_features)
        return Projection(
            layer.weight.detach(), fmt.bits, fmt.group, layer.bias, layer.out_features
        )
    if type(layer) is nn.Linear and type(module.weight) in (nn.Parameter, Tensor):
        weight = module.weight.detach()  # of a stand-in: its own, which the layer shares
        if weight.dtype == dtype and weight.is_contiguous() and weight.is_cpu:
            return Projection(weight, 0, 0, module.bias, weight.shape[0])
    raise NotTaken(f"a projection of class {type(module).__name__}")


def _behind(module: Any) -> Any:
    return module.original if getattr(module, "is_stand_in", False) else None
