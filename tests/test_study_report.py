"""The studies' report, statistics, corpus and setting."""

import json
import re
from pathlib import Path

import pytest
import torch
from moyu_ext.errors import ConfigurationError
from moyu_ext.evaluation.corpus import Corpus
from moyu_ext.evaluation.statistics import (
    bootstrap,
    covered,
    crossed_bootstrap,
    jaccard,
    mean_interval,
    pearson,
    permutation_p,
    ranks,
    sign_at,
    sign_flip_p,
    sign_of,
    spearman,
    top_mask,
)
from moyu_ext.studies import STUDIES, find
from moyu_ext.studies.report import Claim, Report
from moyu_ext.studies.setting import Setting
from study_support import texts_file, tiny_setting


def test_report_writes_json_markdown_and_figure(tmp_path: Path) -> None:
    report = Report("heavy-hitters", "A title", "Table 5", tmp_path)
    report.claim("eq. 1", "a claim", "a number", "holds only if", "the sun shines")
    report.table("numbers", ["a", "b"], [["x", 0.123456789], ["y", float("nan")]])
    report.table("norms", ["|v|"], [["|w|"]])
    report.numbers["tensor"] = torch.tensor([1.0, float("inf")])
    with report.figure("curve", "a curve") as figure:
        figure.subplots().plot([1, 2])
    report.write({"seed": 0})
    found = json.loads((tmp_path / "heavy_hitters.json").read_text())
    assert found["claims"][0]["verdict"] == "holds only if"
    assert found["numbers"]["tensor"] == [1.0, None]
    assert found["versions"]["torch"] == torch.__version__
    text = (tmp_path / "heavy_hitters.md").read_text()
    assert "| a claim (eq. 1) | a number | **holds only if** the sun shines |" in text
    assert "| x | 0.1235 |" in text and "| y | - |" in text
    assert "| \\|v\\| |" in text and "| \\|w\\| |" in text
    assert (tmp_path / "heavy_hitters_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "heavy_hitters_curve.png" in text


def test_report_does_not_change_from_run_to_run(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        report = Report("gradient", "t", "s", folder)
        with report.figure("f", "c") as figure:
            figure.subplots().plot([3, 1, 2])
        report.write(Setting().describe())
    for name in ("gradient.json", "gradient.md", "gradient_f.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_claim_judged_model_by_model(tmp_path: Path) -> None:
    report = Report("gradient", "t", "s", tmp_path)
    for signs in ((-1, -1), (0, -1), (1, 0), (1, -1), (1, 1), (0, 0)):
        report.judged("s", "c", "m", dict(zip("ab", signs, strict=True)), needed="more")
    verdicts = [(claim.verdict, claim.condition) for claim in report.claims]
    partly = ("holds only if", "the model is a")
    assert verdicts == [
        ("fails", ""),
        ("fails", ""),
        partly,
        partly,
        ("holds", ""),
        ("open", "more"),
    ]


def test_claim_refuses_unknown_verdicts_and_missing_conditions() -> None:
    with pytest.raises(ConfigurationError, match="'maybe'; expected one of holds, fails"):
        Claim("s", "c", "m", "maybe")
    with pytest.raises(ConfigurationError, match="needs a condition"):
        Claim("s", "c", "m", "holds only if")


def test_every_study_has_a_module_with_run() -> None:
    for study in STUDIES.values():
        assert callable(study.load().run), study.name
    with pytest.raises(ConfigurationError, match="'nonsense'; expected one of gradient"):
        find("nonsense")


def test_ranks_share_ties() -> None:
    assert ranks(torch.tensor([10.0, 30.0, 20.0, 20.0])).tolist() == [0, 3, 1.5, 1.5]


def test_correlations() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(a, a.exp()).item() == pytest.approx(1)
    assert spearman(a, -a).item() == pytest.approx(-1)
    assert pearson(a, a.exp()).item() < 0.95
    assert spearman(a, torch.ones(4)).item() == 0
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    y = x + torch.randn(50, generator=torch.Generator().manual_seed(1))
    expected = torch.corrcoef(torch.stack([x, y]))[0, 1].item()
    assert pearson(x, y).item() == pytest.approx(expected, abs=1e-6)


def test_intervals_cover_the_mean_and_know_signs() -> None:
    g = torch.Generator().manual_seed(0)
    samples = torch.randn(400, generator=g) + 1
    for interval in (mean_interval(samples), bootstrap(samples)):
        assert interval.low < 1 < interval.high and interval.sign == 1
        assert interval.high - interval.low < 0.4
    assert bootstrap(torch.randn(400, generator=g)).sign == 0
    assert bootstrap(-samples).sign == -1


def test_crossed_bootstrap_draws_seeds_and_texts() -> None:
    g = torch.Generator().manual_seed(0)
    of_seed, of_text = torch.randn(6, 1, generator=g), torch.randn(1, 30, generator=g)
    interval = crossed_bootstrap(of_seed + of_text)
    # As uncertain as six seeds are, which 180 independent values would not be.
    width = 1.96 * (of_seed.var() / 6 + of_text.var() / 30).sqrt().item()
    assert (interval.high - interval.low) / 2 == pytest.approx(width, rel=0.25)
    naive = bootstrap(of_seed + of_text)
    assert interval.high - interval.low > 2 * (naive.high - naive.low)


def test_signs() -> None:
    for low, high, sign in ((0.1, 0.3, 1), (-0.3, -0.1, -1), (-0.1, 0.1, 0)):
        assert sign_of({"mean": 0.0, "low": low, "high": high, "p": 1.0}) == sign
    assert [sign_at(2.0, 0.01), sign_at(-2.0, 0.01), sign_at(2.0, 0.2)] == [1, -1, 0]


def test_permutation_tests_tell_difference_from_chance() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, generator=g), torch.randn(30, generator=g)
    assert permutation_p(a, b + 2) < 0.001
    assert permutation_p(a, b) > 0.05
    assert sign_flip_p(a + 2) < 0.001
    assert sign_flip_p(a - a.mean()) == 1


def test_set_measures() -> None:
    a = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    b = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert jaccard(a, b).tolist() == pytest.approx([1 / 3, 1])
    assert covered(a, b).tolist() == pytest.approx([1 / 2, 1])
    assert top_mask(torch.tensor([2.0, 3.0, 2.0, 1.0]), 2).tolist() == [True, True, False, False]


def test_corpus_parts_never_meet(tmp_path: Path) -> None:
    corpus = Corpus(texts=[texts_file(tmp_path)])
    train, rest = corpus.documents(train=True), corpus.documents()
    assert len(train) == len(rest) == 20 and not set(train) & set(rest)
    one = tmp_path / "long.txt"
    one.write_text("abc " * 5000)
    assert len(Corpus(texts=[one]).documents()) > 2


def test_corpus_without_data_is_the_shipped_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOYU_DATA", raising=False)
    corpus = Corpus()
    assert corpus.domains() == ["shipped stories"]
    assert not set(corpus.documents()) & set(corpus.documents(train=True))
    with pytest.raises(ConfigurationError, match=r"no text of domain 'code'.*--text FILE"):
        corpus.documents("code")


def test_corpus_reads_the_data_folder(data_dir: Path) -> None:
    corpus = Corpus(data_dir)
    assert corpus.domains()[0] == "stories" and len(corpus.domains()) >= 3
    assert len(corpus.documents("news")) > 50
    assert not set(corpus.documents("stories")) & set(corpus.documents("stories", train=True))


def test_setting_describes_the_content_of_the_text(tmp_path: Path, monkeypatch) -> None:
    """Results are taken up again by it: the same names with other content are another setting."""
    monkeypatch.delenv("MOYU_DATA", raising=False)
    training = tmp_path / "train_mix" / "docs.json.xz"
    heldout = tmp_path / "train_mix" / "heldout" / "cnndm.txt"
    heldout.parent.mkdir(parents=True)
    shipped = Setting().describe()
    found = []
    for file, content in ((heldout, "news"), (heldout, "olds"), (training, "x"), (training, "y")):
        file.write_text(content)
        found.append(Setting(data=tmp_path).describe())
        assert found[-1] == Setting(data=tmp_path).describe()
    digests = {one["text_digest"] for one in [shipped, *found]}
    assert len(digests) == 5 and {one["text"] for one in found} == {"data folder"}
    with pytest.raises(ConfigurationError, match="cannot read the file"):
        Setting(texts=[tmp_path / "nowhere.txt"]).describe()


def test_missing_data_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOYU_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match=r"nowhere is not a directory.*--data"):
        Setting()
    monkeypatch.delenv("MOYU_DATA")
    with pytest.raises(ConfigurationError, match=re.escape("pass --data DIR, or set MOYU_DATA")):
        Setting().need_data("bench/mmlu")


def test_rows_are_whole_and_enough(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path)
    subject = next(setting.subjects())
    rows = setting.rows(subject, 10, 5)
    assert rows.shape == (5, 10) and (rows[:, 0] == 1).all()
    assert setting.rows(subject, 10, 50).shape == (50, 10)  # second windows of texts too
    with pytest.raises(ConfigurationError, match="'words' gives 20 rows of 60 tokens, 21 are"):
        setting.rows(subject, 60, 21)


def test_a_model_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigurationError, match=r"'no_such/folder/at-all'.*stories_silu"):
        Setting().subject("no_such/folder/at-all")
