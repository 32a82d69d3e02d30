"""Random weights, quickly: one block of normal numbers, repeated over everything.

The block's length is a prime and each tensor goes on where the last one stopped, so that no two
rows of any matrix are equal: a kernel that reads the wrong one gives the wrong result.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..models.weights import MlpWeights, Packed
from ..packing.rounding import pack_matrix
from ..packing.rows import Format
from ..shadow.build import build_shadow
from ..shadow.pack import Shadow
from .geometries import Geometry

_BLOCK = 4194301  # the largest prime below 2^22


class Filler:
    """Fills tensors of one dtype and device with N(0, deviation^2)."""

    def __init__(
        self, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._normal = torch.randn(_BLOCK, generator=generator).to(device)
        self._dtype = dtype
        self._blocks: dict[float, Tensor] = {}
        self._start = 0

    def fill(self, tensor: Tensor, deviation: float) -> Tensor:
        """Fill a contiguous tensor in place and return it."""
        if deviation not in self._blocks:
            self._blocks[deviation] = (self._normal * deviation).to(self._dtype)
        block = self._blocks[deviation]
        flat = tensor.view(-1)
        done = 0
        while done < flat.numel():
            piece = block[self._start : self._start + flat.numel() - done]
            flat[done : done + piece.numel()].copy_(piece)
            done += piece.numel()
            self._start = (self._start + piece.numel()) % _BLOCK
        return tensor

    def draw(self, *shape: int, deviation: float) -> Tensor:
        """A new tensor of this shape."""
        empty = torch.empty(shape, dtype=self._dtype, device=self._normal.device)
        return self.fill(empty, deviation)


@dataclass(frozen=True)
class MlpLayer:
    """One MLP as the operators take it (down_t [f, d], or packed rows), and as torch's dense MLP
    does: plain, W_down as models store it."""

    weights: MlpWeights
    plain: MlpWeights
    down: Tensor  # [d, f]
    shadows: dict[int, Shadow] = field(default_factory=dict)

    def shadow(self, bits: int) -> Shadow:
        """The shadow of this many bits, built at the first call."""
        if bits not in self.shadows:
            gate_bits = bits if self.weights.gated else 0
            self.shadows[bits] = build_shadow(self.weights, gate_bits, bits)
        return self.shadows[bits]


def mlp_layer(geometry: Geometry, filler: Filler, fmt: Format | None = None) -> MlpLayer:
    """A random MLP: outputs of order 1 for inputs of order 1; the operators' in packed rows if
    there is a format."""
    d, f = geometry.d, geometry.f
    inner, outer = d**-0.5, f**-0.5
    down = filler.draw(d, f, deviation=outer)
    biased = geometry.biased
    weights = MlpWeights(
        gate=filler.draw(f, d, deviation=inner) if geometry.gated else None,
        up=filler.draw(f, d, deviation=inner),
        down_t=down.t().contiguous(),
        gate_bias=filler.draw(f, deviation=0.1) if biased and geometry.gated else None,
        up_bias=filler.draw(f, deviation=0.1) if biased else None,
        down_bias=filler.draw(d, deviation=0.1) if biased else None,
        activation=geometry.activation,
    )
    plain = weights
    if fmt is not None:
        rows: dict[str, Any] = {
            name: pack_matrix(getattr(plain, name), fmt)
            for name in ("gate", "up", "down_t")
            if getattr(plain, name) is not None
        }
        weights = replace(plain, packed=Packed(d, plain.dtype), **rows)
    for weight in (weights.gate, weights.up, weights.down_t):
        if weight is not None:
            ops.use_huge_pages(weight)  # as in a patched model
    return MlpLayer(weights, plain, down)
