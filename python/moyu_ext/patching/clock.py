"""How long MLPs take at one row: the dense ones before a patch, the patched ones while they work.

On the CPU alone: the time of a call says nothing where a device works behind it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..reference import ACTIVATIONS
from .families import MlpSite

_ROUNDS = 3


class Clock:
    """Sums the time of calls with one row."""

    def __init__(self) -> None:
        self.calls = 0
        self.nanoseconds = 0

    def start(self) -> int:
        """The moment, or 0 in a traced forward, which has none."""
        return 0 if torch.compiler.is_compiling() else time.perf_counter_ns()

    def stop(self, start: int, rows: int) -> None:
        """Count the call that began at `start`, if it had one row."""
        if start and rows == 1:
            self.calls += 1
            self.nanoseconds += time.perf_counter_ns() - start

    @property
    def seconds(self) -> float:
        """Mean of a call; NaN where there were none."""
        return 1e-9 * self.nanoseconds / self.calls if self.calls else float("nan")


@torch.no_grad()
def dense_seconds(sites: Sequence[MlpSite]) -> list[float]:
    """Each unpatched MLP at one row by torch's own operators, the fastest of 3; NaN off the CPU.

    Round after round over all layers, as decoding goes through them, so that what does not fit into
    the caches together is not found there.
    """
    best = [float("inf")] * len(sites)
    for _ in range(_ROUNDS):
        for i, site in enumerate(sites):
            w = site.weights()
            if not w.up.is_cpu:
                best[i] = float("nan")
                continue
            act, x = ACTIVATIONS[w.activation], w.up.new_full((1, w.d), 0.01)
            start = time.perf_counter_ns()
            a = act(F.linear(x, w.up if w.gate is None else w.gate, w.gate_bias))
            if w.gate is not None:
                a = a * F.linear(x, w.up, w.up_bias)
            F.linear(a, w.down_t.t(), w.down_bias)
            best[i] = min(best[i], 1e-9 * (time.perf_counter_ns() - start))
    return best
