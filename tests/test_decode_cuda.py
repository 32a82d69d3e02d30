"""benchmarks/decode_cuda.py on the CPU: its modes agree, its copies share, its lock takes turns."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from moyu_ext.benchmarking import Geometry, method_at
from moyu_ext.benchmarking.random_model import random_model
from moyu_ext.benchmarking.rows import BenchmarkError
from transformers import PreTrainedModel

from moyu_ext import ops, report

SIZE = Geometry("tiny", 64, 192, 3, 4, 2, 211)
FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "decode_cuda.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("decode_cuda", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plain_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile that traces only: inductor takes its time."""
    right = torch.compile

    def compile_(work: Any, **_: Any) -> Any:
        return right(work, backend="eager")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", compile_)


def dense() -> PreTrainedModel:
    return random_model(SIZE, torch.float32, positions=64)


@pytest.mark.parametrize("projections", [False, True])
def test_a_loop_is_what_generate_gives(
    script: ModuleType, plain_compile: None, projections: bool
) -> None:
    model = dense()
    patched = script.patched_twin(model, method_at("srida", 0.5)(model), projections)
    ids = torch.randint(3, 211, (1, 20), generator=torch.Generator().manual_seed(1))
    for one in (model, patched):
        text, logits = script.Generator(one, ids, 6, "loop").logits()
        expected, wanted = script.Generator(one, ids, 6, "dynamic").logits()
        assert torch.equal(text, expected) and text.shape == (1, 26)
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    loop = script.Generator(patched, ids, 6, "loop")
    report(patched, reset=True)
    for _ in range(2):  # the second run uses the first one's cache and graph
        loop.run()
    assert report(patched).layers[0].tokens == 2 * 5
    assert script.checked_error(loop) < 1e-4
    plan, density, read = script.bytes_read(patched, SIZE)
    assert plan == "given" and density == 0.5
    skipped = 3 * 3 * 96 * 64 * 4  # layers, matrices, neurons of d float32
    assert read == script.bytes_read(model, SIZE)[2] - skipped


def test_a_twin_shares_all_but_w_down(script: ModuleType) -> None:
    model = dense()
    twin = script.patched_twin(model, method_at("srida", 0.5)(model), False)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    own = {n for n, p in twin.named_parameters() if p.data_ptr() != pointers[n]}
    assert own == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}


def test_a_wrong_result_is_no_row(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense()
    ids = torch.randint(3, 211, (1, 20), generator=torch.Generator().manual_seed(1))
    patched = script.patched_twin(model, method_at("srida", 0.5)(model), False)
    right = ops.sparse_mlp
    monkeypatch.setattr(ops, "sparse_mlp", lambda *args: 1.2 * right(*args))
    with pytest.raises(BenchmarkError, match="relative error of the logits"):
        script.checked_error(script.Generator(patched, ids, 6, "dynamic"))


def test_runs_prepare_together_and_take_turns(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with script.lock(file), file.open() as other:
        script.fcntl.flock(other, script.fcntl.LOCK_SH | script.fcntl.LOCK_NB)  # prepares, too
    with script.lock(file) as wait, file.open() as other:
        wait()
        with pytest.raises(BlockingIOError):
            script.fcntl.flock(other, script.fcntl.LOCK_SH | script.fcntl.LOCK_NB)
    with script.lock(None) as wait:
        wait()
