"""Whether what the compiled step has addresses of is still in its place."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from itertools import repeat
from typing import Any

from torch import Tensor, nn
from transformers.utils import output_capturing

from .stack import LayerSpec, NotTaken, Stack

_VERSION = operator.attrgetter("_version")


class Watch:
    """Whether everything that the compiled step has addresses of is still in its place, and nothing
    was hooked onto what it does not call."""

    def __init__(self, stack: Stack) -> None:
        self._owners: list[Mapping[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._tensors: list[Tensor] = []
        self._dicts: list[Mapping[str, Any]] = []
        self._hooks: list[Any] = []
        self._counted: list[Tensor] = []
        for spec in stack.layers:
            for module in (spec.layer, *_parts(spec)):
                self._add_module(module)
        self._add_module(stack.decoder.norm)
        rotary = stack.decoder.rotary_emb
        for name, buffer in rotary._buffers.items():
            self._add(rotary._buffers, name)
            self._counted.append(buffer)
        self._add(stack.decoder._modules, "layers")
        for i, spec in enumerate(stack.layers):
            self._add(stack.decoder.layers._modules, str(i), spec.layer)
        self._settle()

    def _add(self, owner: Mapping[str, Any], name: str, value: Any = None) -> None:
        self._owners.append(owner)
        self._names.append(name)
        self._values.append(owner[name] if value is None else value)

    def _add_module(self, module: nn.Module) -> None:
        self._dicts.append(module.__dict__)
        self._hooks += [module._forward_hooks, module._forward_pre_hooks]
        for name, child in module._modules.items():
            if child is not None:
                self._add(module._modules, name)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self._add(module._parameters, name)
                self._tensors.append(parameter)

    def add_plan(self, module: Any) -> None:
        """Watch what an MLP's plan reads, too. A new value in its weights counts: the rule knows
        their norms."""
        for name in ("rule", "weights", "active", "estimated", "tokens"):
            self._add(module.__dict__, name)
        self._add_module(module)
        for part in module._modules.values():
            if part is not None:
                self._add_module(part)
                self._counted += [p for p in part._parameters.values() if p is not None]
        self._settle()

    def _settle(self) -> None:
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._counted = [t for t in self._counted if not t.is_inference()]
        self._versions = list(map(_VERSION, self._counted))

    def hooked(self) -> bool:
        """Whether there are hooks, or forwards of single objects. transformers' own hooks, which
        stay behind a call with output_attentions, do not count."""
        every = nn.modules.module
        return (
            (any(self._hooks) and not all(map(_is_transformers, self._hooks)))
            or any(map(operator.contains, self._dicts, repeat("forward")))
            or bool(every._global_forward_hooks or every._global_forward_pre_hooks)
        )

    def holds(self) -> bool:
        """Whether nothing moved; NotTaken where something is hooked."""
        if self.hooked():
            raise NotTaken("hooks on its modules")
        return (
            all(map(operator.is_, map(operator.getitem, self._owners, self._names), self._values))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(_VERSION, self._counted)) == self._versions
        )


def capturing() -> bool:
    """Whether a module around the decoder collects what its layers give."""
    collector = getattr(output_capturing, "_active_collector", None)
    return collector is not None and collector.get() is not None


def _is_transformers(hooks: Mapping[int, Any]) -> bool:
    return all(
        getattr(hook, "__module__", "") == output_capturing.__name__ for hook in hooks.values()
    )


def _parts(spec: LayerSpec) -> list[nn.Module]:
    """The modules of a layer that the step does not call."""
    attention: Any = spec.layer.self_attn
    norms = [m for name, m in spec.layer.named_children() if name.endswith("layernorm")]
    return [*norms, attention, *attention.children()]
