"""Which MLPs are recognised, which are refused, and what is read from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import FAMILIES
from moyu_ext.errors import UnsupportedModelError
from moyu_ext.methods import SRIDA, Dense
from moyu_ext.models.families import activation_name, find_mlps, record_inputs
from moyu_ext.patching.patch import patch, unpatch
from moyu_ext.reference import ACTIVATIONS, activations
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

Make = Callable[..., PreTrainedModel]
Prompt = Callable[..., Tensor]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_find_and_record(family: str, patched: bool, tiny: Make, prompt: Prompt) -> None:
    """The weights found, applied to the inputs recorded, give the MLP's output."""
    model = tiny(family)
    if patched:
        patch(model, Dense())
    sites = find_mlps(model)
    assert [site.index for site in sites] == [0, 1, 2]
    assert all((site.d, site.f) == (32, 96) for site in sites)
    opt = family == "opt"
    assert sites[1].name == ("model.decoder.layers.1" if opt else "model.layers.1.mlp")
    assert sites[1].stack == ("model.decoder.layers" if opt else "model.layers")
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    handles = []
    for site in sites:
        last = site.linear("fc2") if opt else site.module

        def keep(module: nn.Module, args: Any, out: Tensor, index: int = site.index) -> None:
            outputs[index] = out

        handles.append(last.register_forward_hook(keep))
    with record_inputs(model, sites, lambda index, x: inputs.update({index: x})):
        model(prompt(7))
    for handle in handles:
        handle.remove()
    for site in sites:
        w = site.weights()
        assert w.gated is not opt and w.d == 32 and w.f == 96
        a = activations(inputs[site.index], w.gate, w.up, w.gate_bias, w.up_bias, w.activation)
        want = a @ w.down_t + (0 if w.down_bias is None else w.down_bias)
        torch.testing.assert_close(outputs[site.index], want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(w.column_norms(), w.down_t.norm(dim=1))
    inputs.clear()
    model(prompt(7))
    assert not inputs, "the hooks were left behind"


def test_activation_is_recognised_by_value() -> None:
    known = {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
        "gelu_accurate": "gelu_tanh",
        "relu": "relu",
        "relu2": "relu2",
    }
    for name in ACT2FN:
        if name == "xielu":
            continue  # has parameters
        assert activation_name(ACT2FN[name]) == known.get(name, ""), name
    for name, function in ACTIVATIONS.items():
        assert activation_name(function) == name
    assert activation_name(lambda x: F.silu(x.clamp(max=7.0))) == ""


class Gated(nn.Module):
    """A gated MLP with one thing done differently."""

    def __init__(self, change: str = "", d: int = 16, f: int = 24) -> None:
        super().__init__()
        self.change = change
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.change == "clamp":
            gate = gate.clamp(max=7.0)
        if self.change == "high clamp":
            up = up.clamp(-600.0, 600.0)
        if self.change == "swapped":
            gate, up = up, gate
        a = self.act_fn(gate) * up
        if self.change == "norm":
            a = F.rms_norm(a, a.shape[-1:])
        out = self.down_proj(a)
        if self.change == "scale":
            out = out * 0.9
        if self.change == "residual":
            out = out + x
        return (out, None) if self.change == "tuple" else out  # type: ignore[return-value]


class Layer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


def stack(*mlps: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([Layer(mlp) for mlp in mlps])
    return model.eval()


def test_canonical_gated_module() -> None:
    sites = find_mlps(stack(Gated(), Gated()))
    assert [site.name for site in sites] == ["layers.0.mlp", "layers.1.mlp"]


CHANGES = ["clamp", "high clamp", "swapped", "norm", "scale", "residual", "tuple"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_forward_is_refused(dtype: torch.dtype, change: str) -> None:
    """In float16, too, where the largest rows overflow in a plain MLP and not in a clamped one."""
    torch.manual_seed(0)
    mlps = Gated(d=64, f=96), Gated(change, d=64, f=96)
    for mlp in mlps:
        mlp.gate_proj.weight.data *= 0.03
        mlp.up_proj.weight.data *= 4
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp \(Gated\).*supported: gated"):
        find_mlps(stack(*mlps).to(dtype))


def test_weights_with_a_nan_are_named() -> None:
    broken = Gated("scale")
    broken.down_proj.weight.data[3, 5] = torch.nan
    broken.up_proj.weight.data[2, 5] = torch.nan
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp gives no finite output.*NaN"):
        find_mlps(stack(broken))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_check_leaves_mode_and_random_state_alone(dtype: torch.dtype) -> None:
    model = stack(Gated()).to(dtype)
    model.train()
    model.layers[0].mlp.act_fn.eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    find_mlps(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.layers[0].mlp.training and not model.layers[0].mlp.act_fn.training


ODD = {
    "BitNet": {},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "SeedOss": {"head_dim": 8},
    "Phi3": {},
    "GPT2": {"n_embd": 32, "n_head": 4, "n_layer": 2},
    "Mixtral": {"num_local_experts": 2},
    "Qwen2Moe": {"num_experts": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
}


@pytest.mark.parametrize("prefix", ODD)
def test_other_architectures_are_refused(prefix: str) -> None:
    """The error names what was found and what is supported; nothing is changed."""
    config = getattr(transformers, f"{prefix}Config")(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        **ODD[prefix],
    )
    name = f"{prefix}LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    with pytest.raises(UnsupportedModelError, match=r"mlp|feed_forward") as raised:
        patch(model, SRIDA(0.5))
    message = str(raised.value)
    assert "supported: gated MLPs" in message and "OPT" in message
    assert f"{prefix}ForCausalLM" in message or prefix == "GPT2"


def test_layers_of_two_kinds_are_refused() -> None:
    other = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(UnsupportedModelError, match="layers 1, 3 of 4 have no MLP") as raised:
        find_mlps(stack(Gated(), other, Gated(), other))
    assert "mlp Sequential [0 Linear]" in str(raised.value)


def test_two_stacks_are_refused() -> None:
    model = nn.Module()
    model.vision, model.text = stack(Gated()), stack(Gated())
    with pytest.raises(UnsupportedModelError, match=r"vision\.layers, text\.layers"):
        find_mlps(model)
    assert len(find_mlps(model.text)) == 1


def test_no_stack_and_no_module() -> None:
    with pytest.raises(UnsupportedModelError, match="no stack of layers"):
        find_mlps(nn.Linear(3, 3))
    with pytest.raises(UnsupportedModelError, match=r"expected a torch\.nn\.Module, got str"):
        find_mlps("a/model")  # type: ignore[arg-type]


class Packed(nn.Parameter):
    """As a quantised or distributed parameter: a subclass of Parameter."""


def quantise(linear: nn.Linear) -> None:
    linear.weight = Packed(linear.weight.data.clone())


def bad(name: str) -> nn.Module:
    model = stack(Gated(), Gated())
    mlp = model.layers[1].mlp
    if name == "integer":
        mlp.up_proj.weight = nn.Parameter(
            torch.zeros(24, 16, dtype=torch.int8), requires_grad=False
        )
    elif name == "float64":
        model.double()
    elif name == "meta":
        mlp.down_proj.to("meta")
    elif name == "hooks":
        mlp.gate_proj._hf_hook = object()
    elif name == "quantised":
        quantise(mlp.gate_proj)
    elif name == "packed shape":
        mlp.up_proj.weight = nn.Parameter(torch.zeros(24 * 16 // 2, 1))
    elif name == "adapter":
        mlp.up_proj = type("LoraLinear", (nn.Linear,), {})(16, 24, bias=False)
    elif name == "strides":
        mlp.up_proj.weight.data = mlp.up_proj.weight.data.t().contiguous().t()
    elif name == "mixed":
        mlp.up_proj.half()
    return model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("integer", r"layers\.1\.mlp\.up_proj\.weight has dtype torch\.int8"),
        ("float64", r"dtype torch\.float64; expected float32, float16 or bfloat16"),
        ("meta", "meta device.*load the model"),
        ("hooks", "accelerate hooks.*without device_map"),
        ("quantised", r"is a Packed \(quantised or distributed\)"),
        ("packed shape", "has shape"),
        ("adapter", "is a LoraLinear; expected torch.nn.Linear"),
        ("strides", "strides .*contiguous"),
        ("mixed", "mixed dtype or device"),
    ],
)
def test_weights_that_no_operator_can_read(name: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find_mlps(bad(name))


def test_distributed_weights(tmp_path: Any) -> None:
    """A DTensor, from a group of one process."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        model = stack(Gated())
        mesh = init_device_mesh("cpu", (1,))
        up = model.layers[0].mlp.up_proj
        up.weight = nn.Parameter(distribute_tensor(up.weight.data, mesh, [Shard(0)]))
        with pytest.raises(UnsupportedModelError, match=r"quantised or distributed"):
            find_mlps(model)
    finally:
        destroy_process_group()


def test_offloaded_by_accelerate(tiny: Make) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny(), execution_device="cpu")
    with pytest.raises(UnsupportedModelError, match="accelerate hooks"):
        find_mlps(model)


def test_sites_outlive_patch_and_unpatch(tiny: Make) -> None:
    model = tiny()
    site = find_mlps(model)[0]
    original = site.module
    before = site.weights()
    patch(model, SRIDA(0.5))
    assert site.module is not original
    after = site.weights()
    assert after.down_t.is_contiguous() and not before.down_t.is_contiguous()
    assert torch.equal(before.down_t, after.down_t) and after.up is before.up
    unpatch(model)
    assert site.module is original
