"""`moyu study history`."""

import json
from pathlib import Path

import pytest
import torch
from moyu_ext.calibration.train_router import train_router
from moyu_ext.models.text import encode
from moyu_ext.studies import written
from moyu_ext.studies.activity import neuron_norms
from moyu_ext.studies.history import activity, pulls_of_texts, run, theta
from moyu_ext.studies.history_routers import Reading, online, read, recall
from moyu_ext.studies.report import Report
from moyu_ext.studies.setting import Setting
from study_support import text, tiny_setting, tiny_subject


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_pulls_are_those_of_the_last_layers_weights(tiny, name: str) -> None:
    subject = tiny_subject(tiny, name)
    rows = torch.randint(3, 100, (3, 12), generator=torch.Generator().manual_seed(0))
    pulls, squares, positive = pulls_of_texts(subject, rows)
    assert pulls.shape == (3, 3, 96)
    site = subject.sites[1]
    weight = site.linear(site.family.down).weight
    for n in range(3):
        logits = subject.model(rows[n : n + 1]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, rows[n, 1:], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, weight)
        expected = (weight * gradient).sum(0)  # <v_i, dL/dv_i>
        assert torch.allclose(pulls[n, 1], expected.double(), atol=1e-5)
    norms = neuron_norms(subject, rows)
    assert torch.allclose(squares[2, 1], norms[1, 2].double().square().mean(0), rtol=1e-4)
    assert 0 < positive.mean() < 1
    assert all(p.grad is None for p in subject.model.parameters())


def test_importance_adds_up_without_signs() -> None:
    pulls = torch.tensor([[[1.0, -2.0]], [[-1.0, -1.0]]])
    assert theta(pulls).tolist() == [[2, 3]]
    assert torch.equal(theta(pulls), theta(pulls.flip(0)))  # the order of texts adds nothing
    assert activity(torch.tensor([[[1.0, 0.0]], [[7.0, 0.0]]])).tolist() == [[2, 0]]


def test_recall_of_a_router_that_knows_and_one_that_does_not(tiny) -> None:
    subject = tiny_subject(tiny)
    router = train_router(
        subject.model, subject.tokenizer, [text(64, s) for s in range(12)], epochs=1,
        max_tokens=512, progress=False,
    )  # fmt: skip
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    best = torch.stack([layer.scores(x).argsort(-1, descending=True) for layer in router.layers])
    active = torch.zeros(3, 40, 96, dtype=torch.bool)
    active.scatter_(2, best[:, :, :10], True)
    reading = Reading([x] * 3, torch.rand(3, 40, 96), active)
    assert recall(router, reading, 10).tolist() == [1, 1, 1]
    assert recall(router, reading, 5).tolist() == [0.5, 0.5, 0.5]
    opposite = Reading([x] * 3, reading.norms, torch.zeros_like(active).scatter_(
        2, best[:, :, -10:], True))  # fmt: skip
    assert recall(router, opposite, 10).tolist() == [0, 0, 0]
    # It learns the new text's rule, and the router that it started from stays as it was.
    first = router.layers[0].second.clone()
    moved = online(router, opposite, steps=400)
    assert recall(moved, opposite, 10).min() > 0.3
    assert torch.equal(router.layers[0].second, first)
    scores = moved.layers[1].scores(x)
    share = (scores >= moved.layers[1].threshold_for(0.25)).double().mean()
    assert share.item() == pytest.approx(0.25, abs=0.02)


def test_reading_is_the_dense_model(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path)
    subject = setting.subject("llama")
    rows = setting.rows(subject, 16, 4)
    reading = read(setting, subject, rows)
    norms = neuron_norms(subject, rows)
    assert torch.allclose(reading.norms, norms.flatten(1, 2), atol=1e-6)
    assert torch.equal(
        reading.active[2], reading.norms[2] >= setting.thresholds(subject).epsilon[2]
    )


def test_study_writes_its_verdicts(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path, ("llama", "llama-relu"))
    report = Report("history", "t", "s", tmp_path / "out")
    run(setting, report)
    report.write(setting.describe())
    found = json.loads((tmp_path / "out" / "history.json").read_text())
    assert len(found["claims"]) == 9
    assert len(found["figures"]) == 2
    numbers = found["numbers"]["llama-relu"]
    grid = torch.tensor(numbers["routers"]["recall"])
    assert grid.shape == (2, 2) and (grid > 0).all()
    assert numbers["importance, rank correlation"]["two orders"]["mean"] > 0
    assert 0 < numbers["cancellation"] <= 1


def test_one_activation_leaves_the_comparison_open(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path)
    report = Report("history", "t", "s", tmp_path / "out")
    run(setting, report)
    open_claims = [claim for claim in report.claims if "studied together" in claim.condition]
    assert len(open_claims) == 4
    assert all("ReLU" in claim.condition for claim in open_claims)


def test_text_without_data_is_made_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOYU_DATA", raising=False)
    setting, other = Setting(quick=True), Setting(quick=True, seed=1)
    assert setting.domains() == ["stories", "sums", "code", "words"]
    for domain in ("sums", "code", "words"):
        train, rest = setting.documents(domain, train=True), setting.documents(domain)
        assert rest == Setting(quick=True).documents(domain)
        assert rest != other.documents(domain)
        assert len(train) == len(rest) == 8 and not set(train) & set(rest)
        assert min(len(one.split()) for one in rest) >= written.WORDS
    assert "text made from a seed" in setting.describe()["text"]


@pytest.mark.slow
def test_the_twins_write_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOYU_DATA", raising=False)
    monkeypatch.setattr(written, "TOKENS", 24)
    texts = written._stories.__wrapped__(8, 0)
    assert list(texts) == list(written._stories.__wrapped__(8, 0))
    assert len(set(texts)) == 8
    _, tokenizer = written._author("stories_silu")
    assert all(len(encode(tokenizer, one)) > 15 for one in texts)
    assert texts[0].startswith(written.OPENINGS[0]) and texts[4].startswith(written.OPENINGS[1])
