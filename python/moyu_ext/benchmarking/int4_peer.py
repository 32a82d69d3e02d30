"""A peer for packed weights on a GPU: torch's own 4-bit product (`aten::_weight_int4pack_mm`, which
torchao and gpt-fast use) on the same MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import ACTIVATIONS
from .cases import TorchDense
from .rows import BenchmarkError

GROUP = 64
_INNER = 8  # tiles of 16 along d that a thread keeps together


class TorchInt4(TorchDense):
    """All neurons by torch's 4-bit product in groups of 64, bfloat16: codes to the nearest of 16
    levels between a group's least and largest weight."""

    plan = "dense"
    operator = "torch int4"

    def prepare(self, generator: torch.Generator) -> None:
        """See `Case`."""
        super().prepare(generator)
        self.packed: list[dict[str, tuple[Tensor, Tensor]]] = []
        self.wide: list[dict[str, Tensor]] = []
        for layer, down in zip(self.layers, self.downs, strict=True):
            matrices = {"gate": layer.plain.gate, "up": layer.plain.up, "down": down}
            made = {name: _pack(w) for name, w in matrices.items() if w is not None}
            self.packed.append(
                {name: (codes, numbers) for name, (codes, numbers, _) in made.items()}
            )
        self.wide = [{name: wide for name, (_, _, wide) in made.items()}]  # of the last layer

    def call(self, k: int) -> Tensor:
        """See `Case`."""
        mm = torch.ops.aten._weight_int4pack_mm
        act = ACTIVATIONS[self.layers[k].plain.activation]
        made = self.packed[k]
        up = mm(self.x, made["up"][0], GROUP, made["up"][1])
        a = (
            act(mm(self.x, made["gate"][0], GROUP, made["gate"][1])) * up
            if "gate" in made
            else act(up)
        )
        out: Tensor = mm(a, made["down"][0], GROUP, made["down"][1])
        return out

    def verify(self, k: int, out: Tensor) -> float:
        """The error against the last layer's levels in float32, of the largest output."""
        wide = self.wide[0]
        act = ACTIVATIONS[self.layers[k].plain.activation]
        x = self.x.float()
        up = x @ wide["up"].t()
        a = act(x @ wide["gate"].t()) * up if "gate" in wide else act(up)
        right = a @ wide["down"].t()
        error = float((out.float() - right).abs().max() / right.abs().max())
        if not error <= 0.05:  # bfloat16 scales, activations and outputs
            raise BenchmarkError(f"{self}: off by {error:.3e} of the largest; no row is written")
        return error

    @property
    def bytes(self) -> int:
        """Codes, scales and zeros."""
        return sum(t.nbytes for pair in self.packed[0].values() for t in pair)


def _pack(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes as the product takes them, scales and zeros [d / 64, n, 2], the levels [n, d])."""
    n, d = w.shape
    groups = w.float().view(n, d // GROUP, GROUP)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).to(torch.bfloat16).float()
    zero = (low + 8 * scale).to(torch.bfloat16).float()  # what code 8 stands for
    codes = ((groups - zero) / scale + 8).round().clamp(0, 15)
    wide = ((codes - 8) * scale + zero).view(n, d)
    codes = codes.view(n, d).to(torch.uint8)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _INNER)
    numbers = torch.cat([scale, zero], 2).transpose(0, 1).contiguous().to(torch.bfloat16)
    return packed, numbers, wide
