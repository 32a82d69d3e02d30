"""patch(projections=True): the linear layers beside the MLPs, by the project's own GEMV."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moyu_ext.errors import ConfigurationError, PatchStateError
from moyu_ext.methods import SRIDA, Dense
from moyu_ext.models.families import find_mlps
from moyu_ext.patching.patch import patch, report, unpatch
from moyu_ext.patching.projections import ROWS, Projection, find_projections
from snapshot import snapshot
from test_ops import assert_as_good_as_torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moyu_ext import ops

Make = Callable[..., PreTrainedModel]
Prompt = Callable[..., Tensor]
# Attention has four in each of three layers, and there is the head.
FAMILIES = pytest.mark.parametrize("family", ["llama-bias", "qwen2", "gemma", "opt"])


def projections_of(model: nn.Module) -> list[Projection]:
    return [module for module in model.modules() if isinstance(module, Projection)]


@FAMILIES
def test_the_same_text_and_the_same_model_afterwards(
    family: str, tiny: Make, prompt: Prompt
) -> None:
    model, ids = tiny(family), prompt(12)
    before = snapshot(model)
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    patch(model, Dense(), projections=True)
    assert len(projections_of(model)) == report(model).projections == 13
    assert "13 linear layers" in str(report(model))
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), want)
    unpatch(model)
    assert snapshot(model) == before


def test_decode_goes_through_the_operator(tiny: Make, prompt: Prompt, monkeypatch) -> None:
    model = patch(tiny(), SRIDA(0.5), projections=True)
    rows: list[int] = []
    real = ops.gather_gemv

    def count(x: Tensor, *rest: Tensor | None) -> Tensor:
        rows.append(x.numel() // x.shape[-1])
        return real(x, *rest)

    monkeypatch.setattr(ops, "gather_gemv", count)
    with torch.no_grad():
        model(prompt(1, batch=3))
        assert rows == [3] * 13
        rows.clear()
        model(prompt(ops.MAX_ROWS + 1))
    assert rows == [], "more rows run as before"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_values(dtype: torch.dtype, rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(111, 19, bias=bias, dtype=dtype).eval()
    x = torch.randn(2, rows, 111, dtype=dtype).transpose(0, 1)[:, :1]  # not contiguous
    with torch.no_grad():
        got, plain = Projection(linear)(x), linear(x)
        exact = F.linear(x.double(), linear.weight.double(), linear.double().bias)
    assert got.shape == plain.shape
    assert_as_good_as_torch(got, exact, plain, dtype, 111)


def test_state_dict_and_copies_are_the_models(tiny: Make) -> None:
    model = tiny("qwen2")
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch(model, SRIDA(0.5), projections=True)
    got = model.state_dict()
    assert list(got) == list(want) and all(torch.equal(got[name], want[name]) for name in want)
    assert not projections_of(copy.deepcopy(model))
    assert {type(m) for m in projections_of(model)} == {Projection}


def test_a_decode_step_compiles(tiny: Make, prompt: Prompt) -> None:
    plain, model = tiny(), patch(tiny(), Dense(), projections=True)
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        ids = prompt(1)
        torch.testing.assert_close(step(ids).logits, plain(ids).logits)
    assert nodes.count("moyu_ext.gather_gemv.default") == 13


def test_autocast_is_left_to_torch(tiny: Make, prompt: Prompt) -> None:
    plain, model = tiny(), patch(tiny(), Dense(), layers=[0], projections=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.lm_head(torch.randn(1, 32)).dtype == torch.bfloat16
        assert model(prompt(2)).logits.dtype == plain(prompt(2)).logits.dtype


def test_what_is_left_as_it_is(tiny: Make) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = tiny()
    attention = model.model.layers[1].self_attn
    attention.q_proj = Scaled(32, 32, bias=False)
    attention.k_proj._hf_hook = object()
    attention.v_proj.weight.data = attention.v_proj.weight.data.t().contiguous().t()
    attention.o_proj.double()
    bound = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * bound(x)
    found = [getattr(parent, name) for parent, name in find_projections(model, find_mlps(model))]
    assert len(found) == 13 - 5 and model.lm_head not in found
    assert not {id(m) for m in attention.children()} & {id(m) for m in found}


@torch.no_grad()
def test_the_most_rows_are_those_of_the_device(
    tiny: Make, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patch(tiny(), Dense(), projections=True)
    right = ops.gather_gemv
    rows: list[int] = []

    def seen(x: Tensor, *rest: Tensor | None) -> Tensor:
        rows.append(x.numel() // x.shape[-1])
        return right(x, *rest)

    monkeypatch.setattr(ops, "gather_gemv", seen)
    for most, taken in ((8, {4, 5, 8}), (4, {4}), (0, set())):
        monkeypatch.setitem(ROWS, "cpu", most)
        rows.clear()
        for length in (4, 5, 8, 9):
            model(prompt(length))
        assert set(rows) == taken


def test_refusals(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), Dense(), projections=True)
    model.lm_head.train()
    with pytest.raises(PatchStateError, match=r"training mode.*model.eval\(\)"), torch.no_grad():
        model(prompt(3))
    model.eval()
    with pytest.raises(PatchStateError, match=r"backward.*unpatch"):
        model(prompt(3)).logits.sum().backward()
    unpatch(model)
    assert model(prompt(3)).logits.requires_grad
    sites = find_mlps(model)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(layer.self_attn, name).forward = None
    model.lm_head.forward = None
    with pytest.raises(ConfigurationError, match=r"no plain torch.nn.Linear beside its MLPs"):
        find_projections(model, sites)
    model.lm_head.__dict__.pop("forward")
    assert [name for _, name in find_projections(model, sites)] == ["lm_head"]
    model.lm_head.to("meta")  # a device without the operator
    with pytest.raises(ConfigurationError, match=r"no plain torch.nn.Linear beside its MLPs"):
        find_projections(model, sites)
