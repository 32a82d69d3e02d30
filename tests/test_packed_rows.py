"""Operators on packed rows against float64 on what the rows stand for."""

import itertools

import pytest
import torch
from moyu_ext.models.weights import MlpWeights, Packed
from moyu_ext.packing.reference import dequantise
from moyu_ext.packing.reference import unpack_rows as reference_unpack_rows
from moyu_ext.packing.rounding import check_finite, pack_matrix, quantise
from moyu_ext.packing.rows import (
    BITS,
    GROUPS,
    Format,
    format_of,
    linear,
    linear_t,
    pack_rows,
    unpack_codes,
    unpack_rows,
)
from moyu_ext.shadow.build import build_shadow

from moyu_ext import ConfigurationError, _load, ops

FORMATS = [Format(bits, group) for bits, group in itertools.product(BITS, GROUPS)]
SIZES = [(1, 3), (19, 8), (64, 57), (111, 30), (576, 41), (989, 19)]  # (d, f)


@pytest.fixture(params=_load._C.isa_list())
def isa(request):
    before = _load._C.isa_name()
    _load._C.set_isa(request.param)
    yield request.param
    _load._C.set_isa(before)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make(d, f, fmt, dtype=torch.float32, gated=True, bias=False, seed=0):
    """Packed weights, and the plain float64 ones that they stand for."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return torch.randn(*shape, generator=g) * scale

    names = ("gate", "up", "down_t") if gated else ("up", "down_t")
    packed = {n: pack_matrix(draw(f, d, scale=d**-0.5), fmt) for n in names}
    exact = {n: dequantise(unpack_codes(t, d), d).double() for n, t in packed.items()}
    biases = {"gate_bias": None, "up_bias": None, "down_bias": None}
    if bias:
        biases = {"up_bias": draw(f).to(dtype), "down_bias": draw(d).to(dtype)}
        biases["gate_bias"] = draw(f).to(dtype) if gated else None
    wide = {n: None if b is None else b.double() for n, b in biases.items()}
    absent = {} if gated else {"gate": None}
    weights = MlpWeights(**packed, **biases, **absent, activation="silu", packed=Packed(d, dtype))
    return weights, MlpWeights(**exact, **wide, **absent, activation="silu")


def some(f, every, seed=0):
    chosen = torch.arange(seed % every, f, every, dtype=torch.int32)
    indices = torch.zeros(f, dtype=torch.int32)
    indices[: len(chosen)] = chosen
    return indices, torch.tensor([len(chosen)], dtype=torch.int32)


def assert_close(got, exact, dtype=torch.float32, stages=1):
    """A stage rounds its inputs to 2^15 steps of the largest of 64 (of 8 rows' coefficients), and
    the largest of 64 is at most 8 times their root mean square: 2^-13 of their norm at most. Then
    there is the rounding to dtype, and float32 sums."""
    off = float((got.double() - exact).norm() / exact.norm().clamp_min(1e-30))
    assert off <= stages * 2**-13 + torch.finfo(dtype).eps + 1e-6, off


def assert_dots(got, x, weight, bias=0.0):
    """x W^T + bias where x is rounded to 2^15 steps of the largest of each 64, at the worst."""
    n, d = x.shape
    blocks = torch.nn.functional.pad(x.double(), (0, -d % 64)).view(n, -1, 64)
    half_step = (blocks.abs().amax(-1) / 32767 / 2).repeat_interleave(64, 1)[:, :d]
    exact = x.double() @ weight.t() + bias
    floor = 1e-6 * (x.double().abs() @ weight.abs().t() + abs(bias))
    assert bool(((got.double() - exact).abs() <= half_step @ weight.abs().t() + floor).all())


def assert_sums(got, values, packed, weight, group, bias=0.0):
    """values W + bias where the products of values and scales are rounded to 2^15 steps of the
    largest of 8 rows, at the worst of all rows."""
    codes = unpack_codes(packed, weight.shape[1])
    products = values.abs().unsqueeze(-1) * codes.scales.float().abs()
    half_step = (products.amax(1).double() / 32767 / 2).repeat_interleave(group, 1)
    allowed = (half_step * codes.codes.double().sum(0))[:, : weight.shape[1]]
    reach = codes.offsets.float().abs().repeat_interleave(group, 1)[:, : weight.shape[1]]
    floor = 1e-6 * (values.double().abs() @ (weight.abs() + 2 * reach.double()) + abs(bias))
    exact = values.double() @ weight + bias
    assert bool(((got.double() - exact).abs() <= allowed + floor).all())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("d", [1, 19, 64, 111, 576, 2048])
def test_rows_give_back_the_codes_they_were_packed_from(fmt, d):
    codes = quantise(torch.randn(7, d), fmt)
    rows = pack_rows(codes, fmt)
    assert rows.shape == (7, fmt.row_bytes(d))
    assert format_of(rows, d) == fmt
    back = unpack_codes(rows, d)
    assert torch.equal(back.codes, codes.codes)
    assert torch.equal(back.scales, codes.scales) and torch.equal(back.offsets, codes.offsets)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_rounding_is_to_the_nearest_level_between_the_extremes(fmt):
    w = torch.randn(50, 200) * torch.logspace(-3, 2, 50).unsqueeze(1)
    values = dequantise(quantise(w, fmt), 200)
    for start in range(0, 200, fmt.group):
        group, got = w[:, start : start + fmt.group], values[:, start : start + fmt.group]
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        step = (high - low) / (2**fmt.bits - 1)
        # Scale and offset are float16, 2^-24 at the least: the scale is rounded up, the offset
        # to the nearest, and then the range may reach a little further.
        rounding = (low.abs() * 2**-11).clamp_min(2**-25)
        step += (step * 2**-10).clamp_min(2**-24)
        assert bool(((group - got).abs() <= step / 2 + 1.001 * rounding).all())


def test_what_packed_rows_cannot_hold_is_refused():
    for bits, group in ((2, 64), (7, 64), (8, 16), (True, 64), ("4", 64)):
        with pytest.raises(ConfigurationError, match=r"is .*; "):
            Format(bits, group)
    for bad in (float("nan"), float("inf"), 1e5):
        with pytest.raises(ConfigurationError, match=r"layer\.weight reaches from"):
            check_finite("layer", torch.tensor([[0.0, bad]]))
    with pytest.raises(ConfigurationError, match="no format has rows of this length"):
        format_of(torch.zeros(1, 17, dtype=torch.uint8), 64)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_unpacked_rows_are_the_reference(isa, fmt, size):
    d, f = size
    weights, exact = make(d, f, fmt)
    out, right = torch.full((f, d), 7.0), torch.empty(f, d)
    ops.unpack_rows(weights.up, out)
    reference_unpack_rows(weights.up, right)
    assert (out - right).abs().max() <= 2**-22 * right.abs().max()  # an fma keeps more
    for dtype in (torch.float16, torch.bfloat16):
        assert_close(unpack_rows(weights.up, d, dtype), exact.up, dtype)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_products_equal_the_dequantised(isa, fmt, rows):
    for number, (d, f) in enumerate(SIZES):
        weights, exact = make(d, f, fmt, bias=True, seed=number)
        x = torch.randn(rows, d)
        everything = ops.gather_gemv(x, weights.up, None, None, weights.up_bias)
        assert_dots(everything, x, exact.up, exact.up_bias)
        indices, count = some(f, 3, number)
        used = indices[: int(count)].long()
        got = ops.gather_gemv(x, weights.up, indices, count, None)
        assert torch.equal(got[:, len(used) :], torch.zeros(rows, f - len(used)))
        assert_dots(got[:, : len(used)], x, exact.up[used])
        values = torch.randn(rows, f)
        got = ops.gather_gemv_t(values, weights.down_t, indices, count, weights.down_bias, d)
        some_values, some_rows = values[:, : len(used)], weights.down_t[used]
        assert_sums(got, some_values, some_rows, exact.down_t[used], fmt.group, exact.down_bias)
        got = ops.gather_gemv_t(values, weights.down_t, None, None, None, d)
        assert_sums(got, values, weights.down_t, exact.down_t, fmt.group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fmt", FORMATS[1::2], ids=str)
def test_mlps_equal_the_dequantised_under_every_plan(isa, fmt, gated, dtype):
    for number, ((d, f), rows) in enumerate(itertools.product(SIZES[2:], (1, 3, 8, 9))):
        weights, exact = make(d, f, fmt, dtype, gated, bias=number % 2 == 0, seed=number)
        x = torch.randn(rows, d).to(dtype)
        indices, count = some(f, 2, number)
        mask = (torch.rand(rows, f) < 0.7).to(torch.uint8)
        a = exact.activations(x.double())[1]
        active = torch.zeros(f, dtype=torch.bool)
        active[indices[: int(count)].long()] = True
        active = active & mask.bool()
        got = weights.given(x, indices, count, mask)
        assert got.dtype == dtype
        assert_close(got, exact.down(a * active), dtype, 3)
        assert_close(weights.given(x), exact.down(a), dtype, 3)

        norms = weights.column_norms()
        score = a.abs() * norms.double()
        ordered = score.flatten().sort().values
        epsilon = ordered[len(ordered) // 3 : len(ordered) // 3 + 2].mean()
        # Neurons so near the threshold that rounding may decide are left out of the comparison.
        near = (score - epsilon).abs() < 2**-11 * score.norm() + 1e-9
        if not bool(near.any()):
            got, counts = weights.by_threshold(x, "product", norms, epsilon.float().view(1))
            kept = score >= epsilon
            assert torch.equal(counts.long(), kept.sum(1))
            assert_close(got, exact.down(a * kept), dtype, 3)
        got, counts = weights.by_threshold(x, "gate", None, torch.zeros(1))
        assert_close(got, exact.down(a), dtype, 3)
        assert torch.equal(counts, torch.full((rows,), f, dtype=torch.int32))

        shadow = build_shadow(weights, 4, 4)
        bits = (shadow.bits_gate, shadow.bits_up)
        estimate = ops.shadow_scores(
            x, shadow.data, norms, weights.gate_bias, weights.up_bias, gated, *bits, "silu"
        )
        top = torch.zeros(rows, f).scatter_(1, estimate.topk(f // 3).indices, 1.0)
        got, counts = weights.by_shadow(x, shadow.data, bits, norms, None, f // 3)
        assert counts.tolist() == [[f // 3] * rows, [0] * rows]
        assert_close(got, exact.down(a * top), dtype, 3)


def test_what_is_not_finite_stays_in_its_row(isa):
    weights, exact = make(128, 40, Format(4, 32))
    x = torch.randn(4, 128)
    x[1, 5], x[2, 77] = float("nan"), float("inf")
    got = weights.given(x)
    assert not got[1:3].isfinite().any()
    assert_close(got[::3], exact.down(exact.activations(x[::3].double())[1]), stages=3)
    values = torch.ones(2, 40)
    values[1, 39] = float("inf")
    got = ops.gather_gemv_t(values, weights.down_t, None, None, None, 128)
    assert got[0].isfinite().all() and not got[1].isfinite().any()


def test_zero_inputs_and_zero_weights_give_zero(isa):
    weights, _ = make(64, 16, Format(8, 64))
    zero = pack_matrix(torch.zeros(16, 64), Format(3, 32))
    assert not ops.gather_gemv(torch.zeros(2, 64), weights.up, None, None, None).any()
    assert not ops.gather_gemv(torch.randn(2, 64), zero, None, None, None).any()
    assert not ops.gather_gemv_t(torch.randn(2, 16), zero, None, None, None, 64).any()
    assert not weights.given(torch.zeros(3, 64)).any()


def test_the_same_bits_from_run_to_run_and_row_to_row(isa):
    weights, _ = make(576, 300, Format(4, 64))
    x = torch.randn(8, 576)
    first = weights.given(x)
    assert all(torch.equal(weights.given(x), first) for _ in range(5))


@pytest.mark.parametrize("rows", [1, 8, 9, 40])
def test_linear_layers_of_few_and_many_rows_agree(rows):
    weights, exact = make(200, 96, Format(6, 64), bias=True)
    x, a = torch.randn(rows, 200), torch.randn(rows, 96)
    assert_close(linear(x, weights.up, weights.up_bias), x.double() @ exact.up.t() + exact.up_bias)
    assert_close(
        linear_t(a, weights.down_t, 200, weights.down_bias),
        a.double() @ exact.down_t + exact.down_bias,
    )


def test_wrong_rows_are_refused_by_name():
    weights, _ = make(64, 16, Format(4, 64))
    x = torch.randn(1, 64)
    with pytest.raises(RuntimeError, match="weight has rows of 5 bytes, which packed rows of 64"):
        ops.gather_gemv(x, torch.zeros(16, 5, dtype=torch.uint8), None, None, None)
    with pytest.raises(RuntimeError, match="gate, up and down_t must all be packed rows"):
        ops.sparse_mlp(x, torch.randn(16, 64), weights.up, weights.down_t, *[None] * 6, "silu")
    with pytest.raises(RuntimeError, match="columns must say how many"):
        ops.gather_gemv_t(torch.randn(1, 16), weights.down_t, None, None, None)
    with pytest.raises(RuntimeError, match="packed must hold packed rows"):
        ops.unpack_rows(torch.randn(16, 64), torch.empty(16, 64))
    with pytest.raises(RuntimeError, match="out must be float32, float16 or bfloat16"):
        ops.unpack_rows(weights.up, torch.empty(16, 64, dtype=torch.float64))


def test_opcheck_on_packed_rows():
    weights, _ = make(64, 16, Format(5, 32))
    indices, count = some(16, 2)
    check = torch.library.opcheck
    check(ops.unpack_rows, (weights.up, torch.empty(16, 64)))
    check(ops.gather_gemv, (torch.randn(2, 64), weights.up, indices, count))
    check(ops.gather_gemv_t, (torch.randn(2, 16), weights.down_t, indices, count, None, 64))
    matrices = (weights.gate, weights.up, weights.down_t)
    check(
        ops.sparse_mlp,
        (torch.randn(2, 64), *matrices, None, None, None, indices, count, None, "silu"),
    )
