"""The figure of `moyu tune`: perplexity against speed, and the point chosen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..calibration.tune import Tuned


def frontier(tuned: Tuned, path: Path, measured: float | None = None) -> None:
    """Write the frontier as PNG; `measured`: speed-up of a decode step at the chosen point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    points = sorted(tuned.frontier, key=lambda p: p.speedup)
    axes.errorbar(
        [p.speedup for p in points],
        [100 * p.increase for p in points],
        yerr=[100 * p.error for p in points],
        marker="o",
        markersize=4,
        capsize=2,
        label="tuning text",
    )
    chosen = tuned.point
    axes.errorbar(
        [chosen.speedup],
        [100 * tuned.increase],
        yerr=[100 * tuned.error],
        marker="s",
        markersize=7,
        capsize=3,
        linestyle="none",
        label=f"chosen, held-out text (density {chosen.density:.2f})",
    )
    if measured is not None:
        axes.plot(
            [measured],
            [100 * tuned.increase],
            marker="D",
            markersize=7,
            linestyle="none",
            label="chosen, speed measured",
        )
    axes.axhline(100 * tuned.max_increase, linestyle="--", linewidth=1, color="grey", label="limit")
    axes.set_xlabel("decode speed over dense, predicted from the bytes read")
    axes.set_ylabel("perplexity over dense, %")
    axes.set_title(f"{tuned.thresholds.model}: {tuned.thresholds.method}")
    axes.legend()
    figure.savefig(path, dpi=120)
