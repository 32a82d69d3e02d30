"""What QRIDA's studies measure on: text of one domain, and the loss of it under a method."""

from __future__ import annotations

import math

from torch import Tensor

from ..calibration.continuation import continuation_losses
from ..evaluation.agreement import patched
from ..methods.base import Method
from ..methods.dense import Dense
from ..patching.patch import report as usage
from .setting import Setting, Subject

# Models that were trained on more than the main domain.
DOMAINS = {"mix4m_silu": ("stories", "news"), "mix4m_relu": ("stories", "news")}


def domains_of(setting: Setting, subject: Subject) -> list[str]:
    """The domains that a model is measured on."""
    known = setting.corpus.domains()
    wanted = [name for name in DOMAINS.get(subject.name, ()) if name in known]
    return wanted or known[:1]


class Text:
    """Rows of one domain: held-out ones with the dense model's losses, and others to learn from.

    `layers`: the realised density of each layer in the last measurement.
    """

    def __init__(self, setting: Setting, subject: Subject, domain: str) -> None:
        self.subject, self.domain = subject, domain
        self.context = setting.size(64, 16)
        length = self.context + setting.size(192, 32)
        self.rows = setting.rows(subject, length, setting.size(24, 4), domain)
        self.documents = setting.corpus.documents(domain, train=True)
        self.other = setting.rows(subject, length, setting.size(24, 4), domain, train=True)
        self.layers: list[float] = []
        self.dense = self._losses(Dense())[0]

    @property
    def perplexity(self) -> float:
        """Of the dense model."""
        return math.exp(self.dense.mean().item())

    def increase(self, method: Method) -> dict[str, float]:
        """Of perplexity over dense, one standard error of it (over rows), realised density."""
        found, density = self._losses(method)
        change = found - self.dense
        ratio = math.exp(change.mean().item())
        error = ratio * change.std().item() / math.sqrt(len(change))
        return {"increase": ratio - 1, "error": error, "density": density}

    def _losses(self, method: Method) -> tuple[Tensor, float]:
        """Mean loss of each row's continuation, float64 [rows], and the realised density."""
        model = self.subject.model
        with patched(model, method):
            loss = continuation_losses(model, self.rows, self.context).mean(1)
            used = usage(model)
        self.layers = [layer.density for layer in used.layers]
        return loss, used.density


def percent(point: dict[str, float]) -> str:
    """A rise of perplexity with its standard error."""
    return f"{100 * point['increase']:+.2f} % +- {100 * point['error']:.2f}"
