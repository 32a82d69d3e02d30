"""The tuner: its parts, and that what it promises holds when measured by other code."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moyu_ext.calibration.curves import DENSE, Level, LossCurve, allocate, levels
from moyu_ext.calibration.tune import FILE, Tuned, _Run, tune
from moyu_ext.cli.tune import bit_pairs, percent
from moyu_ext.errors import ArtifactError, ConfigurationError, PatchStateError
from moyu_ext.evaluation.perplexity import generation_perplexity
from moyu_ext.models.families import find_mlps

import moyu_ext
from moyu_ext import QRIDA, TDA, Shadows, Thresholds

Make = Callable[..., Any]


def level(cett: float, share: float, bits: tuple[int, int] | None = None) -> Level:
    return Level(1.0, share, cett, cett, cett, cett, share, bits)


def test_loss_curve_goes_through_its_probes() -> None:
    curve = LossCurve.through([(0.4, 0.016), (0.2, 0.002)])
    assert curve.power == pytest.approx(3)
    assert curve(0.4) == pytest.approx(0.016) and curve(0.2) == pytest.approx(0.002)
    assert curve(0.0) == 0
    one = LossCurve.through([(0.5, 0.01)])
    assert one.power == 2 and one(0.25) == pytest.approx(0.0025)
    # Noise: a probe that lost nothing, or less than a smaller one did.
    assert LossCurve.through([(0.2, -1e-3), (0.4, 0.01)])(0.4) == pytest.approx(0.01)
    assert LossCurve.through([(0.2, 0.02), (0.4, 0.01)]).power == 1
    assert LossCurve.through([])(0.5) < 1e-6


def test_allocation_is_the_best_of_all_on_its_hull() -> None:
    """Against every combination of two layers' levels."""
    a = [level(0.1, 0.8), level(0.2, 0.5), level(0.4, 0.4)]
    b = [level(0.1, 0.9), level(0.3, 0.3)]
    curves = [LossCurve(1.0, 2.0), LossCurve(0.5, 2.0)]
    budgets = [0.0, 0.005, 0.01, 0.045, 0.05, 0.1, 1.0]
    for budget in budgets:
        chosen = allocate([a, b], curves, budget)
        spent = sum(curve(x.cett) for curve, x in zip(curves, chosen, strict=True))
        assert spent <= budget + 1e-12
    # Spending exactly what hull steps cost is optimal there.
    for budget in (0.015, 0.055, 0.085, 0.205):
        best = min(
            x.share + y.share
            for x in [DENSE, *a]
            for y in [DENSE, *b]
            if curves[0](x.cett) + curves[1](y.cett) <= budget + 1e-12
        )
        chosen = allocate([a, b], curves, budget)
        assert sum(x.share for x in chosen) == pytest.approx(best)
    assert allocate([a, b], curves, 0.0) == [DENSE, DENSE]


def test_allocation_prefers_cheaper_bits_and_skips_useless_levels() -> None:
    options = [level(0.2, 0.6, (3, 3)), level(0.2, 0.5, (2, 2)), level(0.1, 1.05, (1, 1))]
    (chosen,) = allocate([options], [LossCurve(1.0, 2.0)], 1.0)
    assert chosen.bits == (2, 2)
    assert allocate([[level(0.1, 1.05)]], [LossCurve(1.0, 2.0)], 1.0) == [DENSE]
    assert allocate([[]], [LossCurve(1.0, 2.0)], 1.0) == [DENSE]


@pytest.mark.parametrize("family", ["llama", "llama-relu", "opt"])
def test_levels_measure_density_and_cett(tiny: Make, family: str) -> None:
    w = find_mlps(tiny(family))[0].weights()
    x = torch.randn(300, w.d, generator=torch.Generator().manual_seed(0))
    found = levels(x, w, "product", lambda density: density)
    assert [item.epsilon for item in found] == sorted(item.epsilon for item in found)
    assert len(found) >= 10
    with torch.no_grad():
        a = F.linear(x, w.up, w.up_bias)
        act = F.silu if w.activation == "silu" else F.relu
        a = act(a) if w.gate is None else a * act(F.linear(x, w.gate, w.gate_bias))
        for item in found[::4]:
            below = a.abs() * w.column_norms() < item.epsilon
            ratio = (a * below @ w.down_t).norm(dim=1) / (a @ w.down_t).norm(dim=1)
            assert item.cett == pytest.approx(ratio.nan_to_num(0.0).mean().item(), rel=1e-3)
            assert item.density == pytest.approx(1 - below.float().mean().item(), abs=1e-5)
            assert item.p50 <= item.p95 <= item.max


class Letters:
    bos_token_id = 1

    def encode(self, text: str) -> list[int]:
        return [3 + ord(c) % 98 for c in text]


@pytest.fixture
def texts(tiny: Make) -> list[str]:
    """Text that the tiny model finds likely: what it writes, as letters."""
    model = tiny("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(
            input_ids=torch.full((24, 1), 5), max_new_tokens=48, do_sample=True, pad_token_id=0
        )
    back = {3 + c % 98: chr(c) for c in range(32, 130)}
    return ["".join(back.get(i, "a") for i in row) for row in ids.tolist()]


SMALL: dict[str, Any] = {"context": 16, "continuation": 32, "max_tokens": 24 * 48}


@pytest.mark.parametrize("method", ["qrida", "tda", TDA(0.0, score="gate")])
def test_tuned_thresholds_keep_the_budget(
    tiny: Make, texts: list[str], tmp_path: Path, method: Any
) -> None:
    model = tiny("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    steps: list[tuple[int, int]] = []
    tuned = tune(
        model, Letters(), texts, max_perplexity_increase=0.05, method=method, **SMALL,
        progress=lambda text, done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps == [(i, len(steps)) for i in range(len(steps))] and len(steps) > 10
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert tuned.increase <= 0.05 and tuned.point.share < 1 and tuned.point.increase <= 0.05
    # Measured again, by other code, on the rows held out.
    rows = torch.tensor([Letters().encode(t)[:48] for t in texts])[1::2]
    dense = generation_perplexity(model, rows, context=16, continuation=32).perplexity
    moyu_ext.patch(model, tuned.method())
    sparse = generation_perplexity(model, rows, context=16, continuation=32).perplexity
    assert sparse / dense - 1 == pytest.approx(tuned.increase, abs=1e-4)
    density = moyu_ext.report(model).density
    assert density == pytest.approx(tuned.thresholds.density, abs=0.1)
    assert tuned.tokens == 12 * 32
    # The artefact.
    tuned.save_pretrained(tmp_path)
    loaded = Thresholds.from_pretrained(tmp_path)
    assert loaded == tuned.thresholds
    if tuned.shadows is None:
        assert method != "qrida"
    else:
        shadows = Shadows.from_pretrained(tmp_path)
        assert shadows.fitted and shadows.key == loaded.shadows
        moyu_ext.unpatch(model)
        moyu_ext.patch(model, QRIDA(loaded, shadows=shadows))
        again = generation_perplexity(model, rows, context=16, continuation=32).perplexity
        assert again == sparse and moyu_ext.report(model).density == density
        moyu_ext.unpatch(model)
        with pytest.raises(
            ConfigurationError, match=r"found with fitted shadows .* has the shadows"
        ):
            moyu_ext.patch(model, QRIDA(loaded))
        assert not moyu_ext.patching.patch.is_patched(model)
    saved = json.loads((tmp_path / FILE).read_text())
    assert saved["increase"] == tuned.increase and len(saved["frontier"]) >= 7
    shares = [p.share for p in tuned.frontier]
    assert shares == sorted(shares)
    with pytest.raises(ArtifactError):
        moyu_ext.patch(tiny("llama", seed=1), tuned.method())


@pytest.mark.parametrize("tied", [False, True])
def test_predicted_speedup_counts_what_a_step_reads(tiny: Make, tied: bool) -> None:
    """Of a table of embeddings a step reads one row, unless the head is the same table."""
    model = tiny("llama", tie_word_embeddings=tied)
    run = _Run(model, find_mlps(model), torch.full((2, 8), 5), 4, "product", [])
    mlps = 3 * 3 * 32 * 96
    rest = sum(p.numel() for n, p in model.named_parameters() if "mlp" not in n)
    if not tied:
        rest -= 101 * 32
    assert run._speedup(1.0) == 1
    assert run._speedup(0.25) == pytest.approx((rest + mlps) / (rest + 0.25 * mlps))


def test_budget_that_cannot_be_met_says_what_can(tiny: Make, texts: list[str]) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigurationError, match=r"= 1e-07% cannot be met: .* Allow ") as caught:
        tune(model, Letters(), texts, max_perplexity_increase=1e-9, **SMALL)
    match = re.search(r"Allow (\d+\.\d\d)%", str(caught.value))
    assert match is not None and float(match[1]) > 0
    # What it names can be had, on the tuning text at least, with room for the other half's noise.
    allowed = 2 * float(match[1]) / 100 + 0.02
    assert tune(model, Letters(), texts, max_perplexity_increase=allowed, **SMALL).point.share < 1


def test_without_text_the_model_writes_its_own(tiny: Make) -> None:
    tuned = tune(
        tiny("llama"), Letters(), max_perplexity_increase=0.2, bits=[(2, 2)],
        context=16, continuation=32, max_tokens=960,
    )  # fmt: skip
    assert isinstance(tuned, Tuned) and isinstance(tuned.method(), QRIDA)
    assert set(tuned.thresholds.bits) == {(2, 2)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_perplexity_increase": 0}, "above 0"),
        ({"max_perplexity_increase": -0.1}, "above 0"),
        ({"max_perplexity_increase": float("nan")}, "above 0"),
        ({"method": "srida"}, "QRIDA and TDA"),
        ({"bits": [(5, 5)]}, "1, 2, 3 or 4"),
        ({"context": 500}, "takes 256"),
        ({"max_tokens": 60}, "at least 2"),
    ],
)
def test_bad_arguments_are_refused(
    tiny: Make, texts: list[str], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tune(tiny("llama"), Letters(), texts, **{**SMALL, **arguments})


def test_patched_and_training_models_are_refused(tiny: Make, texts: list[str]) -> None:
    with pytest.raises(PatchStateError, match="patched"):
        tune(moyu_ext.patch(tiny("llama")), Letters(), texts, **SMALL)
    with pytest.raises(PatchStateError, match="training"):
        tune(tiny("llama").train(), Letters(), texts, **SMALL)


def test_command_line_numbers() -> None:
    assert percent("1%") == percent("0.01") == percent(" 1 % ") == 0.01
    assert bit_pairs("1,2/1,3") == [(1, 1), (2, 1), (3, 3)]
    for wrong in ("", "one", "1%%", "1.2.3"):
        with pytest.raises(ConfigurationError, match="max-perplexity-increase"):
            percent(wrong)
    for wrong in ("", "x", "2/1/3", "7"):
        with pytest.raises(ConfigurationError):
            bit_pairs(wrong)


def test_what_was_tuned_serves_on_the_command_line(tiny: Make, tmp_path: Path) -> None:
    """The shadows beside the thresholds are found; where they are missing, it says so."""
    from moyu_ext.cli.common import build_method

    model = tiny("llama")
    shadows = Shadows.fit(model, 2, max_tokens=100, progress=False)
    method = QRIDA(shadows=shadows)
    thresholds = moyu_ext.calibrate(model, Letters(), cett=0.3, method=method, max_tokens=200)
    assert thresholds.shadows == shadows.key
    thresholds.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"found with fitted shadows, and .* not beside"):
        build_method(None, thresholds=tmp_path)
    shadows.save_pretrained(tmp_path)
    made = build_method(None, thresholds=tmp_path)
    assert isinstance(made, QRIDA) and made.shadows is not None
    moyu_ext.patch(model, made)
    with pytest.raises(ConfigurationError, match="score is 'shadow'"):
        build_method("tda", thresholds=tmp_path)


@pytest.mark.slow
def test_command_line(tiny: Make, tmp_path: Path) -> None:
    from moyu_ext.cli import app
    from typer.testing import CliRunner

    out = tmp_path / "tuned"
    arguments = ["tune", "stories_silu", "--out", str(out), "--max-perplexity-increase", "5%"]
    arguments += ["--max-tokens", "2048", "--json", str(tmp_path / "t.json"), "--router-bits", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (out / "frontier.png").stat().st_size > 5000
    assert json.loads((tmp_path / "t.json").read_text())["increase"] <= 0.05
    assert Thresholds.from_pretrained(out).method == "qrida"
    then = ["generate", "stories_silu", "-p", "One day", "--thresholds", str(out)]
    result = CliRunner().invoke(app, [*then, "--max-new-tokens", "4"])
    assert result.exit_code == 0 and "QRIDA(thresholds=<6 layers" in result.output, result.output
