"""`moyu study prompt-length`."""

import json
from pathlib import Path

import pytest
import torch
from moyu_ext.studies.prompt_length import behind, run
from moyu_ext.studies.report import Report
from study_support import tiny_setting


def test_the_same_tokens_behind_each_length() -> None:
    rows = torch.arange(20).view(2, 10)
    assert behind(rows, 4, 3).tolist() == [
        [0, 4, 5, 6, 7, 8, 9],
        [10, 14, 15, 16, 17, 18, 19],
    ]
    assert torch.equal(behind(rows, 7, 3), rows)


def test_study_writes_its_verdicts(tiny, tmp_path: Path) -> None:
    setting = tiny_setting(tiny, tmp_path)
    report = Report("prompt-length", "t", "s", tmp_path / "out")
    run(setting, report)
    report.write(setting.describe())
    found = json.loads((tmp_path / "out" / "prompt_length.json").read_text())
    assert [claim["claim"].split()[0] for claim in found["claims"]] == ["sTDA", "sRIDA"]
    methods = found["numbers"]["llama"]
    assert list(methods) == ["sTDA", "sRIDA", "TDA", "qRIDA"]
    for method in methods.values():
        rise = {length: m["mean"] for length, m in method["rise"].items()}
        assert list(rise) == ["16", "32"]
        gap = method["shortest less longest"]["mean"]
        assert gap == pytest.approx(rise["16"] - rise["32"], abs=1e-6) and gap != 0
    assert methods["sRIDA"]["density"]["32"] == pytest.approx(0.33, abs=0.01)
    assert (tmp_path / "out" / "prompt_length_curves.png").is_file()
