"""The MLP shapes that can be patched, how to find them in a model, and how to read their weights.

A family is one record in `FAMILIES`. A module belongs to one where its structure fits *and* where
its forward computes that family's formula: a gated MLP is run on a few random rows and compared,
because six classes of transformers look like Llama's and compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..packing.layer import PackedLinear
from ..reference import ACTIVATIONS
from .weights import MlpWeights, Packed

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYERS = (nn.Linear, PackedLinear)


@dataclass(frozen=True)
class Family:
    """Child names of one MLP shape.

    `up` is the only input projection where `gate` is None. `layer_classes` empty: the projections
    sit in a module of their own, a direct child of the decoder layer. Otherwise they sit in the
    decoder layer itself (OPT), whose class must be one of those named, since the MLP then has no
    forward of its own that could be checked.
    """

    name: str
    gate: str | None
    up: str
    down: str
    activation: str
    layer_classes: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of the projections."""
        return tuple(name for name in (self.gate, self.up, self.down) if name is not None)

    @property
    def inline(self) -> bool:
        """Whether the projections sit in the decoder layer itself."""
        return bool(self.layer_classes)


FAMILIES = (
    Family("gated", "gate_proj", "up_proj", "down_proj", "act_fn"),
    Family("opt", None, "fc1", "fc2", "activation_fn", layer_classes=("OPTDecoderLayer",)),
)

# Gated in structure, something else in their forward (clamps, norms, multipliers, dropout, top-k),
# some of them only for inputs or settings that a check on random rows may not meet.
ODD_CLASSES = frozenset(
    ("BeamMLP", "BitNetMLP", "DeepseekV4MLP", "FalconH1MLP", "Gemma3nTextMLP", "SeedOssMLP")
)

SUPPORTED = (
    "supported: gated MLPs with gate_proj, up_proj, down_proj and act_fn (Llama, Mistral, Qwen2, "
    "Qwen3, Gemma and others with the same forward) and OPT (fc1, activation_fn, fc2), "
    f"with activation {', '.join(ACTIVATIONS)} and weights in float32, float16 or bfloat16"
)


class MlpSite:
    """One MLP of a model, in layer order. It stays valid when the model is patched or unpatched.

    `index`: position among the model's MLPs; `name`: dotted name in the model; `stack`: that of
    the list of layers; `layer`: the decoder
    layer; `family`; `activation`; `d`, `f`.
    """

    def __init__(self, index: int, name: str, layer: nn.Module, child: str, family: Family) -> None:
        self.index = index
        self.name = name
        self.stack = name.rsplit(".", 2 if child else 1)[0]
        self.layer = layer
        self.child = child  # "" where the projections sit in the layer itself
        self.family = family
        function = getattr(self.module, family.activation)
        # Where the projections sit in the layer, a patch has put a stand-in here.
        self.activation = activation_name(getattr(function, "original", function))
        up = self.linear(family.up)
        self.f: int = up.weight.shape[0]
        # Of a layer that is neither kind the weight tells it, and `check_weights` the rest.
        self.d: int = getattr(up, "in_features", up.weight.shape[-1])

    @property
    def module(self) -> Any:
        """The module that owns the projections: the MLP, or the decoder layer."""
        return getattr(self.layer, self.child) if self.child else self.layer

    @property
    def entry(self) -> Any:
        """The module whose input is the MLP's input x."""
        return self.linear(self.family.up) if self.family.inline else self.module

    def linear(self, name: str) -> Any:
        """The projection of this name (on a patched model: what stands in for it)."""
        return getattr(self.module, name)

    def weights(self) -> MlpWeights:
        """The current parameters; down_t is a transposed view of W_down, or its packed rows."""
        family = self.family
        gate = None if family.gate is None else self.linear(family.gate)
        up, down = self.linear(family.up), self.linear(family.down)
        weight = down.weight.detach()
        packed = weight.dtype == torch.uint8
        return MlpWeights(
            gate=None if gate is None else gate.weight,
            up=up.weight,
            down_t=weight if packed else weight.t(),
            gate_bias=None if gate is None else gate.bias,
            up_bias=up.bias,
            down_bias=down.bias,
            activation=self.activation,
            packed=Packed(self.d, down.dtype) if packed else None,
        )

    def __repr__(self) -> str:
        return f"MlpSite({self.index}, {self.name!r}, {self.family.name}, d={self.d}, f={self.f})"


def find_mlps(model: nn.Module) -> list[MlpSite]:
    """The MLPs of a decoder, one per layer, in layer order.

    Works on patched models too. Raises UnsupportedModelError, naming what was found and what is
    supported, where a layer has no MLP of a known family, where several stacks of layers have one,
    and for weights that no operator can read (integer, float64, meta, offloaded, quantised,
    distributed).
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"expected a torch.nn.Module, got {type(model).__name__}; pass the loaded model"
        )
    stacks: dict[str, list[MlpSite | None]] = {}
    for name, container in model.named_modules():
        if isinstance(container, nn.ModuleList) and len(container) > 0:
            found = [_find_in_layer(f"{name}.{i}", i, layer) for i, layer in enumerate(container)]
            if any(site is not None for site in found):
                stacks[name] = found
    if not stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no MLP of a known family; found {_describe(model)}; "
            f"{SUPPORTED}"
        )
    if len(stacks) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: several stacks of layers have MLPs of a known family "
            f"({', '.join(stacks)}); pass the module that holds only the text decoder"
        )
    ((stack, found),) = stacks.items()
    sites = [site for site in found if site is not None]
    if len(sites) < len(found):
        missing = [i for i, site in enumerate(found) if site is None]
        layer = model.get_submodule(f"{stack}.{missing[0]}")
        raise UnsupportedModelError(
            f"{type(model).__name__}: layers {_ranges(missing)} of {len(found)} have no MLP of a "
            f"known family; found {_children(layer)}; {SUPPORTED}"
        )
    for site in sites:
        check_weights(site)
        _check_forward(site)
    return sites


def down_projections(model: nn.Module) -> set[str]:
    """Dotted names of the MLPs' down projections, by structure alone: no weight is looked at."""
    return {
        f"{site.name}.{site.family.down}"
        for name, layers in model.named_modules()
        if isinstance(layers, nn.ModuleList)
        for i, layer in enumerate(layers)
        if (site := _find_in_layer(f"{name}.{i}", i, layer)) is not None
    }


@contextmanager
def record_inputs(
    model: nn.Module, sites: Sequence[MlpSite], callback: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Within the block, call `callback(site.index, x)` with each MLP's input during forward.

    x is [batch, length, d], or [rows, d] where the layer flattens it (OPT), not copied or detached.
    """

    def hook_for(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: callback(index, args[0])

    handles = [site.entry.register_forward_pre_hook(hook_for(site.index)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def activation_name(function: Callable[[Tensor], Tensor]) -> str:
    """The key of `reference.ACTIVATIONS` that computes the same, or "" if none does.

    Compared by value, not by class name: transformers has three classes for one tanh GELU, and
    clipped or approximate variants that are something else.
    """
    # Away from +-1e4 a clipped variant shows itself, and the four curves are far apart.
    # Also where a model is being built: on meta, or in another dtype.
    exact: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    far = torch.tensor([-1e4, -100.0, 100.0, 1e4], **exact)
    points = torch.cat([torch.linspace(-20, 20, 401, **exact), far])
    with torch.no_grad(), torch.device("cpu"):
        values = function(points.clone())
        for name, candidate in ACTIVATIONS.items():
            if torch.allclose(values, candidate(points), rtol=1e-5, atol=1e-6):
                return name
    return ""


def _find_in_layer(name: str, index: int, layer: nn.Module) -> MlpSite | None:
    sites = []
    for family in FAMILIES:
        if family.inline:
            if type(layer).__name__ in family.layer_classes and _fits(layer, family):
                sites.append(MlpSite(index, name, layer, "", family))
            continue
        for child, module in layer.named_children():
            if _fits(module, family) and type(module).__name__ not in ODD_CLASSES:
                sites.append(MlpSite(index, f"{name}.{child}", layer, child, family))
    return sites[0] if len(sites) == 1 and sites[0].activation else None


def _fits(module: nn.Module, family: Family) -> bool:
    return callable(getattr(module, family.activation, None)) and all(
        isinstance(getattr(getattr(module, name, None), "weight", None), Tensor)
        for name in family.linears
    )


def _is_patched(module: nn.Module, family: Family) -> bool:
    entry = getattr(module, family.up) if family.inline else module
    return getattr(entry, "is_stand_in", False)


def check_weights(site: MlpSite) -> None:
    """Refuse parameters whose bytes are not plain floats in memory on one device."""
    where = site.name
    patched = _is_patched(site.module, site.family)
    dtypes, devices = set(), set()
    for name in site.family.linears:
        linear = site.linear(name)
        weight = linear.weight
        if hasattr(linear, "_hf_hook") or hasattr(site.module, "_hf_hook"):
            raise UnsupportedModelError(
                f"{where}.{name} carries accelerate hooks (offloaded or dispatched); load the "
                "model on one device, without device_map"
            )
        if weight.is_meta:
            raise UnsupportedModelError(
                f"{where}.{name}.weight is on the meta device and has no values; load the model "
                "into memory first"
            )
        if type(weight) not in (nn.Parameter, Tensor):
            raise UnsupportedModelError(
                f"{where}.{name}.weight is a {type(weight).__name__} (quantised or distributed); "
                "expected a plain parameter: load the model unquantised on one device"
            )
        is_packed = isinstance(getattr(linear, "original", linear), PackedLinear)
        if weight.dtype not in DTYPES and not is_packed:
            raise UnsupportedModelError(
                f"{where}.{name}.weight has dtype {weight.dtype}; expected float32, float16 or "
                "bfloat16: load the model unquantised, or convert it with model.to(torch.bfloat16)"
            )
        shape = (site.d, site.f) if name == site.family.down else (site.f, site.d)
        if is_packed and (linear.out_features, linear.in_features) != shape:
            raise UnsupportedModelError(f"{where}.{name} is {linear}; expected {shape}")
        if not is_packed and tuple(weight.shape) != shape:
            raise UnsupportedModelError(
                f"{where}.{name}.weight has shape {tuple(weight.shape)}; expected {shape}: load "
                "the model unquantised"
            )
        if not patched and type(linear) not in LAYERS:
            raise UnsupportedModelError(
                f"{where}.{name} is a {type(linear).__name__}; expected torch.nn.Linear: merge "
                "adapters or remove parametrisations first, or load the model unquantised"
            )
        if name != site.family.down and not weight.is_contiguous():
            raise UnsupportedModelError(
                f"{where}.{name}.weight has strides {weight.stride()}; expected contiguous rows: "
                "set weight.data = weight.data.contiguous()"
            )
        dtypes.add(weight.dtype)
        devices.add(weight.device)
    if len(dtypes) > 1 or len(devices) > 1:
        raise UnsupportedModelError(
            f"{where}: projections of mixed dtype or device "
            f"({sorted(map(str, dtypes))}, {sorted(map(str, devices))}); expected one of each"
        )


def _check_forward(site: MlpSite) -> None:
    """Run a gated MLP on rows of three magnitudes and compare with act(gate x) * (up x) -> down."""
    if site.family.inline or _is_patched(site.module, site.family):
        return
    weights = site.weights()
    generator = torch.Generator(device="cpu").manual_seed(0)
    # Large rows too: a clamp in between shows only there.
    x = torch.randn(3, site.d, generator=generator) * torch.tensor([[1.0], [32.0], [1024.0]])
    x = x.to(weights.device, weights.dtype)
    modes = [(module, module.training) for module in site.module.modules()]
    with torch.no_grad():
        expected = weights.down(weights.activations(x)[1]).float()
        site.module.eval()
        try:
            actual = site.module.forward(x)  # not the call: a user's hooks see nothing of this
        except Exception as error:
            raise UnsupportedModelError(
                f"{site.name} ({type(site.module).__name__}) does not map [rows, d] to [rows, d]: "
                f"{error}; {SUPPORTED}"
            ) from error
        finally:
            for module, training in modes:
                module.training = training
    finite = expected.isfinite()
    if not finite.all(1).any():
        raise UnsupportedModelError(
            f"{site.name} gives no finite output for ordinary input; expected finite weights: look "
            "for NaN in the checkpoint"
        )
    same = isinstance(actual, Tensor) and actual.shape == expected.shape
    if same:
        # What overflows has to overflow in both: a clamp in between would keep it finite.
        same = bool((actual.isfinite() == finite).all())
        whole = finite.all(1)
        off = (actual.float() - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-30)
        same = same and bool((off[whole] < 8 * torch.finfo(weights.dtype).eps).all())
    if not same:
        raise UnsupportedModelError(
            f"{site.name} ({type(site.module).__name__}) looks gated but its forward is not "
            f"down(act(gate x) * up x); {SUPPORTED}"
        )


def check_hooks(site: MlpSite) -> None:
    """Refuse hooks on an MLP's parts: the operators compute the parts in one and would skip them.

    Hooks on the MLP itself are no obstacle, they go on.
    """
    for name in (*site.family.linears, site.family.activation):
        part = site.linear(name)
        own = "forward" in getattr(part, "__dict__", {})
        hooks = getattr(part, "_forward_hooks", None) or getattr(part, "_forward_pre_hooks", None)
        if own or hooks:
            what = "a forward of its own" if own else "forward hooks"
            raise UnsupportedModelError(
                f"{site.name}.{name} carries {what}, which a patched MLP would not run; "
                "remove them before patch, or put them on the MLP"
            )


def _describe(model: nn.Module) -> str:
    for name, container in model.named_modules():
        if isinstance(container, nn.ModuleList) and len(container) > 0:
            return f"{name}.0: {type(container[0]).__name__} with {_children(container[0])}"
    return f"no stack of layers (children: {_children(model)})"


def _children(module: nn.Module) -> str:
    parts = []
    for name, child in module.named_children():
        inside = ", ".join(f"{n} {type(c).__name__}" for n, c in child.named_children())
        odd = " (known to compute something else)" if type(child).__name__ in ODD_CLASSES else ""
        parts.append(f"{name} {type(child).__name__}{odd}" + (f" [{inside}]" if inside else ""))
    return "; ".join(parts) or "nothing"


def _ranges(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
