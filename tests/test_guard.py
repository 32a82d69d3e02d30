"""The guard: what it measures, against plain PyTorch, and that it holds CETT on shifted text."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moyu_ext.guard import LayerGuard
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.models.families import find_mlps
from moyu_ext.models.weights import MlpWeights
from torch import Tensor

import moyu_ext
from moyu_ext import QRIDA

Make = Callable[..., Any]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(gated: bool = True, bias: bool = False, d: int = 16, f: int = 40) -> MlpWeights:
    return MlpWeights(
        random(f, d) if gated else None,
        random(f, d, seed=1),
        random(f, d, seed=2),
        random(f, seed=3) if gated and bias else None,
        random(f, seed=4) if bias else None,
        random(d, seed=5) if bias else None,
        "silu",
    )


def guard(every: int = 1, epsilon: Tensor | None = None, target: float | None = None) -> LayerGuard:
    return LayerGuard(every, 40, torch.device("cpu"), epsilon, target)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_measures_the_true_cett_and_recall(gated: bool, bias: bool) -> None:
    w, watch = weights(gated, bias), guard()
    wanted = []
    for seed in range(5):
        x = random(1, 16, seed=10 + seed)
        active = random(1, 40, seed=20 + seed) > 0.5
        watch.measure(x, w, w.column_norms(), active)
        a = F.linear(x, w.up, w.up_bias)
        a = F.silu(a) if w.gate is None else F.silu(F.linear(x, w.gate, w.gate_bias)) * a
        contributions = a[0].unsqueeze(1) * w.down_t
        cett = contributions[~active[0]].sum(0).norm() / contributions.sum(0).norm()
        count = int(active.sum())
        top = contributions.norm(dim=1).topk(count).indices
        wanted.append((float(cett), float(active[0, top].sum()) / count))
    got = watch.report()
    assert got.tokens == 5 and got.epsilon is None
    assert got.cett == pytest.approx(sum(c for c, _ in wanted) / 5, rel=1e-5)
    assert got.recall == pytest.approx(sum(r for _, r in wanted) / 5, rel=1e-6)
    watch.reset()
    assert watch.report().tokens == 0 and math.isnan(watch.report().cett)


def test_all_and_none_active() -> None:
    w, watch = weights(), guard()
    watch.measure(random(1, 16), w, w.column_norms(), torch.ones(1, 40, dtype=torch.bool))
    assert (watch.report().cett, watch.report().recall) == (0.0, 1.0)
    watch.reset()
    watch.measure(random(1, 16), w, w.column_norms(), torch.zeros(1, 40, dtype=torch.bool))
    assert watch.report().cett == pytest.approx(1.0) and watch.report().recall == 1.0
    watch.reset()
    watch.measure(torch.zeros(1, 16), w, w.column_norms(), torch.zeros(1, 40, dtype=torch.bool))
    assert watch.report().cett == 0.0  # nothing is lost of nothing


def test_one_token_in_so_many() -> None:
    watch = guard(every=5)
    assert [watch.due(1) is not None for _ in range(15)] == ([False] * 4 + [True]) * 3
    rows = guard(every=8)
    turns = [rows.due(4) for _ in range(8)]
    assert turns[::2] == [None] * 4
    assert set(turns[1::2]) == {0, 1, 2, 3}  # every row has its turn


def test_epsilon_moves_towards_the_target() -> None:
    w = weights()
    for start in (1e-3, 1e4):
        epsilon = torch.tensor([start])
        watch = guard(1, epsilon, 0.2)
        norms = w.column_norms()
        ratios = []
        for step in range(400):
            x = random(1, 16, seed=step)
            a = F.silu(x @ w.gate.t()) * (x @ w.up.t())  # type: ignore[union-attr]
            active = a.abs() * norms >= epsilon
            dropped = torch.where(active, torch.zeros(()), a) @ w.down_t
            ratios.append(float(dropped.norm() / (a @ w.down_t).norm()))
            watch.measure(x, w, norms, active)
        # The target lies near 20, further than the bounds let it go.
        if start == 1e-3:
            assert epsilon.item() == pytest.approx(64e-3)
        else:
            assert epsilon.item() == pytest.approx(1e4 / 64)
    epsilon = torch.tensor([5.0])
    watch = guard(1, epsilon, 0.2)
    ratios = []
    for step in range(600):
        x = random(1, 16, seed=step)
        a = F.silu(x @ w.gate.t()) * (x @ w.up.t())  # type: ignore[union-attr]
        active = a.abs() * norms >= epsilon
        dropped = torch.where(active, torch.zeros(()), a) @ w.down_t
        ratios.append(float(dropped.norm() / (a @ w.down_t).norm()))
        watch.measure(x, w, norms, active)
    assert sum(ratios[200:]) / 400 == pytest.approx(0.2, rel=0.05)


def test_a_token_that_is_not_finite_moves_nothing() -> None:
    epsilon = torch.tensor([1.0])
    watch = guard(1, epsilon, 0.2)
    w = weights()
    watch.measure(torch.full((1, 16), torch.nan), w, w.column_norms(), random(1, 40) > 0)
    assert epsilon.item() == 1.0


def test_watching_changes_no_token_and_reports(tiny: Make, prompt: Make) -> None:
    ids = prompt(12)
    outputs = []
    for mode in ("off", "watch"):
        model = moyu_ext.patch(tiny("llama"), QRIDA(0.3, guard=mode, guard_every=4))
        outputs.append(
            model.generate(input_ids=ids, max_new_tokens=33, do_sample=False, pad_token_id=0)
        )
        report = moyu_ext.report(model)
        guards = [layer.guard for layer in report.layers]
        if mode == "off":
            assert guards == [None] * 3 and math.isnan(report.cett)
            assert "CETT" not in str(report)
            continue
        assert [g.tokens for g in guards if g] == [8] * 3  # 32 decode steps
        assert all(0 < g.cett < 1 and 0.3 < g.recall <= 1 for g in guards if g)
        assert report.cett == pytest.approx(sum(g.cett for g in guards if g) / 3)
        assert "CETT" in str(report) and "recall" in str(report)
        moyu_ext.report(model, reset=True)
        assert moyu_ext.report(model).layers[0].guard.tokens == 0  # type: ignore[union-attr]
    assert torch.equal(*outputs)


def test_guard_of_the_first_layer_sees_the_models_tokens(tiny: Make, prompt: Make) -> None:
    """Layer 0 gets the dense model's input, so its CETT can be told from a dense forward."""
    ids = prompt(30)
    model = tiny("llama")
    site = find_mlps(model)[0]
    inputs: list[Tensor] = []
    handle = site.entry.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    method = QRIDA(0.3, guard_every=1)
    w = site.weights()
    rule = method.bind(0, w)
    x = inputs[0][0, 10:]
    with torch.no_grad():
        active = rule.active(x, x, x)  # type: ignore[union-attr]
        a = F.silu(F.linear(x, w.gate)) * F.linear(x, w.up)  # type: ignore[arg-type]
        dropped = a.masked_fill(active, 0) @ w.down_t
        want = (dropped.norm(dim=1) / (a @ w.down_t).norm(dim=1)).mean().item()
        moyu_ext.patch(model, method)
        out = model(input_ids=ids[:, :10], use_cache=True)
        for t in range(10, 30):
            out = model(input_ids=ids[:, t : t + 1], **passing(model, cache_of(out)))
    measured = moyu_ext.report(model).layers[0].guard
    assert measured is not None and measured.tokens == 20
    assert measured.cett == pytest.approx(want, rel=1e-3)


@pytest.mark.slow
def test_holds_cett_on_text_of_another_kind(data_dir: Path) -> None:
    """Calibrated on stories, run on code: CETT drifts without the guard, and holds with it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = data_dir / "models" / "mix4m_silu"
    heldout = data_dir / "train_mix" / "heldout"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stories = heldout / "stories.txt"
    thresholds = moyu_ext.calibrate(
        model, tokenizer, stories, cett=0.2, method=QRIDA(bits=2), progress=False
    )
    ids = torch.tensor(tokenizer.encode((heldout / "code.txt").read_text()[:12000]))[: 5 * 256]
    results = {}
    for mode in ("watch", "hold"):
        # One token in 4, so that a short test has as many measurements as a long generation.
        moyu_ext.patch(model, QRIDA(thresholds, guard=mode, guard_every=4))
        with torch.no_grad():
            for number, row in enumerate(ids.view(5, 256)):
                cache = cache_of(model(input_ids=row[None, :16], use_cache=True))
                for t in range(16, 256):
                    model(input_ids=row[None, t : t + 1], **passing(model, cache))
                if number == 1:  # epsilon has settled
                    moyu_ext.report(model, reset=True)
        layers = moyu_ext.report(model).layers
        results[mode] = [
            layer.guard.cett / target.cett - 1  # type: ignore[union-attr]
            for layer, target in zip(layers, thresholds.layers, strict=True)
        ]
        moyu_ext.unpatch(model)
    # Layers drift up and down, so their mean may hide it.
    assert max(abs(off) for off in results["watch"]) > 0.15
    assert max(abs(off) for off in results["hold"]) < 0.15
