"""`moyu study inertia`."""

import json
from pathlib import Path

import pytest
import torch
from moyu_ext.studies.activity import active, neuron_norms, prompt_statistic, strongest
from moyu_ext.studies.inertia import focus, in_parallel, in_sequence, random_like, run
from moyu_ext.studies.inertia_distance import _coverage, _overlap
from moyu_ext.studies.inertia_meaning import pair_overlap, shared_tokens, text_sets
from moyu_ext.studies.paraphrases import PAIRS
from moyu_ext.studies.report import Report
from study_support import tiny_setting, tiny_subject


@pytest.fixture
def rows() -> torch.Tensor:
    ids = torch.randint(3, 100, (3, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 1
    return ids


@pytest.mark.parametrize("name", ["llama", "llama-relu", "opt"])
def test_norms_are_those_of_the_neurons_contributions(tiny, rows, name: str) -> None:
    subject = tiny_subject(tiny, name)
    norms = neuron_norms(subject, rows)
    site = subject.sites[1]
    held = {}
    handle = site.linear(site.family.down).register_forward_pre_hook(
        lambda module, args: held.__setitem__("a", args[0])
    )
    with torch.no_grad():
        subject.model(rows)
    handle.remove()
    a = held["a"].view(*rows.shape, site.f)
    down = site.linear(site.family.down).weight
    for place in ((0, 3, 5), (2, 23, 90)):
        contribution = a[place] * down[:, place[2]]  # n_i(x), eq. 12
        assert norms[1][place].item() == pytest.approx(contribution.norm().item(), abs=1e-6)


def test_parallel_tokens_see_only_the_first(tiny, rows) -> None:
    subject = tiny_subject(tiny)
    alone = in_parallel(subject, rows)
    pair = torch.tensor([[1, int(rows[1, 9])]])
    assert torch.allclose(alone[:, 1, 8], neuron_norms(subject, pair)[:, 0, 1], atol=1e-6)
    assert torch.allclose(in_sequence(subject, rows)[:, :, 0], alone[:, :, 0], atol=1e-6)
    assert not torch.allclose(in_sequence(subject, rows)[:, :, 5], alone[:, :, 5], atol=1e-3)


def test_random_tokens_come_from_the_texts(rows) -> None:
    drawn = random_like(rows, torch.Generator().manual_seed(1))
    assert torch.equal(drawn[:, 0], rows[:, 0]) and drawn.shape == rows.shape
    assert not torch.equal(drawn, rows)
    assert set(drawn[:, 1:].flatten().tolist()) <= set(rows[:, 1:].flatten().tolist())


def test_focus_of_known_sets() -> None:
    same = torch.zeros(2, 1, 5, 20, dtype=torch.bool)
    same[..., :4] = True
    apart = torch.eye(20, dtype=torch.bool).view(1, 1, 20, 20)
    assert focus(same)["overlap"].item() == pytest.approx(1)
    assert focus(same)["union"].item() == pytest.approx(0.2)
    assert focus(same)["top"].item() == pytest.approx(0.5)
    assert focus(apart)["overlap"].item() == pytest.approx(0)
    assert focus(apart)["union"].item() == pytest.approx(1)


def test_strongest_leaves_zeros_out() -> None:
    norms = torch.tensor([0.0, 3.0, 0.0, 1.0])
    assert strongest(norms, 1).tolist() == [False, True, False, False]
    assert strongest(norms, 3).tolist() == [False, True, False, True]


def test_overlap_by_distance_finds_a_period(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path)
    sets = torch.zeros(1, 2, 32, 8, dtype=torch.bool)
    for t in range(32):
        sets[0, 0, t, t % 2] = True  # one of two neurons in turn
        sets[0, 1, t, 4 + t % 2] = True
    found = _overlap(setting, sets, [1, 2, 3, 4])
    assert found["overlap"] == [0, 1, 0, 1] and found["of different texts"] == 0


def test_texts_that_run_alike_are_compared_at_one_distance(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path)
    one = torch.rand(1, 1, 40, 12, generator=torch.Generator().manual_seed(0)) > 0.5
    found = _overlap(setting, one.expand(1, 3, 40, 12), [1, 2])  # three times the same text
    assert found["of different texts"] == pytest.approx(found["overlap"][0])
    assert found["next token over other text"]["mean"] == pytest.approx(0, abs=1e-12)


def test_coverage_counts_neurons_by_distance(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path)
    norms = torch.full((1, 2, 12, 10), 0.01)
    norms[:, 0, :4, :5] = 1.0  # the first text's prompt uses neurons 0-4
    norms[:, 1, :4, 5:] = 1.0
    at_threshold = torch.zeros(1, 2, 12, 10, dtype=torch.bool)
    at_threshold[:, 0, 4:8, 0] = True  # near tokens: inside, far ones: outside
    at_threshold[:, 0, 8:, 9] = True
    at_threshold[:, 1, 4:, 5] = True
    found = _coverage(norms, at_threshold, 4, [1, 5, 9], setting)
    assert found["prompt 0.5"]["neurons"] == [1.0, 0.5]
    assert found["static 0.5"]["neurons"] == [0.0, 0.5]  # the other text's prompt
    assert found["gain 0.5"]["mean"] == pytest.approx(0.5)


def test_shared_tokens_and_pair_overlap() -> None:
    a, b = torch.tensor([[1, 5, 6, 7]]), torch.tensor([[1, 7, 8, 8], [1, 5, 6, 7]])
    assert shared_tokens(a, b).tolist() == [[0.25, 1.0]]
    sets = torch.tensor([[[True, False], [True, True]]])
    assert pair_overlap(sets, sets).tolist() == [[1.0, 0.5], [0.5, 1.0]]


def test_text_sets_follow_the_statistic(tiny, rows) -> None:
    subject = tiny_subject(tiny)
    sets = text_sets(subject, rows)
    statistic = prompt_statistic(neuron_norms(subject, rows)[:, :, 1:])
    expected = neuron_norms(subject, rows)[2, 1, 1:].square().mean(0).sqrt()
    assert torch.allclose(statistic[2, 1], expected)
    chosen = statistic[2, 1][sets[2, 1]]
    assert sets.sum(-1).unique().tolist() == [round(0.33 * 96)]
    assert chosen.min() >= statistic[2, 1][~sets[2, 1]].max()


def test_active_uses_each_layers_threshold(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path)
    subject = setting.subject("llama")
    norms = neuron_norms(subject, setting.rows(subject, 16, 4))
    epsilon = setting.thresholds(subject).epsilon
    assert torch.equal(active(setting, subject, norms)[1], norms[1] >= epsilon[1])
    assert setting.thresholds(subject) is setting.thresholds(subject)


def test_paraphrases_share_few_words() -> None:
    assert len(PAIRS) >= 20
    for first, second in PAIRS:
        words = [
            {w.strip(".,").lower() for w in side.split() if len(w.strip(".,")) > 3}
            for side in (first, second)
        ]
        assert len(words[0] & words[1]) <= 1, (first, second)


def test_study_writes_its_verdicts(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path, ("llama", "llama-relu"))
    report = Report("inertia", "t", "s", tmp_path / "out")
    run(setting, report)
    report.write(setting.describe())
    found = json.loads((tmp_path / "out" / "inertia.json").read_text())
    assert len(found["claims"]) == 10
    assert len(found["figures"]) == 2 + 3
    assert all((tmp_path / "out" / figure["file"]).is_file() for figure in found["figures"])
    # Words drawn at random have no meaning: parts of a text are no more alike than of two texts.
    assert found["numbers"]["llama"]["meaning"]["gap"]["p"] > 0.01
