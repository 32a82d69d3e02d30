"""Operators against the float64 reference, with tolerances computed from plain PyTorch's error."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moyu_ext.models.weights import MlpWeights
from moyu_ext.shadow.build import build_shadow

from moyu_ext import _load, ops, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1), (19, 7), (111, 64), (128, 111), (64, 989), (257, 300)]  # (d, f)
ISAS = _load._C.isa_list()
SENTINEL = 12345.0


@pytest.fixture(params=ISAS)
def isa(request):
    before = _load._C.isa_name()
    _load._C.set_isa(request.param)
    yield request.param
    _load._C.set_isa(before)


def make(d, f, rows, dtype, gated=True, bias=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    weight = d**-0.5
    return {
        "x": draw(rows, d),
        "gate": draw(f, d, scale=weight) if gated else None,
        "up": draw(f, d, scale=weight),
        "down_t": draw(f, d, scale=f**-0.5),
        "gate_bias": draw(f) if bias and gated else None,
        "up_bias": draw(f) if bias else None,
        "down_bias": draw(d) if bias else None,
    }


def pick(f, density, seed=0):
    g = torch.Generator().manual_seed(seed)
    chosen = torch.nonzero(torch.rand(f, generator=g) < density).flatten().int()
    if density >= 1:
        chosen = torch.arange(f, dtype=torch.int32)
    indices = torch.zeros(f, dtype=torch.int32)
    indices[: chosen.numel()] = chosen
    return indices, torch.tensor([chosen.numel()], dtype=torch.int32)


def assert_as_good_as_torch(got, exact, plain, dtype, terms):
    """At most twice the error of plain PyTorch in the same dtype, plus the rounding floor: one
    rounding to dtype, and a float32 sum whose error grows with the root of the number of terms."""
    scale = exact.abs().max().clamp(min=1e-3)
    floor = scale * (torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * terms**0.5)
    ours = (got.double() - exact).abs().max()
    theirs = (plain.double() - exact).abs().max()
    assert got.dtype == dtype
    assert ours <= 2 * theirs + floor, f"{ours:.3e} against torch's {theirs:.3e} + {floor:.3e}"


def plain_mlp(m, active, activation):
    """The MLP as a user would write it, in the tensors' own dtype."""
    act = reference.ACTIVATIONS[activation]
    h = torch.nn.functional.linear(m["x"], m["up"], m["up_bias"])
    if m["gate"] is None:
        a = act(h)
    else:
        a = act(torch.nn.functional.linear(m["x"], m["gate"], m["gate_bias"])) * h
    out = (a * active.to(a.dtype)) @ m["down_t"]
    return out if m["down_bias"] is None else out + m["down_bias"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_sparse_mlp(isa, dtype, size, density):
    d, f = size
    for rows, gated, bias in (
        (1, True, False),
        (3, False, True),
        (8, True, True),
        (13, True, False),
    ):
        m = make(d, f, rows, dtype, gated, bias)
        indices, count = pick(f, density)
        got = ops.sparse_mlp(**m, indices=indices, count=count, mask=None, activation="silu")
        exact = reference.sparse_mlp(
            **{k: None if v is None else v.double() for k, v in m.items()},
            indices=indices,
            count=count,
            mask=None,
            activation="silu",
            dtype=torch.float64,
        )
        active = torch.zeros(f, dtype=torch.bool)
        active[indices[: int(count)].long()] = True
        assert_as_good_as_torch(got, exact, plain_mlp(m, active, "silu"), dtype, d + f)


@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
def test_activations_and_mask(isa, activation):
    m = make(96, 77, 5, torch.float32, bias=True)
    indices, count = pick(77, 0.6)
    mask = (torch.rand(5, 77, generator=torch.Generator().manual_seed(3)) < 0.5).to(torch.uint8)
    got = ops.sparse_mlp(**m, indices=indices, count=count, mask=mask, activation=activation)
    expected = reference.sparse_mlp(
        **m, indices=indices, count=count, mask=mask, activation=activation
    )
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    everything = ops.sparse_mlp(**m, indices=None, count=None, mask=None, activation=activation)
    dense = plain_mlp(m, torch.ones(77, dtype=torch.bool), activation)
    torch.testing.assert_close(everything, dense, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("plan", ["gate", "product"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_threshold_mlp(isa, plan, dtype, size):
    d, f = size
    for rows, gated in ((1, True), (3, False), (11, True)):
        m = make(d, f, rows, dtype, gated, bias=rows == 3)
        scale = reference.column_norms(m["down_t"]) if plan == "product" else None
        wide = {k: None if v is None else v.double() for k, v in m.items()}
        inputs = {k: v for k, v in wide.items() if not k.startswith("down")}
        a = reference.activations(**inputs, dtype=torch.float64)
        for quantile in (0.0, 0.6, 2.0):
            eps = a.abs().flatten().quantile(min(quantile, 1.0)) * (1 if quantile <= 1 else 1e6)
            if scale is not None:
                eps = eps * scale.mean()
            eps = eps.float().reshape(1)
            got, counts = ops.threshold_mlp(
                **m, scale=scale, epsilon=eps, activation="silu", plan=plan
            )
            active = reference.threshold_active(
                **inputs,
                scale=scale,
                epsilon=eps,
                activation="silu",
                plan=plan,
                dtype=torch.float64,
            )
            # A score within rounding of the threshold may fall on either side.
            slack = max(1, int(0.02 * f))
            assert (counts - active.sum(-1)).abs().max() <= slack
            assert counts.shape == (rows,)
            if (counts == active.sum(-1)).all():
                exact = reference.masked_mlp(
                    **wide, active=active, activation="silu", dtype=torch.float64
                )
                assert_as_good_as_torch(got, exact, plain_mlp(m, active, "silu"), dtype, d + f)


@pytest.mark.parametrize("f", [1, 15, 16, 17, 111, 989, 11008])
def test_threshold_compact(isa, f):
    values = torch.rand(3, f, generator=torch.Generator().manual_seed(f))
    values[:, ::5] = 0.5  # ties with the threshold are active
    values[0, f // 2] = float("nan")  # and so is a NaN
    for eps in (0.0, 0.5, 2.0):
        epsilon = torch.tensor([eps])
        indices, count = ops.threshold_compact(values, epsilon)
        expected = reference.threshold_compact(values, epsilon)
        assert torch.equal(indices, expected[0]) and torch.equal(count, expected[1])
        one, n = ops.threshold_compact(values[1], epsilon)
        assert torch.equal(one, expected[0][1]) and int(n) == int(expected[1][1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_gather(isa, dtype, size):
    d, f = size
    for rows, density in ((1, 0.4), (4, 1.0), (9, 0.4), (2, 0.0)):
        m = make(d, f, rows, dtype, bias=True)
        indices, count = pick(f, density)
        n = int(count)
        got = ops.gather_gemv(m["x"], m["up"], indices, count, m["up_bias"])
        exact = reference.gather_gemv(
            m["x"], m["up"], indices, count, m["up_bias"], dtype=torch.float64
        )
        assert got.dtype == torch.float32 and (got[:, n:] == 0).all()
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)
        everything = torch.arange(f, dtype=torch.int32), torch.tensor([f], dtype=torch.int32)
        assert torch.equal(
            ops.gather_gemv(m["x"], m["up"], None, None, m["up_bias"]),
            ops.gather_gemv(m["x"], m["up"], *everything, m["up_bias"]),
        )
        down = ops.gather_gemv_t(got, m["down_t"], indices, count, m["down_bias"])
        exact = reference.gather_gemv_t(
            got, m["down_t"], indices, count, m["down_bias"], dtype=torch.float64
        )
        plain = got[:, :n].to(dtype) @ m["down_t"][indices[:n].long()] + m["down_bias"]
        assert_as_good_as_torch(down, exact, plain, dtype, d + f)


def test_same_bits_from_run_to_run():
    m = make(512, 2048, 2, torch.bfloat16)
    indices, count = pick(2048, 0.5)
    args = dict(**m, indices=indices, count=count, mask=None, activation="silu")
    first = ops.sparse_mlp(**args)
    assert all(torch.equal(first, ops.sparse_mlp(**args)) for _ in range(10))


def test_nan_reaches_the_output():
    m = make(32, 16, 1, torch.float32)
    m["x"][0, 3] = float("nan")
    epsilon = torch.tensor([1e9])
    out, counts = ops.threshold_mlp(
        **m, scale=None, epsilon=epsilon, activation="silu", plan="product"
    )
    assert out.isnan().all() and int(counts) == 16


def test_forced_isa_that_is_missing_raises():
    with pytest.raises(ValueError, match="sse9000"):
        _load._C.set_isa("sse9000")


BAD = {
    "float64 weights": ({"up": lambda t: t.double()}, "float32, float16 or bfloat16"),
    "mixed dtypes": ({"x": lambda t: t.half()}, "x must have"),
    "short gate": ({"gate": lambda t: t[:-1]}, "gate must be"),
    "strided down": ({"down_t": lambda t: t.t().contiguous().t()}, "not contiguous"),
    "wrong hidden size": ({"x": lambda t: t[:, :-1].contiguous()}, "x must be"),
    "int64 indices": ({"indices": lambda t: t.long()}, "indices must be"),
    "index too large": ({"indices": lambda t: t + 16}, "indices must lie in"),
    "negative index": ({"indices": lambda t: t - 1}, "indices must lie in"),
    "count above capacity": ({"count": lambda t: t + 100}, "count must lie in"),
    "count of wrong shape": ({"count": lambda t: t.repeat(2)}, "count must be"),
    "mask of wrong shape": ({"mask": lambda t: t[:, :-1].contiguous()}, "mask must be"),
    "bias of wrong shape": ({"up_bias": lambda t: t[:-1]}, "up_bias must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_raise(case):
    changes, message = BAD[case]
    m = make(24, 16, 2, torch.float32, bias=True)
    m["indices"], m["count"] = pick(16, 1.0)
    m["mask"] = torch.ones(2, 16, dtype=torch.uint8)
    for name, change in changes.items():
        m[name] = change(m[name])
    with pytest.raises(RuntimeError, match=message):
        ops.sparse_mlp(**m, activation="silu")


def test_indices_and_count_belong_together():
    m = make(24, 16, 2, torch.float32)
    indices, count = pick(16, 0.5)
    for pair in ((indices, None), (None, count)):
        with pytest.raises(RuntimeError, match="gather_gemv: indices and count are given together"):
            ops.gather_gemv(m["x"], m["up"], *pair)


def test_unknown_names_raise():
    m = make(24, 16, 2, torch.float32)
    with pytest.raises(RuntimeError, match="'swish'"):
        ops.sparse_mlp(**m, indices=None, count=None, mask=None, activation="swish")
    with pytest.raises(RuntimeError, match="'down'"):
        ops.threshold_mlp(**m, scale=None, epsilon=torch.zeros(1), activation="silu", plan="down")


def test_opcheck():
    m = make(24, 16, 2, torch.float32)
    indices, count = pick(16, 0.5)
    check = torch.library.opcheck
    check(ops.threshold_compact, (torch.rand(2, 16), torch.tensor([0.5])))
    check(ops.threshold_compact, (torch.rand(16), torch.tensor([0.5])))
    check(ops.gather_gemv, (m["x"], m["up"], indices, count))
    check(ops.gather_gemv, (m["x"], m["up"], None, None))
    values = torch.rand(2, 16)
    check(ops.gather_gemv_t, (values, m["down_t"], indices, count))
    weights = [m[k] for k in ("gate", "up", "down_t", "gate_bias", "up_bias", "down_bias")]
    check(ops.sparse_mlp, (m["x"], *weights, indices, count, None, "silu"))
    check(ops.threshold_mlp, (m["x"], *weights, None, torch.tensor([0.1]), "silu", "gate"))
    norms = reference.column_norms(m["down_t"])
    names = ("gate", "up", "down_t", "gate_bias", "up_bias", "down_bias")
    shadow = build_shadow(MlpWeights(*(m[k] for k in names), activation="silu"), 2, 2).data
    check(ops.shadow_scores, (m["x"], shadow, norms, None, None, True, 2, 2, "silu"))
    args = (m["x"], *weights, shadow, norms, 1 / norms, None, None, 5, 3, 2, 2, "silu")
    check(ops.shadow_mlp, args)


def test_huge_pages_leave_the_values() -> None:
    tensor = torch.arange(5 << 20, dtype=torch.int32)
    before = tensor.clone()
    moved = ops.use_huge_pages(tensor)
    assert torch.equal(tensor, before)
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not mode.exists() or "[never]" in mode.read_text():
        assert not moved
    assert not ops.use_huge_pages(torch.zeros(8))  # nothing of 2 MB to move


ALLOCATION = """
import resource
from pathlib import Path

import torch
from moyu_ext import ops

def call(d):
    return ops.gather_gemv(torch.ones(8, d), torch.ones(1, d), None, None)

small = call(16)
x, weight = torch.ones(8, 1 << 22), torch.ones(1, 1 << 22)
pages = int(Path("/proc/self/statm").read_text().split()[0])
soft = pages * resource.getpagesize() + (32 << 20)
resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))
try:
    ops.gather_gemv(x, weight, None, None)
except (MemoryError, RuntimeError) as error:
    print("refused", type(error).__name__)
assert torch.equal(call(16), small)
print("and goes on")
"""


def test_operators_work_on_after_memory_ran_out() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATION], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.split() == ["refused", "MemoryError", "and", "goes", "on"]


def test_rows_without_elements_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"must not be empty, got .*\[2, 0\]"):
        ops.gather_gemv(torch.ones(2, 0), torch.ones(3, 0), None, None)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_far_below_zero_are_right_to_their_last_digits(activation: str) -> None:
    """act(h) for h of one neuron each, W_down the identity; the formulas in float64."""
    h = -torch.cat([torch.linspace(0.5, 9, 69), torch.tensor([12.0])]).double()
    want = {
        "silu": lambda: h / (1 + torch.exp(-h)),
        "gelu": lambda: h / 2 * torch.special.erfc(-h / 2**0.5),
        "gelu_tanh": lambda: (
            h / (1 + torch.exp(-2 * (2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        ),
    }[activation]()
    up = h.float().unsqueeze(1).expand(-1, 16).contiguous() / 16
    eye = torch.zeros(70, 16)
    got = []
    for first in range(0, 70, 16):  # 16 outputs a call
        part = eye.clone()
        part[first : first + 16] = torch.eye(16)[: 70 - first]
        got.append(
            ops.sparse_mlp(
                torch.ones(1, 16), None, up, part, None, None, None, None, None, None, activation
            )[0, : 70 - first]
        )
    # Rounding of the exponent is a relative error of the power.
    bound = (8 + 4 * (want / h).log().abs()) * torch.finfo(torch.float32).eps
    error = (torch.cat(got).double() - want).abs() / want.abs()
    seen = want.abs() > 1e-37  # below lie float32's subnormals
    assert seen.sum() > 60 and (error <= bound)[seen].all(), (error / bound)[seen].max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_of_a_neuron_major_matrix_are_torchs_own_product(dtype):
    """Also where torch has no instructions for the dtype, and would take 70 times as long."""
    m = make(96, 257, 64, dtype, bias=True)
    weights = MlpWeights(**{k: v for k, v in m.items() if k != "x"}, activation="silu")
    a = torch.randn(64, 257).to(dtype)
    right = torch.nn.functional.linear(a, m["down_t"].t().contiguous(), m["down_bias"])
    exact = a.double() @ m["down_t"].double() + m["down_bias"].double()
    assert_as_good_as_torch(weights.down(a), exact, right, dtype, 257)
