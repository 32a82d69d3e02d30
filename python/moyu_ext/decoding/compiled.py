"""A stack's layers and an MLP's plan as the compiled step takes them: numbers and addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..methods.base import Compiled
from ..models.weights import MlpWeights
from ..packing.rows import format_of
from ..reference import ACTIVATIONS
from .stack import AttentionSpec, LayerSpec, Norm, Projection

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NOTHING = (0, 0, 0, 0)


def norm_tuple(norm: Norm | None) -> tuple[int, float, float]:
    """(address of the weight, eps, offset)."""
    return (0, 0.0, 0.0) if norm is None else (norm.weight.data_ptr(), norm.eps, norm.offset)


def linear_tuple(p: Projection) -> tuple[int, int, int, int]:
    """(address of the weight, bits, group, address of the bias)."""
    return p.weight.data_ptr(), p.bits, p.group, 0 if p.bias is None else p.bias.data_ptr()


def attention_dict(spec: LayerSpec) -> dict[str, Any]:
    """A layer's attention, see `Attention` in csrc/moyu.h."""
    a: AttentionSpec = spec.attention
    linears = {name: linear_tuple(getattr(a, name)) for name in ("q", "k", "v", "o")}
    norms = {name: norm_tuple(getattr(a, name)) for name in ("before", "after", "q_norm", "k_norm")}
    plain = ("wide_norms", "rotary", "heads", "kv_heads", "head_dim", "scale", "softcap")
    return {
        **linears,
        **norms,
        **{name: getattr(a, name) for name in plain},
        "residual_scale": spec.residual_scale,
        "kind": spec.kind,
    }


def mlp_dict(
    plan: Compiled, w: MlpWeights, active: Tensor, estimated: Tensor, tokens: Tensor
) -> dict[str, Any]:
    """An MLP under a plan that the step runs, and the counters for the report."""

    def matrix(weight: Tensor | None, bias: Tensor | None) -> tuple[int, int, int, int]:
        if weight is None:
            return _NOTHING
        bits, group = 0, 0
        if w.packed is not None:
            fmt = format_of(weight, w.d)
            bits, group = fmt.bits, fmt.group
        return weight.data_ptr(), bits, group, 0 if bias is None else bias.data_ptr()

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    return {
        "plan": plan.plan,
        "gate": matrix(w.gate, w.gate_bias),
        "up": matrix(w.up, w.up_bias),
        "down_t": matrix(w.down_t, w.down_bias),
        "f": w.f,
        "activation": list(ACTIVATIONS).index(w.activation),
        "scale": address(plan.scale),
        "epsilon": address(plan.epsilon),
        "records": address(plan.records),
        "inverse": address(plan.inverse),
        "gate_error": address(None if plan.errors is None else plan.errors[0]),
        "up_error": address(None if plan.errors is None else plan.errors[1]),
        "bits_gate": plan.bits[0],
        "bits_up": plan.bits[1],
        "k": plan.k,
        "estimated": plan.estimated,
        "active": active.data_ptr() if plan.counts else 0,
        "estimated_count": estimated.data_ptr() if plan.counts else 0,
        "tokens": tokens.data_ptr() if plan.counts else 0,
    }
