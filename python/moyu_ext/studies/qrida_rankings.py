"""Who may rank the neurons of a token: QRIDA's shadows and what they are compared with.

A ranking gives each layer a score per neuron; compared are the sets of the k highest. `share` says
what a method built on it reads per token, of the dense MLP's bytes in bfloat16, for a hidden size
that is a multiple of 256.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.train_router import train_router
from ..methods.base import Method, Rule, TokenRule
from ..models.families import MlpSite, record_inputs
from ..models.weights import MlpWeights, read_share
from ..reference import ACTIVATIONS
from ..shadow.build import build_shadow
from ..shadow.feedback import build_for
from ..shadow.pack import BLOCK, Shadow
from ..shadow.reference import shadow_scores
from .setting import Setting, Subject

# x [n, d], act(gate) [n, f], a [n, f] (both a(x) where ungated) -> scores [n, f], largest kept.
Scorer = Callable[[Tensor, Tensor, Tensor], Tensor]
BITS = ((4, 4), (3, 3), (2, 2), (1, 1), (2, 1), (1, 2), (3, 1))
EXACT, CATS, SIGNS = "exact norm (TDA)", "gate (CATS)", "gate's signs (SparseInfer)"
WEIGHTED, STATIC, ROUTER = "gate x c x rms(up)", "static set", "trained router (RODA)"
OWN = "shadow 2 bits, fitted to own text"
_ROWS = 8


@dataclass(frozen=True, eq=False)
class Ranking:
    """A scorer per layer, and the share of bytes at a density."""

    label: str
    scorers: Sequence[Scorer]
    share: Callable[[float], float]


@dataclass(frozen=True, eq=False)
class Ranked(Method):
    """The round(density * f) neurons that a ranking scores highest, per token; for scoring only."""

    ranking: Ranking
    density: float = field(default=0.33)

    name = "ranked"
    level = "token"

    @property
    def plan(self) -> str:
        """See `Method`."""
        return "given"

    def bind(self, index: int, weights: MlpWeights) -> Rule:
        """See `Method`."""
        return _Top(self.ranking.scorers[index], size(self.density, weights.f))


class _Top(TokenRule):
    def __init__(self, score: Scorer, k: int) -> None:
        self.score, self.k = score, k

    def apply(self, x: Tensor, weights: MlpWeights) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a ranking is for scoring, not for decoding")

    def active(self, x: Tensor, gate: Tensor, product: Tensor) -> Tensor:
        return highest(self.score(x, gate, product).expand_as(product), self.k)


def size(density: float, f: int) -> int:
    """Neurons that a density keeps, at least one."""
    return max(1, round(density * f))


def highest(scores: Tensor, k: int) -> Tensor:
    """The k highest of each row, bool; ties fall anywhere."""
    places = scores.topk(k, dim=-1, sorted=False).indices
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, places, True)


def shadow_share(bits_gate: int, bits_up: int, matrices: int = 3) -> float:
    """Bytes of a shadow with its bfloat16 scales over those of the MLP in bfloat16, for a hidden
    size that is a multiple of 256."""
    widths = [bits_gate, bits_up][3 - matrices :]
    return sum(bits + 16 / BLOCK for bits in widths) / (16 * matrices)


def layer_inputs(subject: Subject, rows: Tensor, context: int = 0) -> list[Tensor]:
    """What each MLP of the dense model gets on rows [n, length]: x [n * (length - context), d]."""
    found: list[list[Tensor]] = [[] for _ in subject.sites]

    def keep(index: int, x: Tensor) -> None:
        found[index].append(x.detach()[:, context:].reshape(-1, x.shape[-1]))

    with torch.no_grad(), record_inputs(subject.model, subject.sites, keep):
        for batch in rows.split(_ROWS):
            subject.model(input_ids=batch, use_cache=False)
    return [torch.cat(parts) for parts in found]


def rankings(
    setting: Setting, subject: Subject, documents: Sequence[str] | None, rows: Tensor
) -> list[Ranking]:
    """All rankings of one model. `documents` and `rows` (ids of the same kind of text) are what
    those that need training or calibration learn from; None: without a trained router."""
    weights = [site.weights() for site in subject.sites]
    inputs = layer_inputs(subject, rows)
    matrices = weights[0].matrices
    after_up = partial(read_share, "product", matrices=matrices)
    found = [Ranking(EXACT, [_exact(w) for w in weights], after_up)]
    if matrices == 3:
        gates: list[Scorer] = [lambda x, gate, a: gate.abs()] * len(weights)
        after_gate = partial(read_share, "gate", matrices=matrices)
        scales = [_up_scale(x, w) for x, w in zip(inputs, weights, strict=True)]
        found += [
            Ranking(CATS, gates, after_gate),
            Ranking(WEIGHTED, [_scaled_gate(s) for s in scales], after_gate),
        ]
    found.append(Ranking(SIGNS, [_signs(w) for w in weights], lambda r: r + 1 / (16 * matrices)))
    for pair in BITS:
        shadows = [build_shadow(w, *pair) for w in weights]
        found.append(shadow_ranking(name_of(pair), shadows, weights))
    for pair in ((2, 2), (1, 1)):
        fitted = [build_for(x, w, *pair) for x, w in zip(inputs, weights, strict=True)]
        found.append(shadow_ranking(f"{name_of(pair)}, fitted to text", fitted, weights))
    found.append(shadow_ranking(OWN, setting.own_shadows(subject).layers, weights))
    for bits in (4, 2):
        share = shadow_share(bits, bits, matrices)
        found.append(
            Ranking(
                f"SVD, bytes of {bits} bits",
                [_svd(w, share) for w in weights],
                lambda r, share=share: r + share,  # type: ignore[misc]
            )
        )
    if documents is not None:
        found.append(_trained(setting, subject, documents, matrices))
    means = [_mean_square(x, w) for x, w in zip(inputs, weights, strict=True)]
    found.append(Ranking(STATIC, [_constant(m) for m in means], lambda r: r))
    return found


def shadow_ranking(label: str, shadows: Sequence[Shadow], weights: Sequence[MlpWeights]) -> Ranking:
    """The estimate n^ of shadows, one per layer."""
    one = shadows[0]
    share = shadow_share(one.bits_gate, one.bits_up, 3 if one.gated else 2)
    scorers = [_shadow(s, w) for s, w in zip(shadows, weights, strict=True)]
    return Ranking(label, scorers, lambda r: r + share)


def name_of(bits: tuple[int, int]) -> str:
    """The label of a ranking by shadows of (gate, up) bits."""
    if bits[0] != bits[1]:
        return f"shadow {bits[0]}/{bits[1]} bits"
    return f"shadow {bits[0]} bit{'s' if bits[0] > 1 else ''}"


def _exact(w: MlpWeights) -> Scorer:
    c = w.column_norms()
    return lambda x, gate, a: a.abs() * c


def _shadow(s: Shadow, w: MlpWeights) -> Scorer:
    c = w.column_norms()
    return lambda x, gate, a: shadow_scores(
        x, s.data, c, w.gate_bias, w.up_bias, s.gated, s.bits_gate, s.bits_up, w.activation
    )


def _up_scale(x: Tensor, w: MlpWeights) -> Tensor:
    with torch.no_grad():
        return w.project(x, "up").square().mean(0).sqrt() * w.column_norms()


def _scaled_gate(scale: Tensor) -> Scorer:
    return lambda x, gate, a: gate.abs() * scale


def _mean_square(x: Tensor, w: MlpWeights) -> Tensor:
    with torch.no_grad():
        return w.activations(x)[1].square().mean(0) * w.column_norms() ** 2


def _constant(values: Tensor) -> Scorer:
    return lambda x, gate, a: values


def _signs(w: MlpWeights) -> Scorer:
    """SparseInfer (arXiv 2411.12692): how many products w_j x_j of the gate are positive, by the
    sign bits alone; more mean a larger pre-activation. It has no notion of up or of W_down."""
    matrix = w.rows(w.first).sign()
    return lambda x, gate, a: F.linear(x.sign(), matrix)


def _svd(w: MlpWeights, share: float) -> Scorer:
    """n^ from gate and up at the rank whose bfloat16 factors take this share of the MLP's bytes."""
    rank = max(1, round(share * w.matrices * w.f * w.d / ((w.matrices - 1) * (w.f + w.d))))

    def low(matrix: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(matrix.detach().float(), full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ v[:rank]

    up, c, act = low(w.rows("up")), w.column_norms(), ACTIVATIONS[w.activation]
    if w.gate is None:
        return lambda x, gate, a: act(F.linear(x, up, w.up_bias)).abs() * c
    gate = low(w.rows("gate"))
    return lambda x, _, a: (
        (act(F.linear(x, gate, w.gate_bias)) * F.linear(x, up, w.up_bias)).abs() * c
    )


def _trained(
    setting: Setting, subject: Subject, documents: Sequence[str], matrices: int
) -> Ranking:
    """A predictor W_2 W_1 x + b (DejaVu) as large as 2-bit shadows, trained on the documents."""
    site: MlpSite = subject.sites[0]
    share = shadow_share(2, 2, matrices)
    rank = max(1, round(share * matrices * site.d * site.f / (site.d + site.f)))
    setting.log(f"{subject.name}: training a router of rank {rank}")
    router = train_router(
        subject.model,
        subject.tokenizer,
        documents,
        rank=rank,
        max_tokens=setting.size(32768, 1024),
        epochs=setting.size(6, 1),
        progress=False,
        seed=setting.seed,
    )
    scorers: list[Scorer] = [
        lambda x, gate, a, layer=layer: layer.scores(x)  # type: ignore[misc]
        for layer in router.layers
    ]
    return Ranking(ROUTER, scorers, lambda r: r + share)
