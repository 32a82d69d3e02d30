"""What the shadow operators compute, in plain PyTorch: slow, obviously right, the tests' oracle.

Estimate of neuron i for an input row x: x is rounded to int8 per block b of 256 elements,
sx_b = max|x_b| / 127, xq = round(x_b / sx_b); with W^ the shadow's weights and x^ = sx_b xq,

    g^ = W^_gate x^ + gate_bias,  u^ = W^_up x^ + up_bias,  n^_i = |act(g^_i) u^_i| c_i

(|act(u^_i)| c_i where the MLP is ungated), c_i = ||W_down[:, i]||_2. Kernels add up xq * code in
integers; float32 sums here differ from that by their own rounding only.
"""

from __future__ import annotations

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


def shadow_scores(
    x: Tensor,
    shadow: Tensor,
    norms: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    gated: bool,
    bits_gate: int,
    bits_up: int,
    activation: str,
) -> Tensor:
    """n^ of all neurons, float32 [rows, f].

    x: [rows, d]; shadow: uint8 [f, record bytes]; norms: c, float32 [f]; bits_gate is ignored where
    gated is False.
    """
    act = ACTIVATIONS[activation]
    d = x.shape[1]
    rounded = round_input(x)
    out = torch.empty(x.shape[0], len(shadow), dtype=torch.float32, device=x.device)
    for start in range(0, len(shadow), _ROWS):
        rows = slice(start, start + _ROWS)
        gate, up = unpack(Shadow(shadow[rows], d, bits_gate if gated else 0, bits_up))

        def product(matrix: Codes, bias: Tensor | None, rows: slice = rows) -> Tensor:
            value = rounded @ dequantise(matrix)[:, :d].t()
            return value if bias is None else value + bias[rows].float()

        u = product(up, up_bias)
        a = act(u) if gate is None else act(product(gate, gate_bias)) * u
        out[:, rows] = a.abs() * norms[rows]
    return out


def choose(scores: Tensor, epsilon: Tensor | None, k: int) -> Tensor:
    """Active, bool [rows, f]: not below epsilon [1], or the k largest (ties: lower index)."""
    if epsilon is not None:
        return torch.logical_not(scores < epsilon)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[:, :k], True)


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
    epsilon: Tensor | None,
    k: int,
    bits_gate: int,
    bits_up: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The exact MLP over what the shadow chooses: out [rows, d], active neurons int32 [rows]."""
    gated = gate is not None
    scores = shadow_scores(
        x, shadow, norms, gate_bias, up_bias, gated, bits_gate, bits_up, activation
    )
    active = choose(scores, epsilon, k)
    out = masked_mlp(x, gate, up, down_t, gate_bias, up_bias, down_bias, active, activation).to(
        x.dtype
    )
    return out, active.sum(-1, dtype=torch.int32)
