"""`moyu eval`: what it writes, that it goes on where it stopped, and what it refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from moyu_ext.calibration.split_experts import split_experts
from moyu_ext.calibration.train_router import train_router
from moyu_ext.cli import app
from moyu_ext.errors import ConfigurationError
from moyu_ext.evaluation import evaluate, picture
from moyu_ext.evaluation.agreement import compare, continuation_logits, dense_text, patched
from moyu_ext.evaluation.corpus import Corpus
from moyu_ext.evaluation.curves import CURVES, Point, Workshop, _experts, points
from moyu_ext.evaluation.inputs import input_thresholds, masked_inputs
from moyu_ext.evaluation.tasks import TaskScore
from moyu_ext.methods import QRIDA, RIDA, RODA, SRIDA, STDA, TDA, Dense, OnlineRODA
from moyu_ext.models.fingerprint import fingerprint
from moyu_ext.models.weights import read_share
from moyu_ext.patching.patch import report, scoring
from study_support import WordTokenizer, text
from typer.testing import CliRunner

from moyu_ext import embedded

QUICK = ("--context", 16, "--continuation", 12, "--texts", 3, "--written", 4)
TEXTS = [text(60, seed) for seed in range(30)]


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def no_data(monkeypatch) -> None:
    monkeypatch.delenv("MOYU_DATA", raising=False)


@pytest.mark.usefixtures("no_data")
def test_one_run_writes_table_picture_and_json(tmp_path: Path) -> None:
    out, brief = tmp_path / "eval", tmp_path / "brief.json"
    args = ("eval", "stories_silu", "--out", out, *QUICK, "--json", brief, "--seed", 3)
    code, output = run(*args, "--methods", "dense, srida,qrida,srida")
    assert code == 0, output
    found = json.loads((out / "eval.json").read_text())
    assert found["fingerprint"] and found["seed"] == 3 and found["model"] == "stories_silu"
    assert (found["context"], found["continuation"]) == (16, 12)
    assert {"torch", "transformers", "moyu_ext", "python"} <= set(found["versions"])
    rows = found["rows"]
    assert [row["method"] for row in rows] == ["dense", *["sRIDA"] * 5, *["QRIDA, 2 bits"] * 5]
    dense, rest = rows[0], rows[1:]
    assert dense["density"] == dense["agreement"] == dense["generated_agreement"] == 1
    # Rounding to bfloat16: W_down lies otherwise in memory, and some processors then sum otherwise.
    rounding = torch.finfo(torch.bfloat16).eps
    assert abs(dense["change"]) < rounding and dense["kl"] < rounding**2
    for row in rest:
        assert row["texts"] == 3 and row["dense_perplexity"] == dense["dense_perplexity"]
        assert row["kl"] > 1e-4, "a method that leaves neurons out must not score like dense"
        assert row["loss_rise_low"] <= row["loss_rise"] <= row["loss_rise_high"]
    assert [row["density"] for row in rest[:5]] == pytest.approx(
        [0.1, 0.2, 0.33, 0.5, 0.7], abs=5e-3
    )
    assert rest[0]["kl"] > rest[4]["kl"]
    assert "router_recall" not in rest[0]
    # Only per-token methods have a sliding window; dense is the model's own.
    assert dense["sliding_perplexity"] > 1 and rest[0]["sliding_perplexity"] is None
    assert rest[5]["sliding_perplexity"] != dense["sliding_perplexity"]
    assert (out / "eval.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "eval.md").read_text()
    assert table.count("\n") == 2 + len(rows) and "| sRIDA | density 0.33 |" in table
    assert json.loads(brief.read_text()) == evaluate.brief(found)
    # Once more: nothing is measured again.
    before = (out / "eval.json").read_bytes()
    code, output = run(*args, "--methods", "dense,srida,qrida")
    assert code == 0 and "11 of 11 are in" in output and "1 of 11: dense" not in output
    assert (out / "eval.json").read_bytes() == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--methods", "magic"), "method is 'magic'; expected one of dense, tda, cats"),
        (("--tasks", "magic"), "task is 'magic'; expected one of mmlu, truthfulqa_mc1"),
        (("--summaries", "magic"), "--summaries reads summ/ of the data folder: pass --data"),
        (("--data", "nowhere"), "data folder nowhere is not a directory"),
        (("--text", "nowhere.txt"), "cannot read the file 'nowhere.txt'"),
        (("--router", "nowhere"), "cannot read nowhere"),
        (("--context", 4000), "no text has 4012 tokens"),
        (("--density", 1.5), "density is 1.5; expected a number in (0, 1]"),
        (("--cett", 1), "cett is 1.0; expected a number in [0, 1)"),
        (("--methods", "tda", "-d", 0.3), "--density is given, but none of tda is measured by"),
    ],
)
@pytest.mark.usefixtures("no_data")
def test_what_cannot_be_done_is_said(tmp_path: Path, args: Any, message: str) -> None:
    if args[0] == "--summaries":
        pytest.importorskip("rouge_score")
    code, output = run("eval", "stories_silu", "--out", tmp_path / "eval", *QUICK, *args)
    assert code == 2 and message in output, output


@pytest.mark.usefixtures("no_data")
def test_missing_files_of_the_data_folder_are_named(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "train_mix" / "heldout").mkdir(parents=True)
    for task, file in (("mmlu", "_test.csv"), ("piqa", "piqa.test.json"), ("gsm8k", "train.jsonl")):
        code, output = run(
            *("eval", "stories_silu", "--out", tmp_path / "eval", "--data", tmp_path),
            *("--tasks", task),
        )
        assert code == 2 and file in output and "pass --data" in output, output
    folder = tmp_path / "bench" / "commonsense"
    folder.mkdir(parents=True)
    (folder / "piqa.test.json").write_text("{")
    code, output = run(
        "eval", "stories_silu", "--out", tmp_path / "eval", "--data", tmp_path, "--tasks", "piqa"
    )
    assert code == 2 and "is not the file that was expected" in output, output


@pytest.mark.usefixtures("no_data")
def test_missing_packages_are_named_with_the_pip_command(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    code, output = run("eval", "stories_silu", "--out", tmp_path, "--tasks", "mmlu")
    assert code == 2 and 'pip install "moyu_ext[eval]", or pip install lm-eval' in output
    code, output = run(
        "eval", "stories_silu", "--out", tmp_path, "--summaries", "xsum", "--data", tmp_path
    )
    assert code == 2 and 'pip install "moyu_ext[eval]", or pip install rouge-score' in output


def evaluation(model, rows: torch.Tensor, **settings: Any) -> evaluate.Evaluation:
    return evaluate.Evaluation(model, WordTokenizer(), rows, 12, **settings)


def test_results_of_another_meaning_are_measured_anew(tiny, prompt, monkeypatch) -> None:
    def key() -> str:
        return evaluate.Evaluation(tiny(), None, prompt(24, 2), 12).key("dense")

    before = key()
    assert key() == before
    monkeypatch.setattr(evaluate, "_MEANING", evaluate._MEANING + 1)
    assert key() != before


def test_an_interrupted_run_goes_on_and_loses_nothing(tiny, prompt, tmp_path: Path) -> None:
    model, rows = tiny(), prompt(24, 4)
    path = tmp_path / "eval.json"
    made: list[str] = []
    stop = [False]

    def make(density: float) -> Any:
        def build() -> SRIDA:
            if stop[0]:
                raise KeyboardInterrupt
            made.append(str(density))
            return SRIDA(density)

        return build

    dense = Point("dense", "", Dense)
    some = [dense, Point("s", "0.6", make(0.6)), Point("s", "0.8", make(0.8))]
    evaluate.run(evaluation(model, rows), some[:1] + some[2:], path)
    assert made == ["0.8"]
    stop[0] = True
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(evaluation(model, rows), some, path)
    stop[0] = False
    found = evaluate.run(evaluation(model, rows), some, path)
    assert made == ["0.8", "0.6"], "what was measured before the interrupt is kept"
    fresh = evaluate.run(evaluation(model, rows), some, None)
    assert found == fresh == json.loads(path.read_text())
    made.clear()
    # Anything that results depend on makes the file's rows worthless.
    for changed in (
        evaluation(model, rows, seed=1),
        evaluation(model, rows, basis="other texts"),
        evaluation(model, rows[:3]),
        evaluation(tiny(seed=1), rows),
    ):
        evaluate.run(changed, some[1:2], path)
    assert len(made) == 4
    path.write_text("{}")
    with pytest.raises(ConfigurationError, match="is not a file that `moyu eval` wrote"):
        evaluate.run(evaluation(model, rows), some, path)


def test_the_user_s_artefacts_are_part_of_the_key(tiny) -> None:
    model = tiny()
    shop = Workshop(model, WordTokenizer(), TEXTS)
    options = {"experts": 4, "epochs": 1, "max_tokens": 900}
    shop.experts = split_experts(model, WordTokenizer(), TEXTS, split="random", **options)
    first = points(shop, ["rida", "dense"])
    # Only the split that was given, rather than two more that nobody asked for.
    assert [p.curve for p in first] == ["RIDA, random"] * 3 + ["dense"]
    assert first[0].make().experts is shop.experts
    shop.experts = split_experts(model, WordTokenizer(), TEXTS, split="random", seed=1, **options)
    second = points(shop, ["rida", "dense"])
    assert first[0].basis != second[0].basis and first[3].basis == second[3].basis == ""


def test_results_of_another_artefact_are_measured_anew(tiny, prompt, tmp_path: Path) -> None:
    """The user's router or experts may change while the configuration's name stays."""
    model, rows, made = tiny(), prompt(24, 2), []

    def point(basis: str) -> Point:
        return Point("RODA", "recall", lambda: made.append(basis) or SRIDA(0.5), basis)

    for basis, wanted in (("a", ["a"]), ("a", ["a"]), ("b", ["a", "b"])):
        evaluate.run(evaluation(model, rows), [point(basis)], tmp_path / "eval.json")
        assert made == wanted


def test_differences_of_tasks_are_the_method_less_dense(tiny) -> None:
    dense = {"metric": "acc", "value": 0.5, "stderr": 0.1, "documents": 4}
    one = evaluate.Evaluation(tiny(), None, None, 12)
    one.restore({"tasks": {"piqa": dense | {"per_document": [1.0, 1.0, 0.0, 0.0]}}})
    found = one._task(TaskScore("piqa", "acc", 0.25, 0.1, 4, [1.0, 0.0, 0.0, 0.0]))
    assert found["difference"] == -0.25, "worse than dense"
    assert 0 < found["p"] <= 1


@pytest.mark.usefixtures("no_data")
def test_the_points_that_are_asked_for(tmp_path: Path) -> None:
    args = ("eval", "stories_silu", "--out", tmp_path / "eval", *QUICK)
    points = ("-d", 0.25, "--density", 0.6, "-d", 0.25, "--cett", 0.3)
    code, output = run(*args, *points, "--methods", "tda,srida,qrida-fitted")
    assert code == 0, output
    rows = json.loads((tmp_path / "eval" / "eval.json").read_text())["rows"]
    names = ["TDA", "sRIDA", "sRIDA", "QRIDA, 2 bits, fitted", "QRIDA, 2 bits, fitted"]
    settings = ["CETT 0.3", "density 0.25", "density 0.6", "density 0.25", "density 0.6"]
    assert [(row["method"], row["setting"]) for row in rows] == list(
        zip(names, settings, strict=True)
    )
    assert rows[4]["density"] == pytest.approx(0.6, abs=0.01)


def test_gate_quantiles_drop_what_relu_makes_zero(tiny, prompt) -> None:
    """Half of the gates of a random ReLU model are zero: asked for 70 %, the other half is kept."""
    for name, wanted in (("llama-relu", 0.5), ("llama", 0.7)):
        shop = Workshop(tiny(name), WordTokenizer(), TEXTS)
        method = TDA(shop.gate_quantiles(0.7), score="gate")
        found = compare(shop.model, method, prompt(40, 4), 12)
        assert found.density == pytest.approx(wanted, abs=0.08)


def test_experts_of_any_width() -> None:
    assert [_experts(f) for f in (768, 11008, 172, 7)] == [16, 16, 43, 7]


def test_every_method_has_a_curve(tiny, prompt) -> None:
    """All points of all curves on a tiny model: each a number, none of them dense by mistake."""
    model = tiny()
    shop = Workshop(model, WordTokenizer(), TEXTS, tokens=512, router_tokens=800)
    rows = prompt(24, 2)
    task = evaluation(model, rows, calibration=shop.rows(32, 4))
    chosen = [p for name in CURVES for p in points(shop, [name])[-2:]]
    found = evaluate.run(task, chosen, None, reference=True)["rows"]
    assert {row["method"] for row in found} >= {
        *("dense", "TDA", "TDA gate (CATS)", "sTDA, continuation eps", "sRIDA"),
        *("sRIDA, GRIFFIN score", "QRIDA, 2 bits", "RODA", "RODA online", "RIDA, random"),
        "input thresholds (TEAL), masked",
    }
    for row in found:
        assert row["perplexity"] > 1 and 0 < row["density"] <= 1 and row["read"] > 0
        assert row["method"] == "dense" or row["kl"] > 1e-5, row["method"]
        assert ("router_recall" in row) == row["method"].startswith("RODA")
        assert 0 < row.get("router_recall", 1) <= 1


def test_the_method_governs_what_it_would_in_generation(tiny, prompt) -> None:
    """Greedy generation under the method, and its own logits scored: every choice is the argmax."""
    model = tiny()
    prompts = prompt(12, 3)
    from moyu_ext import patch, unpatch

    for method in (TDA(0.4), SRIDA(0.4), STDA(0.3), QRIDA(0.4)):
        patch(model, method)
        written = dense_text(model, prompts, 10)  # by the patched model
        chosen = continuation_logits(model, written, 12).argmax(-1)
        unpatch(model)
        assert torch.equal(chosen, written[:, 12:]), method
        found = compare(model, method, written, 12)
        assert found.agreement.mean() < 1, "dense writes something else somewhere"


def test_numbers_of_a_comparison(tiny, prompt) -> None:
    model, rows = tiny(), prompt(20, 2)
    found = compare(model, SRIDA(0.5), rows, 12)
    dense = continuation_logits(model, rows, 12)
    with torch.no_grad():
        plain = model(rows).logits[:, 11:-1]
    assert torch.allclose(dense, plain, atol=1e-5)
    nll = torch.nn.functional.cross_entropy(
        plain.flatten(0, 1), rows[:, 12:].flatten(), reduction="none"
    ).view(2, 8)
    assert torch.allclose(found.dense_loss, nll.double().mean(1), atol=1e-5)
    # The first scored token is predicted by the prompt, which is dense.
    from moyu_ext import patch, unpatch

    patch(model, SRIDA(0.5))
    ours = continuation_logits(model, rows, 12)
    unpatch(model)
    assert torch.allclose(ours[:, 0], dense[:, 0], atol=1e-5)
    assert not torch.allclose(ours[:, 1], dense[:, 1], atol=1e-3)
    p, q = dense.double().softmax(-1), ours.double().softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1).mean(1)
    assert torch.allclose(found.kl, kl, atol=1e-6)
    # That one agrees by construction, and would hide how often the method itself does.
    same = (ours.argmax(-1) == dense.argmax(-1)).double()
    assert same[:, 0].all() and not same.all()
    assert torch.equal(found.agreement, same[:, 1:].mean(1))
    assert found.change == pytest.approx(found.perplexity / found.dense_perplexity - 1, rel=1e-6)
    with pytest.raises(ConfigurationError, match="context is 20"):
        compare(model, SRIDA(), rows, 20)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_input_thresholds_mask_the_continuation_alone(tiny, prompt, name: str) -> None:
    model, rows = tiny(name), prompt(24, 4)
    with torch.no_grad():
        dense = model(rows).logits
    cut = input_thresholds(model, rows, 0.5)
    with masked_inputs(model, cut, 12, 24) as kept, torch.no_grad():
        masked = model(rows).logits
    assert torch.equal(masked[:, :12], dense[:, :12])
    assert not torch.allclose(masked[:, 12:], dense[:, 12:], atol=1e-2)
    assert kept.density == pytest.approx(0.5, abs=0.05)
    with torch.no_grad():
        assert torch.equal(model(rows).logits, dense)


def test_read_is_the_share_of_bytes_that_the_report_gives(tiny, prompt) -> None:
    """d 32, f 96: a shadow's record of 192 bytes is far more than the b / 24 of a large model."""
    rows = prompt(24, 2)
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(dtype=dtype)
        dense = 3 * 32 * 96 * dtype.itemsize
        router = train_router(
            model, WordTokenizer(), TEXTS, rank=4, epochs=1, max_tokens=900, progress=False
        )
        experts = split_experts(model, WordTokenizer(), TEXTS, experts=4, epochs=1, max_tokens=900)
        predictor = 4 * (32 + 96) * dtype.itemsize + 4 * 96  # its bias is float32
        gate = 16 * (32 + 4) * dtype.itemsize + 4 * dtype.itemsize
        evaluation = evaluate.Evaluation(model, WordTokenizer(), rows, 12)
        for method, added in (
            (Dense(), 0),
            (SRIDA(0.25), 0),
            (QRIDA(0.25), 96 * 192),
            (RODA(router, density=0.3), predictor),
            (OnlineRODA(router, density=0.3), predictor + 4 * 96),  # the rate of each neuron
            (RIDA(experts, density=0.5), gate),
        ):
            found = evaluation.measure(Point("c", "s", lambda method=method: method))
            assert found["read"] == pytest.approx(found["density"] + added / dense), method.name
            with patched(model, method):
                assert [layer.added_bytes for layer in report(model).layers] == [added] * 3
                with torch.no_grad(), scoring(model, 12):
                    model(rows)
                assert report(model).share == found["read"]


@pytest.mark.parametrize(
    ("plan", "gated", "ungated"),
    [("dense", 1, 1), ("given", 0.25, 0.25), ("gate", 0.5, 0.625), ("product", 0.75, 0.625)],
)
def test_share_of_bytes_that_a_plan_reads(plan: str, gated: float, ungated: float) -> None:
    assert read_share(plan, 0.25, 3) == gated
    assert read_share(plan, 0.25, 2) == ungated
    assert read_share(plan, 0.25, 3, 0.125) == gated + 0.125


def test_calibration_text_and_scored_text_never_meet(data_dir: Path, monkeypatch) -> None:
    monkeypatch.delenv("MOYU_DATA", raising=False)
    for corpus in (Corpus(), Corpus(data_dir)):
        for domain in corpus.domains():
            scored, calibration = corpus.documents(domain), corpus.documents(domain, train=True)
            assert scored and calibration
            assert not set(scored) & set(calibration), domain


def test_a_file_without_separators_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("".join(f"{i:04d} " for i in range(3600)))
    corpus = Corpus(texts=[path])
    scored, calibration = corpus.documents(), corpus.documents(train=True)
    assert len(scored) == 5 and len(calibration) == 4
    assert not set(" ".join(scored).split()) & set(" ".join(calibration).split())
    with pytest.raises(ConfigurationError, match="no text of domain 'news'; at hand: one"):
        corpus.documents("news")


def test_table_and_picture_take_what_is_missing(tmp_path: Path) -> None:
    row = {"method": "m", "setting": "s", "density": 0.5, "loss_rise": -0.1, "change": -0.1}
    score = {"value": 0.5, "stderr": None, "documents": 1}
    rows = [
        {"method": "dense", "setting": "", "density": 1.0, "loss_rise": 0.0},
        row | {"tasks": {"piqa": score}, "rouge": {"xsum": {"rouge1": {"value": 9.0, "p": 0.5}}}},
        {"method": "n", "setting": "", "density": None, "loss_rise": None},
    ]
    columns, cells = picture.table(rows)
    cell = cells[1]
    assert cell[columns.index("piqa")] == "50.0"
    assert cell[columns.index("xsum rouge1")] == "9.0 (p 0.5)"
    assert cell[columns.index("change %")] == -10
    picture.draw(rows, tmp_path / "p.png", "title")
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


def test_embedded_model_name_needs_no_path(tiny) -> None:
    content = evaluate.run(evaluation(tiny(), torch.ones(1, 14).long()), [], None)
    assert content["fingerprint"] == fingerprint(tiny())
    assert not any("/" in str(value) for value in content.values())
    assert embedded.names()
