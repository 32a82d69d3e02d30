"""A linear layer on packed rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import PatchStateError, UnsupportedModelError
from .rounding import pack_matrix
from .rows import Format, format_of, linear, linear_t, unpack_rows


def _multiply(x: Tensor, rows: Tensor, bias: Tensor | None, d: int, transposed: bool) -> Tensor:
    """By rows of d columns, or by their transpose."""
    return linear_t(x, rows, d, bias) if transposed else linear(x, rows, bias)


class _Product(torch.autograd.Function):
    """x W^T + b, whose backward multiplies by W: packed rows have no gradient of their own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, bias: Tensor | None, d: int, transposed: bool
    ) -> Tensor:
        ctx.rows, ctx.d, ctx.transposed = rows, d, transposed
        return _multiply(x, rows, bias, d, transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        back = _multiply(grad.contiguous(), ctx.rows, None, ctx.d, not ctx.transposed)
        return back, None, None, None, None


class PackedLinear(nn.Module):
    """x W^T + b, [..., in_features] -> [..., out_features], with W in packed rows.

    weight: uint8 [out_features, row_bytes]; with `transposed` (an MLP's down projection) W^T is
    packed, [in_features, row_bytes], so that a neuron is one row. dtype: that of the weights
    before; x may be float32, float16 or bfloat16, and so is the output. For inference.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fmt: Format,
        *,
        bias: bool = False,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = transposed
        self.dtype = dtype
        n, d = (in_features, out_features) if transposed else (out_features, in_features)
        rows = torch.empty(n, fmt.row_bytes(d), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(
                torch.empty(out_features, dtype=dtype, device=device), requires_grad=False
            )

    @classmethod
    def like(cls, layer: nn.Linear, fmt: Format, *, transposed: bool = False) -> PackedLinear:
        """For the place of a torch.nn.Linear, on meta: `hold` gives it its rows."""
        return cls(
            layer.in_features,
            layer.out_features,
            fmt,
            bias=layer.bias is not None,
            transposed=transposed,
            dtype=layer.weight.dtype,
            device="meta",
        )

    @classmethod
    def of(
        cls, layer: nn.Linear, fmt: Format, rows: Tensor | None = None, *, transposed: bool = False
    ) -> PackedLinear:
        """The packed twin of a torch.nn.Linear; rows: its packed weights, or None: the nearest."""
        packed = cls.like(layer, fmt, transposed=transposed)
        weight = layer.weight.detach()
        if rows is None:
            rows = pack_matrix(weight.t() if transposed else weight, fmt)
        packed.hold(rows)
        if layer.bias is not None:
            packed.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        return packed.train(layer.training)

    def hold(self, rows: Tensor) -> None:
        """Take packed rows as the weights; UnsupportedModelError for another number or length."""
        if rows.shape != self.weight.shape:
            raise UnsupportedModelError(
                f"packed rows {list(rows.shape)} do not fit a layer of {self.in_features} inputs "
                f"and {self.out_features} outputs; expected {list(self.weight.shape)}"
            )
        ops.use_huge_pages(rows)
        self.weight = nn.Parameter(rows, requires_grad=False)

    @property
    def _columns(self) -> int:
        return self.out_features if self.transposed else self.in_features

    @property
    def format(self) -> Format:
        """Bits and group of its rows."""
        return format_of(self.weight, self._columns)

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """W as a plain matrix [out_features, in_features], in the layer's dtype unless told."""
        plain = unpack_rows(self.weight, self._columns, dtype or self.dtype)
        return plain.t() if self.transposed else plain

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b, with a gradient for x alone; PatchStateError in training mode."""
        if self.training:
            raise PatchStateError(
                "packed weights only infer, and this layer is in training mode; call model.eval(), "
                "or load the model unpacked to train it"
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self.weight, self.bias, self._columns, self.transposed)
        return _multiply(x, self.weight, self.bias, self._columns, self.transposed)

    def extra_repr(self) -> str:
        """Sizes and format."""
        fmt = self.format
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={fmt.bits}, "
            f"group={fmt.group}, transposed={self.transposed}"
        )
