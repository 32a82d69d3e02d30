"""What `report` returns: which fraction of the neurons was used, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One patched MLP since the patch (or the last reset).

    density: active neurons / f over the governed tokens, NaN if there were none; tokens: positions
    that obeyed the method; dense_tokens: positions that ran with all neurons (prompts, fallbacks,
    padding included); refreshes: sets chosen, one per sequence and prompt.
    """

    index: int
    name: str
    f: int
    density: float
    tokens: int
    dense_tokens: int
    refreshes: int


@dataclass(frozen=True)
class Report:
    """The patched layers and the method's description; `str()` gives a table."""

    method: str
    layers: tuple[LayerReport, ...]

    @property
    def density(self) -> float:
        """Realised density: the mean over governed tokens and layers; NaN if there were none."""
        tokens = sum(layer.tokens for layer in self.layers)
        if tokens == 0:
            return math.nan
        used = sum(layer.density * layer.tokens for layer in self.layers if layer.tokens)
        return used / tokens

    @property
    def sparsity(self) -> float:
        """1 - density."""
        return 1.0 - self.density

    def __str__(self) -> str:
        lines = [
            self.method,
            f"{'layer':>5}  {'neurons':>7}  {'density':>7}  {'tokens':>7}  {'dense':>7}  "
            f"{'refreshes':>9}",
        ]
        for layer in self.layers:
            lines.append(
                f"{layer.index:>5}  {layer.f:>7}  {_percent(layer.density):>7}  "
                f"{layer.tokens:>7}  {layer.dense_tokens:>7}  {layer.refreshes:>9}"
            )
        lines.append(f"{'mean':>5}  {'':>7}  {_percent(self.density):>7}")
        return "\n".join(lines)


def _percent(density: float) -> str:
    return "-" if math.isnan(density) else f"{100 * density:.1f} %"
