"""Weights that change under a patch: followed where that can be, refused where it can't."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moyu_ext.errors import PatchStateError, UnsupportedModelError
from moyu_ext.methods import QRIDA, Dense, Method
from moyu_ext.patching.patch import patch, unpatch
from torch import Tensor, nn
from transformers import PreTrainedModel

Make = Callable[..., PreTrainedModel]
Prompt = Callable[..., Tensor]
Change = Callable[[nn.Module], object]


def scale_data(linear: nn.Module) -> None:
    linear.weight.data = linear.weight.data.contiguous() * 1.5


def new_parameter(linear: nn.Module) -> None:
    linear.weight = nn.Parameter(linear.weight.detach() * 1.5)


def in_place(linear: nn.Module) -> None:
    with torch.no_grad():
        linear.weight.mul_(1.5)


def copy_data(linear: nn.Module) -> None:
    """As reinforcement learning syncs weights: nothing counts it."""
    linear.weight.data.copy_(linear.weight.data * 1.5)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("change", [scale_data, new_parameter, in_place, copy_data])
@pytest.mark.parametrize("method", [Dense(), QRIDA(1.0), QRIDA(0.4)], ids=repr)
def test_prompt_and_decode_use_the_new_weights(
    change: Change, method: Method, family: str, tiny: Make, prompt: Prompt
) -> None:
    """As if the model had been patched after the change: few rows and many, and what the rule
    knows of the weights (column norms, shadows)."""
    changed, want = tiny(family), tiny(family)
    patch(changed, method)
    for ids in (prompt(3), prompt(12)):
        changed(ids)  # the first forward reads the weights
    for model in (changed, want):
        for name, linear in model.named_modules():
            if name.endswith(("up_proj", "down_proj", "fc1", "fc2")):
                change(linear)
    patch(want, method)
    with torch.no_grad():
        for ids in (prompt(3), prompt(12)):
            assert torch.equal(changed(ids).logits, want(ids).logits)


def test_functional_call_with_other_weights(tiny: Make, prompt: Prompt) -> None:
    model, ids = tiny(), prompt(3)
    name = "model.layers.1.mlp.down_proj.weight"
    other = {name: model.get_parameter(name).detach() * 2}
    with torch.no_grad():
        want = torch.func.functional_call(model, other, (ids,)).logits
        before = model(ids).logits
        patch(model, Dense())
        got = torch.func.functional_call(model, other, (ids,)).logits
        assert torch.allclose(got, want, atol=1e-5)
        assert torch.allclose(model(ids).logits, before, atol=1e-5)


class Adapter(nn.Module):
    """Beside a linear layer, as adapters are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x.sum()


@pytest.mark.parametrize("rows", [3, 12])
def test_a_layer_replaced_after_the_patch_is_an_error(
    rows: int, tiny: Make, prompt: Prompt
) -> None:
    model = patch(tiny(), Dense())
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Adapter(mlp.up_proj)
    with pytest.raises(PatchStateError, match=r"layers\.1\.mlp\.up_proj is a Adapter now.*unpatch"):
        model(prompt(rows))
    mlp.up_proj = mlp.up_proj.base
    model(prompt(rows))
    unpatch(model)


def test_hooks_put_on_a_part_after_the_patch_are_an_error(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), Dense())
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(PatchStateError, match=r"down_proj got forward hooks"):
        model(prompt(3))
    handle.remove()
    model(prompt(3))


def test_a_dtype_that_no_operator_has_is_named(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), QRIDA(0.5)).double()
    with pytest.raises(UnsupportedModelError, match=r"dtype torch\.float64; expected float32"):
        model(prompt(3))


def test_weights_may_change_in_grad_mode(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), Dense())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert model(prompt(3)).logits.requires_grad


def other_activation(mlp: nn.Module) -> None:
    mlp.act_fn = nn.Tanh()


def hook_on_activation(mlp: nn.Module) -> None:
    mlp.act_fn.register_forward_hook(lambda module, args, out: out * 2)


def own_forward(mlp: nn.Module) -> None:
    mlp.up_proj.forward = lambda x: mlp.gate_proj(x)


@pytest.mark.parametrize("change", [other_activation, hook_on_activation, own_forward])
def test_what_a_patched_mlp_would_not_run_is_an_error_before_and_after(
    change: Change, tiny: Make, prompt: Prompt
) -> None:
    model = patch(tiny(), QRIDA(0.4))
    with torch.no_grad():
        model.generate(prompt(3), max_new_tokens=2)
        change(model.model.layers[1].mlp)
        for ids in (prompt(3), prompt(12)):
            with pytest.raises(PatchStateError, match=r"layers\.1\.mlp\.(act_fn|up_proj)"):
                model(ids)
    unpatch(model)
    with torch.no_grad():
        model(prompt(3))
    if change is not other_activation:
        with pytest.raises(UnsupportedModelError, match=r"layers"):
            patch(model, QRIDA(0.4))
