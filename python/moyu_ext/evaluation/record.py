"""What every file of results says of the run, and how its numbers are written."""

from __future__ import annotations

import math
import platform
from typing import Any

import torch


def versions() -> dict[str, str]:
    """Versions that a number may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("moyu_ext", "transformers", "lm-eval", "rouge-score"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def clean(value: Any) -> Any:
    """The value with floats cut to 6 significant digits and non-finite ones as null."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, torch.Tensor):
        return clean(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
