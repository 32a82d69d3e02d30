"""Rounding that knows the inputs: the error of one weight is made good by the weights after it.

Rounding to the nearest level keeps W^ near W. A router wants W^ x near W x, for the inputs x that
the layer really gets, and those fill few of the d directions evenly. With their second moment
H = E[x x^T], the columns are rounded one after another, and the error of each is spread over the
columns not yet rounded, so that E|(W - W^) x|^2 stays small (Frantar et al., arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.weights import MlpWeights
from .build import quantise
from .pack import BLOCK, Codes, Shadow, pack

# Share of the mean of H's diagonal that is added to it: what the calibration text does not know of
# the inputs to come. Recall of the top third on other text (mix4m_silu, 2 bits, news after
# stories): 0.8575 with 0.01, 0.8591 with 0.1, 0.8460 with 1.
DAMPING = 0.1
_TOKENS = 1024
# Errors handed on make weights larger than those that the plain step was best for. The same recall:
# 0.8533 with 1, 0.8587 with 1.1, 0.8591 with 1.15, 0.8582 with 1.2, 0.8536 with 1.3.
_WIDEN = 1.15
# Columns rounded before those behind them are updated in one product, and before those behind them
# among the former are. 4096 columns take 0.45 s per 1024 rows on one thread, 0.58 s with 128 twice.
_COLUMNS = 128
_FEW = 32
_ROWS = 1024  # so that a chunk of rows stays in a core's cache


def build_for(x: Tensor, weights: MlpWeights, bits_gate: int, bits_up: int) -> Shadow:
    """The shadow of one MLP, fitted to its inputs x [tokens, d]; bits_gate as in `build_shadow`.

    Raises ConfigurationError for bits outside 1..4.
    """
    (shadow,) = build_each_for(x, weights, [(bits_gate, bits_up)])
    return shadow


def build_each_for(x: Tensor, weights: MlpWeights, bits: Sequence[tuple[int, int]]) -> list[Shadow]:
    """The same for each of `bits`, (gate, up)."""
    order, factor = elimination(damped_moment(x))
    matrices = {"up": weights.rows("up")}
    if weights.gated:
        matrices["gate"] = weights.rows("gate")
    # Each matrix once for each number of bits, however many pairs have it.
    wanted = {("gate", gate) for gate, _ in bits} | {("up", up) for _, up in bits}
    codes = {
        (name, b): quantise_for(matrices[name], b, order, factor)
        for name, b in sorted(wanted)
        if name in matrices
    }
    return [pack(codes.get(("gate", gate)), codes["up", up], weights.d) for gate, up in bits]


def damped_moment(x: Tensor) -> Tensor:
    """E[x x^T] over x [tokens, d] with its diagonal raised, of mean 1 before; float32 [d, d]."""
    d = x.shape[1]
    moment = torch.zeros(d, d, device=x.device)
    for part in x.split(_TOKENS):
        moment.addmm_(part.float().t(), part.float())
    mean = moment.diagonal().mean()
    identity = torch.eye(d, device=x.device)
    # Where all inputs are zero, or not finite, any direction is as good as another.
    usable = bool(mean > 0) and bool(moment.isfinite().all())
    return moment / mean + DAMPING * identity if usable else identity


def elimination(damped: Tensor) -> tuple[Tensor, Tensor]:
    """In which order to round columns whose inputs have this moment, and the upper triangular U
    with U^T U the moment's inverse in that order: how a column's error goes to those behind it."""
    # Large inputs first: their errors find the most columns left to go to.
    order = damped.diagonal().argsort(descending=True, stable=True)
    lower = torch.linalg.cholesky(damped[order][:, order].flip(0, 1))
    identity = torch.eye(len(damped), device=damped.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return order, upper.contiguous()


def quantise_for(weight: Tensor, bits: int, order: Tensor, factor: Tensor) -> Codes:
    """Codes and scales of a matrix [f, d] by the `elimination` of its inputs' moment; the scales
    are those of `quantise`, a little wider.

    Raises ConfigurationError for bits outside 1..4.
    """
    start = quantise(weight, bits)
    f, d = weight.shape
    scales = (_WIDEN * start.scales.float()).bfloat16()
    codes = torch.zeros_like(start.codes)
    for first in range(0, f, _ROWS):
        rows = slice(first, first + _ROWS)
        w = weight[rows].float().nan_to_num(0.0, 0.0, 0.0)
        step = scales[rows].float().repeat_interleave(BLOCK, 1)[:, :d]
        code = torch.empty_like(w)
        code[:, order] = _round(w.t()[order], step.t()[order], factor, 2**bits - 1).t()
        codes[rows, :d] = code.to(torch.uint8)
    return Codes(codes, scales, bits)


def _round(w: Tensor, step: Tensor, factor: Tensor, top: int) -> Tensor:
    """Codes of w [d, n], as `step` both in the order of rounding; w is used up."""
    d, n = w.shape
    inverse = torch.where(step > 0, 1 / step, torch.zeros_like(step))
    weights = (1 / factor.diagonal()).tolist()
    code = torch.empty_like(w)
    for begin in range(0, d, _COLUMNS):
        end = min(begin + _COLUMNS, d)
        errors = w.new_empty(end - begin, n)
        for first in range(begin, end, _FEW):
            last = min(first + _FEW, end)
            for j in range(first, last):
                error = errors[j - begin]
                torch.mul(w[j], inverse[j], out=code[j])
                code[j].add_(top / 2).round_().clamp_(0, top)
                torch.sub(code[j], top / 2, out=error)
                torch.sub(w[j], error.mul_(step[j]), out=error)
                error.mul_(weights[j])
                w[j + 1 : last].addr_(factor[j, j + 1 : last], error, alpha=-1)
            done = slice(first - begin, last - begin)
            w[last:end].addmm_(factor[first:last, last:end].t(), errors[done], alpha=-1)
        w[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    return code
