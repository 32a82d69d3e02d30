"""Rounding the weights of an MLP to the few levels of a shadow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..models.weights import MlpWeights
from .pack import BLOCK, Codes, Shadow, blocks_of, check_bits, pack, record_bytes

# Step between levels for normally distributed weights of unit variance (Max 1960, table II), where
# the search for the step begins. 1 bit needs no search: the best step is twice the mean |w|.
_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352}
_REFITS = 2
# Elements worked on at once: few enough for a core's L2 cache, which makes building 3x faster than
# whole matrices do.
_CHUNK = 1 << 18


def build_shadow(weights: MlpWeights, bits_gate: int, bits_up: int) -> Shadow:
    """The shadow of one MLP; bits_gate is ignored where it is ungated.

    Raises ConfigurationError for bits outside 1..4.
    """
    bits_gate = bits_gate if weights.gated else 0
    for bits in (bits_gate, bits_up)[not weights.gated :]:
        check_bits(bits)
    width = record_bytes(weights.d, bits_gate, bits_up)
    data = torch.empty(weights.f, width, dtype=torch.uint8, device=weights.device)
    ops.use_huge_pages(data)
    rows = _rows(weights.d)
    for start in range(0, weights.f, rows):  # the codes of whole matrices would be four times data
        part = slice(start, start + rows)
        codes = quantise(weights.rows("gate", part), bits_gate) if weights.gated else None
        data[part] = pack(codes, quantise(weights.rows("up", part), bits_up), weights.d).data
    return Shadow(data, weights.d, bits_gate, bits_up)


def quantise(weight: Tensor, bits: int) -> Codes:
    """Codes and scales of a matrix [f, d], per row and block of 256 elements.

    The scale s and the codes c make sum_j (w_j - s l(c_j))^2 small, l(c) = c - (2^bits - 1) / 2:
    beginning with the best step for a normal distribution, codes and scale are fitted to each other
    by turns (Lloyd's method). Weights that are not finite count as 0.

    Raises ConfigurationError for bits outside 1..4.
    """
    check_bits(bits)
    f, d = weight.shape
    blocks = blocks_of(d)
    codes = torch.zeros(f, blocks * BLOCK, dtype=torch.uint8, device=weight.device)
    scales = torch.zeros(f, blocks, dtype=torch.bfloat16, device=weight.device)
    rows = _rows(d)
    for start in range(0, f, rows):
        part = weight[start : start + rows].float()
        part = F.pad(part.nan_to_num(0.0, 0.0, 0.0), (0, blocks * BLOCK - d))
        real = torch.arange(blocks * BLOCK, device=weight.device) < d
        level, scale = _fit(part.view(-1, blocks, BLOCK), bits, real.view(blocks, BLOCK))
        codes[start : start + rows] = level.to(torch.uint8).view(-1, blocks * BLOCK)
        scales[start : start + rows] = scale
    codes[:, d:] = 0
    return Codes(codes, scales, bits)


def _rows(d: int) -> int:
    return max(1, _CHUNK // (blocks_of(d) * BLOCK))


def _fit(w: Tensor, bits: int, real: Tensor) -> tuple[Tensor, Tensor]:
    """w [n, blocks, 256] -> codes as float32 of the same shape, and scales bfloat16 [n, blocks]."""
    count = real.sum(-1)
    if bits == 1:
        scale = (2 * w.abs().sum(-1) / count).bfloat16()
        return (w >= 0).float(), scale
    top = 2**bits - 1
    scale = _STEP[bits] * (w.square().sum(-1) / count).sqrt()
    for _ in range(_REFITS):
        level = _round(w, scale, top).sub_(top / 2).mul_(real)
        scale = (w * level).sum(-1) / level.square().sum(-1).clamp_min_(1e-30)
    rounded = scale.bfloat16()
    return _round(w, rounded.float(), top), rounded


def _round(w: Tensor, scale: Tensor, top: int) -> Tensor:
    """The code whose level lies nearest, as float32."""
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    # Level c - top/2 is nearest where w/scale + top/2 rounds to c.
    return (w * inverse.unsqueeze(-1)).add_(top / 2).round_().clamp_(0, top)
