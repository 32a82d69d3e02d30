"""The bytes of packed rows, as csrc/moyu.h describes them.

A row of d columns is cut into blocks of 64 (the last one padded). A code c of b bits stands for
scale * c + offset, with one scale and one offset (float16) per group of 32 or 64 columns:

    [codes, 8 b bytes a block][scales][offsets]

and element 16 t + w of a block (t < 4, w < 16) lies in

    b = 4, 5, 6   bits 4t .. 4t+3 of little-endian word w of 32 bytes: the low four bits
    b = 8         byte t % 2 of word w of the 32 bytes from 32 (t / 2) on
    b = 3         bits 2t, 2t+1 of byte w of 16: the low two bits
    b = 6         behind them, bits 2t, 2t+1 of byte w of 16: the high two bits
    b = 3, 5      behind them, bit w of little-endian word t of 4: the top bit

so that a load, a shift and a mask give 16 neighbouring codes as 16-bit numbers. Rows of one d have
another length in each format: a tensor of rows tells its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..errors import ConfigurationError

BLOCK = 64
BITS = (3, 4, 5, 6, 8)
GROUPS = (32, 64)
# Rows whose codes are held unpacked at a time, in elements: what a CPU's caches hold, or what keeps
# a GPU busy.
_CHUNK, _CUDA_CHUNK = 1 << 22, 1 << 26


@dataclass(frozen=True)
class Format:
    """bits per code (3, 4, 5, 6 or 8) and columns per group (32 or 64).

    Raises ConfigurationError for anything else.
    """

    bits: int = 8
    group: int = 64

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise ConfigurationError(
                f"bits is {self.bits!r}; packed weights have 3, 4, 5, 6 or 8 bits"
            )
        if isinstance(self.group, bool) or self.group not in GROUPS:
            raise ConfigurationError(
                f"group is {self.group!r}; a scale of packed weights serves 32 or 64 columns"
            )

    def __str__(self) -> str:
        return f"{self.bits} bits in {self.group}"

    @property
    def bits_a_weight(self) -> float:
        """Scales and offsets included."""
        return self.bits + 32 / self.group

    def row_bytes(self, d: int) -> int:
        """Bytes of a row of d columns."""
        return blocks_of(d) * (8 * self.bits + 4 * BLOCK // self.group)


@dataclass(frozen=True, eq=False)
class Codes:
    """A matrix [n, d] in codes: codes uint8 [n, blocks * 64], scales and offsets float16
    [n, blocks * 64 / group]."""

    codes: Tensor
    scales: Tensor
    offsets: Tensor


def blocks_of(d: int) -> int:
    """Blocks per row."""
    return -(-d // BLOCK)


def format_of(rows: Tensor, d: int) -> Format:
    """The format of packed rows uint8 [n, row_bytes] with d columns.

    Raises ConfigurationError where no format has rows of this length.
    """
    for bits in BITS:
        for group in GROUPS:
            if Format(bits, group).row_bytes(d) == rows.shape[-1]:
                return Format(bits, group)
    raise ConfigurationError(
        f"packed rows of {rows.shape[-1]} bytes: no format has rows of this length for {d} columns"
    )


def pack_rows(codes: Codes, fmt: Format) -> Tensor:
    """uint8 [n, row_bytes] from codes, scales and offsets."""
    n, bits = codes.codes.shape[0], fmt.bits
    c = codes.codes.view(n, -1, 4, 16)  # block, t, w
    if bits == 8:  # words 0..15 hold t = 0 and 1, words 16..31 t = 2 and 3
        parts = [c.view(n, -1, 2, 2, 16).transpose(3, 4).flatten(2)]
    elif bits == 3:
        parts = [_pairs(c & 3), _tops(c >> 2)]
    else:
        low = c & 15
        words = torch.stack([low[:, :, 0] | low[:, :, 1] << 4, low[:, :, 2] | low[:, :, 3] << 4], 3)
        parts = [words.flatten(2)]
        if bits == 5:
            parts.append(_tops(c >> 4))
        if bits == 6:
            parts.append(_pairs(c >> 4))
    blocks = torch.cat(parts, 2).flatten(1)
    numbers = [t.contiguous().view(torch.uint8) for t in (codes.scales, codes.offsets)]
    return torch.cat([blocks, *numbers], 1)


def unpack_codes(rows: Tensor, d: int) -> Codes:
    """The inverse of `pack_rows`."""
    fmt = format_of(rows, d)
    n, bits, blocks = rows.shape[0], fmt.bits, blocks_of(d)
    end = blocks * 8 * bits
    numbers = rows[:, end:].contiguous().view(torch.float16)
    scales, offsets = numbers.chunk(2, 1)
    data = rows[:, :end].reshape(n, blocks, 8 * bits)
    if bits == 8:
        c = data.view(n, blocks, 2, 16, 2).transpose(3, 4).reshape(n, blocks, 4, 16)
    elif bits == 3:
        c = _from_pairs(data[:, :, :16]) | _from_tops(data[:, :, 16:]) << 2
    else:
        words = data[:, :, :32].reshape(n, blocks, 16, 2)
        nibbles = torch.stack([words & 15, words >> 4], 4)  # w, byte, nibble
        c = nibbles.flatten(3).permute(0, 1, 3, 2)
        if bits == 5:
            c = c | _from_tops(data[:, :, 32:]) << 4
        if bits == 6:
            c = c | _from_pairs(data[:, :, 32:]) << 4
    return Codes(c.reshape(n, -1), scales.contiguous(), offsets.contiguous())


def unpack_rows(rows: Tensor, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Packed rows as a matrix [n, d] of dtype (float32, float16, bfloat16)."""
    out = torch.empty(rows.shape[0], d, dtype=dtype, device=rows.device)
    ops.unpack_rows(rows, out)
    return out


def native(x: Tensor) -> bool:
    """Whether torch multiplies matrices of x's dtype, where x is, by instructions made for that."""
    return not x.is_cpu or _native_on_cpu(x.dtype)


@cache
def _native_on_cpu(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this dtype on this CPU by instructions of its own.

    Where it does not (no AVX-512), bfloat16 takes 3 to 5 times as long as float32, and 200 times
    where one of the two is transposed (torch 2.13, Zen 3)."""
    tests = {
        torch.bfloat16: "_is_mkldnn_bf16_device_supported",
        torch.float16: "_is_mkldnn_fp16_device_supported",
    }
    if dtype not in tests:
        return True
    test = getattr(torch.ops.mkldnn, tests[dtype], None)
    return bool(test is not None and test())


def linear(x: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias for packed rows of W [n, d]: x [..., d] -> [..., n] in x's dtype.

    Up to ops.MAX_ROWS rows of x by the operator, more by matmuls with blocks of unpacked rows.
    """
    d, n = x.shape[-1], rows.shape[0]
    bias = None if bias is None else bias.to(x.dtype)
    if 0 < x.numel() <= ops.MAX_ROWS * d:
        return ops.gather_gemv(x.contiguous(), rows, None, None, bias).to(x.dtype)
    out = x.new_empty(*x.shape[:-1], n)
    wide = x if native(x) else x.float()
    step = _rows_at_once(x, d)
    for start in range(0, n, step):
        part = slice(start, start + step)
        some = F.linear(wide, unpack_rows(rows[part], d, wide.dtype))
        out[..., part] = some if bias is None else some + bias[part]
    return out


def linear_t(a: Tensor, rows: Tensor, d: int, bias: Tensor | None = None) -> Tensor:
    """a W + bias for packed rows of W [f, d]: a [..., f] -> [..., d] in a's dtype."""
    if 0 < a.numel() <= ops.MAX_ROWS * a.shape[-1]:
        out = ops.gather_gemv_t(a.float().contiguous(), rows, None, None, None, d)
        return (out if bias is None else out + bias.float()).to(a.dtype)
    flat = a.reshape(-1, a.shape[-1])
    flat = flat if native(flat) else flat.float()
    out = torch.zeros(flat.shape[0], d, device=a.device, dtype=torch.float32)
    step = _rows_at_once(a, d)
    for start in range(0, flat.shape[1], step):
        part = slice(start, start + step)
        w = unpack_rows(rows[part], d, flat.dtype)
        if flat.dtype == torch.float32:
            out.addmm_(flat[:, part], w)
        else:
            out += flat[:, part] @ w
    out = out if bias is None else out + bias.float()
    return out.to(a.dtype).view(*a.shape[:-1], d)


def _rows_at_once(x: Tensor, d: int) -> int:
    return max(1, (_CHUNK if x.is_cpu else _CUDA_CHUNK) // d)


def _pairs(c: Tensor) -> Tensor:
    """Two bits of each element [n, blocks, 4, 16] -> bytes [n, blocks, 16]."""
    return c[:, :, 0] | c[:, :, 1] << 2 | c[:, :, 2] << 4 | c[:, :, 3] << 6


def _from_pairs(data: Tensor) -> Tensor:
    return torch.stack([data >> 2 * t & 3 for t in range(4)], 2)


def _tops(c: Tensor) -> Tensor:
    """One bit of each element [n, blocks, 4, 16] -> bytes [n, blocks, 8]."""
    place = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=c.device)
    return (c.reshape(*c.shape[:2], 8, 8) * place).sum(-1, dtype=torch.uint8)


def _from_tops(data: Tensor) -> Tensor:
    place = torch.arange(8, dtype=torch.uint8, device=data.device)
    return (data.unsqueeze(-1) >> place & 1).view(*data.shape[:2], 4, 16)
