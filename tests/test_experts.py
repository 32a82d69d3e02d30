"""Mixture-of-experts models through transformers' experts interface, against its eager loop."""

from pathlib import Path

import pytest
import torch
import transformers
from moyu_ext.errors import UnsupportedModelError
from moyu_ext.integrations import experts as door

from moyu_ext import ops

COMMON = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MODELS = {
    "Mixtral": {"intermediate_size": 40, "num_local_experts": 4},
    "Qwen2Moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
        "num_experts": 6,
    },
    "Qwen3Moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "head_dim": 8,
    },
}


def make(name: str, dtype: torch.dtype = torch.float32, **extra) -> transformers.PreTrainedModel:
    settings = {**COMMON, **MODELS.get(name, {}), **extra}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**settings)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Rows of each call of the operator."""
    rows: list[int] = []
    operator = ops.sparse_mlp

    def counting(x, *args):
        rows.append(x.shape[0])
        return operator(x, *args)

    monkeypatch.setattr(ops, "sparse_mlp", counting)
    return rows


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 3, 40])
def test_logits_are_those_of_the_eager_loop(name: str, length: int, prompt, calls) -> None:
    model = make(name)
    ids = prompt(length, 2)
    with torch.no_grad():
        expected = model(ids).logits
        assert calls == []
        model.set_experts_implementation("moyu")
        found = model(ids).logits
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    assert all(1 <= rows <= ops.MAX_ROWS for rows in calls)
    if length < 4:  # nothing but the operator: every chosen expert of every token
        assert sum(calls) == 2 * 2 * 2 * length
    model.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_close_as_eager(dtype: torch.dtype, prompt, calls) -> None:
    """Against float64: at most twice eager's error."""
    model = make("Mixtral", dtype)
    module = model.model.layers[0].mlp.experts
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    index = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 1]])
    weights = torch.rand(4, 2, generator=torch.Generator().manual_seed(2)).to(dtype)
    truth = torch.zeros(4, 32, dtype=torch.float64)
    for t in range(4):
        for k in range(2):
            gate, up = module.gate_up_proj[index[t, k]].double().chunk(2)
            hidden = torch.nn.functional.silu(gate @ x[t].double()) * (up @ x[t].double())
            down = module.down_proj[index[t, k]].double()
            truth[t] += weights[t, k].double() * (down @ hidden)
    with torch.no_grad():
        eager = (module(x, index, weights).double() - truth).abs().max()
        model.set_experts_implementation("moyu")
        ours = (module(x, index, weights).double() - truth).abs().max()
    assert len(calls) == 4
    assert ours <= 2 * eager + torch.finfo(dtype).eps * truth.abs().max()


def test_generation_is_the_same(prompt, calls) -> None:
    model = make("Mixtral")
    expected = model.generate(prompt(12, 2), max_new_tokens=12, do_sample=False)
    model.set_experts_implementation("moyu")
    assert torch.equal(model.generate(prompt(12, 2), max_new_tokens=12, do_sample=False), expected)
    assert len(calls) > 40


def test_parameters_keep_names_shapes_and_values(tmp_path: Path, prompt) -> None:
    model = make("Mixtral")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.set_experts_implementation("moyu")
    with torch.no_grad():
        expected = model(prompt(5)).logits
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again.set_experts_implementation("moyu")
    with torch.no_grad():
        assert torch.allclose(again(prompt(5)).logits, expected, atol=1e-6)


def test_gradients_take_the_differentiable_way(prompt, calls) -> None:
    model = make("Mixtral")
    model(prompt(3), labels=prompt(3)).loss.backward()
    weight = model.model.layers[0].mlp.experts.down_proj
    expected, weight.grad = weight.grad, None
    model.set_experts_implementation("moyu")
    model(prompt(3), labels=prompt(3)).loss.backward()
    assert torch.allclose(weight.grad, expected, atol=1e-6)
    assert calls == []


def test_experts_of_other_processes_are_left_out() -> None:
    """Expert parallelism marks them with an index past the last expert."""
    module = make("Mixtral").model.layers[0].mlp.experts
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    weights = torch.ones(1, 2)
    with torch.no_grad():
        found = door.experts_forward(module, x, torch.tensor([[4, 1]]), weights)
        both = door.experts_forward(module, x, torch.tensor([[1, 1]]), weights)
    assert torch.allclose(2 * found, both, atol=1e-6)


@pytest.mark.parametrize(("dtype", "device"), [("float64", "cpu"), ("float32", "meta")])
def test_weights_that_the_operator_lacks_are_refused(dtype: str, device: str, calls) -> None:
    module = make("Mixtral").model.layers[0].mlp.experts.to(getattr(torch, dtype)).to(device)
    x = torch.zeros(1, 32, dtype=getattr(torch, dtype))
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=f"{dtype} on {device}"):
        door.experts_forward(module, x, torch.tensor([[0, 1]]), torch.ones(1, 2))
    assert calls == []


def test_other_forms_are_refused(prompt) -> None:
    model = make("GptOss", intermediate_size=32, num_local_experts=4, head_dim=8)
    model.set_experts_implementation("moyu")
    with pytest.raises(UnsupportedModelError, match="GptOssExperts: has_bias is True"):
        model(prompt(3))
    odd = make("Mixtral", hidden_act="tanh")
    odd.set_experts_implementation("moyu")
    with pytest.raises(UnsupportedModelError, match="its activation is"):
        odd(prompt(3))


def test_use_runs_the_operator(prompt, calls) -> None:
    model = make("Mixtral")
    assert door.use(model) is model
    with torch.no_grad():
        model(prompt(3))
    assert len(calls) > 0


@pytest.mark.parametrize("name", ["Llama4", "JetMoe", "Llama"])
def test_use_refuses_where_it_would_have_no_effect(name: str) -> None:
    small = {"num_local_experts": 2, "intermediate_size": 24, "intermediate_size_mlp": 24}
    config = getattr(transformers, "Llama4TextConfig" if name == "Llama4" else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(
        config(**{**COMMON, **small, "head_dim": 8})
    )
    with pytest.raises(UnsupportedModelError, match=f"no effect on {name}ForCausalLM"):
        door.use(model)


def test_use_refuses_experts_of_another_form_before_a_forward() -> None:
    model = make("Mixtral")
    model.model.layers[1].mlp.experts.has_bias = True
    with pytest.raises(UnsupportedModelError, match="has_bias is True"):
        door.use(model)
    assert model.config._experts_implementation == "eager"
