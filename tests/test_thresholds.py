"""Thresholds, their files, and the fingerprint that ties them to a model."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from moyu_ext.calibration import thresholds as module
from moyu_ext.calibration.thresholds import LayerThreshold, Thresholds
from moyu_ext.errors import ArtifactError, ConfigurationError, MoyuError, UnsupportedModelError
from moyu_ext.models.fingerprint import fingerprint
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def make(**changes: object) -> Thresholds:
    layers = (
        LayerThreshold(float(torch.tensor(0.1)), 0.5, 0.199, 0.2, 0.25, 0.4),
        LayerThreshold(0.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    )
    given = dict(layers=layers, cett=0.2, fingerprint="abc", score="gate", tokens=17, model="m")
    return Thresholds(**{**given, **changes})  # type: ignore[arg-type]


def tiny(vocabulary: int = 64, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=vocabulary,
    )
    return LlamaForCausalLM(config).eval()


def test_epsilon_is_float32_per_layer() -> None:
    made = make()
    assert made.epsilon.dtype == torch.float32
    assert torch.equal(made.epsilon, torch.tensor([0.1, 0.0]))
    assert made.density == 0.75


@pytest.mark.parametrize("bad", [math.nan, -0.1, math.inf, -math.inf])
def test_impossible_epsilon_raises_with_layer_and_value(bad: float) -> None:
    layers = [*make().layers, LayerThreshold(bad, 1, 0, 0, 0, 0)]
    with pytest.raises(ConfigurationError, match=f"layer 2 has epsilon {bad}"):
        make(layers=layers)


@pytest.mark.parametrize(
    "change", [{"score": "griffin"}, {"on": "prompt"}, {"granularity": "token"}, {"layers": ()}]
)
def test_impossible_settings_raise(change: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(change)).rstrip("s")):
        make(**change)


def test_save_and_load_give_the_same(tmp_path: Path) -> None:
    made = make()
    made.save_pretrained(tmp_path / "new" / "folder")
    loaded = Thresholds.from_pretrained(tmp_path / "new" / "folder")
    assert loaded == made
    assert torch.equal(loaded.epsilon, made.epsilon)
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert names == ["moyu.safetensors", "moyu_config.json"]
    # Saving over it replaces it.
    other = make(cett=0.3)
    other.save_pretrained(tmp_path / "new" / "folder")
    assert Thresholds.from_pretrained(tmp_path / "new" / "folder") == other


@pytest.mark.parametrize("name", ["moyu_config.json", "moyu.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "flipped"])
def test_damaged_files_raise(tmp_path: Path, name: str, damage: str) -> None:
    make().save_pretrained(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 255]) + content[-2:])
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(ArtifactError, match=name):
        Thresholds.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 99, "format version 99"),
        ("kind", "router", "describes router, expected thresholds"),
        ("layers", [{"epsilon": 1.0}], "does not describe thresholds"),
        ("layers", None, "does not describe thresholds"),
        ("score", "griffin", "score"),
        ("surprise", 1, "surprise"),
        ("fingerprint", -1, "fingerprint is -1; expected a string"),
        ("fingerprint", None, "fingerprint is None"),
        ("fingerprint", [], "fingerprint is"),
        ("shadows", None, "shadows is None"),
    ],
)
def test_configurations_that_do_not_fit_raise(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    make().save_pretrained(tmp_path)
    path = tmp_path / "moyu_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ArtifactError, match=message):
        Thresholds.from_pretrained(tmp_path)


def test_files_of_two_saves_do_not_mix(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config = (tmp_path / "moyu_config.json").read_bytes()
    layer = dataclasses.replace(make().layers[0], epsilon=0.5)
    make(layers=(layer, layer)).save_pretrained(tmp_path)
    (tmp_path / "moyu_config.json").write_bytes(config)
    with pytest.raises(ArtifactError, match="another save"):
        Thresholds.from_pretrained(tmp_path)
    # The checksum agrees, the numbers do not.
    make(layers=(layer, layer)).save_pretrained(tmp_path)
    edited = json.loads((tmp_path / "moyu_config.json").read_text())
    edited["layers"][0]["epsilon"] = 0.25
    (tmp_path / "moyu_config.json").write_text(json.dumps(edited))
    with pytest.raises(ArtifactError, match="differ"):
        Thresholds.from_pretrained(tmp_path)


def test_interrupted_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().save_pretrained(tmp_path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make(cett=0.3).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert Thresholds.from_pretrained(tmp_path) == make()
    assert len(list(tmp_path.iterdir())) == 2


def test_errors_are_moyu_errors_and_builtins() -> None:
    assert issubclass(ArtifactError, MoyuError) and issubclass(ArtifactError, ValueError)


def test_fingerprint_follows_the_weights_of_the_layers() -> None:
    model = tiny()
    original = fingerprint(model)
    assert original == fingerprint(tiny())
    assert original != fingerprint(tiny(seed=1))
    assert original == fingerprint(model.model), "the head does not count"
    model.resize_token_embeddings(80)
    assert original == fingerprint(model), "the vocabulary does not count"
    down = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        down[0, 0] += 1
    assert original != fingerprint(model)


def test_fingerprint_does_not_depend_on_layout_or_width() -> None:
    model = tiny()
    original = fingerprint(model)
    down = model.model.layers[0].mlp.down_proj.weight
    down.data = down.data.t().contiguous().t()
    assert down.stride() == (1, 16)
    assert original == fingerprint(model)
    assert original == fingerprint(model.bfloat16())


def test_fingerprint_follows_the_shape() -> None:
    """The same names and the same values in their order, in matrices of another shape."""
    found = []
    for rows, columns in ((2, 3), (3, 2)):
        model = nn.Sequential(nn.Linear(columns, rows, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.arange(6.0).view(rows, columns))
        found.append(fingerprint(model))
    assert found[0] != found[1]


def test_fingerprint_of_a_model_without_numbered_layers() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 3)})
    original = fingerprint(model)
    with torch.no_grad():
        model["b"].bias[2] += 1
    assert original != fingerprint(model)


def test_fingerprint_of_parameters_without_values_raises() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(UnsupportedModelError, match="meta device"):
        fingerprint(model)
