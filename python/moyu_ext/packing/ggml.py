"""GGUF's quantised blocks as packed rows: the same codes, with scales as float16.

ggml's blocks of 32 weights (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0) hold code * d, (code - zero) * d or
code * d + m with float16 d and m, which a group of 32 columns holds exactly. Q4_K and Q5_K have 8
blocks of 32 under one d and one m with integer factors; their products are rounded to float16
(2^-11 of each at most).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import Codes

# By ggml's name: bits a code, and bytes and weights a block.
TYPES = {
    "Q4_0": (4, 18, 32),
    "Q4_1": (4, 20, 32),
    "Q5_0": (5, 22, 32),
    "Q5_1": (5, 24, 32),
    "Q8_0": (8, 34, 32),
    "Q4_K": (4, 144, 256),
    "Q5_K": (5, 176, 256),
}


def codes_of(kind: str, data: Tensor) -> Codes:
    """Codes of rows of blocks, uint8 [n, bytes], of a type in TYPES; groups of 32."""
    _, size, _ = TYPES[kind]
    n = data.shape[0]
    blocks = data.reshape(-1, size)
    codes, scale, offset = (_k if kind.endswith("K") else _plain)(kind, blocks)
    codes = codes.reshape(n, -1)
    padding = -codes.shape[1] % 64  # a row is made of blocks of 64
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    scales, offsets = (_padded(t.reshape(n, -1), padding // 32) for t in (scale, offset))
    return Codes(codes.contiguous(), scales.half(), offsets.half())


def _padded(t: Tensor, more: int) -> Tensor:
    return torch.nn.functional.pad(t, (0, more)) if more else t


def _half(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(data: Tensor) -> Tensor:
    """Bytes [n, k] -> their low, then their high halves, [n, 2 k]."""
    return torch.cat([data & 15, data >> 4], 1)


def _bits(data: Tensor) -> Tensor:
    """Bytes [n, 4] -> bit j of the little-endian word, [n, 32]."""
    place = torch.arange(8, dtype=torch.uint8)
    return (data.unsqueeze(-1) >> place & 1).reshape(len(data), -1)


def _plain(kind: str, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = _half(blocks, 0)
    if kind == "Q8_0":
        # int8 as a code from 0 on: 128 more, which is its top bit turned.
        return blocks[:, 2:] ^ 128, d, -128 * d
    if kind == "Q4_0":
        return _nibbles(blocks[:, 2:]), d, -8 * d
    if kind == "Q4_1":
        return _nibbles(blocks[:, 4:]), d, _half(blocks, 2)
    at = 2 if kind == "Q5_0" else 4
    codes = _nibbles(blocks[:, at + 4 :]) | _bits(blocks[:, at : at + 4]) << 4
    return codes, d, -16 * d if kind == "Q5_0" else _half(blocks, 2)


def _k(kind: str, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """8 blocks of 32: code * (d * s_j) - (m * t_j), s_j and t_j of 6 bits in 12 bytes."""
    low, high, top = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    s = torch.cat([low & 63, top & 15 | low >> 2 & 48], 1)
    t = torch.cat([high & 63, top >> 4 | high >> 2 & 48], 1)
    scale, offset = _half(blocks, 0) * s, -_half(blocks, 2) * t
    nibbles = blocks[:, -128:].reshape(-1, 4, 32)
    codes = torch.stack([nibbles & 15, nibbles >> 4], 2).reshape(-1, 256)
    if kind == "Q5_K":
        place = torch.arange(8, dtype=torch.uint8).view(8, 1)
        codes = codes | (blocks[:, None, 16:48] >> place & 1).reshape(-1, 256) << 4
    return codes, scale, offset
