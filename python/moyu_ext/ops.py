"""The operators, by the names and arguments of :mod:`moyu_ext.reference`, compiled.

Each wraps ``torch.ops.moyu_ext.<name>``; the fakes below let ``torch.compile`` trace through.
Tensors are contiguous and on one device; weights and ``x`` share float32, float16 or bfloat16, or
the weights are packed rows (uint8, see `packing.rows`; on the CPU only), and sums are kept in
float32. A wrong shape, dtype or device raises RuntimeError, and on the CPU so does an index or
count out of range; on CUDA, where the host cannot look at them without waiting, a count is clamped
and such an index contributes 0, unless MOYU_CHECK=1 asks to wait and look.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _load  # registers torch.ops.moyu_ext
from .errors import PatchStateError

MAX_ROWS = 8
"""Rows that one pass over the weights serves (csrc/moyu.h: kMaxRows)."""

_ops = torch.ops.moyu_ext
threshold_compact = _ops.threshold_compact.default
gather_gemv = _ops.gather_gemv.default
gather_gemv_t = _ops.gather_gemv_t.default
unpack_rows = _ops.unpack_rows.default
sparse_mlp = _ops.sparse_mlp.default
threshold_mlp = _ops.threshold_mlp.default
shadow_scores = _ops.shadow_scores.default
shadow_mlp = _ops.shadow_mlp.default


class _InferenceOnly(torch.autograd.Function):
    """Identity whose backward is an error: the operators have no gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise PatchStateError(
            "backward through a patched or packed layer: its operators have no gradient; call "
            "moyu_ext.unpatch(model) to train, and train a model before it is packed"
        )


def inference_only(out: Tensor) -> Tensor:
    """The output of an operator, with a clear error for a backward pass through it."""
    if out.requires_grad and not torch.compiler.is_compiling():
        return _InferenceOnly.apply(out)
    return out


def use_huge_pages(tensor: Tensor) -> bool:
    """Move a CPU tensor's memory to huge pages where the system has them; its values stay.

    Rows gathered from 4 KB pages wait for page walks. Returns whether that was done; memory mapped
    from a file stays as it is.
    """
    if tensor.device.type != "cpu":
        return False
    moved: bool = _load._C.use_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return moved


@torch.library.register_fake("moyu_ext::threshold_compact")
def _(values: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    rows = 1 if values.dim() == 1 else values.shape[0]
    return (
        torch.empty_like(values, dtype=torch.int32),
        values.new_empty(rows, dtype=torch.int32),
    )


@torch.library.register_fake("moyu_ext::gather_gemv")
def _(
    x: Tensor,
    weight: Tensor,
    indices: Tensor | None,
    count: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    capacity = (weight if indices is None else indices).shape[0]
    return x.new_empty((*x.shape[:-1], capacity), dtype=torch.float32)


@torch.library.register_fake("moyu_ext::gather_gemv_t")
def _(
    values: Tensor,
    weight_t: Tensor,
    indices: Tensor | None,
    count: Tensor | None,
    bias: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    packed = weight_t.dtype == torch.uint8
    dtype = torch.float32 if packed and bias is None else (bias if packed else weight_t).dtype  # type: ignore[union-attr]
    d = weight_t.shape[1] if columns is None else columns
    return weight_t.new_empty((*values.shape[:-1], d), dtype=dtype)


@torch.library.register_fake("moyu_ext::unpack_rows")
def _(packed: Tensor, out: Tensor) -> None:
    return None


@torch.library.register_fake("moyu_ext::sparse_mlp")
def _(
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
) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("moyu_ext::threshold_mlp")
def _(
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
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.int32)


@torch.library.register_fake("moyu_ext::shadow_scores")
def _(
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
    return norms.new_empty((x.numel() // x.shape[-1], norms.shape[0]))


@torch.library.register_fake("moyu_ext::shadow_mlp")
def _(
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
    return torch.empty_like(x), x.new_empty((2, x.numel() // x.shape[-1]), dtype=torch.int32)
