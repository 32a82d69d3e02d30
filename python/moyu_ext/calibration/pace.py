"""How long a model's MLPs take for one token, by the shares of neurons that they read.

Measured on the machine at hand on the model's own layers, one after another as a token takes them,
so that what a cache holds of them is as in decoding. A router costs its own pass and some time that
no share saves, which at small sizes is most of what there is to save.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.dense import Dense
from ..methods.qrida import QRIDA
from ..patching.patch import patch, unpatch
from ..patching.sparse_mlp import SparseMLP
from ..shadow.store import Shadows

# (exact, estimated) that are timed; what lies between follows from them.
_POINTS = ((0.7, 0.2), (0.3, 0.45), (0.05, 0.6), (0.1, 0.0))
_REPEATS = 9


@dataclass(frozen=True)
class Pace:
    """Seconds of one token in all MLPs: `dense`; with a router `fixed`, and `exact` and `estimated`
    for the whole of the neurons."""

    dense: float
    fixed: float
    exact: float
    estimated: float

    def seconds(self, exact: float, estimated: float) -> float:
        """At these shares of the neurons."""
        return self.fixed + self.exact * exact + self.estimated * estimated


def measure_pace(model: nn.Module, shadows: Shadows, inputs: Sequence[Tensor]) -> Pace:
    """The pace of a model that comes unpatched; inputs: one x [1, d] for each MLP."""
    with torch.inference_mode(False), torch.no_grad(), _patched(model) as mlps:
        passes = [_dense(mlps, inputs)]
        passes += [_sparse(mlps, inputs, shadows, point) for point in _POINTS]
        times: list[list[float]] = [[] for _ in passes]
        for turn in range(_REPEATS + 1):
            for one, found in zip(passes, times, strict=True):
                begin = _now(inputs[0])
                one()
                if turn:  # the first touches everything for the first time
                    found.append(_now(inputs[0]) - begin)
    dense, *sparse = (statistics.median(found) for found in times)
    table = torch.tensor([[1.0, *point] for point in _POINTS], dtype=torch.float64)
    right = torch.tensor(sparse, dtype=torch.float64).unsqueeze(1)
    fixed, exact, estimated = torch.linalg.lstsq(table, right).solution.flatten().tolist()
    return Pace(dense, max(fixed, 0.0), max(exact, 0.0), max(estimated, 0.0))


@contextmanager
def _patched(model: nn.Module) -> Iterator[list[SparseMLP]]:
    patch(model, Dense(), decode_step=False)
    try:
        yield [module for module in model.modules() if isinstance(module, SparseMLP)]
    finally:
        unpatch(model)


def _dense(mlps: list[SparseMLP], inputs: Sequence[Tensor]) -> Callable[[], None]:
    return _pass([(mlp.rule, mlp.weights) for mlp in mlps], inputs)


def _sparse(
    mlps: list[SparseMLP], inputs: Sequence[Tensor], shadows: Shadows, point: tuple[float, float]
) -> Callable[[], None]:
    exact, estimated = point
    method = QRIDA(exact=exact, estimated=estimated, shadows=shadows, guard="off")
    rules = []
    for mlp in mlps:
        assert mlp.weights is not None
        rules.append((method.bind(mlp.site.index, mlp.weights), mlp.weights))
    return _pass(rules, inputs)


def _pass(rules: list[tuple[Any, Any]], inputs: Sequence[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for (rule, weights), x in zip(rules, inputs, strict=True):
            rule.apply(x, weights)

    return run


def _now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()
