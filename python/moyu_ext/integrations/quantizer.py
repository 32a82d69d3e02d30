"""Packed weights through transformers' door for quantised models.

`from_pretrained(..., quantization_config=PackConfig(bits=4))` packs while it loads, tensor by
tensor; `save_pretrained` of a packed model writes packed rows, and `from_pretrained` of such a
directory reads them back, once this module is imported (`moyu_ext.PackConfig` does that).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ConfigurationError, UnsupportedModelError
from ..models.families import down_projections
from ..models.packed import (
    QUANT_METHOD,
    describe,
    find_layers,
    plan,
    replace,
    tied_heads,
    untie,
)
from ..packing.layer import PackedLinear
from ..packing.rounding import check_finite, pack_matrix
from ..packing.rows import Format


@register_quantization_config(QUANT_METHOD)
class PackConfig(QuantizationConfigMixin):
    """For `from_pretrained(quantization_config=...)`: bits and group as `moyu_ext.pack` takes them.

    layers: {name: (bits, group)} of a model whose files are packed already.
    """

    def __init__(
        self,
        bits: int | dict[str, int] = 8,
        group: int | None = None,
        layers: dict[str, tuple[int, int]] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.bits = bits
        self.group = group
        self.layers = layers
        for number in bits.values() if isinstance(bits, dict) else [bits]:
            Format(number, 64 if group is None else group)
        if layers is not None:
            self.formats()

    def formats(self) -> dict[str, Format]:
        """The formats in a packed model's files, by layer; ConfigurationError for bad ones."""
        try:
            return {name: Format(*pair) for name, pair in dict(self.layers or {}).items()}
        except TypeError as error:
            raise ConfigurationError(
                f"the packed model's configuration has layers {self.layers!r}; expected "
                "{name: [bits, group]}"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """What config.json says of a packed model."""
        return describe(self.formats())


@register_quantizer(QUANT_METHOD)
class PackQuantizer(HfQuantizer):
    """Builds packed layers before the weights are loaded, and packs what comes unpacked."""

    quantization_config: PackConfig
    _waiting: dict[str, Format]

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        config = self.quantization_config
        if self.pre_quantized:
            formats, later = config.formats(), []
            if unknown := formats.keys() - find_layers(model).keys():
                raise UnsupportedModelError(
                    f"the configuration has packed layers that {type(model).__name__} does not "
                    f"have: {', '.join(sorted(unknown)[:4])}; it is another model's"
                )
        else:
            formats = plan(model, config.bits, config.group)
            later = tied_heads(model)  # their weights are the embedding's, known in the end
        transposed = down_projections(model)
        for name, fmt in formats.items():
            if name not in later:
                layer: Any = model.get_submodule(name)
                packed = PackedLinear.like(layer, fmt, transposed=name in transposed)
                replace(model, name, packed)
        self._waiting = {name: formats[name] for name in later if name in formats}
        config.layers = {name: (fmt.bits, fmt.group) for name, fmt in formats.items()}
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        """Whether it is the weight of a packed layer that comes unpacked."""
        name, _dot, kind = param_name.rpartition(".")
        packed = isinstance(model.get_submodule(name), PackedLinear)
        return not self.pre_quantized and kind == "weight" and packed

    def get_quantize_ops(self) -> _Pack:
        """What turns such a weight into packed rows."""
        return _Pack()

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, fmt in self._waiting.items():
            layer: Any = model.get_submodule(name)
            replace(model, name, PackedLinear.of(layer, fmt))
        untie(model, list(self._waiting))
        # Models are packed by `moyu_ext.pack` too, without a quantizer: the one way to tell it.
        model.config.quantization_config = self.quantization_config.to_dict()
        return model.eval()

    def is_serializable(self) -> bool:
        """Yes: packed rows are tensors like others."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: packed weights only infer."""
        return False


class _Pack(ConversionOps):
    """A weight as packed rows, in its layer's format."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str, model: nn.Module, **_: Any
    ) -> dict[str, Tensor]:
        (found,) = input_dict.values()
        weight: Tensor = found[0] if isinstance(found, list) else found
        name = full_layer_name.rpartition(".")[0]
        layer = model.get_submodule(name)
        assert isinstance(layer, PackedLinear)
        check_finite(name, weight)
        with torch.no_grad():
            rows = pack_matrix(weight.t() if layer.transposed else weight, layer.format)
        return {full_layer_name: rows}
