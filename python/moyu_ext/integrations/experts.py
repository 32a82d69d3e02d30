"""Mixture-of-experts models with the project's operator, through transformers' experts interface.

Importing this module registers the implementation "moyu", so that

    from moyu_ext.integrations import experts
    experts.use(model)     # model.set_experts_implementation("eager") goes back

runs each token's experts through `ops.sparse_mlp`: the model's own router is the router of RIDA
(arXiv 2406.12569, section 2.3), its choice the `given` plan. W_down's memory stays transposed after
going back. Importing it imports transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations import moe

from .. import ops
from ..errors import UnsupportedModelError
from ..models.families import DTYPES, activation_name

NAME = "moyu"
_ACTIVATION = "_moyu_activation"


def use(model: Any) -> Any:
    """Call model.set_experts_implementation("moyu") and check that it has an effect; the model.

    transformers takes the name without a word for a model whose experts never ask for an
    implementation (llama4_text, jetmoe), and experts of a form that the operator lacks would only
    fail in the first forward.

    Raises UnsupportedModelError in both cases; the model is then left as it was.
    """
    # What transformers' decorator for experts gives to a class.
    modules = [m for m in model.modules() if hasattr(type(m), "_apply_gate")]
    for module in modules:
        _check(module)
    if modules and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(NAME)
    if not modules or any(m.config._experts_implementation != NAME for m in modules):
        raise UnsupportedModelError(
            f'experts implementation "{NAME}" has no effect on {type(model).__name__}: its experts '
            "do not run through transformers' experts interface; expected a mixture of experts "
            "that does, such as Mixtral or Qwen3-MoE. For a dense MLP use moyu_ext.patch(model)"
        )
    return model


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """sum_k w_k(x) MLP_{e_k}(x): hidden_states [tokens, d], experts and weights [tokens, k].

    MLP_e(x) = W_down[e] (act(W_gate[e] x) * (W_up[e] x)). An expert that got at most ops.MAX_ROWS
    (8) tokens runs through the operator, one with more through torch's matmuls, as does everything
    where a gradient is wanted. W_down is laid out neuron-major the first time, in place, with the
    same name, shape and values. Which experts were chosen is read on the host, so this cannot be
    captured in a CUDA graph.

    Raises UnsupportedModelError for experts of another form (biases, interleaved or transposed
    weights, a gate of their own, an activation that the operator lacks).
    """
    activation = self.__dict__.get(_ACTIVATION)
    if activation is None:
        activation = _check(self)
        self.__dict__[_ACTIVATION] = activation
    grad = torch.is_grad_enabled() and (
        hidden_states.requires_grad or self.gate_up_proj.requires_grad
    )
    if not grad and not self.down_proj[0].t().is_contiguous():
        with torch.inference_mode(False), torch.no_grad():
            down = self.down_proj
            down.data = down.data.transpose(1, 2).contiguous().transpose(1, 2)
    # Sums of the chosen experts in float32, rounded once.
    total = torch.zeros_like(hidden_states, dtype=torch.float32)
    for expert in top_k_index.unique().tolist():
        if not 0 <= expert < self.num_experts:  # another process has it
            continue
        token, place = torch.where(top_k_index == expert)
        x = hidden_states[token]
        if grad or len(token) > ops.MAX_ROWS:
            out = _dense(self, x, expert)
        else:
            out = _sparse(self, x, expert, activation)
        total = total.index_add(0, token, out.float() * top_k_weights[token, place, None].float())
    return total.to(hidden_states.dtype)


def _dense(module: Any, x: Tensor, expert: int) -> Tensor:
    gate, up = F.linear(x, module.gate_up_proj[expert]).chunk(2, dim=-1)
    return F.linear(module.act_fn(gate) * up, module.down_proj[expert])


def _sparse(module: Any, x: Tensor, expert: int, activation: str) -> Tensor:
    gate, up = module.gate_up_proj[expert].chunk(2)
    down_t = module.down_proj[expert].t()
    return ops.sparse_mlp(
        x.contiguous(), gate, up, down_t, None, None, None, None, None, None, activation
    )


def _check(module: Any) -> str:
    """The activation's name. Raises UnsupportedModelError unless the operator computes this."""
    name = type(module).__name__
    forms = {
        "has_gate": True,
        "has_bias": False,
        "is_transposed": False,
        "is_concatenated": True,
        "has_post_expert_norm": False,
    }
    for form, wanted in forms.items():
        if getattr(module, form, wanted) is not wanted:
            raise _unsupported(name, f"{form} is {not wanted}")
    if type(module)._apply_gate is not moe._default_apply_gate:
        raise _unsupported(name, "it has a gate of its own (_apply_gate)")
    weight = module.gate_up_proj
    if weight.dtype not in DTYPES or weight.device.type == "meta":
        raise _unsupported(name, f"its weights are {weight.dtype} on {weight.device}")
    activation = activation_name(module.act_fn)
    if not activation:
        raise _unsupported(name, f"its activation is {type(module.act_fn).__name__}")
    return activation


def _unsupported(name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f'experts implementation "{NAME}" does not compute {name}: {reason}; expected gated '
        "experts with gate_up_proj [E, 2f, d] and down_proj [E, d, f] without biases in float32, "
        'float16 or bfloat16; use model.set_experts_implementation("eager")'
    )


moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
