"""`moyu study tables`."""

import csv
import json
from pathlib import Path

import pytest
import torch
from moyu_ext.errors import ConfigurationError
from moyu_ext.evaluation import rouge as rouge_module
from moyu_ext.studies import tables, tables_measure, tables_paper
from moyu_ext.studies.report import Report
from moyu_ext.studies.tables_measure import latencies, likelihoods, mean_cell, options
from study_support import WordTokenizer, text, tiny_setting, tiny_subject

from moyu_ext import SRIDA, Dense, patch, unpatch


def bench_rows(path: Path) -> Path:
    rows = [
        {"name": "mlp", "method": "torch", "geometry": "llama-2-7b", "density": 1,
         "median_us": 9, "speedup_vs_dense": 1, "device": "c", "commit": "abc"},
        {"name": "decode", "method": "unpatched", "geometry": "llama-2-7b", "density": 1,
         "median_us": 800000, "speedup_vs_dense": 1, "device": "c", "commit": "abc"},
        {"name": "decode", "method": "srida", "geometry": "llama-2-7b", "density": 0.33,
         "median_us": 400000, "speedup_vs_dense": 2, "device": "c", "commit": "abc"},
        {"name": "generate-1024+128-static", "method": "srida+projections",
         "geometry": "llama-2-7b", "density": 0.44, "median_us": 910000,
         "speedup_vs_dense": 1.19, "device": "NVIDIA", "commit": "abc"},
    ]  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_quoted_figures_are_the_papers() -> None:
    # Spot checks against the text of arXiv 2406.12569, one of each table.
    assert tables_paper.TABLE_1["LLaMA-3-8B"]["sTDA"] == (61.37, 50.81, 75.18, 43.39)
    assert tables_paper.TABLE_2["sRIDA"] == (23.92, 7.19, 20.00, 10.17)
    assert tables_paper.TABLE_3[3] == ("sTDA", "1024+1024", 67.12, 91.25)
    assert tables_paper.TABLE_4["dense", "512+128"] == (18.29, 20.31)
    assert tables_paper.TABLE_5["TDA"] == (33.94, 55.00, 63.18, None)
    assert tables_paper.speedups()["sTDA"] == pytest.approx(132.88 / 91.25)
    assert tables_paper.speedups()["sRIDA"] == pytest.approx(4.11 / 3.18)


def test_likelihood_is_the_models(tiny) -> None:
    subject = tiny_subject(tiny)
    document = {"query": text(20, 0), "choices": [text(2, 1), text(3, 2)], "gold": 1}
    pairs = options(WordTokenizer(), document)
    assert [len(head) for head, _ in pairs] == [21, 21] and [len(t) for _, t in pairs] == [2, 3]
    patch(subject.model, Dense())
    found = likelihoods(subject, pairs, without_heavy=False)
    bare = likelihoods(subject, pairs, without_heavy=True)
    unpatch(subject.model)
    head, tail = pairs[1]
    with torch.no_grad():
        logits = subject.model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
    expected = sum(logits[20 + i, token].item() for i, token in enumerate(tail))
    assert found[1].item() == pytest.approx(expected, abs=1e-4)
    assert not torch.allclose(bare, found, atol=1e-3)
    patch(subject.model, SRIDA(0.3))
    sparse = likelihoods(subject, pairs, without_heavy=False)
    unpatch(subject.model)
    assert not torch.allclose(sparse, found, atol=1e-3)  # the method governs the answer


def test_options_of_a_sentence_with_two_beginnings() -> None:
    document = {"contexts": ["w1 w2", "w1 w3 w4"], "ending": "w5", "gold": 0}
    assert options(WordTokenizer(), document) == [([1, 4, 5], [8]), ([1, 4, 6, 7], [8])]


def test_cells() -> None:
    cell = mean_cell([1.0, 0.0, 0.0, 1.0])
    assert cell.value == 50 and cell.count == 4
    assert cell.error == pytest.approx(100 * (1 / 3) ** 0.5 / 2)
    reasons = tables._Reasons()
    assert reasons.text(cell) == "50.0 ± 28.9"
    assert reasons.text(tables._quoted(45.83)) == "(45.83)"
    assert reasons.text(tables._quoted(None)) == "- [1]"
    assert reasons.note() == "[1] the paper prints no figure."


def test_latencies_come_with_their_row(tmp_path: Path) -> None:
    path = bench_rows(tmp_path / "rows.csv")
    found = latencies(path)
    assert [row.method for row in found] == ["unpatched", "srida", "srida+projections"]
    assert [row.setup for row in found] == ["per token", "per token", "1024+128"]
    assert found[1].milliseconds == 400 and found[1].where == "rows.csv row 3, commit abc"
    other = tmp_path / "rows.json"
    other.write_text(json.dumps({"rows": [vars(found[0])]}))
    with pytest.raises(
        ConfigurationError, match=r"rows\.json holds no rows of `moyu bench decode`"
    ):
        latencies(other)
    with pytest.raises(ConfigurationError, match="nowhere holds no rows"):
        latencies(tmp_path / "nowhere")


def test_faster_is_judged_by_method_and_device_at_the_median(tmp_path: Path) -> None:
    rows = [
        tables_measure.Latency("srida", "per token", "llama-2-7b", 0.3, 1.0, speed, "Xeon", "row")
        for speed in (1.0, 1.3, 1.9)
    ]
    rows += [
        tables_measure.Latency("stda", "1+1", "llama-2-7b", 0.3, 1.0, 1.1, "NVIDIA X", "row"),
        tables_measure.Latency("tda", "per token", "llama-3-8b", 0.3, 1.0, 9.0, "Xeon", "row"),
    ]
    report = Report("tables", "t", "s", tmp_path)
    tables._faster(report, rows, tables_paper.speedups(), "measure it")
    tables._faster(report, [], tables_paper.speedups(), "measure it")
    first, second = report.claims
    assert "sRIDA on the CPU 1.30 (median of 3); sTDA on NVIDIA X 1.10" in first.measured
    assert (first.verdict, first.condition) == ("holds only if", "it is sRIDA on the CPU")
    assert (second.verdict, second.condition) == ("open", "measure it")


def test_table_5_is_judged_by_what_accuracy_falls(tmp_path: Path) -> None:
    # Without heavy hitters TDA scores best, and falls most.
    scores = {"TDA": (1.0, 0.5), "sTDA": (0.6, 0.3), "sRIDA": (0.2, 0.1)}
    values = {
        table: {(m, "MMLU"): [pair[at]] * 20 for m, pair in scores.items()}
        for at, table in enumerate(("1", "5"))
    }
    report = Report("tables", "t", "s", tmp_path)
    tables._claims(tiny_setting(None, tmp_path, ()), report, {"m": values})
    assert [claim.verdict for claim in report.claims] == ["holds", "holds"]
    assert "TDA less sTDA +20.0 points" in report.claims[1].measured


def study(tiny, tmp_path: Path, **changes) -> dict:
    setting = tiny_setting(tiny, tmp_path)
    setting.bench = bench_rows(tmp_path / "rows.csv")
    for name, value in changes.items():
        setattr(setting, name, value)
    report = Report("tables", "t", "s", tmp_path / "out")
    tables.run(setting, report)
    report.write(setting.describe())
    return json.loads((tmp_path / "out" / "tables.json").read_text())


def test_without_data_every_cell_says_why_it_is_empty(tiny, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MOYU_DATA", raising=False)
    found = study(tiny, tmp_path)
    for table in ("1", "2", "4", "5"):
        mine = [row for row in found["numbers"][f"table {table}"] if row["model"] == "llama"]
        assert [row["method"] for row in mine] == ["dense", "TDA", "sTDA", "sRIDA"]
        for row in mine:
            cells = [cell for cell in row.values() if isinstance(cell, dict)]
            assert all(cell["kind"] == "empty" and cell["reason"] for cell in cells)
    whole = (tmp_path / "out" / "tables.md").read_text()
    assert "is in the data folder: pass --data DIR, or set MOYU_DATA" in whole
    assert "| LLaMA-2-7B, paper | TDA | (45.62) | (60.66) | (73.88) | (13.65) | (67.12) |" in whole
    assert "| sRIDA | per token | 67.0 | 400.0 ms | 2.000 | rows.csv row 3, commit abc |" in whole
    assert "| sRIDA + projections | 1024+128 | 56.0 | 0.91 s in all | 1.190 | rows.csv" in whole
    assert (
        "no rows of tda, stda in rows.csv; measure it with `moyu bench decode -g llama-2-7b"
        in whole
    )
    verdicts = {claim["claim"]: claim["verdict"] for claim in found["claims"]}
    assert list(verdicts.values()) == ["fails", "fails", "fails", "holds", "open", "open"]
    assert "sTDA (12.31) and (12.31)" in whole  # of two tables, which measure different things
    assert "falls most sTDA, sTDA, sTDA; least sRIDA, TDA, sRIDA" in whole


def test_cells_are_measured_where_there_is_data(tiny, tmp_path: Path, monkeypatch) -> None:
    document = {"query": text(20, 0), "choices": [text(2, 1), text(3, 2)], "gold": 1}
    task = tables_measure.find_task("mmlu")
    made = type(task)("mmlu", "choice", "mmlu", lambda data: [document] * 3)
    monkeypatch.setattr(tables_measure, "find_task", lambda name: made)

    def missing(*_):
        raise ConfigurationError("ROUGE needs the package rouge-score: pip install rouge-score")

    items = [rouge_module.Item(text(30, 3), text(5, 4), 8, ("\n",))] * 2
    monkeypatch.setattr(tables_measure, "load_items", lambda data, name, limit: items[:limit])
    monkeypatch.setattr(tables_measure, "rouge", missing)
    found = study(tiny, tmp_path, data=tmp_path)
    first = next(r for r in found["numbers"]["table 1"] if r["model"] == "llama")
    assert first["MMLU"]["kind"] == "measured" and first["MMLU"]["count"] == 2
    srida = next(
        r for r in found["numbers"]["table 5"]
        if r["model"] == "llama" and r["method"] == "sRIDA"
    )  # fmt: skip
    assert srida["sparsity"]["value"] == pytest.approx(56.17, abs=1)
    assert srida["GSM8K"]["kind"] == "empty" and "generation" in srida["GSM8K"]["reason"]
    rouge_row = next(r for r in found["numbers"]["table 2"] if r["model"] == "llama")
    assert "pip install rouge-score" in rouge_row["ROUGE-1"]["reason"]
