"""CETT (eq. 14) in closed form, and the search against a walk over every threshold."""

import math
from collections.abc import Callable

import pytest
import torch
from moyu_ext.calibration.cett import TOLERANCE, LayerTokens, cett, largest_epsilon
from moyu_ext.errors import ConfigurationError
from moyu_ext.models.weights import MlpWeights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def diagonal(column_norms: list[float], down_bias: Tensor | None = None) -> MlpWeights:
    """An ungated ReLU MLP with a(x) = x for x >= 0 and n_i(x) = x_i c_i e_i."""
    f = len(column_norms)
    down_t = torch.diag(torch.tensor(column_norms))
    return MlpWeights(None, torch.eye(f), down_t, None, None, down_bias, "relu")


def random_weights(d: int, f: int, seed: int = 0) -> MlpWeights:
    g = torch.Generator().manual_seed(seed)
    gate, up, down_t = (torch.randn(f, d, generator=g) / math.sqrt(d) for _ in range(3))
    biases = (torch.randn(n, generator=g) * 0.1 for n in (f, f, d))
    return MlpWeights(gate, up, down_t, *biases, "silu")


def neurons(x: Tensor, w: MlpWeights) -> tuple[Tensor, Tensor]:
    """Contributions [tokens, f, d] and neuron norms [tokens, f], straight from eq. 12."""
    assert w.gate is not None and w.gate_bias is not None and w.up_bias is not None
    gate = torch.nn.functional.silu(x @ w.gate.T + w.gate_bias)
    n = (gate * (x @ w.up.T + w.up_bias)).unsqueeze(-1) * w.down_t
    return n, n.norm(dim=-1)


def test_cett_in_closed_form() -> None:
    a = torch.tensor([[3.0, 4.0, 12.0]])
    down_t = torch.eye(3)
    dropped = torch.tensor([[True, True, False]])
    assert cett(a, dropped, down_t).tolist() == pytest.approx([5 / 13])
    assert cett(a, torch.tensor([[True, True, True]]), down_t).tolist() == [1.0]
    assert cett(a, torch.tensor([[False, False, False]]), down_t).tolist() == [0.0]
    # Contributions add as vectors: these two cancel.
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])
    assert cett(torch.ones(1, 3), dropped, opposite).tolist() == [0.0]


def test_cett_of_silent_tokens_is_zero() -> None:
    assert cett(torch.zeros(2, 3), torch.ones(2, 3) > 0, torch.eye(3)).tolist() == [0.0, 0.0]
    # Only 0 / 0 is 0: an error on an output that cancels to zero is no small error.
    cancel = torch.tensor([[1.0], [-1.0]])
    assert cett(torch.ones(1, 2), torch.tensor([[True, False]]), cancel).tolist() == [math.inf]


def test_measure_in_closed_form() -> None:
    # Neuron norms 3, 4, 12 and 6, 8, 0; the output bias stays outside.
    tokens = LayerTokens(
        torch.tensor([[3.0, 2.0, 12.0], [6.0, 4.0, 0.0]]),
        diagonal([1.0, 2.0, 1.0], down_bias=torch.full((3,), 100.0)),
    )
    ratios, density = tokens.measure([0.0, 3.0, 4.0, 4.5, 7.0, 100.0])
    expected = [
        [0, 0, 3 / 13, 5 / 13, 5 / 13, 1],
        [0, 0, 0, 0, 0.6, 1],
    ]
    assert torch.allclose(ratios.T, torch.tensor(expected))
    # A norm equal to epsilon stays; a zero falls below any epsilon above zero.
    assert density.tolist() == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 0])
    # Norms 3, 4, 12 and 6, 8, 0 at 7: what is left is 12 and 8, plus the bias.
    kept = torch.tensor([[0.0, 0.0, 12.0], [0.0, 8.0, 0.0]]) + 100
    assert torch.equal(tokens.output(7.0), kept)


@pytest.mark.parametrize("tokens", [1, 255, 256, 700])
def test_measure_does_not_depend_on_blocks(tokens: int) -> None:
    w = random_weights(8, 24)
    x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1))
    n, norms = neurons(x, w)
    dropped = norms < 0.3
    expected = (n * dropped.unsqueeze(-1)).sum(1).norm(dim=-1) / n.sum(1).norm(dim=-1)
    layer = LayerTokens(x, w)
    ratios, density = layer.measure([0.3])
    assert layer.measured == tokens
    assert torch.allclose(ratios[0], expected, rtol=1e-4, atol=1e-6)
    assert density.item() == pytest.approx(1 - dropped.double().mean().item(), abs=1e-7)
    output = (n * ~dropped.unsqueeze(-1)).sum(1) + w.down_bias
    assert torch.allclose(layer.output(0.3), output, rtol=1e-4, atol=1e-5)


def test_gate_score_ranks_by_gate_and_measures_contributions() -> None:
    w = random_weights(8, 24)
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    n, _ = neurons(x, w)
    assert w.gate is not None
    dropped = torch.nn.functional.silu(x @ w.gate.T + w.gate_bias).abs() < 0.2
    expected = (n * dropped.unsqueeze(-1)).sum(1).norm(dim=-1) / n.sum(1).norm(dim=-1)
    ratios, density = LayerTokens(x, w, "gate").measure([0.2])
    assert torch.allclose(ratios[0], expected, rtol=1e-4, atol=1e-6)
    assert density.item() == pytest.approx(1 - dropped.double().mean().item(), abs=1e-7)


def test_continuation_chooses_on_the_first_half_of_each_text() -> None:
    w = random_weights(8, 24)
    lengths = [7, 600]
    x = torch.randn(sum(lengths), 8, generator=torch.Generator().manual_seed(1))
    n, norms = neurons(x, w)
    expected, kept, start = [], [], 0
    for length in lengths:
        middle, end = start + length // 2, start + length
        statistic = norms[start:middle].square().mean(0).sqrt()
        dropped = statistic < 0.3
        assert 0 < dropped.sum() < 24
        part = (n[middle:end] * dropped.view(1, -1, 1)).sum(1)
        expected.append(part.norm(dim=-1) / n[middle:end].sum(1).norm(dim=-1))
        kept += [n[start:middle].sum(1), n[middle:end].sum(1) - part]
        start = end
    layer = LayerTokens(x, w, lengths=lengths)
    assert layer.measured == 304
    assert torch.allclose(layer.measure([0.3])[0][0], torch.cat(expected), rtol=1e-4, atol=1e-6)
    output = torch.cat(kept) + w.down_bias
    assert torch.allclose(layer.output(0.3), output, rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow_with_tokens_times_f() -> None:
    sizes: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in [out] if isinstance(t, Tensor))
            return out

    d, f, tokens = 8, 512, 4096
    with Largest():
        layer = LayerTokens(torch.randn(tokens, d), random_weights(d, f))
        largest_epsilon(mean_of(layer), 0.2, layer.quantiles(64))
        layer.output(0.1)
    assert max(sizes) <= 256 * f < tokens * f / 8


def mean_of(layer: LayerTokens) -> Callable[[list[float]], list[float]]:
    return lambda epsilons: layer.measure(epsilons)[0].double().mean(1).tolist()


def staircase(layer: LayerTokens, norms: Tensor) -> tuple[list[float], list[float]]:
    """Every threshold at which the mean can change, and the mean there."""
    steps = norms.flatten().unique().tolist()
    return steps, mean_of(layer)(steps)


@pytest.mark.parametrize("target", [0.01, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_search_finds_the_largest_step_that_meets_the_target(target: float, tokens: int) -> None:
    w = random_weights(6, 16, seed=tokens)
    x = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(tokens))
    layer = LayerTokens(x, w)
    steps, means = staircase(layer, neurons(x, w)[1])
    best = max((s for s, mean in zip(steps, means, strict=True) if mean <= target), default=0.0)
    best_mean = mean_of(layer)([best])[0]

    found = largest_epsilon(mean_of(layer), target, layer.quantiles(64))
    mean = mean_of(layer)([found])[0]
    assert mean <= target
    assert best_mean - mean <= TOLERANCE
    above = [m for s, m in zip(steps, means, strict=True) if s > max(found, best)]
    assert not above or min(above) > target


def test_search_takes_the_last_crossing() -> None:
    # Contributions 1, -1.1, 10 on one axis: CETT is 0, then 0.101, then 0.0101, then 1.
    w = MlpWeights(
        None, torch.eye(3), torch.tensor([[1.0], [-1.1], [10.0]]), None, None, None, "relu"
    )
    layer = LayerTokens(torch.ones(1, 3), w)
    assert mean_of(layer)([1.0, 1.1, 10.0, 11.0]) == pytest.approx([0, 1 / 9.9, 0.1 / 9.9, 1])
    assert largest_epsilon(mean_of(layer), 0.05, layer.quantiles(64)) == 10.0


def test_search_closes_in_on_a_single_step() -> None:
    passes = 0

    def step(epsilons: list[float]) -> list[float]:
        nonlocal passes
        passes += 1
        return [0.9 if epsilon > 0.7 else 0.0 for epsilon in epsilons]

    found = largest_epsilon(step, 0.01, torch.linspace(0.01, 1, 64))
    assert found == torch.tensor(0.7).item()  # the last float32 that is not above 0.7
    assert passes < 30


def test_search_at_a_target_of_zero_or_out_of_reach() -> None:
    layer = LayerTokens(torch.tensor([[3.0, 4.0]]), diagonal([1.0, 1.0]))
    assert largest_epsilon(mean_of(layer), 0.0, layer.quantiles(64)) == 0.0
    # The smaller neuron costs 0.6; up to its norm nothing is dropped.
    found = largest_epsilon(mean_of(layer), 0.2, layer.quantiles(64))
    assert 0 <= found <= 3.0 and layer.measure([found])[1].item() == 1.0
    # At 0.6 exactly it may go, and the threshold reaches the larger one.
    reached = largest_epsilon(mean_of(layer), 0.6 + 1e-6, layer.quantiles(64))
    assert reached == 4.0


def test_search_may_drop_a_layer_that_is_silent_on_most_tokens() -> None:
    x = torch.zeros(10, 2)
    x[0] = torch.tensor([3.0, 4.0])
    layer = LayerTokens(x, diagonal([1.0, 1.0]))
    found = largest_epsilon(mean_of(layer), 0.2, layer.quantiles(64))
    assert layer.measure([found])[1].item() == 0.0
    assert 4.0 < found < 4.001
    silent = LayerTokens(torch.zeros(3, 2), diagonal([1.0, 1.0]))
    found = largest_epsilon(mean_of(silent), 0.2, silent.quantiles(64))
    assert 0 < found < 1e-30


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_outputs_that_are_not_finite_raise(bad: float) -> None:
    layer = LayerTokens(torch.tensor([[1.0, bad]]), diagonal([1.0, 1.0]))
    with pytest.raises(ConfigurationError, match="not finite"):
        layer.measure([0.1])


def test_half_precision_inputs_are_measured_in_float32() -> None:
    w = random_weights(8, 24)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    low = MlpWeights(
        *(None if t is None else t.bfloat16() for t in (w.gate, w.up, w.down_t)),
        *(None if t is None else t.bfloat16() for t in (w.gate_bias, w.up_bias, w.down_bias)),
        "silu",
    )
    exact = MlpWeights(
        *(None if t is None else t.bfloat16().float() for t in (w.gate, w.up, w.down_t)),
        *(None if t is None else t.bfloat16().float() for t in (w.gate_bias, w.up_bias)),
        None if w.down_bias is None else w.down_bias.bfloat16().float(),
        "silu",
    )
    ours, reference = LayerTokens(x, low), LayerTokens(x.float(), exact)
    assert torch.equal(ours.measure([0.3])[0], reference.measure([0.3])[0])
    assert ours.output(0.3).dtype == torch.bfloat16
