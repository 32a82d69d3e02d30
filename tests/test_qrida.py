"""QRIDA against an oracle: an unpatched model whose neurons are masked by the estimate."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moyu_ext.errors import ArtifactError, ConfigurationError, PatchStateError
from moyu_ext.methods import METHODS
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.models.families import find_mlps
from moyu_ext.shadow.build import build_shadow
from moyu_ext.shadow.reference import shadow_scores
from torch import Tensor, nn

import moyu_ext
from moyu_ext import QRIDA, SRIDA, Shadows, Thresholds

Make = Callable[..., Any]
Keep = Callable[[Tensor, int], Tensor]


def top(density: float) -> Keep:
    def keep(scores: Tensor, layer: int) -> Tensor:
        k = max(1, round(density * scores.shape[1]))
        order = scores.sort(dim=1, descending=True, stable=True).indices
        return torch.zeros_like(scores).scatter_(1, order[:, :k], 1.0)

    return keep


def above(epsilon: list[float]) -> Keep:
    return lambda scores, layer: (scores >= epsilon[layer]).float()


@contextmanager
def masked(model: nn.Module, keep: Keep, bits: tuple[int, int], first: int) -> Iterator[None]:
    """Positions from `first` on of a single sequence use only what the estimate keeps."""
    handles = []
    inputs: dict[int, Tensor] = {}
    for site in find_mlps(model):
        w = site.weights()
        shadow = build_shadow(w, *bits)
        norms = w.down_t.detach().float().norm(dim=1)

        def remember(module: nn.Module, args: tuple[Tensor, ...], i: int = site.index) -> None:
            inputs[i] = args[0].detach().reshape(-1, args[0].shape[-1])

        def zero(
            module: nn.Module,
            args: tuple[Tensor, ...],
            i: int = site.index,
            w: Any = w,
            shadow: Any = shadow,
            norms: Tensor = norms,
        ) -> tuple[Tensor]:
            scores = shadow_scores(
                inputs[i], shadow.data, norms, w.gate_bias, w.up_bias, w.gated, *bits, w.activation
            )
            mask = keep(scores, i)
            mask[:first] = 1
            return (args[0] * mask.view(args[0].shape).to(args[0].dtype),)

        handles.append(site.entry.register_forward_pre_hook(remember))
        handles.append(site.linear(site.family.down).register_forward_pre_hook(zero))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def oracle_greedy(
    model: nn.Module, ids: Tensor, new: int, keep: Keep, bits: tuple[int, int]
) -> Tensor:
    """Greedy continuation of ids [P] without a cache; the prompt is dense."""
    prompt = len(ids)
    with masked(model, keep, bits, prompt):
        for _ in range(new):
            logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, -1]
            ids = torch.cat([ids, logits.argmax().view(1)])
    return ids


@torch.no_grad()
def estimates(model: nn.Module, ids: Tensor, bits: tuple[int, int]) -> list[Tensor]:
    """n^ of each layer over ids [S], dense forward."""
    found: list[Tensor] = []

    def keep(scores: Tensor, layer: int) -> Tensor:
        found.append(scores)
        return torch.ones_like(scores)

    with masked(model, keep, bits, 0):
        model(input_ids=ids.unsqueeze(0), use_cache=False)
    return found


def generate(model: Any, ids: Tensor, new: int = 12, **kwargs: Any) -> Tensor:
    settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, **kwargs}
    out: Tensor = model.generate(input_ids=ids, **settings)
    return out


@pytest.mark.parametrize(
    "family", ["llama", "llama-bias", "llama-relu", "qwen2", "qwen3", "gemma", "mistral", "opt"]
)
def test_greedy_tokens_equal_the_oracle(tiny: Make, prompt: Make, family: str) -> None:
    ids = prompt(12)
    bits = (2, 2)
    want = oracle_greedy(tiny(family), ids[0], 12, top(0.4), bits)
    model = moyu_ext.patch(tiny(family), QRIDA(0.4, bits=2))
    assert torch.equal(generate(model, ids)[0], want)
    assert moyu_ext.report(model).density == pytest.approx(round(0.4 * 96) / 96)

    epsilon = [s.quantile(0.6).item() for s in estimates(tiny(family), ids[0], bits)]
    want = oracle_greedy(tiny(family), ids[0], 12, above(epsilon), bits)
    model = moyu_ext.patch(tiny(family), QRIDA(thresholds=epsilon, bits=2))
    assert torch.equal(generate(model, ids)[0], want)
    assert 0.1 < moyu_ext.report(model).density < 0.9


@pytest.mark.parametrize("bits", [1, 3, 4, (2, 1), (1, 4), (3, 2)])
def test_every_number_of_bits(tiny: Make, prompt: Make, bits: Any) -> None:
    ids = prompt(12)
    pair = bits if isinstance(bits, tuple) else (bits, bits)
    want = oracle_greedy(tiny("llama"), ids[0], 10, top(0.3), pair)
    model = moyu_ext.patch(tiny("llama"), QRIDA(0.3, bits=bits))
    assert torch.equal(generate(model, ids, 10)[0], want)


def test_the_choice_matters(tiny: Make, prompt: Make) -> None:
    """Otherwise the tests above would pass with any mask."""
    ids = prompt(12)
    dense = generate(tiny("llama"), ids, 24)
    texts = {tuple(dense[0].tolist())}
    for density in (0.05, 0.2, 0.4):
        texts.add(tuple(oracle_greedy(tiny("llama"), ids[0], 24, top(density), (2, 2)).tolist()))
    assert len(texts) == 4


def test_rows_do_not_depend_on_each_other(tiny: Make, prompt: Make) -> None:
    lengths = [5, 12, 9]
    rows = [prompt(n, seed=n)[0] for n in lengths]
    padded = torch.stack([F.pad(row, (12 - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (12 - len(row), 0)) for row in rows])
    model = moyu_ext.patch(tiny("llama"), QRIDA(0.4))
    got = generate(model, padded, attention_mask=mask)
    for row, out in zip(rows, got, strict=True):
        want = oracle_greedy(tiny("llama"), row, 12, top(0.4), (2, 2))
        assert torch.equal(out[12:], want[len(row) :])


def test_beams_static_cache_and_chunks_run(tiny: Make, prompt: Make) -> None:
    ids = prompt(12)
    model = moyu_ext.patch(tiny("llama"), QRIDA(0.4))
    greedy = generate(model, ids)
    assert torch.equal(generate(model, ids, cache_implementation="static"), greedy)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=2), greedy)
    assert generate(model, ids, num_beams=3).shape == greedy.shape


def test_scoring_equals_decoding(tiny: Make, prompt: Make) -> None:
    ids = prompt(24)
    model = moyu_ext.patch(tiny("llama"), QRIDA(0.3))
    with torch.no_grad():
        with moyu_ext.scoring(model, 10):
            at_once = model(input_ids=ids).logits[0]
        out = model(input_ids=ids[:, :10], use_cache=True)
        steps = [out.logits[0]]
        for t in range(10, 24):
            out = model(input_ids=ids[:, t : t + 1], **passing(model, cache_of(out)))
            steps.append(out.logits[0])
    torch.testing.assert_close(torch.cat(steps), at_once, rtol=1e-4, atol=1e-4)


def test_prefill_obeys_where_asked(tiny: Make, prompt: Make) -> None:
    ids = prompt(20)
    with torch.no_grad():
        with masked(model := tiny("llama"), top(0.3), (2, 2), 0):
            want = model(input_ids=ids).logits
        dense = tiny("llama")(input_ids=ids).logits
        got = moyu_ext.patch(tiny("llama"), QRIDA(0.3, prefill=True))(input_ids=ids).logits
        prompt_dense = moyu_ext.patch(tiny("llama"), QRIDA(0.3))(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prompt_dense, dense, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(want, dense, rtol=1e-2)


@pytest.mark.parametrize("method", [QRIDA(1.0, prefill=True), QRIDA(thresholds=0.0, prefill=True)])
def test_everything_active_is_the_dense_model(tiny: Make, prompt: Make, method: QRIDA) -> None:
    ids = prompt(4)
    with torch.no_grad():
        want = tiny("llama")(input_ids=ids).logits
        model = moyu_ext.patch(tiny("llama"), method)
        torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
    assert moyu_ext.report(model).density == 1


@pytest.mark.parametrize("family", ["llama-bias", "opt"])
def test_nothing_active_leaves_the_output_bias(tiny: Make, prompt: Make, family: str) -> None:
    ids = prompt(4)
    plain = tiny(family)
    for site in find_mlps(plain):
        nn.init.zeros_(site.linear(site.family.down).weight)
    with torch.no_grad():
        want = plain(input_ids=ids).logits
        model = moyu_ext.patch(tiny(family), QRIDA(thresholds=1e30, prefill=True))
        torch.testing.assert_close(model(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
    assert moyu_ext.report(model).density == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny: Make, prompt: Make, dtype: torch.dtype) -> None:
    ids = prompt(6)
    with torch.no_grad():
        with masked(model := tiny("llama", dtype=dtype), top(0.5), (2, 2), 0):
            want = model(input_ids=ids).logits.float()
        patched = moyu_ext.patch(tiny("llama", dtype=dtype), QRIDA(0.5))
        got = patched(input_ids=ids).logits.float()
        exact = moyu_ext.patch(tiny("llama"), QRIDA(0.5))(input_ids=ids).logits
    # As near to float32 as plain PyTorch in this dtype is.
    assert (got - exact).norm() <= 2 * (want - exact).norm() + 1e-3 * exact.norm()


def test_density_and_bits_per_layer(tiny: Make, prompt: Make) -> None:
    density, bits = [0.2, 1.0, 0.5], [(2, 2), 4, (1, 3)]
    model = moyu_ext.patch(tiny("llama"), QRIDA(density, bits=bits))
    generate(model, prompt(12))
    realised = [layer.density for layer in moyu_ext.report(model).layers]
    assert realised == pytest.approx([round(0.2 * 96) / 96, 1.0, 0.5])


def test_loading_other_weights_renews_the_shadow(tiny: Make, prompt: Make) -> None:
    ids = prompt(12)
    other = tiny("llama", seed=1)
    model = moyu_ext.patch(tiny("llama"), QRIDA(0.4))
    generate(model, ids)
    model.load_state_dict(other.state_dict())
    want = oracle_greedy(other, ids[0], 12, top(0.4), (2, 2))
    assert torch.equal(generate(model, ids)[0], want)


def test_unpatch_gives_the_model_back(tiny: Make, prompt: Make) -> None:
    model, ids = tiny("llama"), prompt(12)
    before = generate(model, ids)
    moyu_ext.patch(model, QRIDA(0.1))
    assert not torch.equal(generate(model, ids), before)
    assert torch.equal(generate(moyu_ext.unpatch(model), ids), before)


# --- shadows from a file ---


def test_saved_shadows_serve(tiny: Make, prompt: Make, tmp_path: Path) -> None:
    ids = prompt(12)
    Shadows.build(tiny("llama"), 3).save_pretrained(tmp_path)
    shadows = Shadows.from_pretrained(tmp_path)
    model = moyu_ext.patch(tiny("llama"), QRIDA(0.4, shadows=shadows))
    for mlp, shadow in zip(model.model.layers, shadows.layers, strict=True):
        assert mlp.mlp.rule.router.shadow.data.data_ptr() == shadow.data.data_ptr()  # no copy
    want = oracle_greedy(tiny("llama"), ids[0], 12, top(0.4), (3, 3))
    assert torch.equal(generate(model, ids)[0], want)


def test_shadows_of_another_model_are_refused(tiny: Make) -> None:
    shadows = Shadows.build(tiny("llama", seed=1), 2)
    model = tiny("llama")
    with pytest.raises(ArtifactError, match="fingerprint"):
        moyu_ext.patch(model, QRIDA(0.4, shadows=shadows))
    assert not moyu_ext.patching.patch.is_patched(model)
    right = moyu_ext.patch(model, QRIDA(0.4, shadows=Shadows.build(model, 2)))
    right.load_state_dict(tiny("llama", seed=1).state_dict())
    with pytest.raises(ArtifactError, match="layer 0"):
        right(input_ids=torch.tensor([[5]]))


# --- thresholds ---


@pytest.fixture
def texts() -> list[str]:
    return ["once upon a time there was a neuron that did not fire " * 4] * 3


class Letters:
    """A tokenizer for the tiny models' vocabulary."""

    def encode(self, text: str) -> list[int]:
        return [3 + ord(c) % 98 for c in text]


@pytest.mark.parametrize("family", ["llama", "opt", "llama-bias"])
@pytest.mark.parametrize("bits", [2, (1, 3)])
def test_calibration_meets_the_true_cett(
    tiny: Make, texts: list[str], family: str, bits: Any
) -> None:
    model = tiny(family)
    method = QRIDA(bits=bits)
    thresholds = moyu_ext.calibrate(
        model, Letters(), texts, cett=0.2, method=method, sequential=False, progress=False
    )
    pair = bits if isinstance(bits, tuple) else (bits, bits)
    assert thresholds.score == "shadow" and thresholds.method == "qrida"
    assert thresholds.bits == (pair,) * 3
    ids = torch.tensor(Letters().encode(texts[0]))
    epsilon = thresholds.epsilon.tolist()
    ratios: list[float] = []
    for site, scores in zip(find_mlps(model), estimates(model, ids, pair), strict=True):
        w = site.weights()
        inputs: list[Tensor] = []
        handle = site.entry.register_forward_pre_hook(
            lambda module, args, inputs=inputs: inputs.append(args[0].detach())
        )
        with torch.no_grad():
            model(input_ids=ids.unsqueeze(0))
        handle.remove()
        x = inputs[0].reshape(-1, w.d)
        a = F.linear(x, w.up, w.up_bias)
        act = {"silu": F.silu, "relu": F.relu}[w.activation]
        a = act(a) if w.gate is None else a * act(F.linear(x, w.gate, w.gate_bias))
        dropped = torch.where(scores < epsilon[site.index], a, torch.zeros(())) @ w.down_t
        ratios.append((dropped.norm(dim=1) / (a @ w.down_t).norm(dim=1)).mean().item())
    assert ratios == pytest.approx([0.2] * 3, abs=2e-3)
    assert [layer.cett for layer in thresholds.layers] == pytest.approx(ratios, abs=1e-4)
    assert all(0 < layer.density < 1 for layer in thresholds.layers)


def test_calibrated_thresholds_patch_save_and_load(
    tiny: Make, prompt: Make, texts: list[str], tmp_path: Path
) -> None:
    model, ids = tiny("llama"), prompt(12)
    thresholds = moyu_ext.calibrate(
        model, Letters(), texts, cett=0.3, method=QRIDA(bits=3), progress=False
    )
    thresholds.save_pretrained(tmp_path)
    back = Thresholds.from_pretrained(tmp_path)
    assert back == thresholds
    want = oracle_greedy(tiny("llama"), ids[0], 12, above(back.epsilon.tolist()), (3, 3))
    for method in (QRIDA(back), QRIDA(thresholds=back, bits=3)):
        assert method.bits_of(2) == (3, 3)
        moyu_ext.patch(model, method)
        assert torch.equal(generate(model, ids)[0], want)
        moyu_ext.unpatch(model)
    with pytest.raises(ConfigurationError, match=r"bits 2 .*\(3, 3\)"):
        QRIDA(back, bits=2)
    with pytest.raises(ConfigurationError, match="score='shadow'"):
        moyu_ext.patch(model, moyu_ext.TDA(back))
    product = moyu_ext.calibrate(model, Letters(), texts, cett=0.3, progress=False)
    with pytest.raises(ConfigurationError, match="score='product'"):
        moyu_ext.patch(model, QRIDA(product))
    with pytest.raises(ArtifactError, match="fingerprint"):
        moyu_ext.patch(tiny("llama", seed=1), QRIDA(back))


# --- what it costs ---


@pytest.mark.parametrize(
    ("method", "known", "added"),
    [
        (QRIDA(0.25), 0, 192),  # 2 bits: two blocks of 64 bytes and the scales, whole cache lines
        (QRIDA([0.25, 1.0, 0.25]), 0, 128),  # a dense layer has no shadow
        (SRIDA(0.25), 0, 0),
        (moyu_ext.TDA(0.5, score="gate"), 1, 0),
        (moyu_ext.TDA(0.5), 2, 0),
        (moyu_ext.Dense(), 0, 0),
    ],
)
def test_report_tells_memory_and_bytes_read(
    tiny: Make, prompt: Make, method: Any, known: int, added: int
) -> None:
    model = moyu_ext.patch(tiny("llama"), method)
    generate(model, prompt(12))
    report = moyu_ext.report(model)
    assert report.added_bytes == 3 * 96 * added
    dense = 3 * 3 * 96 * 32 * 4  # layers, matrices, f, d, float32
    want = (known + (3 - known) * report.density) / 3 + report.added_bytes / dense
    assert report.share == pytest.approx(want)
    assert ("MiB added" in str(report)) == (want < 1)
    assert f"{1 / want:.2f}x" in report.cost()


# --- configuration ---


def test_registry_and_repr() -> None:
    assert METHODS["qrida"] is QRIDA
    assert QRIDA().density == 0.33 and QRIDA().bits_of(0) == (2, 2)
    assert "density=0.33" in repr(QRIDA()) and "bits=2" in repr(QRIDA())
    assert QRIDA().plan == "given" and QRIDA().level == "token"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "1, 2, 3 or 4"),
        ({"bits": 5}, "1, 2, 3 or 4"),
        ({"bits": 2.5}, "1, 2, 3 or 4"),
        ({"bits": (2, 9)}, "1, 2, 3 or 4"),
        ({"bits": (2, 2, 2)}, "pair"),
        ({"bits": [(2, 2), 7]}, "1, 2, 3 or 4"),
        ({"density": 0}, r"\(0, 1\]"),
        ({"density": 1.5}, r"\(0, 1\]"),
        ({"density": "half"}, r"\(0, 1\]"),
        ({"density": [0.5, 2.0]}, r"\(0, 1\]"),
        ({"density": 0.5, "thresholds": 0.1}, "one of them"),
        ({"thresholds": float("nan")}, "epsilon of layer 0"),
        ({"thresholds": -1.0}, "epsilon of layer 0"),
        ({"guard": "yes"}, "off, watch, hold"),
        ({"guard": "hold"}, "calibrated thresholds"),
        ({"guard": "hold", "thresholds": 0.1}, "calibrated thresholds"),
        ({"guard_every": 0}, ">= 1"),
    ],
)
def test_bad_configurations_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        QRIDA(**arguments)


@pytest.mark.parametrize(
    "method",
    [QRIDA([0.5, 0.5]), QRIDA(bits=[2, 2]), QRIDA(thresholds=[0.1, 0.1]), QRIDA(bits=[2] * 4)],
)
def test_wrong_number_of_layers_is_refused(tiny: Make, method: QRIDA) -> None:
    model = tiny("llama")
    with pytest.raises(ConfigurationError, match=r"3 MLPs"):
        moyu_ext.patch(model, method)
    moyu_ext.patch(model, SRIDA(0.5))  # it is as it was


def test_training_mode_is_refused(tiny: Make) -> None:
    with pytest.raises(PatchStateError, match="training"):
        moyu_ext.patch(tiny("llama").train(), QRIDA())


@pytest.mark.slow
def test_compiles_as_one_graph(tiny: Make, prompt: Make) -> None:
    model = moyu_ext.patch(tiny("llama"), QRIDA(0.4))
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 1, 32)
    with torch.no_grad():
        want = mlp(x)
        compiled = torch.compile(mlp, fullgraph=True)
        torch.testing.assert_close(compiled(x), want)
        before = int(mlp.tokens)
        compiled(x)
        assert int(mlp.tokens) == before + 1
