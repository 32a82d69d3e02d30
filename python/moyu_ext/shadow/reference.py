"""What the shadow operators compute, in plain PyTorch: slow, obviously right, the tests' oracle.

Estimate of neuron i for an input row x: x is rounded to int8 per block b of 256 elements,
sx_b = max|x_b| / 127, xq = round(x_b / sx_b); with W^ the shadow's weights and x^ = sx_b xq,

    g^ = W^_gate x^ + gate_bias,  u^ = W^_up x^ + up_bias,
    a^_i = act(g^_i) u^_i,  n^_i = |a^_i| c_i

(a^_i = act(u^_i) where the MLP is ungated), c_i = ||W_down[:, i]||_2. Kernels add up xq * code in
integers; float32 sums here differ from that by their own rounding only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import ACTIVATIONS, masked_mlp
from .pack import BLOCK, Codes, Shadow, blocks_of, unpack

_ROWS = 1024  # neurons whose weights are unpacked to float32 at once


def round_input(x: Tensor) -> Tensor:
    """x^ of x [rows, d]: rounded to 127 steps per block of 256 on each side of 0, float32."""
    rows, d = x.shape
    padded = F.pad(x.float(), (0, blocks_of(d) * BLOCK - d)).view(rows, -1, BLOCK)
    step = padded.abs().amax(-1, keepdim=True) / 127
    # Where x is not finite, 0 * step is NaN: the estimate is NaN too, and so counts as active.
    whole = torch.where((step > 0) & step.isfinite(), padded / step, torch.zeros_like(padded))
    return (whole.round() * step).view(rows, -1)[:, :d]


def dequantise(matrix: Codes) -> Tensor:
    """W^ of a quantised matrix: float32 [f, blocks * 256]. Columns past d are not 0."""
    level = matrix.codes.float() - (2**matrix.bits - 1) / 2
    f, blocks = matrix.scales.shape
    return (level.view(f, blocks, BLOCK) * matrix.scales.float().unsqueeze(-1)).view(f, -1)


def projections(
    x: Tensor,
    shadow: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    gated: bool,
    bits_gate: int,
    bits_up: int,
) -> tuple[Tensor | None, Tensor]:
    """g^ (None where the MLP is ungated) and u^ of all neurons, float32 [rows, f] each.

    x: [rows, d]; shadow: uint8 [f, record bytes]; bits_gate is ignored where gated is False.
    """
    d = x.shape[1]
    rounded = round_input(x)
    found: list[list[Tensor]] = [[], []]
    for start in range(0, len(shadow), _ROWS):
        rows = slice(start, start + _ROWS)
        pair = unpack(Shadow(shadow[rows], d, bits_gate if gated else 0, bits_up))
        for matrix, bias, values in zip(pair, (gate_bias, up_bias), found, strict=True):
            if matrix is not None:
                value = rounded @ dequantise(matrix)[:, :d].t()
                values.append(value if bias is None else value + bias[rows].float())
    gate, up = (torch.cat(values, 1) if values else None for values in found)
    assert up is not None
    return gate, up


def product(gate: Tensor | None, up: Tensor, activation: str) -> Tensor:
    """a^ of g^ and u^, as `projections` gives them."""
    act = ACTIVATIONS[activation]
    return act(up) if gate is None else act(gate) * up


def shadow_scores(x: Tensor, shadow: Tensor, norms: Tensor, *how: Any) -> Tensor:
    """n^ of all neurons, float32 [rows, f]; norms: c, float32 [f]; `how`: what `projections` takes
    behind the shadow, and the activation."""
    return product(*projections(x, shadow, *how[:-1]), how[-1]).abs_() * norms


def choose(scores: Tensor, epsilon: Tensor | None, k: int) -> Tensor:
    """Active, bool [rows, f]: not below epsilon [1], or the k largest (ties: lower index)."""
    if epsilon is not None:
        return torch.logical_not(scores < epsilon)
    if not 0 < k < scores.shape[-1]:
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    # Selecting takes a tenth of sorting, but which of equals stays only sorting tells.
    active = torch.logical_not(scores < scores.topk(k, sorted=False).values.amin(-1, keepdim=True))
    unclear = active.sum(-1) != k
    if bool(unclear.any()):
        order = torch.sort(scores[unclear], dim=-1, descending=True, stable=True).indices
        chosen = torch.zeros_like(scores[unclear], dtype=torch.bool)
        active[unclear] = chosen.scatter_(-1, order[:, :k], True)
    return active


def tiers(scores: Tensor, k: int, estimated: int) -> tuple[Tensor, Tensor]:
    """The k largest scores and the next `estimated` largest, bool [rows, f] each."""
    exact = choose(scores, None, k)
    return exact, choose(scores, None, k + estimated) & ~exact


def expected_gains(
    gate: Tensor | None, up: Tensor, activation: str, norms: Tensor, errors: Tensor
) -> tuple[Tensor, Tensor]:
    """What neuron i adds to the output has the squared size s, and the squared error e where it is
    estimated, float32 [rows, f] each. With g^, u^ as `projections` gives them, c = norms [f], and
    their root mean square errors dg, du (errors [2, f]):

        s = (a^ c)^2,  e = (D^2 (u^2 + du^2) + (act(g^) du)^2) c^2,
        D = (act(g^ + dg) - act(g^ - dg)) / 2

    (ungated: e = (D c)^2 with u^ and du in the place of g^ and dg).
    """
    act = ACTIVATIONS[activation]
    h, error = (up, errors[1]) if gate is None else (gate, errors[0])
    slope = (act(h + error) - act(h - error)) / 2
    size, lost = act(h).square(), slope.square()
    if gate is not None:
        wide = errors[1].square()
        lost = lost * (up.square() + wide) + size * wide
        size = size * up.square()
    return size * norms.square(), lost * norms.square()


def tiers_by_price(
    size: Tensor, lost: Tensor, price: Tensor | float, gated: bool
) -> tuple[Tensor, Tensor]:
    """Exact and estimated neurons, bool [rows, f] each, by what a row of weights has to save.

    Estimating saves `size` for one row, computing `lost` more for two more (ungated: one): each is
    done where every row saves at least the price.
    """
    more = 2 if gated else 1
    skipped = (size < price) & (size + lost < (1 + more) * price)
    estimated = (size >= price) & (lost < more * price)
    return ~(skipped | estimated), estimated  # a NaN is exact


def shadow_mlp(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    shadow: Tensor,
    norms: Tensor,
    inverse: Tensor | None,
    errors: Tensor | None,
    epsilon: Tensor | None,
    k: int,
    estimated: int,
    bits_gate: int,
    bits_up: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The MLP in the tiers that the shadow chooses: out [rows, d], and how many neurons are exact
    and estimated, int32 [2, rows].

    By price where there are errors (epsilon is the price), by threshold where there is epsilon
    alone, else by rank: the k largest, and the `estimated` behind them. The activation of an
    estimated neuron is its score, with its sign, times inverse [f] (1 / c).
    """
    g, u = projections(x, shadow, gate_bias, up_bias, gate is not None, bits_gate, bits_up)
    signed = product(g, u, activation) * norms
    if errors is not None:
        assert epsilon is not None
        gains = expected_gains(g, u, activation, norms, errors)
        exact, rest = tiers_by_price(*gains, epsilon, g is not None)
    elif epsilon is not None:
        exact = choose(signed.abs(), epsilon, k)
        rest = torch.zeros_like(exact)
    else:
        exact, rest = tiers(signed.abs(), k, estimated)
    out = masked_mlp(x, gate, up, down_t, gate_bias, up_bias, down_bias, exact, activation)
    if inverse is not None:
        values = torch.where(rest, signed * inverse, torch.zeros_like(signed))
        out = out + values.to(out.dtype) @ down_t.to(out.dtype)
    counts = torch.stack([exact.sum(-1), rest.sum(-1)]).to(torch.int32)
    return out.to(x.dtype), counts
