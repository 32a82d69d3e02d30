"""What packed rows mean, in plain PyTorch: the oracle of the kernels' tests."""

from __future__ import annotations

from torch import Tensor

from .rows import Codes, unpack_codes


def dequantise(codes: Codes, d: int) -> Tensor:
    """scale * code + offset, float32 [n, d]."""
    n, groups = codes.scales.shape
    c = codes.codes.view(n, groups, -1).float()
    values = c * codes.scales.float().unsqueeze(-1) + codes.offsets.float().unsqueeze(-1)
    return values.view(n, -1)[:, :d]


def unpack_rows(packed: Tensor, out: Tensor) -> None:
    """out [n, d] = the values of packed rows, uint8 [n, row_bytes]."""
    out.copy_(dequantise(unpack_codes(packed, out.shape[1]), out.shape[1]))
