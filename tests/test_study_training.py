"""`moyu study training`."""

import json
from pathlib import Path

import pytest
import torch
from moyu_ext.studies import training
from moyu_ext.studies.report import Report
from moyu_ext.studies.setting import Setting
from study_support import texts_file

TEXTS = ["once upon a time there was a fox. " * 40, "one day the old fox met a small bird. " * 40]


def bytes_of(texts: list[str]) -> torch.Tensor:
    return torch.tensor(list("\n".join(texts).encode()))


def test_models_differ_in_the_activation_alone() -> None:
    relu, silu = training.untrained("relu", 3), training.untrained("silu", 3)
    for (name, a), (_, b) in zip(relu.named_parameters(), silu.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    other = training.untrained("relu", 4).lm_head.weight
    assert not torch.equal(other, relu.lm_head.weight)


def test_an_interrupted_run_ends_like_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = bytes_of(TEXTS)
    whole = training.train_one("relu", 0, train, TEXTS, (0, 2, 4), tmp_path / "whole")
    assert [point["step"] for point in whole] == [0, 2, 4]
    assert whole[-1]["loss"] < whole[0]["loss"]
    steps = []
    step = training._step

    def failing(*args) -> None:
        steps.append(args[4])
        if len(steps) == 4:
            raise KeyboardInterrupt
        step(*args)

    monkeypatch.setattr(training, "_step", failing)
    with pytest.raises(KeyboardInterrupt):
        training.train_one("relu", 0, train, TEXTS, (0, 2, 4), tmp_path / "cut")
    again = training.train_one("relu", 0, train, TEXTS, (0, 2, 4), tmp_path / "cut")
    assert steps == [0, 1, 2, 3, 2, 3]  # from the last point that was measured
    assert again == whole
    # Another setting does not take up this run, nor does other text of the same length.
    texts = [*TEXTS, "one", "two", "end"]
    other = train.clone()
    other[-1] += 1
    for now, measured in ((train, texts), (other, texts), (other, [*texts[:-1], "and"])):
        training.train_one("relu", 0, now, measured, (0, 2, 4), tmp_path / "cut")
    assert steps[6:] == 3 * [0, 1, 2, 3]
    monkeypatch.setattr(training, "RATE", 1e-3)
    training.train_one("relu", 0, now, measured, (0, 2, 4), tmp_path / "cut")
    assert steps[18:] == [0, 1, 2, 3]


def test_zeros_and_sparsity_of_a_point() -> None:
    found = {
        activation: training.measured(
            training.subject_of("m", training.untrained(activation, 0), training.Bytes()), TEXTS
        )
        for activation in ("relu", "silu")
    }
    assert found["silu"]["zeros"] == 0 and 0.4 < found["relu"]["zeros"] < 0.6  # half of the signs
    assert 0 < found["silu"]["sparsity"] < found["relu"]["sparsity"] < 1
    assert len(found["relu"]["gradient"]) == 8
    assert found["relu"]["loss"] == pytest.approx(5.545, abs=0.1)  # ln 256


def test_half_way() -> None:
    assert training._half_way(torch.tensor([0.0, 1.0, 6.0, 10.0]), (0, 10, 20, 30)) == 20
    assert training._half_way(torch.tensor([9.0, 8.0, 3.0, 1.0]), (0, 10, 20, 30)) == 20


def test_study_writes_its_verdicts(tmp_path: Path) -> None:
    setting = Setting(texts=[texts_file(tmp_path)], quick=True)
    report = Report("training", "t", "s", tmp_path / "out")
    training.run(setting, report)
    report.write(setting.describe())
    found = json.loads((tmp_path / "out" / "training.json").read_text())
    assert len(found["claims"]) == 5
    assert found["numbers"]["steps"] == [0, 10]
    assert torch.tensor(found["numbers"]["curves"]["ReLU"]["loss"]).shape == (2, 2)
    assert (tmp_path / "out" / "training_curves.png").is_file()
    assert not (tmp_path / "out" / "training_runs").exists()
