"""Rounding that knows the inputs: what one weight loses is made good by the weights after it.

Rounding to the nearest level keeps each weight near its own. A layer wants W^ x near W x, for the
inputs x that it really gets. With their second moment H = E[x x^T], the columns of W are rounded
one after another, and the error of each is spread over those not rounded yet, so that
E|(W - W^) x|^2 stays small (GPTQ, Frantar et al., arXiv 2210.17323). A group's scale and offset are
chosen when the group is reached, from what its weights have become by then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .rounding import codes_of, grid
from .rows import BLOCK, Codes, Format, blocks_of, pack_rows

# Share of the mean of H's diagonal that is added to it: what the text does not know.
DAMPING = 0.01
# Columns rounded before all behind them are updated in one product.
_COLUMNS = 128
# How much of a group's range may be cut off at each end, to spend the levels where the weights are.
_CUTS = (0.0, 0.05, 0.1)
_TOKENS = 4096


def second_moment(x: Tensor) -> Tensor:
    """E[x x^T] over x [..., n], float32 [n, n]."""
    flat = x.reshape(-1, x.shape[-1])
    moment = torch.zeros(flat.shape[1], flat.shape[1], device=x.device)
    for part in flat.split(_TOKENS):
        wide = part.float()
        moment.addmm_(wide.t(), wide)
    return moment.div_(max(1, flat.shape[0]))


@dataclass(frozen=True, eq=False)
class Elimination:
    """In which order to round inputs, int64 [n], and the upper triangular U [n, n] with U^T U their
    damped moment's inverse in that order: how an input's error goes to those behind it."""

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, moment: Tensor, group: int) -> Elimination:
        """For inputs of this moment [n, n], keeping groups of so many inputs together."""
        order = _order(moment.diagonal(), group)
        return cls(order, _factor(moment[order][:, order]))


def pack_fitted(weight: Tensor, inputs: Elimination, fmt: Format, *, transposed: bool) -> Tensor:
    """Packed rows of W [n, d], uint8, fitted to these inputs.

    weight: W; with `transposed` the rows of W^T instead, [inputs, outputs], whose groups lie along
    the outputs. inputs: in groups of fmt.group, with `transposed` of 1. Where they were all zero,
    or not finite, weights go to their nearest levels. Weights must be finite, see
    `rounding.check_finite`.
    """
    work = _neurons if transposed else _columns
    return pack_rows(work(weight.detach().float(), inputs.order, inputs.factor, fmt), fmt)


def _order(diagonal: Tensor, group: int) -> Tensor:
    """Columns by descending second moment, whole groups at a time: errors of large inputs find the
    most columns left to go to."""
    n = len(diagonal)
    groups = F.pad(diagonal, (0, -n % group)).view(-1, group)
    inside = groups.argsort(dim=1, descending=True, stable=True)
    mean = groups.mean(1)
    mean[-1] *= group / (group - -n % group)  # a short one
    first = mean.argsort(dim=0, descending=True, stable=True)
    order = (first[:, None] * group + inside[first]).flatten()
    return order[order < n]


def _factor(moment: Tensor) -> Tensor:
    """Upper triangular U with U^T U the damped moment's inverse."""
    n = len(moment)
    identity = torch.eye(n, device=moment.device)
    mean = moment.diagonal().mean()
    if not (bool(mean > 0) and bool(moment.isfinite().all())):
        return identity
    damped = moment / mean + DAMPING * identity
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1).contiguous()


def _levels(w: Tensor, bits: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and offset, float16 [...], for w [..., group] with little squared error, each weighted
    by importance [group]: the best of a few cut ranges, then twice the least squares for its codes.
    """
    weights = torch.ones_like(w[..., :1]) if importance is None else importance

    def loss(scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        codes = codes_of(w, scale, offset, bits)
        value = scale.float().unsqueeze(-1) * codes + offset.float().unsqueeze(-1)
        return ((value - w).square_() * weights).sum(-1), codes

    low, high = w.amin(-1), w.amax(-1)
    scale, offset = grid(w, bits)
    least, codes = loss(scale, offset)

    def take(s: Tensor, o: Tensor) -> None:
        nonlocal scale, offset, least, codes
        now, found = loss(s, o)
        better = now < least
        scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
        codes = torch.where(better.unsqueeze(-1), found, codes)
        least = torch.minimum(now, least)

    for a in _CUTS:
        for b in _CUTS:
            if a or b:
                span = high - low
                take((span * ((1 - a - b) / (2**bits - 1))).half(), (low + a * span).half())
    spread = weights.expand_as(w)
    total = spread.sum(-1)
    for _ in range(2):
        mean_c, mean_w = (spread * codes).sum(-1) / total, (spread * w).sum(-1) / total
        centred = (codes - mean_c.unsqueeze(-1)) * spread
        variance = (centred * codes).sum(-1)
        s = ((centred * w).sum(-1) / variance.clamp_min(1e-20)).half()
        s = torch.where((variance > 0) & (s > 0), s, scale)
        take(s, (mean_w - s.float() * mean_c).half())
    return scale, offset


def _columns(weight: Tensor, order: Tensor, factor: Tensor, fmt: Format) -> Codes:
    """Groups along the inputs: `order` keeps each one together."""
    n, d = weight.shape
    width, groups = blocks_of(d) * BLOCK, blocks_of(d) * BLOCK // fmt.group
    codes = torch.zeros(width, n, dtype=torch.uint8, device=weight.device)
    scales = torch.zeros(groups, n, dtype=torch.float16, device=weight.device)
    offsets = torch.zeros_like(scales)
    w = weight.t()[order].contiguous()  # a column lies in one piece
    places = order.tolist()
    inverse = factor.diagonal().reciprocal()
    for begin in range(0, d, _COLUMNS):
        end = min(begin + _COLUMNS, d)
        errors = w.new_empty(end - begin, n)
        for k in range(begin, end):
            group = places[k] // fmt.group
            if k == 0 or group != places[k - 1] // fmt.group:
                size = min(fmt.group, d - group * fmt.group)
                now = w[k : k + size].t().contiguous()
                scale, offset = _levels(now, fmt.bits, inverse[k : k + size].square())
                scales[group], offsets[group] = scale, offset
                step, zero = scale.float(), offset.float()
                over = torch.where(step > 0, 1 / step, torch.zeros_like(step))
            code = ((w[k] - zero) * over).round_().clamp_(0, 2**fmt.bits - 1)
            codes[places[k]] = code.to(torch.uint8)
            error = (w[k] - code * step - zero) * inverse[k]
            errors[k - begin] = error
            w[k + 1 : end].addr_(factor[k, k + 1 : end], error, alpha=-1)
        w[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    # Clones: of a single group t() is contiguous as it stands, but not in the bytes' sense.
    laid = [t.t().clone(memory_format=torch.contiguous_format) for t in (codes, scales, offsets)]
    return Codes(*laid)


def _neurons(rows: Tensor, order: Tensor, factor: Tensor, fmt: Format) -> Codes:
    """Groups along the outputs: a row of W^T has its own, chosen when it is reached."""
    f, d = rows.shape
    padding = blocks_of(d) * BLOCK - d
    width, groups = d + padding, (d + padding) // fmt.group
    codes = torch.zeros(f, width, dtype=torch.uint8, device=rows.device)
    scales = torch.zeros(f, groups, dtype=torch.float16, device=rows.device)
    offsets = torch.zeros_like(scales)
    w = rows[order].contiguous()
    places = order.tolist()
    inverse = factor.diagonal().reciprocal().tolist()
    for begin in range(0, f, _COLUMNS):
        end = min(begin + _COLUMNS, f)
        errors = w.new_empty(end - begin, d)
        for k in range(begin, end):
            row = w[k].view(1, -1)
            if padding:
                row = F.pad(row, (0, padding), mode="replicate")
            now = row.view(groups, fmt.group)
            scale, offset = _levels(now, fmt.bits)
            code = codes_of(now, scale, offset, fmt.bits)
            value = scale.float().unsqueeze(-1) * code + offset.float().unsqueeze(-1)
            place = places[k]
            codes[place] = code.view(-1).to(torch.uint8)
            scales[place], offsets[place] = scale, offset
            torch.sub(w[k], value.view(-1)[:d], out=errors[k - begin])
            errors[k - begin].mul_(inverse[k])
            w[k + 1 : end].addr_(factor[k, k + 1 : end], errors[k - begin], alpha=-1)
        w[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    return Codes(codes, scales, offsets)
