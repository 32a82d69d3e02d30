"""`moyu train-router` and `moyu split-experts`, and what `moyu generate` does with their output."""

import json
from pathlib import Path

import pytest
from moyu_ext.cli import app
from typer.testing import CliRunner

from moyu_ext import embedded

PROMPT = ["-p", "Once upon a time", "--max-new-tokens", "6", "--no-compare"]


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "stories.txt"
    path.write_text("<|endoftext|>".join(embedded.heldout()[:30]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def router(texts: Path) -> Path:
    out = texts.parent / "router"
    code, output = run(
        *("train-router", "stories_relu", "--texts", texts, "--out", out, "--max-tokens", 3000),
        *("--rank", 16, "--epochs", 2, "--json", texts.parent / "router.json"),
    )
    assert code == 0, output
    assert "recall" in output and "precision" in output and "density" in output
    return out


def test_train_router_writes_what_it_prints(router: Path) -> None:
    found = json.loads((router.parent / "router.json").read_text())
    assert found["command"] == "train-router" and len(found["layers"]) == 6
    assert all(0 < layer["recall"] <= 1 and 0 < layer["density"] < 1 for layer in found["layers"])
    assert sorted(path.name for path in router.iterdir()) == [
        "moyu.safetensors",
        "moyu_config.json",
    ]


@pytest.mark.parametrize("method", [[], ["--method", "roda-online"]])
def test_generate_takes_the_router(router: Path, method: list[str]) -> None:
    code, output = run("generate", "stories_relu", *PROMPT, "--router", router, *method)
    assert code == 0, output
    assert ("OnlineRODA(" if method else "RODA(") in output


def test_generate_refuses_another_model_s_router(router: Path) -> None:
    code, output = run("generate", "stories_silu", *PROMPT, "--router", router)
    assert code == 2
    assert "router was trained on another model" in output and "train one on this model" in output


def test_split_experts_and_generate(texts: Path) -> None:
    out = texts.parent / "experts"
    code, output = run(
        *("split-experts", "stories_relu", "--texts", texts, "--out", out, "--split", "random"),
        *("--max-tokens", 2000, "--epochs", 1, "--json", texts.parent / "experts.json"),
    )
    assert code == 0, output
    assert "of the squared norms" in output
    found = json.loads((texts.parent / "experts.json").read_text())
    assert found["split"] == "random" and len(found["layers"]) == 6
    code, output = run("generate", "stories_relu", *PROMPT, "--experts", out, "--density", 0.25)
    assert code == 0, output
    assert "RIDA(<6 layers, 16 experts by random>" in output and "25.0%" in output
    code, output = run("generate", "stories_silu", *PROMPT, "--experts", out)
    assert code == 2 and "split from another model" in output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--method", "roda"), "run `moyu train-router MODEL --out DIR` first and pass --router"),
        (("--method", "roda-online"), "roda-online needs a trained router"),
        (("--method", "rida"), "run `moyu split-experts MODEL --out DIR` first and pass --experts"),
        (("--router", "nowhere"), "cannot read nowhere"),
    ],
)
def test_generate_names_what_is_missing(args: tuple[str, ...], message: str) -> None:
    code, output = run("generate", "stories_relu", *PROMPT, *args)
    assert code == 2 and message in " ".join(output.split())


def test_wrong_options_are_named(texts: Path, tmp_path: Path) -> None:
    for command, extra, message in (
        ("train-router", ("--recall", 1.5), "recall is 1.5"),
        ("split-experts", ("--experts", 7), "expected a divisor"),
        ("split-experts", ("--split", "x"), "split is 'x'"),
    ):
        code, output = run(command, "stories_relu", "--texts", texts, "--out", tmp_path, *extra)
        assert code == 2 and message in output, output
    (tmp_path / "file").write_text("")
    code, output = run("train-router", "stories_relu", "--out", tmp_path / "file")
    assert code == 2 and "cannot be made a directory" in output
