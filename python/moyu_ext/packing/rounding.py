"""From weights to the codes of packed rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError
from .rows import BLOCK, Codes, Format, blocks_of, pack_rows

# Elements worked on at once: few enough for a core's L2 cache.
_CHUNK = 1 << 18
_LARGEST = 65504.0  # of float16


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ConfigurationError for weights that are not finite, or that float16 does not reach."""
    low, high = weight.aminmax()
    if not (float(high) <= _LARGEST and float(low) >= -_LARGEST):  # a NaN is neither
        raise ConfigurationError(
            f"{name}.weight reaches from {float(low):g} to {float(high):g}; packed weights must be "
            "finite and at most 65504 in size: look for NaN or infinities in the checkpoint"
        )


def grid(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The scale and offset, float16 [...], whose codes reach from a group's least to its largest
    weight; w [..., group]."""
    low, high = w.amin(-1), w.amax(-1)
    offset = low.half()
    # The offset's own rounding belongs to the range, or the largest weight was cut off.
    exact = (high - offset.float()).clamp_min_(0) / (2**bits - 1)
    scale = exact.half()
    # Up: 255 steps that are each a little short would cut the largest weight off.
    short = scale.float() < exact
    return (scale.view(torch.int16) + short).view(torch.float16), offset


def codes_of(w: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """The code whose value lies nearest to each weight, as float32; w [..., group]."""
    step = scale.float()
    inverse = torch.where(step > 0, 1 / step, torch.zeros_like(step)).unsqueeze(-1)
    return ((w - offset.float().unsqueeze(-1)) * inverse).round_().clamp_(0, 2**bits - 1)


def quantise(weight: Tensor, fmt: Format) -> Codes:
    """Codes of a matrix [n, d], each weight rounded to the nearest of its group's levels, which are
    spread evenly from its least to its largest weight.

    Weights must be finite, see `check_finite`.
    """
    n, d = weight.shape
    w = weight.detach().float()
    padding = blocks_of(d) * BLOCK - d
    # A repeated last column changes no group's range.
    w = F.pad(w.unsqueeze(0), (0, padding), mode="replicate").squeeze(0) if padding else w
    groups = w.view(n, -1, fmt.group)
    scale, offset = grid(groups, fmt.bits)
    codes = codes_of(groups, scale, offset, fmt.bits).to(torch.uint8).view(n, -1)
    return Codes(codes, scale, offset)


def pack_matrix(weight: Tensor, fmt: Format) -> Tensor:
    """Packed rows, uint8 [n, row_bytes], of a matrix [n, d]; as `quantise`."""
    n, d = weight.shape
    rows = torch.empty(n, fmt.row_bytes(d), dtype=torch.uint8, device=weight.device)
    step = max(1, _CHUNK // d)
    for start in range(0, n, step):
        part = slice(start, start + step)
        rows[part] = pack_rows(quantise(weight[part], fmt), fmt)
    return rows
