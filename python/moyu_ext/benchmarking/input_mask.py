"""The peer to beat on a GPU: inputs of small magnitude are masked, by a Triton split-K GEMV.

Written anew in the manner of the published kernels (TEAL, arXiv 2408.14690): every projection skips
the columns of W whose input is below a threshold, so that at equal sparsity an MLP reads the same
share of its weights as the `given` plan. gate and up share their mask and one launch.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .cases import Case
from .rows import BenchmarkError


def why_not() -> str | None:
    """Why the peer cannot run here, or None where it can."""
    if not torch.cuda.is_available():
        return "no CUDA device, or a CPU-only torch"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    return None


@cache
def _kernels() -> Any:
    """Triton compiles functions by their source, so they live in a module of their own."""
    from . import input_mask_triton

    return input_mask_triton


class InputMask(Case):
    """silu(W_gate x~) * (W_up x~) = h, then W_down h~, where ~ sets inputs near zero to zero.

    The thresholds keep `density` of the elements of x, and of h. One row.
    """

    plan = "input-mask"
    operator = "triton_masked_gemv"

    def prepare(self, generator: torch.Generator) -> None:
        """See `Case`."""
        first = self.layers[0].weights
        if self.x.shape[0] != 1 or not first.gated or first.activation != "silu":
            raise ConfigurationError(
                "plan input-mask takes one row and a gated MLP with SiLU; leave it out for others"
            )
        self.all_active()
        self.threshold_x = _threshold(self.x, self.asked)
        self.thresholds_h = []
        # One buffer of sums for gate, up and out, so that one memset clears it.
        self.sums = torch.zeros(2 * first.f + first.d, dtype=torch.float32, device=self.x.device)
        self.gate_up_t = []
        self.kept = 0.0
        for layer in self.layers:
            w = layer.weights
            assert w.gate is not None
            self.gate_up_t.append(torch.cat([w.gate, w.up]).t().contiguous())
            h = self._hidden(len(self.gate_up_t) - 1)
            self.thresholds_h.append(_threshold(h, self.asked))
            self.kept += float(_kept(h, self.thresholds_h[-1]).sum()) / len(self.layers)
        self.kept_x = float(_kept(self.x, self.threshold_x).sum())

    def call(self, k: int) -> Tensor:
        """See `Case`."""
        return _kernels().masked_mlp(
            self.x, self.gate_up_t[k], self.layers[k].weights.down_t, self.sums,
            self.threshold_x, self.thresholds_h[k],
        )  # fmt: skip

    def _hidden(self, k: int) -> Tensor:
        w = self.layers[k].weights
        assert w.gate is not None
        x = self.x.double() * _kept(self.x, self.threshold_x)
        g = x @ w.gate.double().t()
        return g * torch.sigmoid(g) * (x @ w.up.double().t())

    def verify(self, k: int, out: Tensor) -> float:
        """See `Case`: against the masked products in float64."""
        h = self._hidden(k)
        right = (h * _kept(h, self.thresholds_h[k])) @ self.layers[k].weights.down_t.double()
        error = float((out.double() - right).abs().max() / right.abs().max())
        # h is rounded once, the sum once more; an element at the threshold may fall on either side.
        if not error <= 8 * torch.finfo(out.dtype).eps + 1e-3:
            raise BenchmarkError(f"{self}: the result is off by {error:.3e}; no row is written")
        return error

    @property
    def density(self) -> float:
        """The share of inputs that is kept, weighted by the weights that it reads."""
        w = self.layers[0].weights
        return (2 * self.kept_x / w.d + self.kept / w.f) / 3

    @property
    def bytes(self) -> int:
        """The columns of gate and up for the kept x, and the rows of down_t for the kept h."""
        w = self.layers[0].weights
        return round((2 * self.kept_x * w.f + self.kept * w.d) * w.up.element_size())


def _kept(values: Tensor, threshold: float) -> Tensor:
    """In float64, since a float16 tensor would round the threshold first."""
    return values.double().abs() > threshold


def _threshold(values: Tensor, density: float) -> float:
    """About `density` of abs(values) lie above it."""
    ordered = values.abs().double().flatten().sort().values
    place = round((1 - density) * ordered.numel())
    if place == 0:
        return -1.0
    high = ordered[min(place, ordered.numel() - 1)]
    return float((ordered[place - 1] + high) / 2)
