"""Budgets: what errors cost, the price that keeps a budget, and that it holds when measured by
other code."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moyu_ext.calibration import budget as budgets
from moyu_ext.calibration import tune as tuning
from moyu_ext.calibration.pace import Pace, measure_pace
from moyu_ext.calibration.router_fit import cost_at, fit_router
from moyu_ext.calibration.sensitivity import sample_layers
from moyu_ext.calibration.tune import nats, tune
from moyu_ext.calibration.tuned import FILE
from moyu_ext.errors import ArtifactError, ConfigurationError, PatchStateError
from moyu_ext.models.families import find_mlps
from moyu_ext.shadow.reference import expected_gains, projections, tiers_by_price

import moyu_ext
from moyu_ext import QRIDA, Lossless, Shadows, Tuned

Make = Callable[..., Any]


class Letters:
    """A tokenizer for the tiny models: one token per character."""

    bos_token_id = 1

    def encode(self, text: str) -> list[int]:
        return [1] + [3 + ord(c) % 98 for c in text]


SMALL: dict[str, Any] = {"context": 16, "continuation": 32, "max_tokens": 24 * 48}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOYU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fast_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which time is bytes: tiny layers themselves gain nothing from a router."""
    monkeypatch.setattr(tuning, "measure_pace", lambda *_: Pace(3.0, 0.1, 3.0, 1.0))


def rows_of(model: Any, count: int, length: int = 48) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model.generate(
            input_ids=torch.full((count, 1), 5), max_new_tokens=length - 1, do_sample=True,
            pad_token_id=0,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(0.01, 0.01), (1, 1.0), ("0.02", 0.02), ("1%", math.log(1.01)), (" 50 % ", math.log(1.5))],
)
def test_budgets_are_nats(given: Any, wanted: float) -> None:
    assert nats(given) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    "given", [0, -0.1, float("nan"), float("inf"), "", "one", "1%%", "-1%", True, None, [0.1]]
)
def test_what_is_no_budget_is_refused(given: Any, tiny: Make) -> None:
    with pytest.raises(ConfigurationError, match="budget is"):
        nats(given)
    if given is not None:
        model = tiny("llama")
        with pytest.raises(ConfigurationError, match="budget is"):
            moyu_ext.patch(model, budget=given)
        assert not moyu_ext.patching.patch.is_patched(model)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_predicted_loss_of_an_error_is_its_kl(tiny: Make, family: str, packed: bool) -> None:
    model = tiny(family)
    if packed:
        model = moyu_ext.pack(model, bits=8)
    sites = find_mlps(model)
    ids, context = rows_of(model, 48), 16
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    samples = sample_layers(model, sites, ids, context, seed=0)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    generator = torch.Generator().manual_seed(1)
    errors = [0.03 * torch.randn(s.g.shape, generator=generator) for s in samples]
    predicted = sum(
        float((s.g * e).sum(-1).square().mean()) / 2 for s, e in zip(samples, errors, strict=True)
    )
    with torch.no_grad():
        dense = model(input_ids=ids).logits[:, context:-1].log_softmax(-1)
        handles = []
        for site, error in zip(sites, errors, strict=True):

            def add(module: Any, args: Any, out: Any, error: Any = error) -> Any:
                full = torch.zeros(*ids.shape, out.shape[-1])
                full[:, context:] = error.view(len(ids), -1, out.shape[-1])
                return out + full.view(out.shape)

            handles.append(site.linear(site.family.down).register_forward_hook(add))
        other = model(input_ids=ids).logits[:, context:-1].log_softmax(-1)
        for handle in handles:
            handle.remove()
    kl = F.kl_div(other, dense, reduction="none", log_target=True).sum(-1).mean()
    assert kl == pytest.approx(predicted, rel=0.3)


@pytest.mark.parametrize("family", ["llama", "llama-bias"])
def test_products_without_instructions_are_taken_in_float32(
    tiny: Make, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moyu_ext.models import forward

    monkeypatch.setattr(forward, "native", lambda x: x.dtype == torch.float32)
    model = tiny(family, dtype=torch.bfloat16)
    twin = tiny(family, dtype=torch.bfloat16).float()
    ids = rows_of(twin, 16)
    found = []
    for one in (model, twin):
        sites = find_mlps(one)
        with forward.wide_products(one):
            kinds = {"forward" in m.__dict__ for m in one.modules() if type(m) is torch.nn.Linear}
        assert kinds == {one is model}
        assert not any("forward" in m.__dict__ for m in one.modules())
        found.append(sample_layers(one, sites, ids, 16, seed=0))
    for mine, right in zip(*found, strict=True):
        assert mine.x.dtype == torch.bfloat16
        # The same text, rounded on the way: close where the labels drawn are the same.
        close = torch.nn.functional.cosine_similarity(mine.g.float(), right.g, dim=-1)
        assert close.median() > 0.95
        assert (mine.x.float() - right.x).norm() < 0.05 * right.x.norm()


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_router_knows_its_costs(tiny: Make, family: str) -> None:
    model = tiny(family)
    sites = find_mlps(model)
    samples = sample_layers(model, sites, rows_of(model, 16), 16, seed=0)[1]
    w = sites[1].weights()
    shadow = fit_router(samples, w, (3, 3))
    assert shadow.costs is not None and shadow.costs.shape == (3, w.f)
    along = samples.g @ w.down_t.t()
    torch.testing.assert_close(
        shadow.costs[0], (along.square().mean(0) / 2).sqrt(), rtol=1e-3, atol=1e-8
    )
    x = samples.x[samples.governed]
    how = (x, shadow.data, w.gate_bias, w.up_bias, w.gated, 3, 3)
    gate, up = projections(*how)
    pairs = [(up, w.project(x, "up"), shadow.costs[2])]
    if gate is not None:
        pairs.append((gate, w.project(x, "gate"), shadow.costs[1]))
    for guess, right, error in pairs:
        found = (guess - right).square().mean(0).sqrt()
        # That of all inputs, with some of none in particular.
        assert 0.8 < float((error / found.detach()).median()) < 1.6
    # And what it does at a price, against the same in the open.
    prices = [1e-7, 1e-5, 1e-3]
    gains = expected_gains(gate, up, w.activation, shadow.costs[0], shadow.costs[1:])
    a = w.activations(x)[1]
    guess = a.new_tensor(0.0) + (torch.relu(up) if gate is None else F.silu(gate) * up)
    for price, cost in zip(prices, cost_at(samples, w, shadow, prices), strict=True):
        exact, estimated = tiers_by_price(*gains, price, gate is not None)
        kept = torch.where(exact, a, torch.where(estimated, guess, torch.zeros(())))
        lost = (samples.g * ((kept - a) @ w.down_t)).sum(-1)
        assert cost.exact == pytest.approx(float(exact.float().mean()))
        assert cost.estimated == pytest.approx(float(estimated.float().mean()))
        assert cost.loss == pytest.approx(float(lost.square().mean()) / 2, rel=1e-3, abs=1e-12)
        again = exact.float().mean() + estimated.float().mean()
        assert (price == prices[0]) <= (again > 0.5) and (price == prices[2]) <= (again < 0.5)


@pytest.mark.usefixtures("fast_rows")
@pytest.mark.parametrize("packed", [False, True])
def test_a_budget_is_kept(tiny: Make, tmp_path: Path, packed: bool) -> None:
    model = moyu_ext.pack(tiny("llama"), bits=8) if packed else tiny("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    steps: list[tuple[int, int]] = []
    texts = ["".join(chr(32 + (i * 7 + j * j) % 90) for j in range(60)) for i in range(24)]
    tuned = tune(
        model, Letters(), texts, budget=0.05, **SMALL,
        progress=lambda text, done, total: steps.append((done, total)),
    )  # fmt: skip
    assert [done for done, _ in steps] == list(range(len(steps))) and len(steps) >= 5
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert tuned.sparse and 0 < tuned.kl <= 0.045 and tuned.seconds < tuned.dense_seconds
    # Measured again, by other code, on the rows held out.
    rows = torch.tensor([Letters().encode(t)[:48] for t in texts])[::3]
    with torch.no_grad():
        dense = model(input_ids=rows).logits[:, 16:-1].log_softmax(-1)
        moyu_ext.patch(model, tuned.method())
        with moyu_ext.scoring(model, 16):
            sparse = model(input_ids=rows).logits[:, 16:-1].log_softmax(-1)
    kl = F.kl_div(sparse, dense, reduction="none", log_target=True).sum(-1)
    assert tuned.tokens == kl.numel()
    assert float(kl.mean()) == pytest.approx(tuned.kl, rel=1e-3)
    same = dense.argmax(-1) == sparse.argmax(-1)
    assert tuned.agreement == pytest.approx(float(same.float().mean()))
    report = moyu_ext.report(model)
    predicted = sum(layer.exact for layer in tuned.layers) / 3
    assert report.density == pytest.approx(predicted, abs=0.1)
    assert report.estimated == pytest.approx(
        sum(layer.estimated for layer in tuned.layers) / 3, abs=0.1
    )
    moyu_ext.unpatch(model)
    # The artefact.
    tuned.save_pretrained(tmp_path)
    loaded = Tuned.from_pretrained(tmp_path)
    assert loaded.as_dict() == tuned.as_dict()
    with torch.no_grad():
        moyu_ext.patch(model, loaded.method())
        with moyu_ext.scoring(model, 16):
            again = model(input_ids=rows).logits[:, 16:-1].log_softmax(-1)
    assert torch.equal(again, sparse)
    with pytest.raises(ArtifactError):
        moyu_ext.patch(tiny("llama", seed=1), loaded.method())


@pytest.mark.usefixtures("fast_rows")
def test_a_budget_in_half_precision(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from moyu_ext.models import forward

    monkeypatch.setattr(forward, "native", lambda x: x.dtype == torch.float32)
    tuned = tune(tiny("llama", dtype=torch.bfloat16), budget=0.1, **SMALL)
    assert tuned.sparse and 0 < tuned.kl <= 0.1


@pytest.mark.usefixtures("fast_rows")
def test_more_budget_buys_more(tiny: Make) -> None:
    found = [tune(tiny("llama"), budget=b, **SMALL) for b in (0.002, 0.02, 0.2)]
    assert found[0].seconds > found[1].seconds > found[2].seconds
    assert found[0].kl < found[1].kl < found[2].kl
    one = tune(tiny("llama"), budget=0.02, layers=[1], **SMALL)
    assert [layer.price > 0 for layer in one.layers] == [False, True, False]


def test_where_nothing_is_gained_all_stays_dense(tiny: Make, prompt: Make) -> None:
    model = tiny("llama")
    ids = prompt(12)
    want = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    tuned = tune(model, budget=0.01, **SMALL)
    assert not tuned.sparse and isinstance(tuned.method(), Lossless) and tuned.kl == 0
    moyu_ext.patch(model, budget=0.01, layers=[0, 2])
    got = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(got, want)
    text = str(moyu_ext.report(model))
    assert "0.01 nats buy no time in any layer here" in text


def test_the_pace_is_that_of_the_rules(tiny: Make) -> None:
    model = tiny("llama", hidden_size=256, intermediate_size=2048)
    shadows = Shadows.build(model, 3)
    pace = measure_pace(model, shadows, [torch.randn(1, 256) for _ in range(3)])
    assert pace.dense > 0 and pace.exact > 0
    assert not moyu_ext.patching.patch.is_patched(model)


@pytest.mark.usefixtures("fast_rows")
def test_patch_remembers_a_budget(
    tiny: Make, prompt: Make, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Tuned:
        calls.append(kwargs)
        return tune(*args, **kwargs, **SMALL)

    monkeypatch.setattr(budgets, "tune", counted)
    ids = prompt(12)
    texts = []
    for _ in range(2):
        model = moyu_ext.patch(tiny("llama"), budget=0.05)
        texts.append(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False))
        text = str(moyu_ext.report(model))
        assert "of 0.05 nats on" in text and "as fast" in text and "QRIDA(price=" in text
    assert len(calls) == 1 and torch.equal(*texts)
    moyu_ext.patch(tiny("llama"), budget="5%")
    moyu_ext.patch(tiny("llama", seed=1), budget=0.05)
    moyu_ext.patch(tiny("llama"), budget=0.05, layers=[1])
    assert len(calls) == 4
    # A damaged file is found anew; a folder that cannot be written is said.
    for folder in (cache / "budgets").iterdir():
        (folder / FILE).write_text("{}")
    with pytest.warns(UserWarning, match="found anew"):
        moyu_ext.patch(tiny("llama"), budget=0.05)
    (cache.parent / "file").write_text("")
    monkeypatch.setenv("MOYU_CACHE", str(cache.parent / "file"))
    with pytest.warns(UserWarning, match="set MOYU_CACHE"):
        moyu_ext.patch(tiny("llama"), budget=0.05)
    with pytest.raises(ConfigurationError, match="give one of them"):
        moyu_ext.patch(tiny("llama"), QRIDA(), budget=0.05)


@pytest.mark.usefixtures("fast_rows")
@pytest.mark.parametrize(
    "change",
    [
        {"layers": []},
        {"budget": float("nan")},
        {"budget": True},
        {"kl": -1.0},
        {"tokens": "many"},
        {"model": 3},
        {"shadows": "0" * 32},
        {"shadows": ""},
        {"format_version": 9},
        {"more": 1},
    ],
    ids=lambda change: "-".join(change) + "-" + str(next(iter(change.values())))[:8],
)
def test_a_changed_file_is_refused(tiny: Make, tmp_path: Path, change: dict[str, Any]) -> None:
    tune(tiny("llama"), budget=0.1, **SMALL).save_pretrained(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(content | change))
    with pytest.raises(ArtifactError, match="run moyu tune again"):
        Tuned.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, "above 0"),
        ({"bits": 5}, "1, 2, 3 or 4"),
        ({"context": 500}, "256 tokens that this model takes"),
        ({"context": 0}, "at least 1 each"),
        ({"max_tokens": 60}, "at least 3"),
        ({"layers": [7]}, "layers contains 7"),
    ],
)
def test_bad_arguments_are_refused(tiny: Make, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tune(tiny("llama"), **{**SMALL, **arguments})


def test_patched_and_training_models_are_refused(tiny: Make) -> None:
    with pytest.raises(PatchStateError, match="patched"):
        tune(moyu_ext.patch(tiny("llama")), **SMALL)
    with pytest.raises(PatchStateError, match="training"):
        tune(tiny("llama").train(), **SMALL)
    with pytest.raises(ConfigurationError, match="pass texts"):
        tune(tiny("llama", bos_token_id=None, eos_token_id=None), **SMALL)


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    from moyu_ext.cli import app
    from typer.testing import CliRunner

    out = tmp_path / "tuned"
    arguments = ["tune", "stories_silu", "--out", str(out), "--budget", "5%"]
    arguments += ["--max-tokens", "2304", "--json", str(tmp_path / "t.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (out / "layers.png").stat().st_size > 5000
    assert json.loads((tmp_path / "t.json").read_text())["kl"] <= math.log(1.05)
    then = ["generate", "stories_silu", "-p", "One day", "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, [*then, "--tuned", str(out)])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, [*then, "--tuned", str(out), "--budget", "1%"])
    assert result.exit_code == 2 and "give one of them" in result.output
    result = CliRunner().invoke(app, [*then, "--budget", "none"])
    assert result.exit_code == 2 and "budget is 'none'" in result.output
