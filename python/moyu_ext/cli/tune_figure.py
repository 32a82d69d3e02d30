"""The figure of `moyu tune`: which layers leave out what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..calibration.tuned import Tuned


def layers(tuned: Tuned, path: Path) -> None:
    """Write the layers' shares of exact and estimated neurons, and their losses, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    shares, losses = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    places = range(len(tuned.layers))
    exact = [layer.exact for layer in tuned.layers]
    shares.bar(places, exact, label="computed")
    shares.bar(places, [x.estimated for x in tuned.layers], bottom=exact, label="estimated")
    shares.set_ylabel("share of neurons")
    shares.set_ylim(0, 1)
    shares.legend(loc="lower right")
    shares.set_title(
        f"{tuned.model}: KL {tuned.kl:.4f} of {tuned.budget:.4g} nats, MLPs "
        f"{tuned.dense_seconds / max(tuned.seconds, 1e-12):.2f}x as fast (predicted)"
    )
    losses.bar(places, [1e3 * layer.loss for layer in tuned.layers], color="grey")
    losses.set_ylabel("loss, millinats")
    losses.set_xlabel("layer")
    figure.savefig(path, dpi=120)
