"""`moyu study qrida`, `qrida-bytes`, `qrida-guard` and `frontier`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.shadow.build import build_shadow
from moyu_ext.shadow.pack import record_bytes
from moyu_ext.studies import frontier, qrida_bytes, qrida_guard, qrida_rankings
from moyu_ext.studies.parts import FOLDER, once
from moyu_ext.studies.qrida import run
from moyu_ext.studies.qrida_rankings import (
    EXACT,
    Ranked,
    Ranking,
    highest,
    layer_inputs,
    shadow_ranking,
    shadow_share,
)
from moyu_ext.studies.qrida_text import Text
from moyu_ext.studies.report import Report
from study_support import tiny_setting, tiny_subject

import moyu_ext
from moyu_ext import QRIDA


@pytest.fixture
def text(tiny, tmp_path: Path) -> Text:
    setting = tiny_setting(tiny, tmp_path)
    return Text(setting, setting.subject("llama"), "words")


def weights_of(text: Text) -> list[Any]:
    return [site.weights() for site in text.subject.sites]


def exact(text: Text) -> Ranking:
    return Ranking(EXACT, [qrida_rankings._exact(w) for w in weights_of(text)], lambda r: r)


def test_highest_takes_k_of_each_row() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    assert highest(scores, 2).tolist() == [[True, False, True], [False, True, True]]
    assert highest(torch.zeros(4, 9), 3).sum(1).tolist() == [3] * 4


@pytest.mark.parametrize("bits", [(2, 2), (3, 1), (4, 4)])
def test_share_of_a_shadow_is_that_of_its_records(bits: tuple[int, int]) -> None:
    d = 64 * 256  # so that no padding counts
    assert shadow_share(*bits) == pytest.approx(record_bytes(d, *bits) / (3 * 2 * d))
    assert shadow_share(*bits, matrices=2) == pytest.approx(record_bytes(d, 0, bits[1]) / (4 * d))


def test_ranking_by_a_shadow_is_qrida(text: Text) -> None:
    weights = weights_of(text)
    ranking = shadow_ranking("s", [build_shadow(w, 2, 2) for w in weights], weights)
    got = text.increase(Ranked(ranking, 0.3))
    want = text.increase(QRIDA(0.3))
    assert got == pytest.approx(want, rel=1e-6) and abs(got["increase"]) > 1e-4
    assert text.layers == pytest.approx([29 / 96] * 3)


def test_everything_ranked_is_dense_and_less_is_not(text: Text) -> None:
    assert text.increase(Ranked(exact(text), 1.0))["increase"] == pytest.approx(0, abs=1e-6)
    few = text.increase(Ranked(exact(text), 0.1))
    assert abs(few["increase"]) > 1e-3 and few["error"] > 0


def test_signs_are_counts_of_positive_products(tiny) -> None:
    w = tiny_subject(tiny).sites[0].weights()
    x = torch.randn(5, w.d, generator=torch.Generator().manual_seed(0))
    counts = (x.unsqueeze(1) * w.gate.detach() > 0).sum(-1)
    scores = qrida_rankings._signs(w)(x, x, x)
    assert torch.equal((scores + w.d) / 2, counts.float())


def test_svd_of_full_rank_ranks_exactly_and_of_rank_one_does_not(tiny) -> None:
    w = tiny_subject(tiny).sites[0].weights()
    x = torch.randn(20, w.d, generator=torch.Generator().manual_seed(0))
    gate, a = w.activations(x)
    want = qrida_rankings._exact(w)(x, gate, a)
    torch.testing.assert_close(qrida_rankings._svd(w, 1.0)(x, gate, a), want, rtol=1e-3, atol=1e-4)
    low = qrida_rankings._svd(w, 1e-6)(x, gate, a)
    assert not torch.equal(highest(low, 30), highest(want, 30))


def test_layer_inputs_are_what_the_mlps_get(text: Text) -> None:
    inputs = layer_inputs(text.subject, text.rows, text.context)
    assert [x.shape for x in inputs] == [(4 * 32, 32)] * 3
    w = weights_of(text)[0]
    gate, a = w.activations(inputs[0])
    torch.testing.assert_close(gate, F.silu(inputs[0] @ w.gate.t()))
    torch.testing.assert_close(a, gate * (inputs[0] @ w.up.t()))


def test_parts_are_measured_once(tmp_path: Path) -> None:
    calls = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"value": float("inf"), "list": (1, 2)}

    key = {"model": "m", "size": 1.5}
    for _ in range(2):
        assert once(tmp_path, key, measure) == {"value": None, "list": [1, 2]}
    assert len(calls) == 1
    once(tmp_path, key | {"size": 2.5}, measure)
    assert len(calls) == 2
    for path in (tmp_path / FOLDER).iterdir():
        path.write_text(path.read_text()[:20])
    once(tmp_path, key, measure)
    assert len(calls) == 3


@pytest.mark.parametrize("name", ["llama", pytest.param("llama-relu", marks=pytest.mark.slow)])
def test_study_of_rankings(tiny, tmp_path: Path, name: str) -> None:
    setting = tiny_setting(tiny, tmp_path, (name,))
    for _ in range(2):  # the second time from its parts
        report = Report("qrida", "t", "s", tmp_path / "out")
        run(setting, report)
        report.write(setting.describe())
    found = json.loads((tmp_path / "out" / "qrida.json").read_text())
    numbers = found["numbers"][name]["words"]
    assert len(numbers["quality"]) >= 18
    for points in numbers["quality"].values():
        assert [p["asked"] for p in points] == [0.5, 0.33, 0.2]
        assert [p["density"] for p in points] == pytest.approx([0.5, 0.33, 0.2], abs=0.01)
    recall = {k: sum(v["0.33"]["recall"]) for k, v in numbers["recall"].items()}
    assert recall["shadow 4 bits"] > recall["shadow 2 bits"] > recall["shadow 1 bit"]
    assert recall["shadow 2 bits"] > recall["static set"]
    assert set(numbers["at CETT 0.2"]) >= {"4/4", "2/2", "1/1", "2/1"}
    assert len(found["figures"]) == 2 and len(found["claims"]) >= 4
    assert not any(hasattr(m, "is_stand_in") for m in setting.subject(name).model.modules())


def test_study_of_bytes(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path)
    report = Report("qrida-bytes", "t", "s", tmp_path / "out")
    qrida_bytes.run(setting, report)
    choice = report.numbers["llama"]["choice"]
    for values in choice.values():
        densities = [point["density"] for point in values["arms"].values()]
        assert densities == pytest.approx([densities[0]] * 4, abs=0.05)
    assert report.claims


def test_study_of_the_frontier(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path)
    report = Report("frontier", "t", "s", tmp_path / "out")
    frontier.run(setting, report)
    points = {point["label"]: point for point in report.numbers["llama"]}
    every = points["8 bits, all neurons"]
    assert every["bits"] == 8 * 68 / 32 and 0 <= every["kl"] < 0.01  # one block of 64 for d = 32
    tiers = points["bf16, tiers, 0.70 of the rows"]
    rows = tiers["exact"] + tiers["estimated"] / 3
    assert rows == pytest.approx(0.7, abs=0.1)
    record = 8 * (record_bytes(32, 3, 3) + 12) / (3 * 32)
    assert tiers["bits"] == pytest.approx(16 * rows + record)
    assert tiers["unpadded"] < tiers["bits"]
    for group in ("CATS", "TDA", "TEAL"):
        assert points[f"{group} at 0.5"]["kl"] > points[f"{group} at 0.7"]["kl"] > 0
    assert points["TEAL at 0.5"]["bits"] == pytest.approx(8, abs=1)
    assert (tmp_path / "out" / "frontier_llama.png").exists() and report.claims
    assert not any(hasattr(m, "is_stand_in") for m in setting.subject("llama").model.modules())


def test_the_frontier_and_the_line() -> None:
    def at(bits: float, kl: float) -> dict[str, float]:
        return {"bits": bits, "kl": kl}

    line = [at(4, 0.1), at(6, 0.001), at(5, 0.01)]
    assert frontier.frontier([*line, at(5.5, 0.02)]) == [line[0], line[2], line[1]]
    assert frontier.below(at(4.5, 0.03), line) is True
    assert frontier.below(at(4.5, 0.04), line) is False
    assert frontier.below(at(7, 0.0), line) is None


def test_watching_sees_what_a_guard_on_every_token_sees(tiny) -> None:
    subject = tiny_subject(tiny)
    rows = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    result = qrida_guard._decode(subject, QRIDA(0.3, guard="watch", guard_every=1), rows, 4.0)
    assert result["tokens"] == 2 * 24
    tail = torch.tensor(result["layers"])
    assert tail.shape == (3,) and result["cett"] == pytest.approx(tail.mean().item())
    moyu_ext.patch(subject.model, QRIDA(0.3, guard="watch", guard_every=1))
    with torch.no_grad():
        out = subject.model(input_ids=rows[1:, :16], use_cache=True)
        for t in range(16, 40):
            cache = cache_of(out)
            out = subject.model(input_ids=rows[1:, t : t + 1], **passing(subject.model, cache))
    assert moyu_ext.report(subject.model).cett == pytest.approx(result["cett"], rel=1e-5)


def test_curve_is_a_running_mean(monkeypatch) -> None:
    monkeypatch.setattr(qrida_guard, "_SMOOTH", 4)
    values = torch.arange(140, dtype=torch.float64)
    assert qrida_guard._smooth(values).tolist() == [1.5, 65.5, 129.5]


def test_study_of_the_guard(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path)
    monkey = pytest.MonkeyPatch()
    monkey.setattr(qrida_guard, "_LENGTH", 32)
    monkey.setattr(qrida_guard, "_PROMPT", 12)  # more than 8 rows run dense
    with monkey.context():
        report = Report("qrida-guard", "t", "s", tmp_path / "out")
        qrida_guard.run(setting, report)
    monkey.undo()
    found = report.numbers["llama"]
    assert list(found["texts"]) == ["words", "other"]
    for modes in found["texts"].values():
        assert set(modes) == {"watch 64", "hold 64"}
        assert all(0 < values["cett"] < 1 for values in modes.values())
    assert [claim.source for claim in report.claims] == ["QRIDA, guard"] * 3
