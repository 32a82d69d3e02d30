"""What a model looks like from outside, to compare before and after."""

from __future__ import annotations

from typing import Any

from torch import nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a failed or undone patch must leave as it was."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        seen[f"module {name}"] = (id(module), type(module), module.training)
        seen[f"keys {name}"] = sorted(module.__dict__)
        seen[f"hooks {name}"] = [
            len(getattr(module, hooks))
            for hooks in (
                "_forward_hooks",
                "_forward_pre_hooks",
                "_forward_hooks_with_kwargs",
                "_forward_pre_hooks_with_kwargs",
                "_forward_hooks_always_called",
                "_load_state_dict_post_hooks",
            )
        ]
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        content = None if value.is_meta else value.clone().flatten().tolist()
        seen[name] = (id(parameter), parameter.dtype, tuple(parameter.stride()), content)
    return seen
