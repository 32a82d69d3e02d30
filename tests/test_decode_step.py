"""The compiled decode step against the layers' own forwards, and what is left to them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from decode_support import FAMILIES, decoded, error, family, steps
from moyu_ext.methods import QRIDA, SRIDA, STDA, TDA, Dense, Method
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.models.packed import pack
from moyu_ext.patching.patch import patch, report, unpatch
from torch import Tensor, nn
from transformers import PreTrainedModel

Make = Callable[..., PreTrainedModel]
Prompt = Callable[..., Tensor]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_families(name: str, dtype: torch.dtype, prompt: Prompt) -> None:
    """Every family, single tokens and pieces, two sequences, beyond the sliding window. What half
    precision may differ is what its own two ways of attending differ, eager and sdpa."""
    model = family(name, dtype)
    ids, more, cut = prompt(7, batch=2), prompt(16, batch=2, seed=1), [1] * 8 + [3, 1, 4]
    want = steps(model, ids, more, cut)
    patch(model, Dense())
    assert report(model).step.layers == 3, report(model).step
    got = steps(model, ids, more, cut)
    assert decoded(model) == 2 * 16
    allowed = 3e-6 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert error(got, want) < allowed


@pytest.mark.parametrize("heads", [(6, 6), (6, 1), (8, 2), (12, 1)], ids=str)
@pytest.mark.parametrize("size", [8, 20, 64, 80])
def test_heads(heads: tuple[int, int], size: int, prompt: Prompt) -> None:
    """Heads that share keys or do not, of sizes that no vector divides; more keys than a chunk."""
    model = family("Llama", num_attention_heads=heads[0], num_key_value_heads=heads[1],
                   head_dim=size)  # fmt: skip
    ids, more = prompt(150), prompt(5, seed=1)
    want = steps(model, ids, more, [1] * 5)
    got = steps(patch(model, Dense()), ids, more, [1] * 5)
    assert decoded(model) == 5 and error(got, want) < 3e-6


def test_part_of_a_head_is_rotated(prompt: Prompt) -> None:
    model = family("Llama")
    rotary = model.model.rotary_emb
    rotary.register_buffer("inv_freq", rotary.inv_freq[:6], persistent=False)

    def part(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        turned = [
            torch.cat([plain(x[..., :12], cos, sin), x[..., 12:]], -1) for x in (q, k)
        ]  # fmt: skip
        return tuple(turned)

    def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos.unsqueeze(1) + torch.cat([-b, a], -1) * sin.unsqueeze(1)

    module = transformers.models.llama.modeling_llama
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, "apply_rotary_pos_emb", part)
        ids, more = prompt(9), prompt(4, seed=1)
        want = steps(model, ids, more, [1] * 4)
        patch(model, Dense())
        got = steps(model, ids, more, [1] * 4)
    assert decoded(model) == 4 and error(got, want) < 3e-6


def test_large_norms(prompt: Prompt) -> None:
    """Where an offset of one is less than half precision sees of a weight."""
    model = family("Gemma3", torch.bfloat16)
    for key, parameter in model.named_parameters():
        if "norm" in key:
            parameter.data += 60
    ids, more = prompt(7), prompt(4, seed=1)
    want = steps(model, ids, more, [1] * 4)
    patch(model, Dense())
    assert model.model.norm.weight.mean() > 50 and report(model).step.layers == 3
    assert error(steps(model, ids, more, [1] * 4), want) < 0.06


METHODS: dict[str, Method] = {
    "dense": Dense(),
    "tda": TDA(0.02),
    "tda-gate": TDA(0.05, score="gate"),
    "stda": STDA(0.02),
    "srida": SRIDA(0.5),
    "qrida": QRIDA(0.5, guard_every=5),
    "qrida-epsilon": QRIDA(thresholds=0.02, guard="off"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("bits", [0, 8])
def test_methods(method: Method, bits: int, prompt: Prompt) -> None:
    """Each method does the same with the step as without it, and reports the same."""
    found = []
    for step in (False, True):
        model = family("Llama")
        if bits:
            pack(model, bits, progress=False)
        patch(model, method, decode_step=step)
        logits = steps(model, prompt(12, batch=2), prompt(9, batch=2, seed=1), [1] * 6 + [2, 1])
        found.append((logits, report(model)))
    (want, old), (got, new) = found
    assert error(got, want) < (1e-5 if not bits else 1e-4)
    assert new.step.tokens == 18 and not new.step.left
    for a, b in zip(old.layers, new.layers, strict=True):
        assert (a.tokens, a.dense_tokens, a.refreshes) == (b.tokens, b.dense_tokens, b.refreshes)
        assert a.density == pytest.approx(b.density, abs=1e-3)
        assert (a.guard is None) == (b.guard is None)
        if a.guard is not None and b.guard is not None:
            assert a.guard.tokens == b.guard.tokens > 0
            assert a.guard.cett == pytest.approx(b.guard.cett, rel=1e-3)


def test_some_layers(prompt: Prompt) -> None:
    """The others' MLPs are called as they are."""
    model = family("Qwen2")
    ids, more = prompt(8), prompt(5, seed=1)
    want = steps(model, ids, more, [1] * 5)
    got = steps(patch(model, Dense(), layers=[1]), ids, more, [1] * 5)
    assert decoded(model) == 5 and error(got, want) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "bits",
    [
        {"*": 4},
        {"*.[qv]_proj": 4, "*.o_proj": 8, "*.gate_proj": 8, "*.up_proj": 8, "*.down_proj": 5},
    ],
    ids=["all", "some"],
)
def test_packed(bits: dict[str, int], dtype: torch.dtype, prompt: Prompt) -> None:
    """Packed and plain projections side by side, as the packed model computes itself."""
    model = pack(family("Qwen2", dtype), bits, progress=False)
    ids, more = prompt(8, batch=2), prompt(5, batch=2, seed=1)
    want = steps(model, ids, more, [1] * 5)
    got = steps(patch(model, Dense()), ids, more, [1] * 5)
    assert decoded(model) == 10
    assert error(got, want) < (1e-4 if dtype == torch.float32 else 0.05)


def left(model: PreTrainedModel) -> list[str]:
    return list(report(model).step.left)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"output_attentions": True}, "the argument output_attentions"),
        ({"output_hidden_states": True}, "the argument output_hidden_states"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1, 1]])}, "an attention mask with gaps"),
    ],
)
def test_calls_that_are_left(kwargs: dict[str, Any], says: str, prompt: Prompt) -> None:
    model = family("Llama", attn_implementation="eager")
    with torch.no_grad():
        cache = cache_of(model(input_ids=prompt(6), use_cache=True))
        twin = copy.deepcopy(cache)
        want = model(input_ids=prompt(1), use_cache=True, **passing(model, cache), **kwargs)
        patch(model, Dense())
        got = model(input_ids=prompt(1), use_cache=True, **passing(model, twin), **kwargs)
    assert left(model) == [says] and error(got.logits, want.logits) < 3e-6
    assert (got.attentions is None) == (want.attentions is None)


def test_gradients_and_hooks_are_left(prompt: Prompt) -> None:
    model = patch(family("Llama"), Dense())
    cache = cache_of(model(input_ids=prompt(6), use_cache=True))
    model(input_ids=prompt(1), use_cache=True, **passing(model, cache))
    assert left(model) == ["gradients or training mode"]
    report(model, reset=True)
    seen = []
    layer = model.model.layers[1]
    for module in (layer, layer.self_attn.q_proj, layer.mlp, layer.mlp.gate_proj):
        if module is layer.mlp.gate_proj:
            break  # a patched MLP refuses hooks on its parts by itself
        handle = module.register_forward_hook(lambda *_: seen.append(1))
        with torch.no_grad():
            model(input_ids=prompt(1), use_cache=True, **passing(model, cache))
        handle.remove()
    assert report(model).step.left == {"hooks on its modules": 3} and len(seen) == 3
    with torch.no_grad():
        model(input_ids=prompt(1), use_cache=True, **passing(model, cache))
    assert report(model).step.tokens == 1


def test_a_model_that_moves(prompt: Prompt) -> None:
    """New tensors, other values, another dtype: the step follows."""
    model = patch(family("Llama"), Dense())
    ids, more = prompt(6), prompt(4, seed=1)
    for change in (
        lambda m: m.model.layers[0].self_attn.q_proj.weight.data.mul_(0.5),
        lambda m: setattr(m.model.layers[1].self_attn, "o_proj", nn.Linear(96, 48, bias=True)),
        lambda m: m.load_state_dict({k: v + 0.01 for k, v in m.state_dict().items()}),
        lambda m: m.model.layers[2].mlp.up_proj.weight.data.mul_(2),
        lambda m: m.double().float(),
        lambda m: m.to(torch.bfloat16),
    ):
        change(model)
        got = steps(model, ids, more, [1] * 4)
        plain = copy.deepcopy(model)
        assert "forward" not in plain.model.__dict__, "a copy is unpatched"
        bound = 3e-6 if model.dtype == torch.float32 else 0.03
        assert error(got, steps(plain, ids, more, [1] * 4)) < bound
    assert report(model).step.tokens == 24


def test_another_kind_of_layer(prompt: Prompt) -> None:
    model = patch(family("Llama"), Dense())

    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / 2

    ids, more = prompt(6), prompt(2, seed=1)
    old = model.model.layers[1].self_attn.o_proj
    half = Half(96, 48, bias=True)
    half.load_state_dict(old.state_dict())
    model.model.layers[1].self_attn.o_proj = half
    got = steps(model, ids, more, [1, 1])
    assert left(model) == ["a projection of class Half"]
    assert error(got, steps(copy.deepcopy(model), ids, more, [1, 1])) < 3e-6


def test_decoders_that_are_not_taken(tiny: Make) -> None:
    assert "known shape" in report(patch(tiny("opt"), Dense())).step.reason
    assert "decode_step=False" in report(patch(tiny(), Dense(), decode_step=False)).step.reason
    model = tiny()
    model.model.__class__ = type("Strange", (type(model.model),), {})
    assert "Strange" in report(patch(model, Dense())).step.reason


def test_a_class_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check finds it, and the layers' own forwards run."""
    module = transformers.models.llama.modeling_llama
    right = module.LlamaAttention.forward

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = right(self, *args, **kwargs)
        return out * (1.0 if self.layer_idx < 2 else 1.001), weights

    monkeypatch.setattr(module.LlamaAttention, "forward", wrong)
    model = patch(family("Llama"), Dense())
    assert "its layer 2 computes something else" in report(model).step.reason
    assert "forward" not in model.model.__dict__


def test_patch_leaves_no_trace(prompt: Prompt) -> None:
    """The check touches no random numbers, no counts, no hooks of the user; unpatch undoes all."""
    model = family("Llama")
    before = {id(m): dict(m.__dict__) for m in model.modules()}
    state = torch.random.get_rng_state()
    patch(model, QRIDA(0.5))
    assert torch.equal(torch.random.get_rng_state(), state)
    used = report(model)
    assert used.step.tokens == 0 and all(layer.tokens == 0 for layer in used.layers)
    assert pickle.loads(pickle.dumps(model)).generate(prompt(4), max_new_tokens=2).shape == (1, 6)
    unpatch(model)
    assert {id(m): dict(m.__dict__) for m in model.modules()} == before


def test_hooks_at_patch_time_are_not_called(prompt: Prompt) -> None:
    model = family("Llama")
    seen = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    patch(model, Dense())
    assert not seen and "hooks" in report(model).step.reason


def test_a_decoder_that_cannot_be_tried_out(prompt: Prompt) -> None:
    """The patch goes on without the step, and says why."""
    model = family("Llama")
    embedding = model.model.embed_tokens

    class Table(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            return embedding(ids)

    model.model.embed_tokens = Table()
    patch(model, Dense())
    assert "trying the step out failed: AttributeError" in report(model).step.reason
    assert model.generate(prompt(5), max_new_tokens=3).shape == (1, 8)
