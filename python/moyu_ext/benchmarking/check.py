"""Is a result right? The float64 reference on the active set, and a tolerance that is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..models.weights import MlpWeights
from .rows import BenchmarkError

_BLOCK = 1024  # neurons widened to float64 at a time: 100 MB at d = 4096


def exact(x: Tensor, weights: MlpWeights, active: Tensor) -> Tensor:
    """The MLP in float64 by `reference`: x [rows, d], active bool [rows, f] -> [rows, d]."""
    w = weights
    used = active.any(0).nonzero().flatten()
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for block in used.split(_BLOCK):
        out += reference.masked_mlp(
            x,
            w.rows("gate", block) if w.gated else None,
            w.rows("up", block),
            w.rows("down_t", block),
            None if w.gate_bias is None else w.gate_bias[block],
            None if w.up_bias is None else w.up_bias[block],
            None,
            active[:, block],
            w.activation,
            torch.float64,
        )
    return out if w.down_bias is None else out + w.down_bias.double()


def plain(x: Tensor, weights: MlpWeights, active: Tensor) -> Tensor:
    """The same in x's dtype, as a user of torch would write it: [rows, d]."""
    used = active.any(0).nonzero().flatten()
    part: dict[str, Any] = {
        name: weights.rows(name, used).to(x.dtype)
        for name in ("gate", "up", "down_t")
        if getattr(weights, name) is not None
    }
    for name in ("gate_bias", "up_bias"):
        bias = getattr(weights, name)
        part[name] = None if bias is None else bias[used]
    some = replace(weights, packed=None, **part)
    return some.down(some.activations(x)[1] * active[:, used])


def verify(what: str, out: Tensor, x: Tensor, weights: MlpWeights, active: Tensor) -> float:
    """The relative error max|out - exact| / max|exact|.

    Raises BenchmarkError where it exceeds twice plain torch's error in the same dtype, plus one
    rounding to that dtype and a float32 sum's error, which grows with the root of its terms.
    """
    terms = weights.d + weights.f
    return _compare(what, out, exact(x, weights, active), plain(x, weights, active), terms)


def verify_linear(what: str, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """`verify` for a linear layer: x [rows, k], weight [n, k], out [rows, n]."""
    blocks = weight.split(_BLOCK)
    right = torch.cat([x.double() @ block.double().t() for block in blocks], -1)
    right = right if bias is None else right + bias.double()
    return _compare(what, out, right, F.linear(x, weight, bias), weight.shape[1])


def _compare(what: str, out: Tensor, right: Tensor, plain: Tensor, terms: int) -> float:
    scale = float(right.abs().max().clamp_min(1e-30))
    error = float((out.double() - right).abs().max()) / scale
    allowed = 2 * float((plain.double() - right).abs().max()) / scale
    allowed += torch.finfo(out.dtype).eps
    allowed += torch.finfo(torch.float32).eps * terms**0.5
    if not error <= allowed:
        raise BenchmarkError(
            f"{what}: the result is off by {error:.3e} of its largest element, allowed are "
            f"{allowed:.3e}; the row is not written"
        )
    return error


# Of the largest logit: two ways through all layers, each rounded in the model's dtype.
_STEP = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


def verify_step(label: str, got: Tensor, want: Tensor) -> float:
    """The largest error of a decode step's logits relative to the largest of those through the
    layers' own forwards; BenchmarkError where it is more than rounding makes."""
    error = float((got.double() - want.double()).abs().max() / want.double().abs().max())
    if not error <= _STEP[want.dtype]:
        raise BenchmarkError(
            f"{label}: the decode step's logits differ by {error:.2e} of the largest from those "
            f"through the layers, allowed {_STEP[want.dtype]:.0e}: no row is written"
        )
    return error
