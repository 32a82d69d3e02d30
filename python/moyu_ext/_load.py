"""Loads the compiled extension and says what is wrong where that fails."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from .errors import ExtensionError


def load_extension() -> ModuleType:
    """Import ``moyu_ext._C``, which registers ``torch.ops.moyu_ext``.

    torch comes first, so that the extension finds torch's OpenMP runtime loaded and shares it.

    Raises:
        ExtensionError: with the likely causes.
    """
    try:
        return importlib.import_module("moyu_ext._C")
    except ImportError as error:
        raise ExtensionError(
            f"moyu_ext._C does not load: {error}. Likely causes: the package was not installed "
            "(run `pip install .` in the clone); it was built for another Python; or torch "
            f"{torch.__version__} is older than 2.11, against which it is built. "
            "`moyu env` prints a report."
        ) from error


_C = load_extension()
