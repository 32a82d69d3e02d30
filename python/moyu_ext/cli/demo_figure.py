"""The picture that `moyu demo` draws: density per layer, and CETT against the threshold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_atomically

if TYPE_CHECKING:
    from .demo_measure import ModelResult

# Okabe and Ito's colours, told apart with any colour vision; a marker each, for print.
_COLOURS = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#F0E442")
_MARKERS = "so^Dv<>P"
_NAMES = {"silu": "SwiGLU", "relu": "ReLU"}


def draw(results: list[ModelResult], target: float, path: Path) -> None:
    """One row of two panels per model, as PNG."""
    # A figure of its own, without pyplot: no global state and no window, whatever the backend.
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.0 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(results), 2, squeeze=False)
    for (left, right), result in zip(axes, results, strict=True):
        name = f"{result.model} ({_NAMES.get(result.activation, result.activation)})"
        _densities(left, result)
        left.set_title(f"{name}: neurons computed", fontsize=11)
        _curves(right, result, target)
        right.set_title(f"{name}: error on held-out text", fontsize=11)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_atomically(path, content.getvalue())


def _densities(axes: Any, result: ModelResult) -> None:
    layers = range(result.layers)
    for index, row in enumerate(result.rows):
        if row.name != "Dense":
            axes.plot(
                layers,
                [100 * density for density in row.densities],
                color=_COLOURS[index % len(_COLOURS)],
                marker=_MARKERS[index % len(_MARKERS)],
                linestyle="--" if index % 2 else "-",  # lines may lie on each other
                label=row.name,
            )
    axes.set_xlabel("layer")
    axes.set_xticks(layers)
    axes.set_ylabel("density, % of neurons")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _curves(axes: Any, result: ModelResult, target: float) -> None:
    import matplotlib

    shades = matplotlib.colormaps["viridis"]
    chosen = result.calibration["tda, product"].layers
    last = max(result.layers - 1, 1)
    for index, (epsilons, cett) in enumerate(result.curves):
        colour = shades(0.9 * index / last)
        axes.plot(epsilons, cett, color=colour, label=f"layer {index}")
        at = _interpolate(epsilons, cett, chosen[index].epsilon)
        axes.plot(chosen[index].epsilon, at, "o", color=colour, markeredgecolor="black")
    axes.axhline(target, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        f"target {target}", (0.01, target), (0, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", fontsize=8,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("threshold on the neuron norm (dots: calibrated)")
    axes.set_ylabel("mean CETT")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")


def _interpolate(x: list[float], y: list[float], at: float) -> float:
    import numpy

    return float(numpy.interp(at, x, y))
