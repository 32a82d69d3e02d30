"""`bench decode --profile`: the parts add up, know their bytes, and refuse what they cannot see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moyu_ext.benchmarking.decode_profile import profile_decode, profile_model
from moyu_ext.benchmarking.geometries import Geometry
from moyu_ext.cli import app
from moyu_ext.errors import ConfigurationError
from moyu_ext.methods import SRIDA, Dense
from moyu_ext.patching.patch import patch
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

SIZE = Geometry("small", 64, 96, 3, 4, 2, 211)


def test_parts() -> None:
    result = profile_decode(SIZE, [Dense(), SRIDA(0.5)], torch.float32, prompt_tokens=20,
                            new_tokens=10)  # fmt: skip
    dense, sparse = result.profiles
    for profile in result.profiles:
        assert profile.token_ms == pytest.approx(sum(part.ms for part in profile.parts))
        assert all(part.ms > 0 for part in profile.parts[:7])
        assert 0 < profile.outside_ms < profile.token_ms
    read = {part.name: part.bytes for part in dense.parts}
    assert read["q, k, v"] == 3 * (64 + 32 + 32) * 64 * 4
    assert read["o"] == 3 * 64 * 64 * 4
    assert read["MLPs"] == 3 * 3 * 64 * 96 * 4
    assert read["head"] == 211 * 64 * 4
    assert read["attention over 25 tokens"] == 3 * 2 * 2 * 16 * 4 * 25
    halved = {part.name: part.bytes for part in sparse.parts}
    assert halved["MLPs"] == read["MLPs"] // 2 and sparse.density == 0.5
    packed = profile_decode(SIZE, [Dense()], bits=8, prompt_tokens=20, new_tokens=4)
    assert packed.title == "small, 8 bits"
    assert packed.profiles[0].parts[0].bytes < read["q, k, v"] / 3


def test_a_model_without_a_step(
    tiny: Callable[..., PreTrainedModel], prompt: Callable[..., Tensor]
) -> None:
    model = patch(tiny("opt"), Dense())
    with pytest.raises(ConfigurationError, match="known shape"):
        profile_model(model, prompt(9), 4, "dense")


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moyu_ext.benchmarking import decode_profile

    monkeypatch.setattr(decode_profile, "geometry", lambda name: SIZE)
    file = tmp_path / "profile.json"
    runs = ["bench", "decode", "--profile", "-m", "dense", "-m", "qrida", "--new", "6"]
    result = CliRunner().invoke(app, [*runs, "--prompt", "16", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "outside products and attention" in result.output and "q, k, v" in result.output
    found = json.loads(file.read_text())["profiles"]
    assert len(found) == 2 and found[0]["parts"][3]["name"] == "MLPs"
    refused = CliRunner().invoke(app, [*runs, "--csv", str(tmp_path / "x.csv")])
    assert refused.exit_code == 2 and "--profile" in refused.output
