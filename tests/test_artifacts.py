"""What all saved artefacts share: one directory, its refusals, and a short repr."""

from pathlib import Path
from typing import Any

import pytest
import torch
from moyu_ext.calibration.thresholds import LayerThreshold, Thresholds
from moyu_ext.calibration.train_router import train_router
from moyu_ext.cli import app
from moyu_ext.errors import ArtifactError, ConfigurationError
from moyu_ext.routers.experts import Experts, LayerExperts
from moyu_ext.routers.router import LayerRouter, Router
from moyu_ext.shadow.pack import Shadow, record_bytes
from moyu_ext.shadow.store import Shadows
from typer.testing import CliRunner

D, F, RANK, LAYERS = 64, 300, 16, 24


def layer(kind: type) -> Any:
    if kind is Thresholds:
        return LayerThreshold(0.125, 0.5, 0.2, 0.2, 0.3, 0.4)
    if kind is Router:
        tensors = [torch.ones(*shape) for shape in ((RANK, D), (F, RANK), (F,), (201,), (F,))]
        return LayerRouter(*tensors, 0.1, 0.0, 0.9, 0.8, 0.3, 0.9, 0.3)
    if kind is Experts:
        where = torch.arange(F, dtype=torch.int32) % 4
        tensors = [torch.ones(*shape) for shape in ((8, D), (4, 8), (4,))]
        return LayerExperts(where, *tensors, 0.7, 0.8, 0.5)
    return Shadow(torch.zeros(F, record_bytes(D, 2, 3), dtype=torch.uint8), D, 2, 3)


def make(kind: type) -> Any:
    layers = tuple(layer(kind) for _ in range(LAYERS))
    rest: dict[type, tuple[Any, ...]] = {
        Thresholds: (0.2, "abc"),
        Router: ("abc", 0.2, 0.95, 17),
        Experts: ("abc", "kmeans", 17),
        Shadows: ("abc",),
    }
    return kind(layers, *rest[kind])


KINDS = (Thresholds, Router, Experts)


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_one_kind_does_not_overwrite_another(tmp_path: Path, there: type, new: type) -> None:
    make(there).save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    if there is new:
        make(new).save_pretrained(tmp_path)
    else:
        names = f"holds saved {there.__name__.lower()}, which {new.__name__.lower()} would"
        with pytest.raises(ArtifactError, match=f"{tmp_path} {names}.*another folder"):
            make(new).save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_shadows_may_lie_beside_thresholds(tmp_path: Path) -> None:
    for kind in (Thresholds, Shadows, Thresholds):
        make(kind).save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("left", [b"{", b"[]", b"{}", b"\xff"])
def test_what_cannot_be_loaded_may_be_replaced(tmp_path: Path, left: bytes) -> None:
    (tmp_path / "moyu_config.json").write_bytes(left)
    make(Router).save_pretrained(tmp_path)
    assert len(Router.from_pretrained(tmp_path).layers) == LAYERS


@pytest.mark.parametrize(
    "command", [["calibrate"], ["tune"], ["train-router"], ["split-experts"]], ids="".join
)
def test_commands_refuse_before_the_work(tmp_path: Path, command: list[str]) -> None:
    make(Experts if command != ["split-experts"] else Router).save_pretrained(tmp_path)
    # The model is never looked for.
    result = CliRunner().invoke(app, [*command, "./no-model", "--out", str(tmp_path)])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert f"{tmp_path} holds saved" in result.output


def test_training_refuses_before_the_work(tmp_path: Path) -> None:
    make(Experts).save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="holds saved experts"):
        train_router(torch.nn.Linear(1, 1), None, ["text"], out=tmp_path)


@pytest.mark.parametrize("kind", [*KINDS, Shadows])
@pytest.mark.parametrize("bad", [None, 3, b"folder"])
def test_what_is_no_path_is_refused(kind: Any, bad: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"directory is .*; expected the path"):
        kind.from_pretrained(bad)
    with pytest.raises(ConfigurationError, match=r"directory is .*; expected the path"):
        make(kind).save_pretrained(bad)


@pytest.mark.parametrize("kind", [*KINDS, Shadows])
def test_repr_is_short(kind: type) -> None:
    made = make(kind)
    text = repr(made)
    assert text.startswith(f"{kind.__name__}(<{LAYERS} layers, ") and len(text) < 200
    text = repr(made.layers[0])
    assert text.startswith(type(made.layers[0]).__name__) and len(text) < 200
    if kind is not Thresholds:
        assert f"d {D}" in text and f"f {F}" in text
