"""Packed weights on a GPU: the operators, layers and whole models beside the same on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moyu_ext.benchmarking import method_at
from moyu_ext.packing.layer import PackedLinear
from moyu_ext.packing.rounding import pack_matrix
from moyu_ext.packing.rows import BITS, GROUPS, Format, unpack_rows
from torch import Tensor
from transformers import PreTrainedModel

from moyu_ext import UnsupportedModelError, ops, pack, patch

HAS_KERNELS = torch._C._dispatch_has_kernel_for_dispatch_key("moyu_ext::unpack_rows", "CUDA")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a CPU-only torch"),
    pytest.mark.skipif(not HAS_KERNELS, reason="moyu_ext was built without its CUDA kernels"),
]
Make = Callable[..., PreTrainedModel]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(64, 17), (111, 43), (576, 300), (640, 2048), (4096, 500)]


def close(got: Tensor, want: Tensor, dtype: torch.dtype, times: float = 2.0) -> None:
    """Within two roundings to dtype, and 2^-13 of the whole for what the kernels sum."""
    got, want = got.cpu().double(), want.cpu().double()
    allowed = (
        2 * torch.finfo(dtype).eps * want.abs() + times * 2**-13 * want.norm() / want.numel() ** 0.5
    )
    assert bool(((got - want).abs() <= allowed + 1e-30).all()), float((got - want).abs().max())


def rows_of(f: int, d: int, fmt: Format) -> Tensor:
    return pack_matrix(torch.randn(f, d) / d**0.5, fmt)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
def test_unpacked_rows_are_the_cpus(bits: int, group: int) -> None:
    for d in (1, 64, 130, 576):
        rows = rows_of(9, d, Format(bits, group))
        for dtype in DTYPES:
            got = unpack_rows(rows.cuda(), d, dtype).cpu()
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got, unpack_rows(rows, d, dtype), rtol=eps, atol=1e-7)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gathers(size: tuple[int, int], bits: int, group: int, dtype: torch.dtype) -> None:
    d, f = size
    rows = rows_of(f, d, Format(bits, group))
    wide = unpack_rows(rows, d).double()
    indices = torch.arange(0, f, 3, dtype=torch.int32)
    count = torch.tensor([indices.numel()], dtype=torch.int32)
    for n in (1, 2, 8, 11):
        x = torch.randn(n, d).to(dtype)
        got = ops.gather_gemv(x.cuda(), rows.cuda(), None, None, None)
        close(got, x.double() @ wide.t(), torch.float32)
        some = ops.gather_gemv(x.cuda(), rows.cuda(), indices.cuda(), count.cuda(), None)
        assert torch.equal(some.cpu(), got.cpu()[:, ::3])
        a = torch.randn(n, f)
        close(
            ops.gather_gemv_t(a.cuda(), rows.cuda(), None, None, None, d),
            a.double() @ wide,
            torch.float32,
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("formats", [(4, 4, 64), (4, 8, 32), (8, 4, 64), (8, 8, 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_mlp(size: tuple[int, int], formats: tuple[int, int, int], dtype: torch.dtype) -> None:
    d, f = size
    inner, outer = Format(formats[0], formats[2]), Format(formats[1], formats[2])
    gate, up, down_t = rows_of(f, d, inner), rows_of(f, d, inner), rows_of(f, d, outer)
    wide = [unpack_rows(rows, d).double() for rows in (gate, up, down_t)]
    mlp = [rows.cuda() for rows in (gate, up, down_t)] + [None] * 3
    indices = torch.randperm(f)[: f // 2 + 1].sort().values.to(torch.int32)
    count = torch.tensor([indices.numel()], dtype=torch.int32)
    for n in (1, 3, 8):
        x = torch.randn(n, d).to(dtype)
        gates = torch.nn.functional.silu(x.double() @ wide[0].t())
        a = gates * (x.double() @ wide[1].t())
        kept = torch.zeros_like(a)
        kept[:, indices.long()] = a[:, indices.long()]
        got = ops.sparse_mlp(x.cuda(), *mlp, indices.cuda(), count.cuda(), None, "silu")
        close(got, kept @ wide[2], dtype, 16)
        ordered = gates.abs().flatten().sort().values
        near = ordered[ordered.numel() // 2 :][:512]
        epsilon = (near[1:] + near[:-1])[(near[1:] - near[:-1]).argmax()] / 2
        got, counts = ops.threshold_mlp(
            x.cuda(), *mlp, None, epsilon.float().view(1).cuda(), "silu", "gate"
        )
        active = gates.abs() >= epsilon
        assert torch.equal(counts.cpu().long(), active.sum(1))
        close(got, (a * active) @ wide[2], dtype, 16)


def test_other_bits_are_refused_by_name() -> None:
    x, rows = torch.randn(1, 64), rows_of(8, 64, Format(5, 64))
    with pytest.raises(RuntimeError, match="packed rows of 5 bits run on the CPU only"):
        ops.gather_gemv(x.cuda(), rows.cuda(), None, None, None)


def test_a_layer_moves_to_the_gpu() -> None:
    for transposed in (False, True):
        layer = torch.nn.Linear(192, 320)
        packed = PackedLinear.of(layer, Format(4, 64), transposed=transposed).eval()
        for n in (1, 5, 64):
            x = torch.randn(n, 192)
            want = torch.nn.functional.linear(x.double(), packed.dequantise().double())
            want += layer.bias.detach().double()
            close(packed.cuda()(x.cuda()), want, torch.float32, 4)
            packed.cpu()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["unpatched", "dense", "tda", "stda", "srida", "qrida"])
def test_a_model_says_the_same(tiny: Make, bits: int, name: str) -> None:
    here = pack(tiny(hidden_size=128, intermediate_size=320), bits)
    there = pack(tiny(hidden_size=128, intermediate_size=320).cuda(), bits)
    if name != "unpatched":
        method = method_at(name, 0.5, 32)(here)
        for model in (here, there):
            patch(model, method)
    ids = torch.arange(5, 37)[None]
    with torch.inference_mode():
        text = here.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False)
        cache = there(ids.cuda(), use_cache=True)
        worst = 0.0
        reference = here(ids, use_cache=True)
        for token in text[0, 32:]:
            worst = max(worst, float((cache.logits.cpu() - reference.logits)[:, -1].abs().max()))
            step = token.view(1, 1)
            cache = there(step.cuda(), past_key_values=cache.past_key_values, use_cache=True)
            reference = here(step, past_key_values=reference.past_key_values, use_cache=True)
    # Where each token has its own set, a rounding may turn a neuron.
    assert worst < (1.0 if name in ("tda", "qrida") else 0.02)


def test_bits_that_only_the_cpu_has(tiny: Make) -> None:
    with pytest.raises(UnsupportedModelError, match="have 4 or 8 bits, not 5"):
        pack(tiny().cuda(), 5)


def test_a_graph_replays() -> None:
    rows = rows_of(300, 576, Format(4, 64)).cuda()
    x = torch.randn(1, 576, device="cuda")
    ops.gather_gemv(x, rows, None, None, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.gather_gemv(x, rows, None, None, None)
    x.copy_(torch.randn(1, 576))
    graph.replay()
    assert torch.equal(out, ops.gather_gemv(x, rows, None, None, None))
