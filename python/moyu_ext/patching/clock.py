"""How long MLPs take at one row: the dense ones before a patch, the patched ones while they work.

On the CPU alone, and not under torch.compile: elsewhere the time of a call says nothing, since a
device works behind it or the call is traced away.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..reference import ACTIVATIONS
from .families import MlpSite

_ROUNDS = 2


class Clock:
    """Sums the time of calls with one row, but for the first, which warms up."""

    def __init__(self) -> None:
        self.calls = -1
        self.nanoseconds = 0

    def start(self, x: torch.Tensor) -> int:
        """The moment; 0 where time says nothing."""
        if torch.compiler.is_compiling() or not x.is_cpu:
            return 0
        return time.perf_counter_ns()

    def stop(self, start: int, rows: int) -> None:
        """Count the call that began at `start`, if it had one row."""
        if start and rows == 1:
            self.calls += 1
            if self.calls:
                self.nanoseconds += time.perf_counter_ns() - start

    @property
    def seconds(self) -> float:
        """Mean of a call; NaN where there were none."""
        return 1e-9 * self.nanoseconds / self.calls if self.calls > 0 else float("nan")


@torch.no_grad()
def dense_seconds(sites: Sequence[MlpSite]) -> list[float]:
    """Each unpatched MLP at one row by torch's own operators: the mean of two calls behind one that
    warms up; NaN off the CPU.

    Round after round over all of a model's layers, as decoding goes through them, so that what does
    not fit into the caches together is not found there.
    """
    total = [0.0] * len(sites)
    for number in range(_ROUNDS + 1):
        for i, site in enumerate(sites):
            w = site.weights()
            if not w.up.is_cpu:
                total[i] = float("nan")
                continue
            act, x = ACTIVATIONS[w.activation], w.up.new_full((1, w.d), 0.01)
            start = time.perf_counter_ns()
            a = F.linear(x, w.up, w.up_bias)
            a = act(a) if w.gate is None else a * act(F.linear(x, w.gate, w.gate_bias))
            F.linear(a, w.down_t.t(), w.down_bias)
            if number:
                total[i] += 1e-9 * (time.perf_counter_ns() - start)
    return [seconds / _ROUNDS for seconds in total]
