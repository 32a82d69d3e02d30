"""`moyu study gradient`."""

import json
from pathlib import Path

import pytest
import torch
from moyu_ext.evaluation.statistics import bootstrap
from moyu_ext.reference import activations
from moyu_ext.studies.activation_gradients import own_text, pulls, recorded_activations, untrained
from moyu_ext.studies.gradient import (
    CASES,
    SCALE,
    Case,
    _smaller,
    closed_form,
    expected_gradient,
    gaussian,
    positive,
    random_class,
    run,
)
from moyu_ext.studies.report import Report
from study_support import tiny_setting, tiny_subject


def test_equation_4_written_out() -> None:
    g = torch.Generator().manual_seed(0)
    v = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    a = torch.rand(2, 4, generator=g, dtype=torch.float64)
    y = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
    found = closed_form(v, a, y)
    for n in range(2):
        scores = [sum(a[n, i] * v[n, k, i] for i in range(4)) for k in range(3)]
        total = sum(torch.exp(s) for s in scores)
        for i in range(4):
            first = sum(torch.exp(scores[k]) * v[n, k, i] for k in range(3)) / total
            second = sum(v[n, k, i] * y[n, k] for k in range(3))
            assert found[n, i].item() == pytest.approx((first - second).item(), abs=1e-12)


@pytest.mark.parametrize("level", [-1.0, 0.5, 2.0])
def test_expectation_is_what_integration_by_parts_says(level: float) -> None:
    case = Case("", "", gaussian, positive(level), random_class)
    interval, spread = expected_gradient(case, 40_000, torch.Generator().manual_seed(1))
    assert interval.low < SCALE**2 * level * spread < interval.high
    assert interval.sign == (1 if level > 0 else -1)


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("as assumed", 1),
        ("mean 1 for all of V", 1),
        ("mean 1 for the true class", -1),
        ("y drawn from the model", 0),
        ("y = the model's first choice", -1),
        ("a_i = -1", -1),
        ("v_j = -v_i with a_j = 2 a_i", -1),
    ],
)
def test_signs_of_broken_assumptions(name: str, sign: int) -> None:
    case = next(case for case in CASES if case.name == name)
    interval, _ = expected_gradient(case, 20_000, torch.Generator().manual_seed(2))
    assert interval.sign == sign


def test_recorded_gradients_are_the_loss_slope(tiny) -> None:
    subject = tiny_subject(tiny)
    model = subject.model.double()
    ids = torch.arange(3, 15).unsqueeze(0)

    def loss() -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")

    with recorded_activations(subject.sites) as held:
        loss().backward()
    grad = held[1].grad
    assert grad is not None
    step = 1e-2  # the model's norms compute in float32, whatever its dtype
    values = []
    for sign in (1, -1):
        bump = torch.zeros_like(held[1])
        bump[0, 4, 7] = sign * step
        handle = (
            subject.sites[1]
            .linear("down_proj")
            .register_forward_pre_hook(lambda module, args, bump=bump: (args[0] + bump,))
        )
        with torch.no_grad():
            values.append(loss().item())
        handle.remove()
    slope = (values[0] - values[1]) / (2 * step)
    assert grad[0, 4, 7].item() == pytest.approx(slope, rel=0.02)


def test_pulls_count_active_neurons_and_leave_no_gradients(tiny) -> None:
    subject = tiny_subject(tiny, "llama-relu")
    rows = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    found = pulls(subject.model, subject.sites, rows)
    inputs = {}
    handle = subject.sites[0].module.register_forward_pre_hook(
        lambda module, args: inputs.__setitem__(0, args[0])
    )
    with torch.no_grad():
        subject.model(rows[:1])
    handle.remove()
    w = subject.sites[0].weights()
    a = activations(inputs[0], w.gate, w.up, activation="relu")
    assert found["active"][0, 0].item() == pytest.approx((a > 0).double().mean().item())
    assert (found["positive"].abs() <= 1).all()
    assert all(p.grad is None for p in subject.model.parameters())


def test_untrained_models_differ_by_seed_alone(tiny) -> None:
    subject = tiny_subject(tiny)
    first, same, other = (untrained(subject, seed) for seed in (1, 1, 2))
    names = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.get_parameter(names), same.get_parameter(names))
    assert not torch.equal(first.get_parameter(names), other.get_parameter(names))


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [([0.5, 0.9], "holds"), ([0.5, 1.1], "holds only if"), ([1.0, 1.1], "fails")],
)
def test_smaller_gradients_of_swiglu(ratios: list[float], verdict: str) -> None:
    assert _smaller(ratios) == verdict


def test_study_writes_its_verdicts(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path, ("llama", "llama-relu"))
    report = Report("gradient", "t", "s", tmp_path / "out")
    run(setting, report)
    report.write(setting.describe())
    found = json.loads((tmp_path / "out" / "gradient.json").read_text())
    verdicts = {claim["claim"]: claim["verdict"] for claim in found["claims"]}
    assert verdicts["for a positive activation the expected gradient is positive"] == "holds"
    assert found["numbers"]["equation_4_relative_error"]["relu"] < 1e-12
    assert found["numbers"]["equation_4_relative_error"]["swiglu"] > 0.1
    assert set(found["models"]) == {"llama", "llama-relu"}


def test_own_text_is_drawn_from_the_model(tiny) -> None:
    subject = tiny_subject(tiny)
    rows = own_text(subject, 12, 6, seed=0)
    assert rows.shape == (6, 12) and len(rows.unique(dim=0)) == 6
    # As likely as the model says: over many draws the expected gradient is zero.
    many = own_text(subject, 12, 64, seed=1)
    found = bootstrap(pulls(subject.model, subject.sites, many)["positive"].mean(1))
    drawn = torch.randint(3, 100, (64, 12), generator=torch.Generator().manual_seed(0))
    other = bootstrap(pulls(subject.model, subject.sites, drawn)["positive"].mean(1))
    assert found.sign == 0 and abs(found.mean) < abs(other.mean) + other.high - other.low
