"""CETT, the cumulative error of tail truncation (arXiv 2406.12569, eq. 14), and the search for the
largest threshold that keeps it at a target.

For a token x with neuron contributions n_i(x) (eq. 12) and scores z_i,

    CETT(x; eps) = || sum_{i: z_i < eps} n_i(x) ||_2 / || sum_i n_i(x) ||_2

where z_i is the neuron norm ||n_i(x)||_2 ("product"), |act(g_i)| ("gate"), or the prompt statistic
of the sequence ("continuation"). Everything is float32; 0 / 0 is 0, so a token whose MLP output is
zero loses nothing. An output bias stays outside the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..models.weights import MlpWeights

# The search ends with two thresholds, one on each side of the target, whose mean CETT differ by at
# most this, or by a quarter of the target if that is less.
TOLERANCE = 2.5e-4
_ROWS = 256  # tokens whose [rows, f] activations are held at once
_GRID = 16
# Where a pass looks inside a bracket, relative to the point where a straight line meets the
# target; the middle is always among them, so that a bracket at least halves.
_SPREAD = (-0.05, -0.005, 0.005, 0.05)


def cett(activations: Tensor, dropped: Tensor, down_t: Tensor) -> Tensor:
    """CETT per token, float32 [tokens].

    `activations` a_i(x): [tokens, f]; `dropped`: bool, broadcast to [tokens, f];
    `down_t`: W_down neuron-major, [f, d].
    """
    a, down_t = activations.float(), down_t.float()
    return _ratio(_only(a, dropped) @ down_t, torch.linalg.vector_norm(a @ down_t, dim=-1))


def _only(a: Tensor, which: Tensor) -> Tensor:
    return torch.where(which, a, torch.zeros((), dtype=a.dtype, device=a.device))


def _ratio(dropped_sum: Tensor, total_norm: Tensor) -> Tensor:
    error = torch.linalg.vector_norm(dropped_sum, dim=-1)
    return torch.where(error == 0, error, error / total_norm)


class LayerTokens:
    """The calibration tokens of one layer: inputs x [tokens, d] and the layer's weights.

    `score` is "product" or "gate", or a function that gives the scores [n, f] of inputs [n, d]
    in their own dtype. With `lengths` (tokens of each text, in order) the rule is
    that of a sequence: the first half of a text (rounded down) is its prompt, z_i the root mean
    square of ||n_i|| over it, and CETT is measured on the rest; the prompt itself stays dense.
    Memory: the inputs, float32 weights and a few [256, f] blocks.

    Raises ConfigurationError where an output is not finite.
    """

    def __init__(
        self,
        x: Tensor,
        weights: MlpWeights,
        score: str | Callable[[Tensor], Tensor] = "product",
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.x = x
        self.score = score
        self.lengths = lengths
        self._weights = weights
        self._wide = weights.to_float32()
        self._norms = weights.column_norms()

    @property
    def measured(self) -> int:
        """Tokens on which CETT is measured."""
        return len(self.x) if self.lengths is None else sum(n - n // 2 for n in self.lengths)

    def _neurons(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Activations and token-level scores [rows, f]."""
        first, a = self._wide.activations(self.x[rows].float())
        if callable(self.score):
            return a, self.score(self.x[rows])
        return a, first.abs() if self.score == "gate" else a.abs() * self._norms

    def _blocks(self) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Rows, their activations, and their scores ([rows, f] or [1, f]; None in a prompt)."""
        if self.lengths is None:
            for rows in _slices(0, len(self.x)):
                yield rows, *self._neurons(rows)
            return
        start = 0
        for length in self.lengths:
            middle = start + length // 2
            squares = torch.zeros_like(self._norms)
            for rows in _slices(start, middle):
                a, norms = self._neurons(rows)
                squares += norms.square().sum(0)
                yield rows, a, None
            statistic = (squares / max(middle - start, 1)).sqrt().unsqueeze(0)
            for rows in _slices(middle, start + length):
                yield rows, self._neurons(rows)[0], statistic
            start += length

    def measure(self, epsilons: Sequence[float]) -> tuple[Tensor, Tensor]:
        """CETT of each measured token at each threshold, [K, measured], and density, [K]."""
        cuts = torch.tensor(epsilons, dtype=torch.float32).tolist()
        ratios: list[Tensor] = []
        dropped = torch.zeros(len(cuts), dtype=torch.float64)
        for _, a, scores in self._blocks():
            if scores is None:
                continue
            total = torch.linalg.vector_norm(a @ self._wide.down_t, dim=-1)
            if not bool(torch.isfinite(total).all()):
                raise ConfigurationError(
                    "the MLP's output on the calibration tokens is not finite (NaN or infinity); "
                    "check the weights, and calibrate in float32 or bfloat16 rather than float16"
                )
            below = [scores < cut for cut in cuts]
            ratios.append(
                torch.stack([_ratio(_only(a, b) @ self._wide.down_t, total) for b in below])
            )
            dropped += torch.stack([b.float().mean() * len(a) for b in below]).double().cpu()
        return torch.cat(ratios, 1), 1 - dropped / self.measured

    def output(self, epsilon: float) -> Tensor:
        """The MLP's output [tokens, d] with the neurons below epsilon left out, in x's dtype."""
        out = torch.empty_like(self.x)
        cut = torch.tensor(epsilon, dtype=torch.float32).item()
        for rows, a, scores in self._blocks():
            y = (a if scores is None else _only(a, ~(scores < cut))) @ self._wide.down_t
            bias = self._weights.down_bias
            out[rows] = (y if bias is None else y + bias.float()).to(out.dtype)
        return out

    def quantiles(self, count: int) -> Tensor:
        """`count` quantiles of the positive scores of the first block, and the largest of all."""
        largest = torch.zeros((), device=self.x.device)
        first: Tensor | None = None
        for _, _, scores in self._blocks():
            if scores is not None:
                first = scores if first is None else first
                largest = torch.maximum(largest, scores.max())
        assert first is not None
        positive = first[first > 0].sort().values
        places = torch.linspace(0, max(len(positive) - 1, 0), count).long()
        return torch.cat([positive[places] if len(positive) else positive, largest.view(1)]).cpu()


def _slices(start: int, stop: int) -> Iterator[slice]:
    for begin in range(start, stop, _ROWS):
        yield slice(begin, min(begin + _ROWS, stop))


def largest_epsilon(
    mean_cett: Callable[[list[float]], list[float]], target: float, scores: Tensor
) -> float:
    """The largest threshold whose mean CETT is at most `target`, exact to `TOLERANCE` of CETT.

    `mean_cett` gives the mean CETT at several thresholds (ascending) in one pass over the tokens.
    `scores`: float32, spread like the neurons' scores, the largest score among them.

    As a function of the threshold the mean is a staircase that need not rise everywhere. A first
    pass at quantiles of the scores finds the last one that meets the target; later passes look
    between the largest threshold known to meet it and the next one known, until their CETT differ
    by at most the tolerance or no float32 lies between. So the result meets the target, and a
    threshold that is known to be just above it does not; a dip back below the target that is
    narrower than a step of the first pass can be missed.

    Returns 0 (every neuron stays) for a target of 0. Where dropping everything meets the target,
    as in a layer that is silent on most tokens, returns the smallest threshold that does so.
    """
    if target == 0:
        return 0.0
    tolerance = min(TOLERANCE, target / 4)
    top = _above_all(scores)
    places = torch.linspace(0, len(scores) - 1, _GRID).long()
    known = {0.0: 0.0}
    candidates = sorted({*scores.sort().values[places].tolist(), top} - known.keys())
    while candidates:
        known.update(zip(candidates, mean_cett(candidates), strict=True))
        lower = max(epsilon for epsilon, mean in known.items() if mean <= target)
        if lower == top:
            return top
        upper = min(epsilon for epsilon in known if epsilon > lower)
        if known[upper] - known[lower] <= tolerance:
            return lower
        candidates = _between(lower, upper, known[lower], known[upper], target)
    return lower


def _above_all(scores: Tensor) -> float:
    """The smallest normal float32 above every score."""
    largest = scores.max().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.nextafter(largest, torch.full_like(largest, torch.inf)).item()


def _between(
    lower: float, upper: float, low_mean: float, high_mean: float, target: float
) -> list[float]:
    """Thresholds to try strictly between two; none if no float32 lies between."""
    width = upper - lower
    crossing = (target - low_mean) / (high_mean - low_mean)
    shares = [0.5, *(crossing + spread for spread in _SPREAD)]
    rounded = torch.tensor([lower + width * share for share in shares], dtype=torch.float32)
    return sorted({epsilon for epsilon in rounded.tolist() if lower < epsilon < upper})
