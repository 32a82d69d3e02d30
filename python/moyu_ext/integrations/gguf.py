"""Models from GGUF files, their codes as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._progress import steps
from ..errors import ArtifactError, ConfigurationError, UnsupportedModelError
from ..models.families import down_projections
from ..models.packed import HEAD_BITS, describe, find_layers, replace, tied_heads, untie
from ..packing import ggml
from ..packing.layer import PackedLinear
from ..packing.rounding import check_finite, pack_matrix
from ..packing.rows import Format, pack_rows

# Architectures whose tensors differ from Hugging Face's only as said here. rotated: rows of q and k
# lie in pairs for the rotary embedding. shifted: norms are stored plus one.
_ARCHITECTURES: dict[str, dict[str, bool]] = {
    "llama": {"rotated": True},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"shifted": True},
    "gemma3": {"shifted": True},
}
_DOWN = Format(8, 32)


def load_gguf(
    path: str | Path, dtype: torch.dtype = torch.bfloat16, *, progress: bool = True
) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file; its linear layers as packed rows, tensor by tensor.

    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K and Q5_K keep their codes, in groups of 32 (`packing.ggml`).
    An MLP's down projection is rounded again, at 8 bits in groups of 32, since its groups run along
    the neurons in the file and within a neuron in packed rows; so are other types of codes. What
    the file has in floats stays so, in `dtype`, and so do embeddings and norms; a head that shares
    the embeddings' weights is packed. `model.gguf_types` says what became of each layer.

    Raises ArtifactError for a file that is no whole GGUF file, UnsupportedModelError for an
    architecture or tensors that are not known, ConfigurationError without the package gguf.
    """
    path = Path(path)
    reader, library = _read(path)
    architecture = _text(reader, "general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path} holds a model of architecture {architecture!r}; known are "
            f"{', '.join(_ARCHITECTURES)}: load it with transformers' gguf_file=..., then "
            "moyu_ext.pack(model)"
        )
    import transformers

    where: dict[str, Any] = {"gguf_file": path.name}
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent, **where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **where)
    except Exception as error:  # transformers and gguf: each has its own family
        raise ArtifactError(
            f"{path} has no configuration that transformers reads: {error}"
        ) from error
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    layers = find_layers(model)
    tied = [name for name in tied_heads(model) if "output.weight" not in tensors]
    down = down_projections(model)
    kinds: dict[str, str] = {}
    filled: set[str] = set()
    names = library.get_tensor_name_map(
        library.MODEL_ARCH[architecture.upper()], config.get_text_config().num_hidden_layers
    )
    wanted = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    with steps("reading", progress) as step:
        for done, name in enumerate(wanted):
            step(name, done, len(wanted))
            layer, _, kind = name.rpartition(".")
            source = names.get_name(layer) if layer not in tied else "token_embd"
            tensor = tensors.get(f"{source}.{kind}")
            if tensor is None:
                raise UnsupportedModelError(
                    f"{path} has no tensor {source}.{kind} for {name}; it is no whole "
                    f"{architecture} model"
                )
            filled.add(tensor.name)
            order = _order(architecture, layer, config)
            if layer in layers and kind == "weight":
                rows, fmt, kinds[layer] = _packed(tensor, library, layer in down, order)
                if rows is not None:
                    packed = PackedLinear.like(layers[layer], fmt, transposed=layer in down)
                    packed.hold(rows)
                    replace(model, layer, packed)
                    continue
            value = torch.tensor(library.quants.dequantize(tensor.data, tensor.tensor_type))
            value = value if order is None else value[order]
            if "norm" in layer.rpartition(".")[2] and _ARCHITECTURES[architecture].get("shifted"):
                value = value - 1
            _set(model, name, value.to(dtype))
    left = [name for name in tensors if name not in filled and not name.startswith("rope_")]
    if left:
        raise UnsupportedModelError(
            f"{path} has tensors that a {architecture} model of transformers does not: "
            f"{', '.join(left[:4])}"
        )
    untie(model, tied)
    _fill_buffers(model, config, dtype)
    model.config.quantization_config = describe(
        {n: m.format for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    )
    model.gguf_types = kinds
    return model.eval(), tokenizer


def _read(path: Path) -> tuple[Any, Any]:
    try:
        import gguf
    except ImportError as error:
        raise ConfigurationError(
            "GGUF files are read with the package gguf; install it: pip install gguf"
        ) from error
    if not path.is_file():
        raise ConfigurationError(f"there is no file {path}")
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # whatever its parser meets
        raise ArtifactError(
            f"{path} is no whole GGUF file ({type(error).__name__}: {error}); get it again"
        ) from error
    count = reader.fields.get("split.count")
    if count is not None and int(count.contents()) > 1:
        raise UnsupportedModelError(
            f"{path} is one of {int(count.contents())} parts; join them with llama.cpp's "
            "llama-gguf-split --merge"
        )
    return reader, gguf


def _text(reader: Any, key: str) -> str:
    field = reader.fields.get(key)
    return "" if field is None else str(field.contents())


def _order(architecture: str, layer: str, config: Any) -> Tensor | None:
    """Where the file's rows of q and k lie in Hugging Face's, or None where they lie the same."""
    part = layer.rpartition(".")[2]
    if part not in ("q_proj", "k_proj") or not _ARCHITECTURES[architecture].get("rotated"):
        return None
    text = config.get_text_config()
    heads = text.num_attention_heads if part == "q_proj" else text.num_key_value_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return torch.arange(heads * size).view(heads, size // 2, 2).transpose(1, 2).reshape(-1)


def _packed(
    tensor: Any, library: Any, transposed: bool, order: Tensor | None
) -> tuple[Tensor | None, Format, str]:
    """Packed rows of a weight, or None where it is in floats, their format, what became of it."""
    kind = tensor.tensor_type.name
    if kind in ("F32", "F16", "BF16", "F64"):
        return None, _DOWN, f"{kind}, kept"
    if kind in ggml.TYPES and not transposed:
        data = torch.from_numpy(tensor.data.copy())
        codes = ggml.codes_of(kind, data if order is None else data[order])
        fmt = Format(ggml.TYPES[kind][0], 32)
        return pack_rows(codes, fmt), fmt, f"{kind}, its codes"
    try:
        plain = torch.from_numpy(library.quants.dequantize(tensor.data, tensor.tensor_type))
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"{tensor.name} is of type {kind}, which cannot be read; known are "
            f"{', '.join(ggml.TYPES)}, Q6_K and floats"
        ) from error
    check_finite(tensor.name, plain)
    plain = plain if order is None else plain[order]
    fmt = _DOWN if transposed else Format(HEAD_BITS, 32)
    rows = pack_matrix(plain.t() if transposed else plain, fmt)
    return rows, fmt, f"{kind}, rounded to {fmt}"


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    if owner.get_parameter(child).shape != value.shape:
        raise UnsupportedModelError(
            f"{name} has shape {list(value.shape)} in the file, and "
            f"{list(owner.get_parameter(child).shape)} by its configuration"
        )
    setattr(owner, child, nn.Parameter(value, requires_grad=False))


def _fill_buffers(model: nn.Module, config: Any, dtype: torch.dtype) -> None:
    """The values of buffers, which are lost on meta and do not depend on the layers' number."""
    import copy

    import transformers

    small = copy.deepcopy(config)
    text = small.get_text_config()
    text.num_hidden_layers, text.vocab_size = 0, 1
    text.pad_token_id = None
    right = dict(transformers.AutoModelForCausalLM.from_config(small, dtype=dtype).named_buffers())
    for name, _ in list(_buffers(model)):
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent).register_buffer(child, right[name].clone(), persistent=False)


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, buffer) for name, buffer in model.named_buffers() if buffer.is_meta)
