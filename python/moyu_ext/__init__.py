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
    from .calibration.budget import patch
    from .calibration.calibrate import calibrate
    from .calibration.split_experts import split_experts
    from .calibration.thresholds import Thresholds
    from .calibration.train_router import train_router
    from .calibration.tune import tune
    from .calibration.tuned import Tuned
    from .evaluation.perplexity import generation_perplexity
    from .methods import QRIDA, RIDA, RODA, SRIDA, STDA, TDA, Dense, Lossless, OnlineRODA
    from .patching.patch import report, scoring, unpatch
    from .routers.experts import Experts
    from .routers.router import Router
    from .shadow.store import Shadows

__version__ = "0.1.0"

_HOMES = {
    "Dense": ".methods",
    "Lossless": ".methods",
    "Tuned": ".calibration.tuned",
    "PackConfig": ".integrations.quantizer",
    "Experts": ".routers.experts",
    "OnlineRODA": ".methods",
    "QRIDA": ".methods",
    "RIDA": ".methods",
    "RODA": ".methods",
    "Router": ".routers.router",
    "SRIDA": ".methods",
    "STDA": ".methods",
    "TDA": ".methods",
    "Shadows": ".shadow.store",
    "Thresholds": ".calibration.thresholds",
    "calibrate": ".calibration.calibrate",
    "generation_perplexity": ".evaluation.perplexity",
    "load": ".integrations.load",
    "pack": ".models.packed",
    "patch": ".calibration.budget",
    "report": ".patching.patch",
    "scoring": ".patching.patch",
    "split_experts": ".calibration.split_experts",
    "train_router": ".calibration.train_router",
    "tune": ".calibration.tune",
    "unpatch": ".patching.patch",
}

__all__ = [
    "QRIDA",
    "RIDA",
    "RODA",
    "SRIDA",
    "STDA",
    "TDA",
    "ArtifactError",
    "ConfigurationError",
    "Dense",
    "Experts",
    "ExtensionError",
    "Lossless",
    "MoyuError",
    "OnlineRODA",
    "PackConfig",
    "PatchStateError",
    "Router",
    "Shadows",
    "Thresholds",
    "Tuned",
    "UnsupportedModelError",
    "calibrate",
    "generation_perplexity",
    "load",
    "pack",
    "patch",
    "report",
    "scoring",
    "split_experts",
    "train_router",
    "tune",
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
