"""Triton source of the input-masking peer; imported only where Triton and a GPU are there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# What a program takes of W^T, C columns of K inputs: the grid is split along the inputs, too.
SHAPES = [(64, 64, 4), (128, 32, 4), (128, 64, 8), (128, 128, 8), (256, 16, 4), (256, 32, 8),
          (512, 16, 8), (512, 32, 8)]  # fmt: skip


@triton.autotune(
    [triton.Config({"C": c, "K": k}, num_warps=warps) for c, k, warps in SHAPES],
    key=["n_inputs", "n_columns"],
    reset_to_zero=["sums"],
)
@triton.jit
def masked_gemv_kernel(  # type: ignore[no-untyped-def]
    x, weight_t, sums, threshold, n_inputs, n_columns, C: tl.constexpr, K: tl.constexpr
):
    """sums[c] += sum over a split of the inputs k with abs(x[k]) > threshold of x[k] W^T[k, c]."""
    columns = tl.program_id(0) * C + tl.arange(0, C)
    inputs = tl.program_id(1) * K + tl.arange(0, K)
    values = tl.load(x + inputs, mask=inputs < n_inputs, other=0.0).to(tl.float32)
    kept = (tl.abs(values) > threshold) & (inputs < n_inputs)
    wanted = kept[:, None] & (columns < n_columns)[None, :]
    where = weight_t + inputs.to(tl.int64)[:, None] * n_columns + columns[None, :]
    weights = tl.load(where, mask=wanted, other=0.0, eviction_policy="evict_first").to(tl.float32)
    total = tl.sum(tl.where(kept, values, 0.0)[:, None] * weights, 0)
    tl.atomic_add(sums + columns, total, mask=columns < n_columns, sem="relaxed")


@triton.jit
def silu_mul_kernel(gate_up, hidden, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """hidden[i] = silu(gate_up[i]) * gate_up[n + i]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + at, mask=at < n, other=0.0)
    up = tl.load(gate_up + n + at, mask=at < n, other=0.0)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(hidden + at, value.to(hidden.dtype.element_ty), mask=at < n)


def masked_mlp(
    x: Tensor,
    gate_up_t: Tensor,
    down_t: Tensor,
    sums: Tensor,
    threshold_x: float,
    threshold_h: float,
) -> Tensor:
    """x [1, d], gate_up_t [d, 2 f], down_t [f, d], sums float32 [2 f + d] -> [1, d]."""
    f, d = down_t.shape
    sums.zero_()
    hidden = torch.empty(f, dtype=x.dtype, device=x.device)
    _masked_gemv(x, gate_up_t, sums, threshold_x)
    silu_mul_kernel[(triton.cdiv(f, 1024),)](sums, hidden, f, BLOCK=1024)
    _masked_gemv(hidden, down_t, sums[2 * f :], threshold_h)
    return sums[2 * f :].to(x.dtype).view(1, d)


def _masked_gemv(x: Tensor, weight_t: Tensor, sums: Tensor, threshold: float) -> None:
    inputs, columns = weight_t.shape

    def grid(shape: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(columns, shape["C"]), triton.cdiv(inputs, shape["K"])

    masked_gemv_kernel[grid](x, weight_t, sums, threshold, inputs, columns)
