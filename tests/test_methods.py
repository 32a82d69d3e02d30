"""The methods' configurations and rules, against formulas written out here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from moyu_ext.errors import ArtifactError, ConfigurationError
from moyu_ext.methods import METHODS, QRIDA, RIDA, RODA, SRIDA, STDA, TDA, Dense, OnlineRODA
from moyu_ext.methods.base import SequenceRule, TokenRule, describe
from moyu_ext.models.weights import MlpWeights

D, F = 8, 20


def weights(gated: bool = True, activation: str = "silu", seed: int = 0) -> MlpWeights:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    gate = draw(F, D) if gated else None
    return MlpWeights(gate, draw(F, D), draw(F, D), None, None, None, activation)


def activations(w: MlpWeights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(act(gate), a) of a SiLU or ReLU MLP."""
    act = torch.nn.functional.silu if w.activation == "silu" else torch.relu
    if w.gate is None:
        a = act(x @ w.up.t())
        return a, a
    gate = act(x @ w.gate.t())
    return gate, gate * (x @ w.up.t())


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("score", ["product", "gate"])
def test_tda(score: str, gated: bool) -> None:
    w = weights(gated, "silu" if gated else "relu")
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    gate, a = activations(w, x)
    norms = a.abs() * w.down_t.norm(dim=1)
    values = norms if score == "product" else gate.abs()
    eps = float(values[values > 0].median())
    rule = TDA(eps, score=score).bind(0, w)
    assert isinstance(rule, TokenRule)
    want = values >= eps
    assert 0 < want.sum() < want.numel()
    assert torch.equal(rule.active(x, gate, a), want)
    out, counts = rule.apply(x, w)
    torch.testing.assert_close(out, (a * want) @ w.down_t, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == want.sum(1).tolist()


def test_tda_takes_one_epsilon_per_layer() -> None:
    w = weights()
    x = torch.randn(3, D)
    method = TDA([0.0, float("inf")])
    assert method.bind(0, w).apply(x, w)[1].tolist() == [F] * 3
    assert method.bind(1, w).apply(x, w)[1].tolist() == [0] * 3


def test_nan_counts_as_active() -> None:
    w = weights()
    a = torch.full((1, F), float("nan"))
    assert TDA(1.0).bind(0, w).active(torch.zeros(1, D), a, a).all()


def test_dense_uses_everything() -> None:
    w = weights()
    x = torch.randn(4, D)
    out, counts = Dense().bind(0, w).apply(x, w)
    torch.testing.assert_close(out, activations(w, x)[1] @ w.down_t, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == [F] * 4


def test_stda_is_the_root_mean_square() -> None:
    w = weights()
    a = torch.randn(7, F)
    s = (a.abs() * w.down_t.norm(dim=1)).square().mean(0).sqrt()
    eps = float(s.median())
    rule = STDA(eps).bind(0, w)
    assert isinstance(rule, SequenceRule)
    running = rule.statistic(a).sum(0)
    torch.testing.assert_close((running / 7).sqrt(), s)
    # One ulp from the median itself, the comparison may go either way.
    clear = (s - eps).abs() > 1e-5
    assert torch.equal(rule.choose(running, 7)[clear], (s >= eps)[clear])
    both = rule.choose(torch.stack([running, 4 * running]), torch.tensor([[7], [28]]))
    assert torch.equal(both[0], both[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["contribution", "griffin"])
def test_srida_keeps_the_top(score: str, dtype: torch.dtype) -> None:
    w = weights()
    a = torch.randn(9, F).to(dtype)
    rule = SRIDA(0.3, score=score).bind(0, w)
    assert isinstance(rule, SequenceRule)
    values = a.float()
    if score == "griffin":
        s = (values / values.norm(dim=1, keepdim=True)).norm(dim=0)
    else:
        s = (values.abs() * w.down_t.norm(dim=1)).square().mean(0).sqrt()
    statistic = rule.statistic(a)
    assert statistic.dtype == torch.float32 and bool((statistic >= 0).all())
    chosen = rule.choose(statistic.sum(0), 9)
    assert chosen.nonzero().flatten().tolist() == sorted(s.argsort(descending=True)[:6].tolist())


def test_srida_ties_go_to_the_lower_index_and_density_rounds() -> None:
    w = weights()
    for density, count in ((0.5, 10), (1.0, F), (0.001, 1), (0.12, 2)):
        rule = SRIDA(density).bind(0, w)
        assert isinstance(rule, SequenceRule)
        chosen = rule.choose(torch.ones(2, F), 3)
        assert [row.nonzero().flatten().tolist() for row in chosen] == [list(range(count))] * 2


def test_griffin_ignores_a_token_without_activations() -> None:
    rule = SRIDA(0.5, score="griffin").bind(0, weights())
    assert isinstance(rule, SequenceRule)
    assert not rule.statistic(torch.zeros(2, F)).any()


@pytest.mark.parametrize("kind", [TDA, STDA])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "epsilon of layer 0 is nan"),
        (-0.1, "epsilon of layer 0 is -0.1"),
        ([0.1, float("nan")], "epsilon of layer 1 is nan"),
        (torch.tensor([0.1, -2.0]), "epsilon of layer 1 is -2.0"),
        ([], "thresholds is empty"),
        ("much", "expected Thresholds"),
        (None, "expected Thresholds"),
        (SimpleNamespace(epsilon=torch.tensor([float("nan")])), "epsilon of layer 0 is nan"),
    ],
)
def test_bad_thresholds(kind: Any, value: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        kind(value)


@pytest.mark.parametrize("density", [0, 0.0, -0.5, 1.01, float("nan"), float("inf"), True, "half"])
def test_bad_density(density: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"density is .*expected a number in \(0, 1\]"):
        SRIDA(density)


def test_other_bad_settings() -> None:
    with pytest.raises(ConfigurationError, match="score is 'norm'; expected one of product, gate"):
        TDA(0.1, score="norm")
    with pytest.raises(ConfigurationError, match="expected one of contribution, griffin"):
        SRIDA(0.5, score="gate")
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ConfigurationError, match="min_prompt is"):
            SRIDA(0.5, min_prompt=bad)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="min_prompt is"):
            STDA(0.5, min_prompt=bad)  # type: ignore[arg-type]


def thresholds(score: str = "product", layers: int = 3, fingerprint: str = "f00") -> Any:
    return SimpleNamespace(epsilon=torch.full((layers,), 0.1), score=score, fingerprint=fingerprint)


def test_validate() -> None:
    def current() -> str:
        return "f00"

    TDA(thresholds()).validate(3, current)
    TDA(thresholds("gate"), score="gate").validate(3, current)
    STDA(thresholds()).validate(3, current)
    TDA(0.5).validate(17, current)
    TDA(torch.tensor(0.5)).validate(17, current)
    with pytest.raises(ConfigurationError, match="have 3 layers, the model has 4"):
        TDA(thresholds()).validate(4, current)
    with pytest.raises(ConfigurationError, match="have 2 layers, the model has 4"):
        STDA([0.1, 0.2]).validate(4, current)
    with pytest.raises(ConfigurationError, match="have 1 layers, the model has 4"):
        TDA([0.1]).validate(4, current)
    with pytest.raises(ConfigurationError, match="calibrated for score='gate'"):
        TDA(thresholds("gate")).validate(3, current)
    with pytest.raises(ConfigurationError, match="calibrated for score='gate'"):
        STDA(thresholds("gate")).validate(3, current)
    with pytest.raises(ArtifactError, match="fingerprint is abc, this model's is f00"):
        TDA(thresholds(fingerprint="abc")).validate(3, current)


def test_fingerprint_is_computed_only_where_it_is_needed() -> None:
    def never() -> str:
        raise AssertionError("a pass over the weights for nothing")

    TDA(0.1).validate(3, never)
    SRIDA(0.5).validate(3, never)
    Dense().validate(3, never)


def test_registry_and_descriptions() -> None:
    assert {"dense", "tda", "stda", "srida"} <= set(METHODS)
    assert all(METHODS[name].name == name for name in METHODS)
    for method in (Dense(), SRIDA(), STDA(0.1), TDA(thresholds())):
        assert method.level in ("none", "token", "sequence")
        assert method.plan in ("dense", "given", "gate", "product")
        assert len(repr(method)) < 100
    assert TDA(0.1, score="gate").plan == "gate" and TDA(0.1).plan == "product"
    assert describe(0.25) == "0.25" and describe([0.5, 0.25]) == "<2 layers, 0.25..0.5>"


@pytest.mark.parametrize("half", [np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_numbers_of_numpy_and_torch_are_numbers(half: Any) -> None:
    made = SimpleNamespace(layers=[None])
    methods = (SRIDA(half), QRIDA(half), RIDA(made, half), RODA(made, half), OnlineRODA(made, half))
    for method in methods:
        assert type(method.density) is float and method.density == 0.5
    assert QRIDA([half, 0.25]).density == [0.5, 0.25]
    assert QRIDA(np.array([0.5, 0.25])).density == [0.5, 0.25]
    assert describe(half) == "0.5"
    TDA(half).validate(3, lambda: "f00")  # one for all layers


@pytest.mark.parametrize("bad", [np.float32(1.5), torch.tensor(0.0), torch.tensor(True), np.nan])
def test_densities_out_of_range_are_refused_in_any_type(bad: Any) -> None:
    for make in (SRIDA, QRIDA, lambda density: QRIDA([density])):
        with pytest.raises(ConfigurationError, match=r"expected a number in \(0, 1\]"):
            make(bad)


def test_a_string_is_no_density_and_no_shadows() -> None:
    with pytest.raises(ConfigurationError, match=r"density is '0\.3'; expected a number"):
        QRIDA(density="0.3")
    for shadows in ("folder", Path("folder"), 3, []):
        with pytest.raises(ConfigurationError, match=r"shadows is .*Shadows\.from_pretrained"):
            QRIDA(shadows=shadows)  # type: ignore[arg-type]
