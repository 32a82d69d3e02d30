"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moyu_ext.cli import app
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

import moyu_ext
from moyu_ext import embedded

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Once upon a time, there was a small dog who"
COMMANDS = ("demo", "generate", "pack", "calibrate", "bench mlp", "bench decode", "env")


def moyu(*arguments: Any) -> Any:
    """The result of a command: exit_code, stdout, stderr."""
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="moyu")


def succeed(*arguments: Any) -> Any:
    result = moyu(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def refuse(*arguments: Any) -> str:
    """The message of a command that must fail, on one line of stderr and with exit code 2."""
    result = moyu(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)  # no traceback
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("moyu: error: ")]
    assert len(lines) == 1, result.stderr
    return str(lines[0])


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that sees the package where this one does."""
    path = str(Path(moyu_ext.__file__).parents[1])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def model_dir(
    tiny: Callable[..., PreTrainedModel], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny random model on disk, with the tokenizer of the embedded ones."""
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", vocab_size=2048).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded.path("stories_silu")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("<|endoftext|>".join(embedded.heldout()[:3]), encoding="utf-8")
    return path


# --- help, version, imports


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_examples(command: str) -> None:
    text = succeed(*command.split(), "--help").stdout
    assert f"moyu {command}" in text.split("Example")[1]


def test_help_lists_every_command_with_a_whole_sentence() -> None:
    lines = succeed("--help").stdout.split("Commands:")[1].splitlines()
    for command in ("demo", "generate", "calibrate", "env"):
        (line,) = [text for text in lines if text.split()[:1] == [command]]
        assert line.endswith(".") and not line.endswith("..."), line


def test_version() -> None:
    assert succeed("--version").stdout == f"moyu_ext {moyu_ext.__version__}\n"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, moyu_ext.cli;print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    assert python("-c", code).stdout == "set()\n"


def test_readme_shows_commands_and_options_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^ {4}moyu (.*?)(?: {2,}.*)?$", text, re.MULTILINE)
    assert len(shown) >= 6
    for line in shown:
        words = shlex.split(line)
        names = [word for word in words[:2] if re.fullmatch("[a-z]+", word)]
        described = succeed(*names, "--help").stdout
        for option in (word for word in words if word.startswith("-")):
            assert re.search(rf"(^|\s){option}\b", described), (line, option)


def test_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOYU_CACHE", str(tmp_path))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert len(example.splitlines()) <= 13
    result = python("-c", example)
    assert result.returncode == 0, result.stderr
    assert "Once upon a time" in result.stdout
    assert re.search(r"mean\s+\d+\.\d %", result.stdout)


# --- env


def test_env_reports_what_runs() -> None:
    result = python("-m", "moyu_ext", "env")
    assert result.returncode == 0, result.stderr
    assert "broken" not in result.stdout
    for line in (
        f"  version: {moyu_ext.__version__}",
        f"  torch: {torch.__version__}",
        "  shipped models: stories_relu, stories_silu",
        f"  built for cuda: {torch.version.cuda or 'none'}",
    ):
        assert line in result.stdout.splitlines()
    assert re.search(r"^  instruction sets: .*\bscalar\b", result.stdout, re.MULTILINE)
    if Path("/proc/self/maps").exists():
        runtimes = re.search(r"loaded runtimes: (.*)", result.stdout)
        assert runtimes and len(runtimes[1].split(", ")) == 1 and "omp" in runtimes[1]


def test_env_json_is_what_it_prints(tmp_path: Path) -> None:
    printed = succeed("env", "--json", tmp_path / "env.json").stdout
    facts = json.loads((tmp_path / "env.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__
    for section, values in facts.items():
        assert f"{section}:" in printed
        for key in values:
            assert f"  {key}: " in printed


def test_env_prints_without_the_extension() -> None:
    code = (
        "import sys; sys.modules['moyu_ext._C'] = None; sys.argv = ['moyu', 'env'];"
        "from moyu_ext.cli import main; main()"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert "broken: ExtensionError: moyu_ext._C does not load" in result.stdout
    assert f"torch: {torch.__version__}" in result.stdout


def test_env_prints_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['moyu', 'env'];"
        "from moyu_ext.cli import main; main()"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("broken: ") == 2  # torch, and the extension that needs it
    assert f"version: {moyu_ext.__version__}" in result.stdout


def test_commands_without_the_extension_say_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['moyu_ext._C'] = None;"
        "sys.argv = ['moyu', 'generate', 'stories_silu', '-p', 'x'];"
        "from moyu_ext.cli import main; main()"
    )
    result = python("-c", code)
    assert result.returncode == 2
    assert result.stderr.startswith("moyu: error: moyu_ext._C does not load")
    assert "pip install ." in result.stderr and "Traceback" not in result.stderr


# --- generate


def generate(tmp_path: Path, model: Any, *options: Any) -> tuple[Any, dict[str, Any]]:
    file = tmp_path / "run.json"
    result = succeed(
        "generate", model, "-p", PROMPT, "--max-new-tokens", 12, *options, "--json", file
    )
    return result, json.loads(file.read_text())


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_generate_is_patch_and_generate(tmp_path: Path, model_dir: Path, density: float) -> None:
    result, run = generate(tmp_path, model_dir, "--method", "srida", "--density", density)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    encoded = tokenizer(PROMPT, return_tensors="pt")
    context = encoded["input_ids"].shape[1]
    moyu_ext.patch(model, moyu_ext.SRIDA(density))
    ids = model.generate(**encoded, max_new_tokens=12, do_sample=False)
    realised = moyu_ext.report(model).density
    moyu_ext.unpatch(model)

    assert run["text"] == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert result.stdout == run["text"] + "\n"
    assert run["prompt_tokens"] == context and run["new_tokens"] == 12
    assert run["density"] == realised == pytest.approx(density, abs=0.01)
    # Token by token: what would the dense model take after the same text?
    same = 0
    for end in range(context + 1, context + 12):
        with torch.no_grad():
            logits = model(input_ids=ids[:, :end]).logits
        same += int(logits[0, -1].argmax() == ids[0, end])
    assert run["agreement"] == pytest.approx(same / 11)
    assert density == 0.3 or run["agreement"] == 1.0
    assert run["tokens_per_second"] > 0 and run["dense_tokens_per_second"] > 0
    assert run["speedup"] == pytest.approx(
        run["tokens_per_second"] / run["dense_tokens_per_second"]
    )
    for word in ("density", "speed", "agreement", f"{realised:.1%}"):
        assert word in result.stderr


def test_generate_samples_by_seed(tmp_path: Path, model_dir: Path) -> None:
    options = ("--sample", "--temperature", 0.7, "--no-compare", "--seed")
    first, again, other = (
        generate(tmp_path, model_dir, *options, seed)[1]["text"] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_generate_without_comparison_runs_no_dense_model(tmp_path: Path, model_dir: Path) -> None:
    result, run = generate(tmp_path, model_dir, "--no-compare")
    assert "dense_tokens_per_second" not in run and "agreement" not in run
    assert "agreement" not in result.stderr


def test_generate_one_token_has_no_speed(tmp_path: Path, model_dir: Path) -> None:
    result, run = generate(tmp_path, model_dir, "--max-new-tokens", 1)
    assert run["tokens_per_second"] is None and run["agreement"] is None
    assert "speed       -" in result.stderr


def test_generate_with_an_embedded_model(tmp_path: Path) -> None:
    result, run = generate(tmp_path, "stories_silu", "--method", "dense")
    assert result.stdout.startswith(PROMPT)
    assert run["density"] == 1.0 and run["dtype"] == "bfloat16"
    result, run = generate(tmp_path, "stories_silu", "--projections")
    assert run["projections"] == 25
    assert run["method"] == "Lossless()" and run["agreement"] == 1.0  # no answer changes unasked
    result, run = generate(tmp_path, "stories_silu", "--density", 0.3)
    assert run["method"].startswith("QRIDA(density=0.3")
    assert "as fast where memory is the limit" in result.stderr


# --- calibrate


@pytest.mark.parametrize("score", ["product", "gate"])
def test_calibrate_is_calibrate(tmp_path: Path, model_dir: Path, texts: Path, score: str) -> None:
    out, file = tmp_path / "thresholds", tmp_path / "calibration.json"
    result = succeed(
        "calibrate", model_dir, "--out", out, "--texts", texts, "--cett", 0.1, "--score", score,
        "--max-tokens", 200, "--json", file,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    expected = moyu_ext.calibrate(
        model, tokenizer, texts, cett=0.1, method=moyu_ext.TDA(0.0, score=score), max_tokens=200
    )
    saved = moyu_ext.Thresholds.from_pretrained(out)
    assert torch.equal(saved.epsilon, expected.epsilon)
    assert saved.score == score
    written = json.loads(file.read_text())
    assert [layer["epsilon"] for layer in written["layers"]] == [
        layer.epsilon for layer in expected.layers
    ]
    assert {"density", "cett", "p95", "max"} <= written["layers"][0].keys()
    for layer in expected.layers:
        assert f"{layer.epsilon:.4g}" in result.stdout
    # and the thresholds say by themselves with which method and score they are used
    run = generate(tmp_path, model_dir, "--thresholds", out)[1]
    assert run["method"].startswith("TDA(") and f"score={score!r}" in run["method"]
    assert 0 < run["density"] < 1


def test_calibrate_for_stda_on_continuations(tmp_path: Path, model_dir: Path, texts: Path) -> None:
    succeed(
        "calibrate", model_dir, "--out", tmp_path, "--texts", texts, "--max-tokens", 200,
        "--method", "stda", "--on", "continuation", "--one-pass", "--granularity", "model",
    )  # fmt: skip
    saved = moyu_ext.Thresholds.from_pretrained(tmp_path)
    assert (saved.method, saved.on, saved.granularity) == ("stda", "continuation", "model")
    assert not saved.sequential and len(set(saved.epsilon.tolist())) == 1
    assert generate(tmp_path, model_dir, "--thresholds", tmp_path)[1]["method"].startswith("STDA(")


def test_calibrate_on_the_models_own_text(tmp_path: Path, model_dir: Path) -> None:
    succeed("calibrate", model_dir, "--out", tmp_path, "--max-tokens", 40)
    assert moyu_ext.Thresholds.from_pretrained(tmp_path).tokens == 40


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("generate", "./nowhere", "-p", "x"), ("'./nowhere'", "stories_silu")),
        (("generate", "a/b/c", "-p", "x"), ("'a/b/c'", "hub id")),
        (("generate", "stories_silly", "-p", "x"), ("did you mean stories_silu",)),
        (("generate", "MODEL", "-p", "x", "--density", "1.5"), ("1.5", "(0, 1]")),
        (("generate", "MODEL", "-p", "x", "--density", "nan"), ("nan", "(0, 1]")),
        (("generate", "MODEL", "-p", "x", "--method", "best"), ("'best'", "srida")),
        (("generate", "MODEL", "-p", "x", "--method", "tda"), ("moyu calibrate", "--thresholds")),
        (("generate", "MODEL", "-p", "x", "--method", "dense", "--density", "1"), ("--density",)),
        (("generate", "MODEL", "-p", "x", "--thresholds", "/none"), ("/none", "No such file")),
        (("generate", "MODEL", "-p", "x", "--temperature", "0"), ("--temperature is 0",)),
        (("generate", "MODEL", "-p", "x", "--dtype", "int8"), ("'int8'", "bfloat16")),
        (("generate", "MODEL", "-p", "x", "--device", "tpu"), ("'tpu'", "cpu")),
        (("generate", "MODEL", "-p", "x", "--json", "/none/x.json"), ("/none", "create it")),
        (("calibrate", "MODEL", "--out", "OUT", "--cett", "2"), ("cett is 2", "[0, 1)")),
        (("calibrate", "MODEL", "--out", "OUT", "--score", "x"), ("'x'", "gate")),
        (("calibrate", "MODEL", "--out", "OUT", "--on", "x"), ("'x'", "continuation")),
        (("calibrate", "MODEL", "--out", "OUT", "--method", "x"), ("'x'",)),
        (("calibrate", "MODEL", "--out", "OUT", "--texts", "/none"), ("/none", "No such file")),
        (("calibrate", "MODEL", "--out", "FILE"), ("FILE", "directory")),
        (("demo", "--out", "FILE"), ("FILE", "directory")),
        (("env", "--json", "."), ("--json .", "name a file")),
        (("env", "--json", "loop"), ("--json loop", "name a file")),
        (("generate", "MODEL", "-p", "caf\udce9"), ("--prompt 'caf", "UTF-8")),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line(
    arguments: tuple[str, ...],
    parts: tuple[str, ...],
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("")
    Path("loop").symlink_to("loop")
    message = refuse(*(str(model_dir) if a == "MODEL" else a for a in arguments))
    for part in parts:
        assert part in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(model_dir: Path) -> None:
    assert "sees no GPU" in refuse("generate", model_dir, "-p", "x", "--device", "cuda")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_checkpoint_is_one_clear_line(file: str, model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "m")
    content = (model_dir / file).read_bytes()
    (tmp_path / "m" / file).write_bytes(content[: len(content) // 2])
    message = refuse("generate", tmp_path / "m", "-p", "x")
    assert "does not load" in message and "save_pretrained" in message


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    assert "no config.json" in refuse("generate", tmp_path, "-p", "x")


def test_thresholds_of_another_model(tmp_path: Path, model_dir: Path, texts: Path) -> None:
    succeed("calibrate", model_dir, "--out", tmp_path, "--texts", texts, "--max-tokens", 60)
    message = refuse("generate", "stories_silu", "-p", PROMPT, "--thresholds", tmp_path)
    assert "layers" in message or "fingerprint" in message


def test_an_unreachable_hub_names_the_way_out() -> None:
    result = python(
        "-m", "moyu_ext", "generate", "someone/some-model", "-p", "x", HF_HUB_OFFLINE="1"
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    for part in ("cannot get someone/some-model", "hf download", "--local-dir", "stories_silu"):
        assert part in result.stderr


def test_missing_options_are_explained() -> None:
    result = moyu("generate", "stories_silu")
    assert result.exit_code == 2 and "--prompt" in result.stderr


def test_nothing_is_written_where_the_work_fails(tmp_path: Path, model_dir: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text("old")
    refuse("generate", model_dir, "-p", "x", "--density", 2, "--json", file)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files")
def test_json_where_no_file_can_be_made_is_refused_before_the_work() -> None:
    # The model is never looked for.
    assert "--json /proc/x.json" in refuse(
        "generate", "./none", "-p", "x", "--json", "/proc/x.json"
    )


def test_json_that_fails_late_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moyu_ext.cli.common.write_atomically", full)
    result = moyu("env", "--json", tmp_path / "env.json")
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert re.search("moyu: error: --json .*No space left", result.stderr)


# --- demo


def test_demo(tmp_path: Path) -> None:
    out, file = tmp_path / "demo", tmp_path / "demo.json"
    result = succeed("demo", "--quick", "--out", out, "--json", file)
    assert (out / "moyu_demo.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads(file.read_text())
    (model,) = content["models"]
    rows = {row["name"]: row for row in model["rows"]}
    assert list(rows) == [
        "Dense", "QRIDA", "TDA, product", "TDA, gate", "STDA", "SRIDA, contribution",
        "SRIDA, griffin",
    ]  # fmt: skip
    dense = rows["Dense"]
    assert dense["density"] == 1 and dense["agreement"] == 1
    assert dense["increase"] == pytest.approx(0, abs=1e-4)
    for name, row in rows.items():
        assert name in result.stdout and f"{row['perplexity']:.2f}" in result.stdout
        assert row["increase"] == pytest.approx(
            row["perplexity"] / dense["perplexity"] - 1, abs=1e-4
        )
        assert sum(row["densities"]) / len(row["densities"]) == pytest.approx(row["density"])
    for name in ("SRIDA, contribution", "SRIDA, griffin"):
        assert rows[name]["density"] == pytest.approx(0.5, abs=0.01)
    assert rows["TDA, product"]["density"] < 0.5  # CETT 0.2 leaves out most neurons
    for epsilons, cett in model["curves"]:
        assert epsilons == sorted(epsilons) and cett[0] < 0.2 < cett[-1]
    assert "Picture: " in result.stdout


def test_heldout_text_is_long_enough_for_a_prompt_and_a_continuation() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.path("stories_silu"))
    lengths = [len(tokenizer(story)["input_ids"]) for story in embedded.heldout()]
    assert len(lengths) >= 10 and min(lengths) >= 120


def test_embedded_names_what_there_is() -> None:
    assert embedded.names() == ["stories_relu", "stories_silu"]
    with pytest.raises(moyu_ext.ConfigurationError, match="stories_silu"):
        embedded.path("stories_gelu")
