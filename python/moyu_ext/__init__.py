"""Dynamic activation for Hugging Face language models: compute only the neurons that matter.

Names are looked up on first use, so that importing the package loads neither torch nor the
compiled extension.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    ArtifactError,
    ConfigurationError,
    ExtensionError,
    MoyuError,
    PatchStateError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from .calibration.calibrate import calibrate
    from .calibration.thresholds import Thresholds
    from .methods import QRIDA, SRIDA, STDA, TDA, Dense
    from .patching.patch import patch, report, scoring, unpatch
    from .shadow.store import Shadows

__version__ = "0.1.0"

_HOMES = {
    "Dense": ".methods",
    "QRIDA": ".methods",
    "SRIDA": ".methods",
    "STDA": ".methods",
    "TDA": ".methods",
    "Shadows": ".shadow.store",
    "Thresholds": ".calibration.thresholds",
    "calibrate": ".calibration.calibrate",
    "patch": ".patching.patch",
    "report": ".patching.patch",
    "scoring": ".patching.patch",
    "unpatch": ".patching.patch",
}

__all__ = [
    "QRIDA",
    "SRIDA",
    "STDA",
    "TDA",
    "ArtifactError",
    "ConfigurationError",
    "Dense",
    "ExtensionError",
    "MoyuError",
    "PatchStateError",
    "Shadows",
    "Thresholds",
    "UnsupportedModelError",
    "calibrate",
    "patch",
    "report",
    "scoring",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moyu_ext' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
