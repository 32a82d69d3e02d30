"""The operators and whole-model generation on a GPU; skipped where there is none.

Without a GPU the same kernels run in tests/cpp/test_cuda_kernels.cpp, on an emulator.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from moyu_ext.methods import Method
from test_ops import DTYPES, SIZES, assert_as_good_as_torch, make, pick, plain_mlp
from torch import Tensor
from transformers import PreTrainedModel

from moyu_ext import QRIDA, SRIDA, STDA, TDA, Dense, ops, patch, reference, report

HAS_KERNELS = torch._C._dispatch_has_kernel_for_dispatch_key("moyu_ext::sparse_mlp", "CUDA")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a CPU-only torch"),
    pytest.mark.skipif(not HAS_KERNELS, reason="moyu_ext was built without its CUDA kernels"),
]
WEIGHTS = ("gate", "up", "down_t", "gate_bias", "up_bias", "down_bias")
FULL = torch.ones(1).bool()

Problem = dict[str, Tensor | None]
Make = Callable[..., PreTrainedModel]
Prompt = Callable[..., Tensor]


def on_gpu(m: Problem) -> dict[str, Any]:
    return {k: None if v is None else v.cuda() for k, v in m.items()}


def wide(m: Problem) -> dict[str, Any]:
    return {k: None if v is None else v.double() for k, v in m.items()}


def check_mlp(got: Tensor, m: Problem, active: Tensor, activation: str, dtype: torch.dtype) -> None:
    exact = reference.masked_mlp(
        **wide(m), active=active, activation=activation, dtype=torch.float64
    )
    d, f = m["x"].shape[-1], m["up"].shape[0]
    assert_as_good_as_torch(got.cpu(), exact, plain_mlp(m, active, activation), dtype, d + f)


def active_set(f: int, indices: Tensor, count: Tensor) -> Tensor:
    active = torch.zeros(f, dtype=torch.bool)
    active[indices[: int(count)].long()] = True
    return active


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, (4096, 300)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_sparse_mlp(dtype: torch.dtype, size: tuple[int, int], density: float) -> None:
    d, f = size
    for rows in (1, 2, 3, 5, 8, 13):
        m = make(d, f, rows, dtype, gated=rows != 3, bias=rows % 2 == 0)
        indices, count = pick(f, density)
        mask = (torch.rand(rows, f) < 0.7).to(torch.uint8) if rows > 3 else None
        got = ops.sparse_mlp(
            **on_gpu(m),
            indices=indices.cuda(),
            count=count.cuda(),
            mask=None if mask is None else mask.cuda(),
            activation="silu",
        )
        active = active_set(f, indices, count).expand(rows, f)
        check_mlp(got, m, active if mask is None else active & mask.bool(), "silu", dtype)


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_activations_over_all_neurons(activation: str) -> None:
    for gated in (True, False):
        m = make(96, 77, 2, torch.float32, gated=gated, bias=True)
        got = ops.sparse_mlp(
            **on_gpu(m), indices=None, count=None, mask=None, activation=activation
        )
        check_mlp(got, m, FULL.expand(2, 77), activation, torch.float32)


@pytest.mark.parametrize("plan", ["gate", "product"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, (4096, 300)])
def test_threshold_mlp(plan: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    d, f = size
    for rows, gated in ((1, True), (3, False), (8, True), (11, True)):
        m = make(d, f, rows, dtype, gated, bias=rows == 3)
        scale = reference.column_norms(m["down_t"]) if plan == "product" else None
        inputs = {k: v for k, v in wide(m).items() if not k.startswith("down")}
        a = reference.activations(**inputs, dtype=torch.float64).abs()
        for quantile, factor in ((0.0, 1.0), (0.6, 1.0), (1.0, 1e6)):
            eps = a.flatten().quantile(quantile) * factor * (1 if scale is None else scale.mean())
            eps = eps.float().reshape(1)
            got, counts = ops.threshold_mlp(
                **on_gpu(m),
                scale=None if scale is None else scale.cuda(),
                epsilon=eps.cuda(),
                activation="silu",
                plan=plan,
            )
            active = reference.threshold_active(
                **inputs,
                scale=scale,
                epsilon=eps,
                activation="silu",
                plan=plan,
                dtype=torch.float64,
            )
            expected = active.sum(-1)
            # A score within rounding of the threshold may fall on either side.
            assert (counts.cpu() - expected).abs().max() <= max(1, int(0.02 * f))
            if (counts.cpu() == expected).all():
                check_mlp(got, m, active, "silu", dtype)


@pytest.mark.parametrize("f", [1, 31, 32, 33, 111, 989, 11008, 65536, 65537])
def test_threshold_compact(f: int) -> None:
    values = torch.rand(3, f)
    values[:, ::5] = 0.5
    values[0, f // 2] = float("nan")
    for eps in (0.0, 0.5, 2.0):
        epsilon = torch.tensor([eps])
        indices, count = ops.threshold_compact(values.cuda(), epsilon.cuda())
        expected = reference.threshold_compact(values, epsilon)
        assert torch.equal(indices.cpu(), expected[0]) and torch.equal(count.cpu(), expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gathers(dtype: torch.dtype, size: tuple[int, int]) -> None:
    d, f = size
    for rows, density in ((1, 0.4), (4, 1.0), (9, 0.4), (2, 0.0)):
        m = make(d, f, rows, dtype, bias=True)
        indices, count = pick(f, density)
        where = (indices.cuda(), count.cuda())
        got = ops.gather_gemv(m["x"].cuda(), m["up"].cuda(), *where, m["up_bias"].cuda())
        exact = reference.gather_gemv(
            m["x"], m["up"], indices, count, m["up_bias"], dtype=torch.float64
        )
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.cpu().double(), exact, rtol=1e-5, atol=1e-4)
        whole = ops.gather_gemv(m["x"].cuda(), m["up"].cuda(), None, None, m["up_bias"].cuda())
        exact = reference.gather_gemv(
            m["x"], m["up"], None, None, m["up_bias"], dtype=torch.float64
        )
        torch.testing.assert_close(whole.cpu().double(), exact, rtol=1e-5, atol=1e-4)
        down = ops.gather_gemv_t(got, m["down_t"].cuda(), *where, m["down_bias"].cuda())
        n, values = int(count), got.cpu()
        exact = reference.gather_gemv_t(
            values, m["down_t"], indices, count, m["down_bias"], dtype=torch.float64
        )
        plain = values[:, :n].to(dtype) @ m["down_t"][indices[:n].long()] + m["down_bias"]
        assert_as_good_as_torch(down.cpu(), exact, plain, dtype, d + f)


def test_same_bits_from_run_to_run() -> None:
    m = on_gpu(make(512, 2048, 2, torch.bfloat16))
    indices, count = (t.cuda() for t in pick(2048, 0.5))
    run = lambda: ops.sparse_mlp(  # noqa: E731
        **m, indices=indices, count=count, mask=None, activation="silu"
    )
    first = run()
    assert all(torch.equal(first, run()) for _ in range(20))


def test_count_and_indices_out_of_range_read_nothing() -> None:
    """The host cannot look; the kernels clamp the count and skip the neurons."""
    m = make(64, 40, 2, torch.float32)
    indices = torch.arange(40, dtype=torch.int32)
    indices[[0, 5, 39]] = torch.tensor([-1, 40, 2**31 - 1], dtype=torch.int32)
    active = torch.ones(2, 40, dtype=torch.bool)
    active[:, [0, 5, 39]] = False
    for count in (40, 41, 2**31 - 1):
        n = torch.tensor([count], dtype=torch.int32).cuda()
        got = ops.sparse_mlp(
            **on_gpu(m), indices=indices.cuda(), count=n, mask=None, activation="silu"
        )
        check_mlp(got, m, active, "silu", torch.float32)
    none = torch.tensor([-3], dtype=torch.int32).cuda()
    got = ops.sparse_mlp(
        **on_gpu(m), indices=indices.cuda(), count=none, mask=None, activation="silu"
    )
    assert torch.equal(got.cpu(), torch.zeros(2, 64))


@pytest.mark.parametrize(
    ("list_", "count", "message"),
    [
        ([0, 1], 3, r"count must lie in \[0, 2\]"),
        ([0, 1], -1, r"count must lie in \[0, 2\]"),
        ([0, 7], 2, r"indices must lie in \[0, 7\)"),
    ],
)
def test_a_wrong_set_raises_where_checks_are_asked_for(
    list_: list[int], count: int, message: str
) -> None:
    code = f"""
import torch
from moyu_ext import ops
w = torch.ones(7, 8, device="cuda")
indices, count = (torch.tensor(v, dtype=torch.int32, device="cuda") for v in ({list_}, [{count}]))
ops.sparse_mlp(w[:1].clone(), w, w, w, None, None, None, indices, count, None, "silu")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MOYU_CHECK": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and re.search("sparse_mlp: " + message, done.stderr)


def test_works_on_the_current_stream() -> None:
    m = on_gpu(make(128, 96, 1, torch.float32))
    expected = ops.sparse_mlp(**m, indices=None, count=None, mask=None, activation="silu")
    late = torch.zeros_like(m["x"])
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(m["x"])  # long after the default stream could have read zeros
        got = ops.sparse_mlp(
            **{**m, "x": late}, indices=None, count=None, mask=None, activation="silu"
        )
    stream.synchronize()
    assert torch.equal(got, expected)


# ---- CUDA graphs ----


def capture(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    return graph, out


@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_replays_with_a_changing_set(dtype: torch.dtype) -> None:
    d, f, rows = 128, 300, 3
    m = make(d, f, rows, dtype)
    gpu = on_gpu(m)
    indices, count = (t.cuda() for t in pick(f, 0.5))
    mask = torch.ones(rows, f, dtype=torch.uint8, device="cuda")
    graph, out = capture(
        lambda: ops.sparse_mlp(**gpu, indices=indices, count=count, mask=mask, activation="silu")
    )
    for seed, density in enumerate((1.0, 0.0, 0.1, 0.9)):
        new_indices, new_count = pick(f, density, seed)
        new_mask = (torch.rand(rows, f) < 0.8).to(torch.uint8)
        new_x = torch.randn(rows, d).to(dtype)
        for old, new in ((indices, new_indices), (count, new_count), (mask, new_mask)):
            old.copy_(new)
        gpu["x"].copy_(new_x)
        graph.replay()
        active = active_set(f, new_indices, new_count) & new_mask.bool()
        check_mlp(out, {**m, "x": new_x}, active, "silu", dtype)


@pytest.mark.parametrize("plan", ["gate", "product"])
def test_graph_replays_with_a_changing_threshold(plan: str) -> None:
    gpu = on_gpu(make(128, 300, 2, torch.float16))
    epsilon = torch.zeros(1, device="cuda")
    rest = {"scale": None, "activation": "silu", "plan": plan}
    graph, (out, counts) = capture(lambda: ops.threshold_mlp(**gpu, epsilon=epsilon, **rest))
    for value in (0.0, 0.2, 1e9, 0.05):
        epsilon.fill_(value)
        graph.replay()
        eager = ops.threshold_mlp(**gpu, epsilon=epsilon, **rest)
        assert torch.equal(out, eager[0]) and torch.equal(counts, eager[1])
    assert 0 < int(counts[0]) < 300


def test_graph_of_the_separate_operators() -> None:
    m = make(96, 200, 1, torch.float32)
    gpu = on_gpu(m)
    scores = torch.rand(200, device="cuda")
    epsilon = torch.tensor([0.5], device="cuda")

    def chain() -> Tensor:
        indices, count = ops.threshold_compact(scores, epsilon)
        values = ops.gather_gemv(gpu["x"], gpu["up"], indices, count)
        return ops.gather_gemv_t(values, gpu["down_t"], indices, count)

    graph, out = capture(chain)
    for _ in range(3):
        scores.uniform_()
        graph.replay()
        active = (scores >= 0.5).cpu()
        exact = (m["x"].double() @ m["up"].double().T * active) @ m["down_t"].double()
        torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-4, atol=1e-5)


def test_compiled_without_a_graph_break() -> None:
    gpu = on_gpu(make(128, 96, 1, torch.float16))
    indices, count = (t.cuda() for t in pick(96, 0.5))

    def work(x: Tensor, indices: Tensor, count: Tensor) -> Tensor:
        weights = [gpu[k] for k in WEIGHTS]
        return ops.sparse_mlp(x * 2, *weights, indices, count, None, "silu") + 1

    compiled = torch.compile(work, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        for old, new in zip((indices, count), pick(96, 0.2 * seed, seed), strict=True):
            old.copy_(new)
        expected = work(gpu["x"], indices, count)
        torch.testing.assert_close(compiled(gpu["x"], indices, count), expected)


def test_opcheck() -> None:
    m = on_gpu(make(24, 16, 2, torch.float32))
    indices, count = (t.cuda() for t in pick(16, 0.5))
    weights = [m[k] for k in WEIGHTS]
    check = torch.library.opcheck
    check(ops.threshold_compact, (torch.rand(2, 16).cuda(), torch.tensor([0.5]).cuda()))
    check(ops.gather_gemv, (m["x"], m["up"], indices, count))
    check(ops.gather_gemv, (m["x"], m["up"], None, None))
    check(ops.gather_gemv_t, (torch.rand(2, 16).cuda(), m["down_t"], indices, count))
    check(ops.sparse_mlp, (m["x"], *weights, indices, count, None, "silu"))
    epsilon = torch.tensor([0.1]).cuda()
    check(ops.threshold_mlp, (m["x"], *weights, None, epsilon, "silu", "gate"))


# ---- errors ----

BAD: dict[str, tuple[dict[str, Callable[[Tensor], Tensor]], str]] = {
    "x on the host": ({"x": Tensor.cpu}, "x must be on a cuda device"),
    "weights on the host": ({"up": Tensor.cpu}, "up must be .* on cuda:0, got .* on cpu"),
    "indices on the host": ({"indices": Tensor.cpu}, "indices must be .* on cuda:0, got .* on cpu"),
    "count on the host": ({"count": Tensor.cpu}, "count must be .* on cuda:0, got .* on cpu"),
    "mask on the host": ({"mask": Tensor.cpu}, "mask must be .* on cuda:0, got .* on cpu"),
    "int64 indices": ({"indices": Tensor.long}, "indices must be"),
    "float64 weights": ({"up": Tensor.double}, "float32, float16 or bfloat16"),
    "mixed dtypes": ({"x": Tensor.half}, "x must have"),
    "short gate": ({"gate": lambda t: t[:-1]}, "gate must be"),
    "wrong hidden size": ({"x": lambda t: t[:, :-1].contiguous()}, "x must be"),
    "strided down": ({"down_t": lambda t: t.t().contiguous().t()}, "not contiguous"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise(case: str) -> None:
    changes, message = BAD[case]
    m = on_gpu(make(24, 16, 2, torch.float32, bias=True))
    m["indices"], m["count"] = (t.cuda() for t in pick(16, 1.0))
    m["mask"] = torch.ones(2, 16, dtype=torch.uint8, device="cuda")
    for name, change in changes.items():
        m[name] = change(m[name])
    with pytest.raises(RuntimeError, match=message):
        ops.sparse_mlp(**m, activation="silu")
    torch.cuda.synchronize()  # nothing was launched that fails later


def test_epsilon_on_the_host_raises() -> None:
    with pytest.raises(RuntimeError, match="epsilon must be one float32 on cuda:0"):
        ops.threshold_compact(torch.rand(8, device="cuda"), torch.tensor([0.5]))
    with pytest.raises(RuntimeError, match="values must be on a cuda device"):
        ops.threshold_compact(torch.rand(8), torch.tensor([0.5], device="cuda"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices() -> None:
    m = on_gpu(make(24, 16, 1, torch.float32))
    here = ops.sparse_mlp(**m, indices=None, count=None, mask=None, activation="silu")
    there = {k: None if v is None else v.to("cuda:1") for k, v in m.items()}
    got = ops.sparse_mlp(**there, indices=None, count=None, mask=None, activation="silu")
    assert got.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    torch.testing.assert_close(got.cpu(), here.cpu())
    there["up"] = m["up"]
    with pytest.raises(RuntimeError, match=r"up must be .* on cuda:1, got .* on cuda:0"):
        ops.sparse_mlp(**there, indices=None, count=None, mask=None, activation="silu")


# ---- whole models ----

METHODS: dict[str, Callable[[], Method]] = {
    "dense": Dense,
    "tda": lambda: TDA(0.3),
    "tda-gate": lambda: TDA(0.05, score="gate"),
    "stda": lambda: STDA(0.3),
    "srida": lambda: SRIDA(0.5),
    "qrida": lambda: QRIDA(density=0.4),
    "qrida-threshold": lambda: QRIDA(thresholds=0.05),
    "qrida-mixed": lambda: QRIDA(density=0.5, bits=(2, 1)),
}


def tokens(model: PreTrainedModel, ids: Tensor, new: int = 12, **kwargs: Any) -> Tensor:
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False} | kwargs
    return model.generate(ids.to(model.device), **settings).cpu()


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("name", METHODS)
def test_generate_as_on_the_cpu(tiny: Make, prompt: Prompt, family: str, name: str) -> None:
    on_cpu = patch(tiny(family), METHODS[name]())
    model = patch(tiny(family).cuda(), METHODS[name]())
    for seed in range(2):
        ids = prompt(13, 2, seed)
        assert torch.equal(tokens(model, ids), tokens(on_cpu, ids))
    assert report(model).density == pytest.approx(report(on_cpu).density, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_generate_in_half_precision(
    tiny: Make, prompt: Prompt, dtype: torch.dtype, name: str
) -> None:
    model = patch(tiny("llama", dtype=dtype).cuda(), METHODS[name]())
    assert tokens(model, prompt(13)).shape == (1, 25)
    assert 0 < report(model).density <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_generate_with_a_static_cache(tiny: Make, prompt: Prompt, name: str) -> None:
    """A static cache compiles the decode step into CUDA graphs; they serve every later prompt."""
    eager = patch(tiny("llama").cuda(), METHODS[name]())
    model = patch(tiny("llama").cuda(), METHODS[name]())
    for seed, length in enumerate((13, 21, 13)):
        ids = prompt(length, 1, seed)
        assert torch.equal(tokens(model, ids, cache_implementation="static"), tokens(eager, ids))
    assert report(model).density == pytest.approx(report(eager).density, abs=0.01)


@pytest.mark.slow
def test_projections(tiny: Make, prompt: Prompt) -> None:
    """Also attention's and the head's layers, compiled and not; only rounding changes."""
    plain = patch(tiny("llama").cuda(), STDA(0.3))
    model = patch(tiny("llama").cuda(), STDA(0.3), projections=True)
    for seed, length in enumerate((13, 21)):
        ids = prompt(length, 1, seed)
        expected = tokens(plain, ids)
        assert torch.equal(tokens(model, ids), expected)
        assert torch.equal(tokens(model, ids, cache_implementation="static"), expected)
    with torch.no_grad():
        one = prompt(1).cuda()
        torch.testing.assert_close(model(one).logits, plain(one).logits, rtol=1e-4, atol=1e-4)
