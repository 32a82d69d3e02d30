"""The paper's theory, figures and tables as commands: one file per study, found by this registry.

A study module has `run(setting: Setting, report: Report) -> None`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from ..errors import ConfigurationError


@dataclass(frozen=True)
class Study:
    """`name` on the command line; `module` here; `title` and `source` (of the paper) in reports."""

    name: str
    module: str
    title: str
    source: str

    def load(self) -> ModuleType:
        """The module with the study's `run`, imported when it is asked for."""
        return importlib.import_module(f".{self.module}", __package__)


# In the order in which `moyu study all` runs them.
STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        Study("gradient", "gradient", "Why activations shrink in training", "eq. 1-6"),
        Study("training", "training", "When over-activation appears", "section 3.1"),
        Study("history", "history", "Weight importance and history", "eq. 7-10, section 3.2.1"),
        Study("inertia", "inertia", "Activation inertia", "section 3.2.2, Figures 1-4"),
        Study("heavy-hitters", "heavy_hitters", "Heavy hitters", "section 3.2.2, Table 5"),
        Study("prompt-length", "prompt_length", "Shorter prompts", "section 4.4, Table 4"),
        Study("tables", "tables", "The paper's tables", "Tables 1-5"),
        Study("qrida", "qrida", "A router made of the weights", "beyond the paper"),
        Study("qrida-bytes", "qrida_bytes", "What the bytes buy", "beyond the paper"),
        Study("frontier", "frontier", "Where dynamic activation pays", "beyond the paper"),
        Study("qrida-guard", "qrida_guard", "The guard on shifted text", "beyond the paper"),
    )
}


def find(name: str) -> Study:
    """The study of this name. Raises ConfigurationError that lists the known ones."""
    if name not in STUDIES:
        raise ConfigurationError(f"study is {name!r}; expected one of {', '.join(STUDIES)}, all")
    return STUDIES[name]
