"""What each operator means, in plain PyTorch: slow, obviously right, and the oracle of the tests.

Shapes: hidden size d, intermediate size f, rows r. Everything is computed in ``dtype`` (float32 by
default, float64 for an oracle) and only the final output is rounded to the dtype of ``x``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def activations(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "silu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """a(x) = act(W_gate x + b) * (W_up x + b), or act(W_in x + b) where gate is None: [..., f]."""
    act = ACTIVATIONS[activation]
    h = _linear(x, up, up_bias, dtype)
    return act(h) if gate is None else act(_linear(x, gate, gate_bias, dtype)) * h


def column_norms(down_t: Tensor) -> Tensor:
    """c_i = ||W_down[:, i]||_2 from the neuron-major matrix [f, d], float32 [f]."""
    return torch.linalg.vector_norm(down_t, dim=-1, dtype=torch.float32)


def threshold_compact(values: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending indices (int32, 0 past the end) of the values that are not below epsilon."""
    active = ~(values < epsilon)
    count = active.sum(-1, dtype=torch.int32)
    order = torch.argsort(active.to(torch.int8), dim=-1, descending=True, stable=True)
    place = torch.arange(values.shape[-1], device=values.device)
    indices = torch.where(place < count.unsqueeze(-1), order, torch.zeros_like(order))
    return indices.to(torch.int32), count.reshape(values.shape[:-1] or (1,))


def gather_gemv(
    x: Tensor,
    weight: Tensor,
    indices: Tensor | None,
    count: Tensor | None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """out[r, k] = weight[indices[k]] . x[r] + bias[indices[k]] for k < count, else 0: float32.

    Without indices and count every weight row, in order.
    """
    if indices is None or count is None:
        assert indices is count, "indices and count are given together or not at all"
        return _linear(x, weight, bias, dtype)
    n = int(count)
    out = torch.zeros(*x.shape[:-1], indices.numel(), dtype=dtype, device=x.device)
    rows = indices[:n].long()
    out[..., :n] = _linear(x, weight[rows], None if bias is None else bias[rows], dtype)
    return out


def gather_gemv_t(
    values: Tensor,
    weight_t: Tensor,
    indices: Tensor,
    count: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """out[r] = sum_{k < count} values[r, k] * weight_t[indices[k]] + bias: [..., d]."""
    n = int(count)
    out = values[..., :n].to(dtype) @ weight_t[indices[:n].long()].to(dtype)
    return out if bias is None else out + bias.to(dtype)


def masked_mlp(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    active: Tensor,
    activation: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """sum over active neurons of n_i(x) (eq. 13) + output bias; ``active`` is bool [..., f]."""
    a = activations(x, gate, up, gate_bias, up_bias, activation, dtype)
    out = torch.where(active, a, torch.zeros((), dtype=dtype, device=x.device)) @ down_t.to(dtype)
    return out if down_bias is None else out + down_bias.to(dtype)


def sparse_mlp(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    indices: Tensor | None,
    count: Tensor | None,
    mask: Tensor | None,
    activation: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The `given` plan: the MLP over ``indices[:count]``, each row further limited by ``mask``."""
    f = up.shape[0]
    active = torch.ones(f, dtype=torch.bool, device=x.device)
    if indices is not None and count is not None:
        active.zero_()
        active[indices[: int(count)].long()] = True
    if mask is not None:
        active = active & mask.reshape(*x.shape[:-1], f).bool()
    return masked_mlp(
        x, gate, up, down_t, gate_bias, up_bias, down_bias, active, activation, dtype
    ).to(x.dtype)


def threshold_active(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    scale: Tensor | None,
    epsilon: Tensor,
    activation: str,
    plan: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Bool [..., f]: where the score of the `gate` or `product` plan is not below epsilon."""
    if plan == "gate" and gate is not None:
        score = ACTIVATIONS[activation](_linear(x, gate, gate_bias, dtype)).abs()
    else:
        score = activations(x, gate, up, gate_bias, up_bias, activation, dtype).abs()
    if scale is not None:
        score = score * scale.to(dtype)
    return ~(score < epsilon.to(dtype))


def threshold_mlp(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down_t: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    scale: Tensor | None,
    epsilon: Tensor,
    activation: str,
    plan: str,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The `gate` and `product` plans: output [..., d] and active neurons per row, int32 [rows]."""
    active = threshold_active(
        x, gate, up, gate_bias, up_bias, scale, epsilon, activation, plan, dtype
    )
    out = masked_mlp(x, gate, up, down_t, gate_bias, up_bias, down_bias, active, activation, dtype)
    return out.to(x.dtype), active.sum(-1, dtype=torch.int32).reshape(-1)
