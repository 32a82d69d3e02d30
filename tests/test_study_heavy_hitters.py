"""`moyu study heavy-hitters`."""

import json
from pathlib import Path

import pytest
import torch
from moyu_ext.evaluation.perplexity import generation_perplexity
from moyu_ext.studies.activity import mask_arguments
from moyu_ext.studies.attention import (
    chosen_tokens,
    losses,
    mask_without,
    per_query,
    received_attention,
)
from moyu_ext.studies.heavy_hitters import _shuffled, run
from moyu_ext.studies.report import Report
from study_support import tiny_setting, tiny_subject

from moyu_ext import SRIDA, Dense, UnsupportedModelError


@pytest.fixture
def rows() -> torch.Tensor:
    ids = torch.randint(3, 100, (3, 30), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    return ids


def test_received_attention_is_the_sum_over_queries(tiny, rows) -> None:
    model = tiny()
    before = model.config._attn_implementation
    scores = received_attention(model, rows)
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(rows, output_attentions=True).attentions
    expected = sum(w[1, :, :, 4].sum(-1).mean() for w in weights) / len(weights)
    assert scores[1, 4].item() == pytest.approx(expected.item(), rel=1e-5)
    assert scores.sum(1).tolist() == pytest.approx([30] * 3, rel=1e-5)  # each query gives 1


def test_chosen_tokens() -> None:
    scores = torch.tensor([[9.0, 1.0, 5.0, 2.0, 4.0], [9.0, 5.0, 1.0, 1.0, 1.0]])
    g = torch.Generator().manual_seed(0)
    assert chosen_tokens(scores, 0.4, "heavy", g).nonzero()[:, 1].tolist() == [2, 4, 1, 2]
    # Per query: 1/4, 5/3, 2/2, 4/1 in the first row.
    assert chosen_tokens(scores, 0.4, "heavy per query", g)[0].nonzero().tolist() == [[2], [4]]
    for kind in ("heavy", "heavy per query"):
        there = chosen_tokens(scores, 0.4, f"places of {kind}", g)
        assert torch.equal(there[0], chosen_tokens(scores, 0.4, kind, g)[1])
    drawn = chosen_tokens(torch.rand(50, 20), 0.1, "random", g)
    assert (drawn.sum(1) == 2).all() and not drawn[:, 0].any() and drawn.sum(0)[1:].min() > 0
    assert per_query(scores)[0].tolist() == pytest.approx([9 / 5, 1 / 4, 5 / 3, 1, 4])


def test_attention_of_shuffled_tokens_comes_back_in_their_order(tiny, rows) -> None:
    subject = tiny_subject(tiny)
    order = torch.rand(rows[:, 1:].shape, generator=torch.Generator().manual_seed(5)).argsort(1)
    ids = torch.cat([rows[:, :1], rows[:, 1:].gather(1, order)], 1)
    there = per_query(received_attention(subject.model, ids))
    back = _shuffled(subject, rows, torch.Generator().manual_seed(5))
    assert back[1, order[1, 0]] == there[1, 1]
    assert torch.equal(back.gather(1, order), there[:, 1:])


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_removed_token_reaches_no_later_token(tiny, rows, name: str) -> None:
    subject = tiny_subject(tiny, name)
    removed = torch.zeros(3, 20, dtype=torch.bool)
    removed[:, 7] = True
    mask = mask_without(removed, rows.shape[1])
    other = rows.clone()
    other[:, 7] = (rows[:, 7] - 3 + 1) % 97 + 3
    with torch.no_grad():
        first, second = (
            subject.model(ids, use_cache=False, **mask_arguments(mask, slice(None))).logits
            for ids in (rows, other)
        )
        plain = subject.model(rows, use_cache=False).logits
    assert torch.allclose(first[:, 8:], second[:, 8:], atol=1e-5)
    assert torch.allclose(first[:, :7], plain[:, :7], atol=1e-5)
    assert not torch.allclose(first[:, 8:], plain[:, 8:], atol=1e-3)


def test_losses_without_removal_are_those_of_perplexity(tiny, rows) -> None:
    subject = tiny_subject(tiny)
    expected = generation_perplexity(subject.model, rows, context=16, continuation=14).loss
    found, density = losses(subject, Dense(), rows, 16, None)
    assert found.mean().item() == pytest.approx(expected, rel=1e-5) and density == 1
    # A mask that removes nothing is the same as none, also for a method that learns from context.
    nothing = mask_without(torch.zeros(3, 16, dtype=torch.bool), 30)
    first, density = losses(subject, SRIDA(0.5), rows, 16, None)
    second, _ = losses(subject, SRIDA(0.5), rows, 16, nothing)
    assert torch.allclose(first, second, atol=1e-5) and density == pytest.approx(0.5)
    assert not torch.allclose(first, found, atol=1e-3)


def test_a_model_without_attention_weights_is_refused(tiny, rows, monkeypatch) -> None:
    model = tiny()
    forward = model.forward

    def silent(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.attentions = None
        return output

    monkeypatch.setattr(model, "forward", silent)
    with pytest.raises(UnsupportedModelError, match=r"needs attention weights.*returned none"):
        received_attention(model, rows)
    with pytest.raises(UnsupportedModelError, match="has no eager attention"):
        received_attention(torch.nn.Linear(2, 2), rows)


def test_study_writes_its_verdicts(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path)
    report = Report("heavy-hitters", "t", "s", tmp_path / "out")
    run(setting, report)
    report.write(setting.describe())
    found = json.loads((tmp_path / "out" / "heavy_hitters.json").read_text())
    assert len(found["claims"]) == 10
    where = found["numbers"]["llama"]["where"]
    assert where["lost to meaning"]["mean"] == pytest.approx(
        where["rank correlation of two shuffles"]["mean"]
        - where["rank correlation with itself in the shuffled text"]["mean"]
    )
    quality = found["numbers"]["llama"]["quality"]
    assert set(quality) == {"dense", "TDA", "sTDA", "sRIDA", "qRIDA"}
    assert quality["dense"]["density"] == 1 and quality["sRIDA"]["density"] == 0.5
    assert not any(hasattr(m, "is_stand_in") for m in setting.subject("llama").model.modules())
