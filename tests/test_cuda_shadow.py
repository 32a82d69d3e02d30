"""The shadow's operators on a GPU; skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moyu_ext.models.weights import MlpWeights
from moyu_ext.reference import masked_mlp
from moyu_ext.shadow.build import build_shadow
from moyu_ext.shadow.reference import choose, product, projections, shadow_scores, tiers
from test_cuda import (  # noqa: F401
    Make,
    Prompt,
    capture,
    check_mlp,
    on_gpu,
    pytestmark,
    tokens,
    wide,
)
from test_ops import DTYPES, SIZES, make
from torch import Tensor

from moyu_ext import ops

WEIGHTS = ("gate", "up", "down_t", "gate_bias", "up_bias", "down_bias")


class Case:
    """A random MLP with its shadow, on the host and on the GPU."""

    def __init__(
        self, d: int, f: int, rows: int, dtype: torch.dtype, bits: tuple[int, int], **kind: Any
    ) -> None:
        self.m = make(d, f, rows, dtype, **kind)
        self.gpu = on_gpu(self.m)
        weights = MlpWeights(*[self.m[name] for name in WEIGHTS], "silu")
        shadow = build_shadow(weights, *bits)
        self.bits = (shadow.bits_gate, shadow.bits_up)
        self.shadow, self.norms = shadow.data, weights.column_norms()
        self.gpu_shadow = (self.shadow.cuda(), self.norms.cuda())
        self.inverse = (1 / self.norms).cuda()

    def scores(self, x: Tensor | None = None) -> Tensor:
        g = self.gpu
        return ops.shadow_scores(
            g["x"] if x is None else x, *self.gpu_shadow, g["gate_bias"], g["up_bias"],
            g["gate"] is not None, *self.bits, "silu",
        )  # fmt: skip

    def plain_scores(self) -> Tensor:
        m = self.m
        return shadow_scores(
            m["x"], self.shadow, self.norms, m["gate_bias"], m["up_bias"], m["gate"] is not None,
            *self.bits, "silu",
        )  # fmt: skip

    def mlp(self, epsilon: Tensor | None, k: int, estimated: int = 0) -> tuple[Tensor, Tensor]:
        weights = [self.gpu[name] for name in WEIGHTS]
        inverse = self.inverse if estimated else None
        out, counts = ops.shadow_mlp(
            self.gpu["x"], *weights, *self.gpu_shadow, inverse, None, epsilon, k, estimated,
            *self.bits, "silu",
        )  # fmt: skip
        return out, counts

    def check(self, epsilon: float | None, k: int) -> None:
        """By the operator's own scores: rounding may swap two of nearly equal score."""
        eps = None if epsilon is None else torch.tensor([epsilon])
        active = choose(self.scores().cpu(), eps, k)
        out, counts = self.mlp(None if eps is None else eps.cuda(), k)
        assert torch.equal(counts[0].cpu().long(), active.sum(-1)) and not counts[1].any()
        check_mlp(out, self.m, active, "silu", self.m["x"].dtype)

    def check_tiers(self, k: int, estimated: int) -> None:
        m, act = self.m, "silu"
        exact, rest = tiers(self.scores().cpu(), k, estimated)
        pair = projections(
            m["x"], self.shadow, m["gate_bias"], m["up_bias"], m["gate"] is not None, *self.bits
        )
        values = torch.where(rest, product(*pair, act), torch.zeros(())).double()
        want = masked_mlp(**wide(m), active=exact, activation=act, dtype=torch.float64)
        want += values @ m["down_t"].double()
        out, counts = self.mlp(None, k, estimated)
        assert counts.tolist() == [[k] * len(out), [estimated] * len(out)]
        close = 4 * torch.finfo(out.dtype).eps + 1e-4
        assert (out.cpu().double() - want).abs().max() <= close * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, (4096, 300), (16, 11008)])
@pytest.mark.parametrize("bits", [(2, 2), (1, 4), (4, 1), (3, 3)])
def test_shadow_operators(dtype: torch.dtype, size: tuple[int, int], bits: tuple[int, int]) -> None:
    for rows, gated in ((1, True), (2, True), (3, False), (8, True), (11, True)):
        case = Case(*size, rows, dtype, bits, gated=gated, bias=rows == 3)
        got, plain = case.scores().cpu(), case.plain_scores()
        assert (got - plain).abs().max() <= 1e-4 * plain.abs().max() + 1e-6
        f = size[1]
        for k in (0, f // 3, f):
            case.check(None, k)
        for quantile in (0.0, 0.6):
            case.check(float(plain.flatten()[:100_000].quantile(quantile)), 0)
        case.check(float("inf"), 0)


def test_ties_go_to_the_lower_index() -> None:
    case = Case(64, 300, 2, torch.float32, (2, 2))
    for shadow, norms in ((case.shadow, case.norms), case.gpu_shadow):
        shadow[1:] = shadow[0].clone()
        norms.fill_(1.0)
    assert (case.scores() == case.scores()[:, :1]).all()
    for k in (1, 37, 299):
        case.check(None, k)


def test_the_same_as_on_the_cpu() -> None:
    case = Case(512, 2048, 2, torch.float32, (2, 2))
    weights = [case.m[name] for name in WEIGHTS]
    for epsilon, k in ((None, 600), (torch.tensor([0.05]), 0)):
        on_cpu = ops.shadow_mlp(
            case.m["x"], *weights, case.shadow, case.norms, None, None, epsilon, k, 0, *case.bits,
            "silu",
        )  # fmt: skip
        got = case.mlp(None if epsilon is None else epsilon.cuda(), k)
        assert (got[1].cpu() - on_cpu[1]).abs().max() <= 2
        torch.testing.assert_close(got[0].cpu(), on_cpu[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiers(dtype: torch.dtype) -> None:
    for rows, gated in ((1, True), (2, False), (8, True), (11, True)):
        case = Case(256, 500, rows, dtype, (2, 2), gated=gated)
        for k, estimated in ((0, 500), (100, 150), (100, 400), (499, 1)):
            case.check_tiers(k, estimated)
            first = case.mlp(None, k, estimated)[0]
            assert torch.equal(first, case.mlp(None, k, estimated)[0])


def test_graph_replays_with_other_inputs_and_thresholds() -> None:
    case = Case(128, 300, 3, torch.float16, (2, 2))
    epsilon = torch.zeros(1, device="cuda")
    top, (top_out, top_counts) = capture(lambda: case.mlp(None, 100))
    two, (two_out, _) = capture(lambda: case.mlp(None, 100, 100))
    graph, (out, counts) = capture(lambda: case.mlp(epsilon, 0))
    seen = set()
    for value in (0.0, 0.02, 1e9, 0.05):
        case.gpu["x"].normal_()
        epsilon.fill_(value)
        graph.replay()
        top.replay()
        two.replay()
        eager = case.mlp(epsilon, 0)
        assert torch.equal(out, eager[0]) and torch.equal(counts, eager[1])
        assert torch.equal(top_out, case.mlp(None, 100)[0]) and top_counts[0].tolist() == [100] * 3
        assert torch.equal(two_out, case.mlp(None, 100, 100)[0])
        seen.add(int(counts[0, 0]))
    assert {0, 300} < seen


def test_same_bits_from_run_to_run() -> None:
    case = Case(512, 2048, 2, torch.bfloat16, (2, 1))
    epsilon = torch.tensor([0.05], device="cuda")
    for args in ((None, 700), (epsilon, 0)):
        first = case.mlp(*args)[0]
        assert all(torch.equal(first, case.mlp(*args)[0]) for _ in range(10))


def test_a_row_does_not_depend_on_the_others() -> None:
    case = Case(256, 500, 4, torch.float32, (2, 2))
    scores = case.scores()
    for r in range(4):
        assert torch.equal(case.scores(case.gpu["x"][r : r + 1]), scores[r : r + 1])


def test_opcheck_and_bad_arguments() -> None:
    case = Case(24, 16, 2, torch.float32, (2, 2))
    weights = [case.gpu[name] for name in WEIGHTS]
    shadow, norms = case.gpu_shadow
    check = torch.library.opcheck
    check(ops.shadow_scores, (case.gpu["x"], shadow, norms, None, None, True, 2, 2, "silu"))
    inverse = 1 / norms
    given = (case.gpu["x"], *weights, shadow, norms)
    check(ops.shadow_mlp, (*given, None, None, None, 5, 0, 2, 2, "silu"))
    check(ops.shadow_mlp, (*given, inverse, None, None, 5, 4, 2, 2, "silu"))

    def run(shadow: Tensor = shadow, norms: Tensor = norms, k: int = 5, **changes: Any) -> None:
        inverse, epsilon = changes.get("inverse"), changes.get("epsilon")
        ops.shadow_mlp(
            case.gpu["x"], *weights, shadow, norms, inverse, None, epsilon, k,
            changes.get("estimated", 0), 2, 2, "silu",
        )  # fmt: skip

    with pytest.raises(RuntimeError, match=r"shadow must be .* on cuda:0, got .* on cpu"):
        run(shadow=case.shadow)
    with pytest.raises(RuntimeError, match=r"norms must be .* on cuda:0"):
        run(norms=case.norms)
    with pytest.raises(RuntimeError, match="epsilon must be one float32 on cuda:0"):
        run(epsilon=torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"k must lie in \[0, 16\]"):
        run(k=17)
    with pytest.raises(RuntimeError, match=r"estimated must lie in \[0, 11\]"):
        run(estimated=12, inverse=inverse)
    with pytest.raises(RuntimeError, match="inverse must be given"):
        run(estimated=4)
    with pytest.raises(RuntimeError, match=r"inverse must be .* on cuda:0"):
        run(estimated=4, inverse=inverse.cpu())
    moved = torch.empty(shadow.numel() + 1, dtype=torch.uint8, device="cuda")[1:]
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        run(shadow=moved.view_as(shadow).copy_(shadow))
    torch.cuda.synchronize()
