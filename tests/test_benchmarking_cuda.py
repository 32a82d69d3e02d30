"""`moyu bench mlp --device cuda`, as far as it goes without a GPU: what is timed, checked, written.

A graph's capture and the events' clock are replaced, everything else runs on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moyu_ext.benchmarking import BenchmarkError, geometry, input_mask, mlp_cuda
from moyu_ext.benchmarking import machine as machines
from moyu_ext.benchmarking.input_mask import InputMask
from moyu_ext.benchmarking.weights import Filler, mlp_layer
from moyu_ext.cli import app
from moyu_ext.errors import ConfigurationError
from torch import Tensor
from typer.testing import CliRunner

from moyu_ext import benchmarking, ops

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def masked_mlp(
    x: Tensor, gate_up_t: Tensor, down_t: Tensor, sums: Tensor, at_x: float, at_h: float
) -> Tensor:
    """What the Triton kernels compute."""
    gate, up = ((x * (x.abs() > at_x)).float() @ gate_up_t.float()).chunk(2, -1)
    h = (torch.nn.functional.silu(gate) * up).to(x.dtype)
    return ((h * (h.abs() > at_h)).float() @ down_t.float()).to(x.dtype)


@pytest.fixture
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A "GPU" that is the host; the returned list tells what was captured and timed."""
    log: list[str] = []

    def capture(work: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        out = work()
        log.append("capture")

        def replay() -> None:
            for kept, new in zip(out, work(), strict=True):
                kept.copy_(new)

        return replay, out

    def microseconds(work: Callable[[], object]) -> float:
        work()
        log.append("time")
        return 10.0 + len(log)

    monkeypatch.setattr(machines, "busy_share", lambda seconds: 0.0)
    monkeypatch.setattr(mlp_cuda, "require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(mlp_cuda, "_device_name", lambda device: "a GPU")
    monkeypatch.setattr(mlp_cuda, "_l2_bytes", lambda device: 1 << 16)
    monkeypatch.setattr(mlp_cuda, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(mlp_cuda, "capture", capture)
    monkeypatch.setattr(mlp_cuda, "microseconds", microseconds)
    monkeypatch.setattr(mlp_cuda, "why_not", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setattr(input_mask, "_kernels", lambda: SimpleNamespace(masked_mlp=masked_mlp))
    return log


def measure(size: str = "64,200", dtype: torch.dtype = torch.float16, **options: Any) -> Any:
    settings: dict[str, Any] = {"repeats": 2, "densities": [0.5]}
    return benchmarking.measure_mlp_cuda(size, dtype, **{**settings, **options})


def test_rows(on_the_host: list[str]) -> None:
    plans = ["given", "gate", "product", "shadow-2", "shadow-eps-2", "scores-2"]
    result = measure(plans=plans, densities=[0.5, 0.3], rows=[1, 2])
    one_row = [row for row in result.rows if row.rows == 1]
    assert [row.plan for row in one_row] == [
        *3 * ["dense"], *(plan for plan in plans[:-1] for _ in range(2)), "scores-2",
        *2 * ["input-mask"],
    ]  # fmt: skip
    assert [row.method for row in one_row[:3]] == list(mlp_cuda._DENSE)
    assert "input-mask" not in {row.plan for row in result.rows if row.rows == 2}
    for row in result.rows:
        dense = [r for r in result.rows if r.plan == "dense" and r.rows == row.rows]
        best = min(dense, key=lambda r: r.median_us)
        assert row.dense_impl == best.method and row.device == "a GPU"
        assert math.isclose(row.speedup_vs_dense, best.median_us / row.median_us)
        assert 0 <= row.max_rel_err < 0.02
        if row.plan not in ("dense", "scores-2"):
            # Thresholds lie in the widest gap among 32 of 200 neurons.
            assert min(abs(row.density - 0.5), abs(row.density - 0.3)) < 0.09
    # Each row: eager is not captured, everything is timed in the warm-up and twice, beside copies.
    cases = len(result.rows)
    assert on_the_host.count("capture") == cases - 2
    assert on_the_host.count("time") == 3 * cases + 4


def test_the_peer_masks_inputs() -> None:
    filler = Filler(torch.float32)
    layers = [mlp_layer(geometry("48,160"), filler)]
    case = InputMask(layers, filler.draw(1, 48, deviation=1.0), 0.25, 0)
    assert case.kept_x == 12 and abs(case.kept - 40) <= 1
    assert case.bytes == round((2 * 12 * 160 + case.kept * 48) * 4)
    assert math.isclose(case.density, 0.25, abs_tol=0.01)
    right = masked_mlp(
        case.x, case.gate_up_t[0], layers[0].weights.down_t, case.sums,
        case.threshold_x, case.thresholds_h[0],
    )  # fmt: skip
    assert case.verify(0, right) < 1e-4
    with pytest.raises(BenchmarkError, match=r"input-mask at density 0\.25"):
        case.verify(0, 1.1 * right)
    with pytest.raises(ConfigurationError, match="one row"):
        InputMask(layers, filler.draw(2, 48, deviation=1.0), 0.25, 0)


def test_a_wrong_result_gives_no_row(
    on_the_host: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.sparse_mlp
    monkeypatch.setattr(ops, "sparse_mlp", lambda *args: 1.05 * right(*args))
    with pytest.raises(BenchmarkError, match="given at density"):
        measure(plans=["given"])


def test_a_missing_peer_is_named(on_the_host: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp_cuda, "why_not", lambda: "triton is not installed")
    result = measure(plans=["given"])
    assert "input-mask" not in {row.plan for row in result.rows}
    assert result.warnings == ["the input-masking peer is left out: triton is not installed"]


@NO_GPU
def test_without_a_gpu_it_says_so() -> None:
    assert input_mask.why_not() == "no CUDA device, or a CPU-only torch"
    with pytest.raises(ConfigurationError, match="finds no CUDA device"):
        measure()
    done = CliRunner().invoke(app, ["bench", "mlp", "--device", "cuda", "-g", "64,200"])
    assert done.exit_code != 0
    done = CliRunner().invoke(app, ["bench", "mlp", "--device", "tpu", "-g", "64,200"])
    assert done.exit_code != 0 and "tpu" in str(done.exception) + done.output
