"""The weights of one MLP, and what can be computed from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..packing.rows import linear, linear_t, native, unpack_rows
from ..reference import ACTIVATIONS

# Rows whose activations [rows, f] are held in float32 at a time.
_ROWS = 256


@dataclass(frozen=True)
class Packed:
    """What packed rows do not tell: hidden size, and the dtype of biases and x."""

    d: int
    dtype: torch.dtype


@dataclass(frozen=True)
class MlpWeights:
    """The weights of one MLP as the operators take them.

    gate: [f, d] or None (ungated); up: [f, d]; down_t: [f, d], W_down neuron-major (may be a
    transposed view); biases [f], [f], [d] or None; activation: a key of `reference.ACTIVATIONS`.
    With `packed` the three are packed rows, uint8 [f, row_bytes].
    """

    gate: Tensor | None
    up: Tensor
    down_t: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str

    packed: Packed | None = None

    @property
    def d(self) -> int:
        """Hidden size."""
        return self.up.shape[1] if self.packed is None else self.packed.d

    @property
    def f(self) -> int:
        """Intermediate size, the number of neurons."""
        return self.up.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the biases, of x, and of the weights before they were packed."""
        return self.up.dtype if self.packed is None else self.packed.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.up.device

    @property
    def gated(self) -> bool:
        """Whether there is a gate projection."""
        return self.gate is not None

    @property
    def matrices(self) -> int:
        """3 where there is a gate projection, else 2."""
        return 3 if self.gated else 2

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices, which a dense MLP reads at each token."""
        return sum(m.nbytes for m in (self.gate, self.up, self.down_t) if m is not None)

    def share_read(
        self, plan: str, density: float, added: float = 0.0, estimated: float = 0.0
    ) -> float:
        """Bytes that one token reads over those of the dense MLP, see `read_share`; added: bytes
        that the rule reads beside the weights; estimated: share of the neurons of which it reads
        the row of W_down alone."""
        return read_share(
            plan, density, self.matrices, added / self.nbytes + estimated / self.matrices
        )

    def rows(self, matrix: str, part: slice | Tensor | None = None) -> Tensor:
        """Rows of "gate", "up" or "down_t" as plain numbers [n, d]: the weights themselves, or in
        float32 what packed ones stand for. part: which rows, all by default."""
        weight = getattr(self, matrix).detach()
        weight = weight if part is None else weight[part]
        return weight if self.packed is None else unpack_rows(weight, self.d)

    @property
    def first(self) -> str:
        """The projection behind which the activation stands: "gate", or "up" without one."""
        return "up" if self.gate is None else "gate"

    def project(self, x: Tensor, matrix: str) -> Tensor:
        """W x + b of "gate" or "up", [..., f] in x's dtype, by matmuls."""
        weight, bias = getattr(self, matrix), getattr(self, f"{matrix}_bias")
        return F.linear(x, weight, bias) if self.packed is None else linear(x, weight, bias)

    def norms(self, x: Tensor) -> Tensor:
        """||n_i(x)|| = |a_i(x)| c_i, float32 [..., f]."""
        wide = self.to_float32()
        with torch.no_grad():
            return wide.activations(x.float())[1].abs_().mul_(self.column_norms())

    def activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """act(W_gate x) and a(x), [..., f] in x's dtype, by matmuls; both are a(x) where the MLP
        is ungated."""
        act = ACTIVATIONS[self.activation]
        up = self.project(x, "up")
        if self.gate is None:
            product = act(up)
            return product, product
        gate = act(self.project(x, "gate"))
        # In place where no gradient needs `up`: one pass over [n, f] less than the model's own.
        return gate, gate * up if torch.is_grad_enabled() else up.mul_(gate)

    def down(self, a: Tensor) -> Tensor:
        """W_down a + bias: [..., f] -> [..., d]."""
        if self.packed is not None:
            return linear_t(a, self.down_t, self.d, self.down_bias)
        if not native(a) and a.numel() > ops.MAX_ROWS * self.f:
            # torch's matmul takes 70 times as long where a weight of this dtype is transposed.
            return F.linear(a, self.down_t.t().contiguous(), self.down_bias)
        return F.linear(a, self.down_t.t(), self.down_bias)

    def to_float32(self) -> MlpWeights:
        """A copy in plain float32, which shares what is that already."""
        tensors: dict[str, Any] = {
            name: value.detach().float()
            if self.packed is None or value.dtype != torch.uint8
            else unpack_rows(value.detach(), self.d)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, packed=None, **tensors)

    def output(self, x: Tensor) -> Tensor:
        """The MLP of x [n, d] over all neurons, computed in float32, in x's dtype."""
        wide, out = self.to_float32(), torch.empty_like(x)
        with torch.no_grad():
            for block, rows in zip(x.split(_ROWS), out.split(_ROWS), strict=True):
                rows.copy_(wide.down(wide.activations(block.float())[1]))
        return out

    @property
    def _operands(self) -> tuple[Tensor | None, ...]:
        """In the order in which every operator of an MLP takes them."""
        return self.gate, self.up, self.down_t, self.gate_bias, self.up_bias, self.down_bias

    def given(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        count: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x [rows, d] over a set as `compact` gives it, or over all neurons: [rows, d]."""
        return ops.sparse_mlp(x, *self._operands, indices, count, mask, self.activation)

    def by_threshold(
        self, x: Tensor, plan: str, scale: Tensor | None, epsilon: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x [rows, d] over the neurons whose score, known after `plan` ("gate" or "product"), is
        not below epsilon [1]; scale [f] or None multiplies the score. Returns the output [rows, d]
        and active neurons per row, int32 [rows]."""
        return ops.threshold_mlp(x, *self._operands, scale, epsilon, self.activation, plan)

    def by_shadow(
        self,
        x: Tensor,
        records: Tensor,
        bits: tuple[int, int],
        norms: Tensor,
        epsilon: Tensor | None,
        k: int,
        estimated: int = 0,
        inverse: Tensor | None = None,
        errors: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x [rows, d] in the tiers that a shadow (records and bits of gate and up) chooses, see
        `shadow.reference.shadow_mlp`. Returns the output [rows, d], and how many neurons are exact
        and estimated, int32 [2, rows]."""
        how = (records, norms, inverse, errors, epsilon, k, estimated, *bits, self.activation)
        return ops.shadow_mlp(x, *self._operands, *how)

    def shadow_scores(
        self, x: Tensor, records: Tensor, bits: tuple[int, int], norms: Tensor
    ) -> Tensor:
        """What `by_shadow` compares, for x [rows, d]: float32 [rows, f]."""
        how = (self.gate_bias, self.up_bias, self.gated, *bits, self.activation)
        return ops.shadow_scores(x, records, norms, *how)

    def column_norms(self) -> Tensor:
        """c_i = ||W_down[:, i]||_2, float32 [f]."""
        # In blocks, since the conversion to float32 makes a copy: of 64 MB, which malloc gives back
        # to the system at once, where smaller ones would leave holes in its heap.
        norms = torch.empty(self.f, dtype=torch.float32, device=self.down_t.device)
        rows = max(1, (1 << 24) // self.d)
        for start in range(0, self.f, rows):
            part = slice(start, start + rows)
            block = self.rows("down_t", part)
            norms[part] = torch.linalg.vector_norm(block, dim=1, dtype=torch.float32)
        return norms


def read_share(plan: str, density: float, matrices: int, added: float = 0.0) -> float:
    """Bytes that a token reads, of those of a dense MLP with this many matrices (3 gated, 2 not).

    With m matrices: `given` reads density, `gate` (1 + (m - 1) density) / m and `product`
    (m - 1 + density) / m, since matrices that tell which neurons are active are read in full.
    added: what the rule reads beside the weights (`added_bytes`), over the dense MLP's bytes.
    """
    known = {"dense": matrices, "given": 0, "gate": 1, "product": matrices - 1}[plan]
    return (known + (matrices - known) * density) / matrices + added
