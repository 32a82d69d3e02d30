"""The guard: what a router really drops, measured while it works, and held at a target.

Every so many tokens one token's MLP is computed with all neurons beside the sparse one. That gives
the true CETT of what the router left out (arXiv 2406.12569, eq. 14) and its recall, whatever the
text; a calibration can only speak for the text that it saw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .models.weights import MlpWeights
from .reference import ACTIVATIONS

# One measurement changes epsilon by at most this factor, and all of them together by _RANGE.
_GAIN = 0.15
_STEP = 1.5
_RANGE = 64.0


@dataclass(frozen=True)
class GuardReport:
    """One layer's measurements since the patch (or the last reset).

    tokens: how many were measured; cett: mean CETT of what was dropped; recall: mean fraction of
    the neurons with the largest true norms (as many as the router chose) that the router chose;
    epsilon: the threshold now, None where the rule is a top-k. NaN where nothing was measured.
    """

    tokens: int
    cett: float
    recall: float
    epsilon: float | None


class LayerGuard:
    """Measures one layer's router on one token in `every`.

    `epsilon` (float32 [1], the rule's own tensor) and `target` given: after each measurement

        epsilon <- epsilon * exp(gain * (1 - cett / target))

    so that the mean of the measured CETT, not of its logarithm, settles at the target. Nothing is
    read back from the device. Traced and captured forwards (torch.compile, CUDA graphs) are not
    measured, since a graph cannot choose its tokens.
    """

    def __init__(
        self, every: int, f: int, device: torch.device, epsilon: Tensor | None, target: float | None
    ) -> None:
        self.every = every
        self.epsilon = epsilon
        self.target = target
        self._seen = 0
        self._turn = 0
        self._start = None if epsilon is None else epsilon.clone()
        self._place = torch.arange(f, dtype=torch.int32, device=device)
        self._f = torch.tensor([f], dtype=torch.int32, device=device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._tokens = 0

    def due(self, rows: int) -> int | None:
        """Count a forward of `rows` tokens; the row to measure if it is time, else None."""
        if torch.compiler.is_compiling() or _capturing():
            return None
        self._seen += rows
        if self._seen < self.every:
            return None
        self._seen %= self.every
        self._turn += 1
        return self._turn % rows

    def waits(self, rows: int) -> bool:
        """Whether none of the next `rows` tokens is to be measured."""
        return self._seen + rows < self.every

    def pass_by(self, rows: int) -> None:
        """Count `rows` tokens for which it waits."""
        self._seen += rows

    def measure(
        self,
        x: Tensor,
        weights: MlpWeights,
        norms: Tensor,
        active: Tensor,
        rest: Tensor | None = None,
    ) -> None:
        """Add one token: x [1, d], column norms [f], what the router chose bool [1, f], and the
        activations of which the others keep an estimate, float32 [1, f] (None: of none)."""
        act = ACTIVATIONS[weights.activation]
        with torch.no_grad():
            a = ops.gather_gemv(x, weights.up, None, None, weights.up_bias)
            if weights.gate is None:
                a = act(a)
            else:
                a = a * act(ops.gather_gemv(x, weights.gate, None, None, weights.gate_bias))
            missing = a if rest is None else a - rest
            both = torch.cat(
                [missing.masked_fill(active, 0.0), a]
            )  # one pass over W_down for the two
            columns = None if weights.packed is None else weights.d
            outputs = ops.gather_gemv_t(both, weights.down_t, self._place, self._f, columns=columns)
            dropped, total = torch.linalg.vector_norm(outputs.float(), dim=-1)
            cett = torch.where(dropped == 0, dropped, dropped / total)
            order = torch.sort(a.abs() * norms, dim=-1, descending=True).indices
            chosen = active.sum()
            hits = (active.gather(-1, order) & (self._place < chosen)).sum()
            recall = torch.where(chosen > 0, hits / chosen, torch.ones_like(cett))
            self._sums += torch.stack([cett, recall])
            self._tokens += 1
            if self.epsilon is not None and self.target is not None:
                self._steer(cett)

    def _steer(self, cett: Tensor) -> None:
        assert self.epsilon is not None and self._start is not None and self.target is not None
        factor = torch.exp(_GAIN * (1 - cett / self.target)).clamp(1 / _STEP, _STEP)
        # A NaN (the MLP's output was not finite) says nothing about epsilon.
        moved = self.epsilon * factor.nan_to_num(1.0)
        self.epsilon.copy_(moved.clamp(self._start / _RANGE, self._start * _RANGE))

    def reset(self) -> None:
        """Forget the measurements; epsilon stays where it is."""
        self._sums.zero_()
        self._tokens = 0

    def report(self) -> GuardReport:
        """The measurements so far."""
        cett, recall = (self._sums / self._tokens).tolist() if self._tokens else (math.nan,) * 2
        epsilon = None if self.epsilon is None else float(self.epsilon)
        return GuardReport(self._tokens, cett, recall, epsilon)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
