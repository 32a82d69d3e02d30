"""`moyu study`: errors before the work, resuming, and the page of all verdicts."""

import json
import shutil
from pathlib import Path

import pytest
from moyu_ext.cli import app
from moyu_ext.studies import STUDIES, Study
from moyu_ext.studies.report import Report
from moyu_ext.studies.setting import Setting
from typer.testing import CliRunner

from moyu_ext import embedded


def said(*arguments: str, code: int = 2) -> str:
    result = CliRunner().invoke(app, ["study", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


class OneClaim:
    """Stands in for a study's module."""

    runs = 0

    @classmethod
    def run(cls, setting: Setting, report: Report) -> None:
        cls.runs += 1
        report.models["m"] = {"activation": "relu"}
        report.claim("eq. 1", "water is wet", "quite", "holds only if", "it is liquid")


@pytest.fixture
def one_study(monkeypatch: pytest.MonkeyPatch) -> type[OneClaim]:
    monkeypatch.setattr(OneClaim, "runs", 0)
    monkeypatch.setattr(Study, "load", lambda self: OneClaim)
    monkeypatch.delenv("MOYU_DATA", raising=False)
    return OneClaim


def test_an_unknown_study_is_named_with_the_known_ones(tmp_path: Path) -> None:
    text = said("inertial", "--out", str(tmp_path))
    assert "study is 'inertial'; expected one of gradient, training, history" in text
    assert not any(tmp_path.iterdir())


def test_out_is_tried_before_the_work(tmp_path: Path, one_study, monkeypatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert f"--out {file} cannot be made a directory" in said("gradient", "--out", str(file))
    below = file / "below"
    assert f"--out {below} cannot be made a directory" in said("gradient", "--out", str(below))

    def full(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    text = said("gradient", "--out", str(tmp_path))
    assert f"--out {tmp_path} cannot be written to (Read-only file system)" in text
    assert one_study.runs == 0


def test_missing_data_folder_model_and_rows_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    nowhere = tmp_path / "nowhere"
    out = ("--out", str(tmp_path / "out"))
    text = said("gradient", "--data", str(nowhere), *out)
    assert f"data folder {nowhere} is not a directory; pass --data DIR or set MOYU_DATA" in text
    text = said("inertia", "--model", str(nowhere), *out)
    assert f"cannot load a model from '{nowhere}'" in text and "stories_silu" in text


def test_all_writes_one_page_and_resume_skips_what_is_there(tmp_path: Path, one_study) -> None:
    said("all", "--quick", "--out", str(tmp_path), code=0)
    assert one_study.runs == len(STUDIES)
    page = (tmp_path / "findings.md").read_text()
    assert page.count("| water is wet (eq. 1) | quite | **holds only if** it is liquid |") == len(
        STUDIES
    )
    assert "[Heavy hitters](heavy_hitters.md)" in page
    said("all", "--quick", "--out", str(tmp_path), "--resume", code=0)
    assert one_study.runs == len(STUDIES)
    (tmp_path / "gradient.json").unlink()
    (tmp_path / "inertia.json").write_text('{"half": ')
    said("all", "--quick", "--out", str(tmp_path), "--resume", code=0)
    assert one_study.runs == len(STUDIES) + 2
    said("all", "--quick", "--seed", "1", "--out", str(tmp_path), "--resume", code=0)
    assert one_study.runs == 2 * len(STUDIES) + 2
    assert json.loads((tmp_path / "gradient.json").read_text())["setting"]["seed"] == 1


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    shutil.copytree(embedded.path("stories_silu"), tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    text = said("inertia", "--model", str(tmp_path / "m"), "--out", str(tmp_path / "out"))
    assert f"cannot load a model from '{tmp_path / 'm'}' (SafetensorError" in text


def test_resume_measures_changed_text_anew(tmp_path: Path, one_study) -> None:
    file = tmp_path / "words.txt"
    arguments = ("gradient", "--out", str(tmp_path / "out"), "--text", str(file), "--resume")
    for text, runs in (("one", 1), ("one", 1), ("two", 2), ("two", 2)):
        file.write_text(text)
        said(*arguments, code=0)
        assert one_study.runs == runs
    setting = json.loads((tmp_path / "out" / "gradient.json").read_text())["setting"]
    assert setting["text"] == "words.txt" and str(tmp_path) not in json.dumps(setting)


def test_the_help_names_every_study() -> None:
    listed = said("--help", code=0).split(" Studies ")[1].split(" Without --data")[0]
    assert set(STUDIES) <= set(listed.split())
