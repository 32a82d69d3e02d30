"""A linear layer on packed rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import PatchStateError, UnsupportedModelError
from .rounding import pack_matrix
from .rows import Format, format_of, linear, linear_t, unpack_rows


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
    def format(self) -> Format:
        """Bits and group of its rows."""
        return format_of(self.weight, self.out_features if self.transposed else self.in_features)

    def dequantise(self, dtype: torch.dtype | None = None) -> Tensor:
        """W as a plain matrix [out_features, in_features], in the layer's dtype unless told."""
        d = self.out_features if self.transposed else self.in_features
        plain = unpack_rows(self.weight, d, dtype or self.dtype)
        return plain.t() if self.transposed else plain

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b; PatchStateError in training mode or for a backward pass."""
        if self.training:
            raise PatchStateError(
                "packed weights only infer, and this layer is in training mode; call model.eval(), "
                "or load the model unpacked to train it"
            )
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.transposed:
            out = linear_t(x, self.weight, self.out_features, self.bias)
        else:
            out = linear(x, self.weight, self.bias)
        return ops.inference_only(out)

    def extra_repr(self) -> str:
        """Sizes and format."""
        fmt = self.format
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={fmt.bits}, "
            f"group={fmt.group}, transposed={self.transposed}"
        )
