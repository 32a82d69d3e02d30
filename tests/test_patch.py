"""patch, unpatch, report, scoring: what they change, what they leave alone, what they refuse."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import torch
from moyu_ext.errors import (
    UnsupportedModelError,
)
from moyu_ext.methods import QRIDA, SRIDA, STDA, TDA, Dense, Method
from moyu_ext.models.cache import passing
from moyu_ext.patching.patch import is_patched, patch, report, unpatch
from moyu_ext.patching.sequence_state import ATTRIBUTE
from moyu_ext.patching.sparse_mlp import SparseMLP
from snapshot import snapshot
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

Make = Callable[..., PreTrainedModel]
Prompt = Callable[..., Tensor]
BOTH = pytest.mark.parametrize("family", ["llama-bias", "opt"])
EACH = pytest.mark.parametrize(
    "method", [Dense(), TDA(0.1), TDA(0.1, score="gate"), STDA(0.1), SRIDA(0.5)], ids=repr
)


def mlp_of(model: PreTrainedModel, layer: int = 0) -> SparseMLP:
    decoder = getattr(model.model, "decoder", model.model)
    one = decoder.layers[layer]
    return one.fc1 if hasattr(one, "fc1") else one.mlp


@BOTH
@EACH
def test_unpatch_gives_the_same_modules_and_bits(
    method: Method, family: str, tiny: Make, prompt: Prompt
) -> None:
    model, ids = tiny(family), prompt(12)
    before = snapshot(model)
    want = model.generate(ids, max_new_tokens=6, do_sample=False)
    for _ in range(2):
        assert patch(model, method) is model
        assert is_patched(model) and isinstance(mlp_of(model), SparseMLP)
        model.generate(ids, max_new_tokens=6, do_sample=False)
        assert unpatch(model) is model
        assert not is_patched(model)
        assert snapshot(model) == before
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), want)


@BOTH
def test_the_default_changes_no_answer(family: str, tiny: Make, prompt: Prompt) -> None:
    ids = prompt(12)
    want = tiny(family).generate(ids, max_new_tokens=12, do_sample=False)
    model = patch(tiny(family))
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), want)
    shown = report(model)
    assert shown.method == "Lossless()" and shown.share <= 1
    # Of OPT's ReLU the exact zeros are left out.
    assert (shown.density < 0.7) == (family == "opt") and (shown.density == 1) != (family == "opt")


@BOTH
@EACH
def test_state_dict_is_the_models(method: Method, family: str, tiny: Make) -> None:
    model = tiny(family)
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    patch(model, method)
    got = model.state_dict()
    assert list(got) == list(want)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert sum(1 for _ in model.parameters()) == len(names)


@BOTH
def test_save_pretrained(family: str, tiny: Make, prompt: Prompt, tmp_path: Path) -> None:
    dense, model = tiny(family), patch(tiny(family), STDA(0.1))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(dense)
    assert all(torch.equal(a, dense.state_dict()[n]) for n, a in loaded.state_dict().items())
    assert torch.equal(loaded(prompt(9)).logits, dense(prompt(9)).logits)


def torch_round_trip(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


DUPLICATES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "torch.save": torch_round_trip,
}


@BOTH
@EACH
@pytest.mark.parametrize("way", DUPLICATES)
def test_copies_are_the_unpatched_model(
    way: str, method: Method, family: str, tiny: Make, prompt: Prompt
) -> None:
    dense, model, ids = tiny(family), tiny(family), prompt(12)
    calls: list[int] = []
    if way == "deepcopy":  # a hook of the user's survives; pickle could not take this one
        model.register_forward_hook(lambda *_: calls.append(1))
    patch(model, method)
    before = snapshot(model)
    twin = DUPLICATES[way](model)
    assert snapshot(model) == before, "the copy changed the original"
    assert [type(m) for m in twin.modules()] == [type(m) for m in dense.modules()]
    assert all(p.is_contiguous() for p in twin.parameters())
    assert not is_patched(twin)
    assert torch.equal(
        twin.generate(ids, max_new_tokens=6, do_sample=False),
        dense.generate(ids, max_new_tokens=6, do_sample=False),
    )
    assert bool(calls) == (way == "deepcopy")
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert not shared
    patch(twin, method)
    unpatch(twin)
    assert isinstance(mlp_of(model), SparseMLP)


@BOTH
@EACH
def test_a_pickle_knows_nothing_of_the_package(method: Method, family: str, tiny: Make) -> None:
    """So it loads where moyu_ext is not installed."""
    assert b"moyu" not in pickle.dumps(patch(tiny(family), method))


@BOTH
def test_load_state_dict_and_conversion_keep_the_patch(
    family: str, tiny: Make, prompt: Prompt
) -> None:
    """New weights, assigned weights, another dtype: the rule and the layout follow."""
    other, ids = tiny(family, seed=9), prompt(12)
    eps = oracle.quantiles(other, prompt(30)[0])
    text = other.generate(ids, max_new_tokens=6, do_sample=False)[0]
    rule = oracle.tda(eps)
    everything = torch.ones(len(text), dtype=torch.bool)
    want = oracle.logits(other, text, rule, everything, ~everything)
    for assign in (False, True):
        model = patch(tiny(family), TDA(eps, prefill=True))
        state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        model.load_state_dict(state, assign=assign)
        got = model(text.unsqueeze(0)).logits[0]
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
        assert mlp_of(model).weights.down_t.is_contiguous()
        model.to(torch.bfloat16)
        got = model(text[None, :4]).logits[0]
        assert got.dtype == torch.bfloat16
        assert mlp_of(model).weights.down_t.dtype == torch.bfloat16
        assert mlp_of(model).weights.down_t.is_contiguous()
        unpatch(model)
        assert all(p.is_contiguous() for p in model.parameters())


def test_hooks_on_the_mlp_go_on(tiny: Make, prompt: Prompt) -> None:
    """A hook that the user put on an MLP fires while it is patched, and can be removed."""
    model = tiny()
    calls: list[int] = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    patch(model, SRIDA(0.5))
    model(prompt(9))
    assert calls == [1]
    handle.remove()
    model(prompt(9))
    unpatch(model)
    model(prompt(9))
    assert calls == [1]


@BOTH
def test_hooks_on_its_parts_are_refused(family: str, tiny: Make) -> None:
    model = tiny(family)
    part = (
        model.model.decoder.layers[1].fc2 if family == "opt" else model.model.layers[1].mlp.up_proj
    )
    handle = part.register_forward_pre_hook(lambda *_: None)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"(fc2|up_proj) carries forward hooks"):
        patch(model, SRIDA(0.5))
    assert snapshot(model) == before
    patch(model, SRIDA(0.5), layers=[0])
    unpatch(model)
    handle.remove()
    patch(model, SRIDA(0.5))


def test_memory_layout(tiny: Make) -> None:
    """One copy of each weight: W_down is neuron-major in its own parameter."""
    model = tiny()
    pointers = {n: p.untyped_storage().nbytes() for n, p in model.named_parameters()}
    patch(model, TDA(0.1))
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() == pointers[name]
        neuron_major = parameter.t().is_contiguous() if parameter.dim() == 2 else False
        assert neuron_major == name.endswith("down_proj.weight")
    mlp = mlp_of(model)
    assert mlp.weights.down_t.data_ptr() == mlp.down_proj.weight.data_ptr()
    assert mlp.weights.gate is mlp.gate_proj.weight


@BOTH
@EACH
def test_compiles_without_a_break(method: Method, family: str, tiny: Make, prompt: Prompt) -> None:
    """torch.compile(fullgraph=True) of one patched MLP, decode and prefill, grown by a batch."""
    model = patch(tiny(family), method)
    mlp = mlp_of(model)
    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True, backend="eager")
    with torch.no_grad():
        for rows in (1, 1, 3, 12):
            x = torch.randn(1, rows, 32)
            torch.testing.assert_close(compiled(x), mlp(x), rtol=1e-5, atol=1e-5)
    layer = report(model).layers[0]
    assert layer.tokens + layer.dense_tokens == 2 * 17, "compiled calls are counted too"


@pytest.mark.parametrize("method", [TDA(0.1), SRIDA(0.5)], ids=repr)
def test_a_whole_decode_step_compiles(method: Method, tiny: Make, prompt: Prompt) -> None:
    """One graph serves every step, prompt and cache: sets change in place, beneath it."""
    model = patch(tiny(), method)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(model, fullgraph=True, backend="eager")
    cache = StaticCache(model.config, max_cache_len=32)
    with torch.no_grad():
        for seed in (0, 1):
            cache.reset()
            plain = DynamicCache()
            ids = prompt(12, seed=seed)
            model(ids, **passing(model, cache))
            model(ids, **passing(model, plain))
            for token in prompt(4, seed=seed + 7)[0]:
                got = step(token.view(1, 1), **passing(model, cache)).logits
                want = model(token.view(1, 1), **passing(model, plain)).logits
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiled_step_counts_once_and_copies_no_set(tiny: Make, prompt: Prompt) -> None:
    """On a GPU a counter is a kernel per token, and an input of a graph that may move a copy."""

    def counters(model: nn.Module) -> int:
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
            graphs.append(graph)
            return graph

        torch._dynamo.reset()
        step = torch.compile(model, fullgraph=True, backend=backend)
        with torch.no_grad():
            model(prompt(12), **passing(model, cache))
            step(prompt(1), **passing(model, cache))
        return sum(str(node.target) == "add_" for graph in graphs for node in graph.graph.nodes)

    model = tiny()
    cache = StaticCache(model.config, max_cache_len=32)
    before = counters(model)
    patch(model, SRIDA(0.5))
    cache = StaticCache(model.config, max_cache_len=32)
    assert counters(model) == before + 2
    assert report(model).layers[2].tokens == 1
    state = vars(cache)[ATTRIBUTE]
    (meter,) = model.__dict__["_moyu_patch"].hooks.meters.values()
    still = [state.sizes, meter.used, meter.tokens]
    for layer in state.layers:
        still += [layer.indices, layer.count, layer.mask]
    assert {torch._dynamo.utils.get_static_address_type(t) for t in still} == {"unguarded"}


@pytest.mark.slow
@EACH
def test_inductor(method: Method, tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), method)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True)
    caches = [StaticCache(model.config, max_cache_len=32) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(prompt(12), **passing(model, cache))
        for token in prompt(4)[0]:
            got = step(token.view(1, 1), **passing(model, caches[0])).logits
            want = model(token.view(1, 1), **passing(model, caches[1])).logits
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# Report


def test_report(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), SRIDA(0.25), layers=[1, 2])
    empty = report(model)
    assert empty.density != empty.density and " -" in str(empty), "nothing governed yet: NaN"
    model.generate(prompt(12, batch=2), max_new_tokens=5, do_sample=False)
    rows = report(model, reset=True)
    assert rows.density == 0.25 and rows.sparsity == 0.75
    assert [(r.index, r.name) for r in rows.layers] == [
        (1, "model.layers.1.mlp"),
        (2, "model.layers.2.mlp"),
    ]
    for r in rows.layers:
        assert (r.f, r.density, r.tokens, r.dense_tokens, r.refreshes) == (96, 0.25, 8, 24, 2)
    text = str(rows)
    assert "SRIDA(density=0.25" in text and "25.0 %" in text and len(text.splitlines()) == 7
    assert text.endswith("decode: 3 layers in one call, 8 tokens")
    again = report(model).layers[0]
    assert (again.tokens, again.dense_tokens, again.refreshes) == (0, 0, 0)


def test_report_where_nothing_is_active(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), STDA(1e9))
    model.generate(prompt(12), max_new_tokens=4, do_sample=False)
    assert report(model).density == 0 and "MLPs are infx" in str(report(model))


def test_report_counts_what_was_active(tiny: Make, prompt: Prompt) -> None:
    """TDA's density is the oracle's, layer by layer."""
    dense, model, ids = tiny(), tiny(), prompt(12)
    eps = oracle.quantiles(dense, prompt(30)[0], q=0.7)
    rule = oracle.tda(eps)
    out = patch(model, TDA(eps)).generate(ids, max_new_tokens=9, do_sample=False)[0]
    active = [0, 0, 0]
    governed, learned = oracle.roles(rule, 20, 12)
    inner = rule.keep

    def count(layer: int, *args: Tensor) -> Tensor:
        chosen = inner(layer, *args)
        active[layer] = int(chosen[governed].sum())
        return chosen

    oracle.logits(dense, out[:20], oracle.Rule(count, True), governed, learned)
    got = [round(r.density * r.tokens * r.f) for r in report(model).layers]
    assert got == active


@BOTH
@pytest.mark.parametrize(
    "method", [Dense(), TDA(0.1), STDA(0.1), SRIDA(0.5), QRIDA(0.5)], ids=lambda m: m.name
)
def test_nothing_keeps_the_old_down_projection(tiny: Make, family: str, method: Method) -> None:
    model = tiny(family)
    layer = getattr(model.model, "decoder", model.model).layers[0]
    old = (layer.fc2 if hasattr(layer, "fc2") else layer.mlp.down_proj).weight.data
    patch(model, method)
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated attributes that are touched in passing
        others = [
            found
            for found in gc.get_objects()
            if type(found) in (Tensor, nn.Parameter)  # no fakes, which have no memory
            and found is not old
            and found.layout == torch.strided
            and found.data_ptr() == old.data_ptr()
        ]
    assert others == []
    assert mlp_of(model).weights is not None


@pytest.mark.parametrize("method", [TDA(0.0), QRIDA(1.0), SRIDA(1.0)], ids=repr)
def test_an_input_of_strided_rows(method: Method, tiny: Make) -> None:
    model = tiny()
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))[:, -1:, :]
    with torch.no_grad():
        want = model.model.layers[0].mlp(x)
        patch(model, method)
        assert torch.allclose(model.model.layers[0].mlp(x), want, atol=1e-5)


@BOTH
@pytest.mark.parametrize("method", [TDA(0.0), QRIDA(1.0), SRIDA(1.0)], ids=repr)
@torch.no_grad()
def test_autocast(method: Method, family: str, tiny: Make, prompt: Prompt) -> None:
    """Few rows and many come out in autocast's dtype, as from the unpatched model."""
    model, ids = tiny(family), prompt(12)
    dtypes = []
    with torch.autocast("cpu", torch.bfloat16):
        want = model.generate(
            ids, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        patch(model, method)
        mlp = mlp_of(model)
        handle = mlp.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
        got = model.generate(
            ids, max_new_tokens=4, output_logits=True, return_dict_in_generate=True
        )
        handle.remove()
    assert dtypes == 4 * [torch.bfloat16]
    assert torch.allclose(got.logits[0].float(), want.logits[0].float(), atol=0.3)
