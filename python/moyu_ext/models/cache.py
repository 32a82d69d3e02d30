"""The cache of a forward, by the name that the installed transformers has for it.

Version 5.24 renamed the argument and the output `past_key_values` to `cache`.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

NAMES = ("cache", "past_key_values")


def argument(module: nn.Module) -> str | None:
    """What the module's forward calls its cache; None where it takes none."""
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in NAMES if name in parameters), None)


def passing(model: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword arguments of a forward that continues `cache` (None: begins one)."""
    return {argument(model) or _installed(): cache}


def _installed() -> str:
    """The name for a wrapper whose forward names no arguments."""
    import transformers
    from packaging.version import parse

    return NAMES[parse(transformers.__version__) < parse("5.24")]


def cache_of(output: Any) -> Any:
    """The cache that a forward returned, or None."""
    if isinstance(output, tuple):
        return next((item for item in output if hasattr(item, "get_seq_length")), None)
    found = (getattr(output, name, None) for name in NAMES)
    return next((item for item in found if hasattr(item, "get_seq_length")), None)
