"""`pack`: a model's linear layers as packed rows."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._progress import steps
from ..errors import ConfigurationError, PatchStateError, UnsupportedModelError
from ..packing.layer import PackedLinear
from ..packing.rounding import check_finite
from ..packing.rows import Format
from .families import DTYPES, down_projections
from .fitting import fitted_rows, fitting_batch

Model = TypeVar("Model", bound=nn.Module)
# A head decides between words that are near each other: with fewer bits it costs more than the
# layers do, and it is one matrix of many.
HEAD_BITS = 8
CUDA_BITS = (4, 8)
QUANT_METHOD = "moyu"  # in a configuration


def is_packed(model: nn.Module) -> bool:
    """Whether a model has packed layers."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


@torch.inference_mode(False)
@torch.no_grad()
def pack(
    model: Model,
    bits: int | Mapping[str, int] = 8,
    group: int | None = None,
    *,
    tokenizer: Any = None,
    texts: Sequence[str] | str | PathLike[str] | None = None,
    progress: bool = True,
) -> Model:
    """Round a model's linear layers to packed rows of `bits` bits; in place, returns the model.

    This loses something: at 8 bits hardly any; below 6 bits small models lose much where each
    weight goes to the nearest level (docs/findings_packed.md). With a tokenizer the layers are
    fitted to text instead: what the rounding of one weight loses is made good by the others, for
    the inputs that each layer gets when those below it are packed (GPTQ, arXiv 2210.17323). That
    takes minutes, and memory for the text's hidden states.
    tokenizer: the model's. texts: strings or a UTF-8 file, of which the first 16,384 tokens are
    used; None with a tokenizer: the model writes its own.
    bits: 3, 4, 5, 6 or 8, or a mapping from patterns of module names ("*.mlp.down_proj") to bits,
    of which the first that fits counts; layers that fit none stay as they are. With one number of
    bits the head has 8. group: columns per scale, 64 by default, or 32 (half a bit more a
    weight). Embeddings stay; a head that shares their weights gets packed ones of its own, and the
    model's configuration says so. Each layer is freed once it is packed, so memory peaks one layer
    above the model's. progress: a bar where stderr is a terminal.

    Raises ConfigurationError for bits or groups that do not exist, patterns that no layer fits, and
    weights that are not finite; UnsupportedModelError where there is no linear layer, or one that
    cannot be read (meta, offloaded, quantised, float64), or that lies on a GPU, where packed
    weights have 4 or 8 bits; PatchStateError for a model that is patched, packed or in training
    mode. After an error the model is as it was; an interrupt leaves it packed in part.
    """
    _check_state(model)
    formats = plan(model, bits, group)
    for name, fmt in formats.items():
        _check_layer(name, model.get_submodule(name), fmt)
    transposed = down_projections(model)
    tied = tied_heads(model)
    if texts is not None and tokenizer is None:
        raise ConfigurationError("texts are given without a tokenizer; pass the model's, too")
    with steps("packing", progress) as step:
        fitted: dict[str, Tensor] = {}
        if tokenizer is not None:
            step("text", 0, len(formats))
            batch = fitting_batch(model, tokenizer, texts)
            fitted = fitted_rows(model, formats, transposed, batch, step)
        for done, (name, fmt) in enumerate(formats.items()):
            step(name, done, len(formats))
            layer: Any = model.get_submodule(name)
            rows = fitted.pop(name, None)
            replace(model, name, PackedLinear.of(layer, fmt, rows, transposed=name in transposed))
    untie(model, [name for name in tied if name in formats])
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.quantization_config = describe(formats)
    return model


def plan(
    model: nn.Module, bits: int | Mapping[str, int], group: int | None = None
) -> dict[str, Format]:
    """The format that `pack` gives each layer, by dotted name.

    Raises ConfigurationError and UnsupportedModelError as `pack` does.
    """
    layers = find_layers(model)
    if not layers:
        raise UnsupportedModelError(
            f"pack: {type(model).__name__} has no torch.nn.Linear (quantised or adapted layers "
            "cannot be packed); load the model unquantised"
        )
    group = 64 if group is None else group
    if isinstance(bits, Mapping):
        chosen = {pattern: Format(number, group) for pattern, number in bits.items()}
        for pattern in chosen:
            if not fnmatch.filter(layers, pattern):
                raise ConfigurationError(
                    f"bits names {pattern!r}, which none of the model's linear layers fits; they "
                    f"are called {', '.join(list(layers)[:8])}, ..."
                )
        formats = {
            name: next(fmt for pattern, fmt in chosen.items() if fnmatch.fnmatch(name, pattern))
            for name in layers
            if any(fnmatch.fnmatch(name, pattern) for pattern in chosen)
        }
    else:
        head = Format(max(Format(bits, group).bits, HEAD_BITS), group)
        heads = _heads(model)
        formats = {name: head if name in heads else Format(bits, group) for name in layers}
    return formats


def find_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers by dotted name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def describe(formats: dict[str, Format]) -> dict[str, Any]:
    """What a packed model's configuration says, so that its files load again."""
    layers = {name: [fmt.bits, fmt.group] for name, fmt in formats.items()}
    return {"quant_method": QUANT_METHOD, "layers": layers}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of this dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def tied_heads(model: nn.Module) -> list[str]:
    """Names of linear layers whose weight is that of an embedding, or will be once it is loaded."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    keys: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return [
        name
        for name, layer in find_layers(model).items()
        if id(layer.weight) in tables or f"{name}.weight" in keys
    ]


def untie(model: nn.Module, heads: list[str]) -> None:
    """Tell a transformers model that these heads have weights of their own now."""
    config: Any = getattr(model, "config", None)
    if heads and config is not None:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
        # Else transformers ties them again, when it loads or resizes something.
        keys: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        for name in heads:
            keys.pop(f"{name}.weight", None)


def _check_state(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"pack: model is a {type(model).__name__}; expected the loaded model, a torch.nn.Module"
        )
    if is_packed(model):
        raise PatchStateError("the model is packed already; load it anew to pack it otherwise")
    if any(getattr(module, "is_stand_in", False) for module in model.modules()):
        raise PatchStateError("the model is patched; call moyu_ext.unpatch(model) before pack")
    if model.training:
        raise PatchStateError(
            "the model is in training mode, but packed weights only infer; call model.eval()"
        )


def _check_layer(name: str, layer: Any, fmt: Format) -> None:
    weight = layer.weight
    if type(layer) is not nn.Linear or type(weight) not in (nn.Parameter, Tensor):
        raise UnsupportedModelError(
            f"{name} is a {type(layer).__name__} with a {type(weight).__name__}; expected a plain "
            "torch.nn.Linear: merge adapters first, or load the model unquantised on one device"
        )
    if hasattr(layer, "_hf_hook") or weight.is_meta:
        raise UnsupportedModelError(
            f"{name}.weight is offloaded or on the meta device; load the model into memory first, "
            "without device_map"
        )
    if weight.dtype not in DTYPES:
        raise UnsupportedModelError(
            f"{name}.weight has dtype {weight.dtype}; expected float32, float16 or bfloat16: load "
            "the model unquantised, or convert it with model.to(torch.bfloat16)"
        )
    if weight.device.type not in ("cpu", "cuda"):
        raise UnsupportedModelError(
            f"{name}.weight is on {weight.device}; packed weights run on cpu and cuda: pack the "
            "model there (model.cpu())"
        )
    if weight.is_cuda and fmt.bits not in CUDA_BITS:
        raise UnsupportedModelError(
            f"{name}.weight is on {weight.device}, where packed weights have 4 or 8 bits, not "
            f"{fmt.bits}; pass bits=4 or 8, or pack the model on the CPU (model.cpu())"
        )
    check_finite(name, weight.detach())


def _heads(model: nn.Module) -> list[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [name for name, module in model.named_modules() if module is head]
