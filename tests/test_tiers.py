"""QRIDA in tiers: exact, estimated and skipped neurons, against an unpatched model whose
activations are replaced by plain PyTorch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from moyu_ext.errors import ConfigurationError
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.models.families import find_mlps
from moyu_ext.models.weights import MlpWeights
from moyu_ext.packing.rounding import pack_matrix
from moyu_ext.packing.rows import Format, unpack_rows
from moyu_ext.shadow.build import build_shadow
from moyu_ext.shadow.reference import (
    expected_gains,
    product,
    projections,
    shadow_mlp,
    tiers_by_price,
)
from torch import Tensor, nn

import moyu_ext
from moyu_ext import QRIDA, ops

Make = Callable[..., Any]


@contextmanager
def tiered(
    model: nn.Module, exact: float, estimated: float, bits: int, first: int
) -> Iterator[None]:
    """Positions from `first` on of a single sequence compute in tiers."""
    handles = []
    inputs: dict[int, Tensor] = {}
    for site in find_mlps(model):
        w = site.weights()
        shadow = build_shadow(w, bits, bits)
        norms = w.down_t.detach().float().norm(dim=1)
        k, more = round(exact * w.f), round(estimated * w.f)

        def remember(module: nn.Module, args: tuple[Tensor, ...], i: int = site.index) -> None:
            inputs[i] = args[0].detach().reshape(-1, args[0].shape[-1])

        def replace(
            module: nn.Module,
            args: tuple[Tensor, ...],
            i: int = site.index,
            w: Any = w,
            shadow: Any = shadow,
            norms: Tensor = norms,
            k: int = k,
            more: int = more,
        ) -> tuple[Tensor]:
            how = (w.gate_bias, w.up_bias, w.gated, shadow.bits_gate, bits)
            guess = product(*projections(inputs[i], shadow.data, *how), w.activation)
            order = (guess.abs() * norms).sort(dim=1, descending=True, stable=True).indices
            a = args[0].reshape(guess.shape)
            out = torch.zeros_like(a)
            out.scatter_(1, order[:, :k], a.gather(1, order[:, :k]))
            middle = order[:, k : k + more]
            out.scatter_(1, middle, guess.gather(1, middle).to(a.dtype))
            out[:first] = a[:first]
            return (out.view(args[0].shape),)

        handles.append(site.entry.register_forward_pre_hook(remember))
        handles.append(site.linear(site.family.down).register_forward_pre_hook(replace))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def generate(model: Any, ids: Tensor, new: int = 12, **kwargs: Any) -> Tensor:
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **kwargs}
    out: Tensor = model.generate(input_ids=ids, **settings)
    return out


@pytest.mark.parametrize("decode_step", [True, False])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "llama-relu", "gemma", "opt"])
@pytest.mark.parametrize("shares", [(0.2, 0.4), (0.5, 0.5), (0.0, 0.6), (0.3, 0.0)])
def test_greedy_tokens_equal_the_oracle(
    tiny: Make, prompt: Make, family: str, shares: tuple[float, float], decode_step: bool
) -> None:
    exact, estimated = shares
    model, ids = tiny(family), prompt(12)
    want = ids[0]
    with torch.no_grad(), tiered(model, exact, estimated, 3, 12):
        for _ in range(12):
            logits = model(input_ids=want.unsqueeze(0), use_cache=False).logits[0, -1]
            want = torch.cat([want, logits.argmax().view(1)])
    method = QRIDA(exact=exact, estimated=estimated, bits=3)
    model = moyu_ext.patch(tiny(family), method, decode_step=decode_step)
    assert torch.equal(generate(model, ids)[0], want)
    report = moyu_ext.report(model)
    assert report.density == pytest.approx(round(exact * 96) / 96)
    assert report.estimated == pytest.approx(round(estimated * 96) / 96)
    assert ("estimated" in str(report).splitlines()[1]) == (estimated > 0)
    # Of an estimated neuron the row of W_down alone is read.
    dense = sum(site.weights().nbytes for site in find_mlps(moyu_ext.unpatch(model)))
    matrices = 2 if family == "opt" else 3
    share = report.density + report.estimated / matrices + report.added_bytes / dense
    assert report.share == pytest.approx(share)


def test_each_tier_matters(tiny: Make, prompt: Make) -> None:
    ids = prompt(12)
    texts = {
        tuple(generate(moyu_ext.patch(tiny("llama"), method), ids, 24)[0].tolist())
        for method in (
            QRIDA(exact=0.2, estimated=0.4, bits=2),
            QRIDA(0.2, bits=2),
            QRIDA(0.6, bits=2),
            QRIDA(exact=0.0, estimated=0.6, bits=2),
        )
    }
    assert len(texts) == 4


def test_scoring_equals_decoding(tiny: Make, prompt: Make) -> None:
    ids = prompt(24)
    model = moyu_ext.patch(tiny("llama"), QRIDA(exact=0.2, estimated=0.3))
    with torch.no_grad():
        with moyu_ext.scoring(model, 10):
            at_once = model(input_ids=ids).logits[0]
        out = model(input_ids=ids[:, :10], use_cache=True)
        steps = [out.logits[0]]
        for t in range(10, 24):
            out = model(input_ids=ids[:, t : t + 1], **passing(model, cache_of(out)))
            steps.append(out.logits[0])
    torch.testing.assert_close(torch.cat(steps), at_once, rtol=1e-4, atol=1e-4)


def test_rows_do_not_depend_on_each_other(tiny: Make) -> None:
    """A neuron may be exact for one row and estimated for the next."""
    torch.manual_seed(0)
    model = moyu_ext.patch(tiny("llama"), QRIDA(exact=0.2, estimated=0.3, guard="off"))
    mlp, x = model.model.layers[1].mlp, torch.randn(8, 1, 32)
    together = mlp.rule.apply(x.view(8, 32), mlp.weights)[0]
    for r in range(8):
        alone = mlp.rule.apply(x[r], mlp.weights)[0]
        torch.testing.assert_close(together[r : r + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
def test_the_operator_equals_the_reference(
    dtype: torch.dtype, packed: bool, activation: str, gated: bool
) -> None:
    torch.manual_seed(1)
    f, d = 96, 128
    matrices = [torch.randn(f, d) / d**0.5 for _ in range(3)]
    if packed:
        rows = [pack_matrix(m, Format(8, 64)) for m in matrices]
        matrices = [unpack_rows(r, d) for r in rows]
    else:
        rows = matrices = [m.to(dtype) for m in matrices]
    gate, up, down = (m.float() for m in matrices)
    weights = MlpWeights(gate if gated else None, up, down, None, None, None, activation)
    shadow = build_shadow(weights, 3, 3)
    norms = weights.column_norms()
    errors = 0.2 * torch.rand(2, f)
    for n in (1, 3, 8, 11):
        x = torch.randn(n, d).to(dtype)
        for errors_given, epsilon, k, more in (
            (None, None, 20, 35),
            (errors, torch.tensor([0.02]), 0, 0),
            (errors, torch.tensor([0.0]), 0, 0),
            (errors, torch.tensor([1e9]), 0, 0),
        ):
            how = (shadow.data, norms, 0.9 / norms, errors_given, epsilon, k, more)
            how = (*how, shadow.bits_gate, 3, activation)
            mine = (rows[0] if gated else None, *rows[1:])
            got, counts = ops.shadow_mlp(x, *mine, None, None, None, *how)
            plain = (weights.gate, up, down)
            want, right = shadow_mlp(x.float(), *plain, None, None, None, *how)
            # One rounding of the output, and x in 16 bits for packed rows.
            bound = (torch.finfo(dtype).eps + 2e-4) * want.abs().max()
            assert (got.float() - want).abs().max() <= bound
            assert torch.equal(counts, right)
            if errors_given is None:
                assert counts.tolist() == [[20] * n, [35] * n]
            elif epsilon is not None and epsilon == 0.0:
                assert counts.tolist() == [[f] * n, [0] * n]
            elif epsilon is not None and epsilon == 1e9:
                assert not counts.any() and not got.any()
            else:
                assert 0 < counts[0].sum() < n * f and counts[1].sum() > 0


def test_a_price_buys_what_saves_it() -> None:
    """Two neurons by hand, with d = 1 and a router without rounding."""
    errors, norms = torch.tensor([[0.0, 0.5], [0.0, 0.5]]), torch.tensor([1.0, 2.0])
    up = torch.tensor([[3.0, 0.1]])
    size, lost = expected_gains(None, up, "relu", norms, errors)
    # (3 c)^2 and nothing lost; (0.1 c)^2, and half of relu(0.6) - relu(-0.4), times c, squared.
    torch.testing.assert_close(size, torch.tensor([[9.0, 0.04]]))
    torch.testing.assert_close(lost, torch.tensor([[0.0, 0.36]]))
    for price, exact, estimated in (
        (1.0, [False, False], [True, False]),
        (0.21, [False, False], [True, False]),
        (0.19, [False, True], [True, False]),  # 0.04 + 0.36 for two rows
        (0.03, [False, True], [True, False]),
        (10.0, [False, False], [False, False]),
    ):
        found = tiers_by_price(size, lost, price, gated=False)
        assert [t.tolist() for t in found] == [[exact], [estimated]]
    gate = torch.tensor([[2.0, -1.0]])
    size, lost = expected_gains(gate, up, "relu", norms, errors)
    torch.testing.assert_close(size, torch.tensor([[36.0, 0.0]]))
    torch.testing.assert_close(lost, torch.tensor([[0.0, 0.0]]))


def test_not_a_number_is_exact() -> None:
    size, lost = torch.tensor([[float("nan"), 1.0]]), torch.tensor([[0.0, float("nan")]])
    exact, estimated = tiers_by_price(size, lost, 0.5, gated=True)
    assert exact.tolist() == [[True, True]] and not estimated.any()


def test_the_guard_measures_what_the_tiers_leave_out(tiny: Make) -> None:
    torch.manual_seed(2)
    method = QRIDA(exact=0.2, estimated=0.3, bits=2, guard_every=1)
    model = moyu_ext.patch(tiny("llama"), method)
    mlp, x = model.model.layers[0].mlp, torch.randn(1, 32)
    with torch.no_grad():
        out, _ = mlp.rule.apply(x, mlp.weights)
        want = mlp.original(x)
    cett = float((out - want).norm() / want.norm())
    assert moyu_ext.report(model).cett == pytest.approx(cett, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exact": 0.5, "density": 0.5}, "one thing"),
        ({"estimated": 0.4}, "expected both"),
        ({"exact": 0.5, "estimated": -0.1}, r"estimated is -0.1.*\[0, 1\]"),
        ({"exact": 0.5, "estimated": float("nan")}, r"\[0, 1\]"),
        ({"exact": 0.5, "estimated": "some"}, r"\[0, 1\]"),
        ({"exact": 0.5, "estimated": 0.6}, "at most 1 together"),
        ({"exact": [0.5, 0.9], "estimated": [0.5, 0.2]}, "at most 1 together"),
        ({"exact": 0.0, "estimated": 0.0}, r"\(0, 1\]"),
        ({"exact": 0.0}, r"\(0, 1\]"),
        ({"thresholds": 0.1, "estimated": 0.2}, "tiers go by shares"),
        ({"price": -1.0}, "price is -1.0; expected nats >= 0"),
        ({"price": [0.1, float("nan")]}, "expected nats >= 0"),
        ({"price": 0.1, "density": 0.5}, "price and density"),
        ({"price": 0.1}, "shadows that know what errors cost"),
    ],
)
def test_bad_tiers_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        QRIDA(**arguments)


def test_shares_per_layer(tiny: Make, prompt: Make) -> None:
    method = QRIDA(exact=[0.5, 1.0, 0.25], estimated=[0.25, 0.0, 0.5])
    assert method.bits_of(0) == (3, 3) and QRIDA(0.5).bits_of(0) == (2, 2)
    assert "exact=<3 layers, mean 0.583>, estimated=<3 layers, mean 0.250>" in repr(method)
    assert "exact=0.2, estimated=0.4" in repr(QRIDA(exact=0.2, estimated=0.4))
    model = moyu_ext.patch(tiny("llama"), method)
    generate(model, prompt(9))
    layers = moyu_ext.report(model).layers
    assert [layer.density for layer in layers] == [0.5, 1.0, 0.25]
    assert [layer.estimated for layer in layers] == [0.25, 0.0, 0.5]
    with pytest.raises(ConfigurationError, match="estimated has 2 entries"):
        moyu_ext.patch(tiny("llama"), QRIDA(exact=0.2, estimated=[0.4, 0.4]))
