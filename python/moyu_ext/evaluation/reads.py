"""What share of an MLP's weights a method reads: the bound on its speed, beside its density."""

from __future__ import annotations

from ..methods.base import Method
from ..methods.online_roda import OnlineRODA
from ..methods.qrida import QRIDA
from ..methods.rida import RIDA
from ..methods.roda import RODA
from ..patching.families import MlpSite

_BITS = 16  # of a weight, for comparison with the bits of QRIDA's shadow


def weights_read(method: Method, density: float, site: MlpSite) -> float:
    """Bytes of weights that a decoded token reads in this MLP, its router's included, over those of
    the whole MLP, at this realised density, for 16-bit weights.

    With m matrices (3 gated, 2 not): `given` reads density, `gate` (1 + (m - 1) density) / m and
    `product` (m - 1 + density) / m.
    """
    d, f = site.d, site.f
    m = len(site.family.linears)
    whole = {"dense": m, "given": 0, "gate": 1, "product": m - 1}[method.plan]
    read = (whole + (m - whole) * density) / m
    return read + _router(method, d, f, site) / (m * d * f)


def _router(method: Method, d: int, f: int, site: MlpSite) -> float:
    """Weights of the router, counted in those of 16 bits."""
    if isinstance(method, QRIDA):
        gate, up = method.bits_of(site.index)
        bits = gate + up if site.family.gate is not None else up
        return bits / _BITS * d * f
    if isinstance(method, (RODA, OnlineRODA)):
        return float(method.router.layers[site.index].rank * (d + f))
    if isinstance(method, RIDA):
        layer = method.experts.layers[site.index]
        return float(layer.first.shape[0] * (d + layer.experts))
    return 0.0
