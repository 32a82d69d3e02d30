"""The bytes of a shadow: a record per neuron, its codes in the order in which kernels unpack them.

A row of W is cut into blocks of 256 elements (the last one padded with zeros). An element of b bits
is a code c in [0, 2^b) that stands for scale * (c - (2^b - 1) / 2), with one bfloat16 scale per
block. A record is

    [gate blocks][up blocks][gate scales][up scales][zeros up to a multiple of 64 bytes]

without the gate's parts where the MLP is ungated. A block of b bits takes 32 b bytes:

    b = 2, 3   64 bytes; bits 2t, 2t+1 of byte p: the low two bits of element 64 t + p
    b = 1, 3   then 32 bytes; bit t + 4h of byte p: the top bit of element 64 t + 32 h + p
    b = 4      128 bytes; nibble t of byte 64 h + p: element 128 h + 64 t + p

so that one 64-byte load, a shift and a mask give the codes of 64 neighbouring elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError

BLOCK = 256
BITS = (1, 2, 3, 4)
_ALIGNMENT = 64  # one cache line, and one AVX-512 register


@dataclass(frozen=True, eq=False)
class Codes:
    """One quantised matrix [f, d]: codes uint8 [f, blocks * 256], scales bfloat16 [f, blocks]."""

    codes: Tensor
    scales: Tensor
    bits: int


@dataclass(frozen=True, eq=False, repr=False)
class Shadow:
    """The shadow of one MLP: data uint8 [f, record bytes], for hidden size d.

    bits_gate is 0 where the MLP is ungated. costs: float32 [3, f] or None, what an error in an
    activation costs (the root of nats per unit squared), and the root mean square errors of g^ and
    u^ (of u^ twice where the MLP is ungated): for tiers by price.
    """

    data: Tensor
    d: int
    bits_gate: int
    bits_up: int
    costs: Tensor | None = None

    def __repr__(self) -> str:
        f = self.data.shape[0]
        return f"Shadow(<f {f}, d {self.d}>, bits_gate={self.bits_gate}, bits_up={self.bits_up})"

    @property
    def nbytes(self) -> int:
        """Bytes that a token reads of it."""
        return self.data.nbytes + (0 if self.costs is None else self.costs.nbytes)

    @property
    def gated(self) -> bool:
        """Whether it has a gate's part."""
        return self.bits_gate > 0


def blocks_of(d: int) -> int:
    """Blocks per row."""
    return -(-d // BLOCK)


def record_bytes(d: int, bits_gate: int, bits_up: int) -> int:
    """Bytes of one neuron's record; bits_gate is 0 where the MLP is ungated."""
    matrices = 2 if bits_gate else 1
    content = blocks_of(d) * (BLOCK // 8 * (bits_gate + bits_up) + 2 * matrices)
    return -(-content // _ALIGNMENT) * _ALIGNMENT


def check_bits(bits: object) -> None:
    """Raise ConfigurationError unless bits is 1, 2, 3 or 4."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise ConfigurationError(f"bits is {bits!r}; expected 1, 2, 3 or 4 per weight of a shadow")


def pair_of(bits: object) -> tuple[int, int]:
    """(gate, up) of 1..4 for both, or of a pair. Raises ConfigurationError for anything else."""
    pair = bits if isinstance(bits, (tuple, list)) else (bits, bits)
    if len(pair) != 2:
        raise ConfigurationError(
            f"bits is {bits!r}; expected 1..4, a pair (gate, up), or a list with one of these per "
            "layer"
        )
    for value in pair:
        check_bits(value)
    return pair[0], pair[1]


def pack(gate: Codes | None, up: Codes, d: int) -> Shadow:
    """The shadow of an MLP with hidden size d from its quantised matrices."""
    parts = [m for m in (gate, up) if m is not None]
    f = up.codes.shape[0]
    bits_gate = 0 if gate is None else gate.bits
    content = [_pack_codes(m.codes, m.bits) for m in parts]
    content += [m.scales.contiguous().view(torch.uint8) for m in parts]
    data = torch.zeros(
        f, record_bytes(d, bits_gate, up.bits), dtype=torch.uint8, device=up.codes.device
    )
    torch.cat(content, 1, out=data[:, : sum(part.shape[1] for part in content)])
    return Shadow(data, d, bits_gate, up.bits)


def unpack(shadow: Shadow) -> tuple[Codes | None, Codes]:
    """(gate or None, up): the inverse of `pack`."""
    blocks = blocks_of(shadow.d)
    widths = [bits for bits in (shadow.bits_gate, shadow.bits_up) if bits]
    start = 0
    codes, scales = [], []
    for bits in widths:
        end = start + blocks * BLOCK // 8 * bits
        codes.append(_unpack_codes(shadow.data[:, start:end], bits))
        start = end
    for _ in widths:
        end = start + 2 * blocks
        scales.append(shadow.data[:, start:end].contiguous().view(torch.bfloat16))
        start = end
    matrices = [Codes(*m) for m in zip(codes, scales, widths, strict=True)]
    return (matrices[0] if shadow.gated else None), matrices[-1]


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [f, blocks * 256] -> uint8 [f, blocks * 32 * bits]."""
    f = codes.shape[0]
    parts = []
    if bits == 4:
        pairs = codes.view(f, -1, 2, 2, 64)
        parts.append((pairs[..., 0, :] | pairs[..., 1, :] << 4).flatten(2))
    if bits in (2, 3):
        low = (codes & 3).view(f, -1, 4, 64)
        parts.append(low[:, :, 0] | low[:, :, 1] << 2 | low[:, :, 2] << 4 | low[:, :, 3] << 6)
    if bits in (1, 3):
        top = (codes >> (bits - 1)).view(f, -1, 4, 2, 32)
        byte = torch.zeros_like(top[:, :, 0, 0])
        for t in range(4):
            for h in range(2):
                byte |= top[:, :, t, h] << (t + 4 * h)
        parts.append(byte)
    return torch.cat(parts, 2).view(f, -1)


def _unpack_codes(data: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack_codes`."""
    f = data.shape[0]
    lines = data.reshape(f, -1, BLOCK // 8 * bits)
    if bits == 4:
        both = lines.view(f, -1, 2, 64)
        return torch.stack([both & 15, both >> 4], 3).view(f, -1)
    codes = torch.zeros(f, lines.shape[1], 4, 64, dtype=torch.uint8, device=data.device)
    if bits in (2, 3):
        for t in range(4):
            codes[:, :, t] = lines[..., :64] >> (2 * t) & 3
    if bits in (1, 3):
        halves = codes.view(f, -1, 4, 2, 32)
        for t in range(4):
            for h in range(2):
                halves[:, :, t, h] |= (lines[..., -32:] >> (t + 4 * h) & 1) << (bits - 1)
    return codes.view(f, -1)
