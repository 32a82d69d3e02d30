"""Named geometries: the shapes of published models, to be filled with random weights."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigurationError


@dataclass(frozen=True)
class Geometry:
    """Hidden size d, intermediate size f, and what a whole model needs besides.

    `layers` is None where only the MLP is known. `biased`: every projection has a bias (OPT).
    """

    name: str
    d: int
    f: int
    layers: int | None = None
    heads: int = 0
    kv_heads: int = 0
    vocabulary: int = 0
    gated: bool = True
    activation: str = "silu"
    biased: bool = False
    tied: bool = False

    @property
    def matrices(self) -> int:
        """Weight matrices in one MLP."""
        return 3 if self.gated else 2


GEOMETRIES = {
    g.name: g
    for g in (
        Geometry("llama-2-7b", 4096, 11008, 32, 32, 32, 32000),
        Geometry("llama-3-8b", 4096, 14336, 32, 32, 8, 128256),
        Geometry("llama-3.2-1b", 2048, 8192, 16, 32, 8, 128256, tied=True),
        Geometry("tinyllama-1.1b", 2048, 5632, 22, 32, 4, 32000),
        Geometry(
            "opt-6.7b", 4096, 16384, 32, 32, 32, 50272,
            gated=False, activation="relu", biased=True, tied=True,
        ),
    )
}  # fmt: skip


def geometry(name: str) -> Geometry:
    """The geometry of this name, or of "d,f": one gated SiLU MLP of that size.

    Raises ConfigurationError for anything else.
    """
    if name in GEOMETRIES:
        return GEOMETRIES[name]
    parts = name.replace("x", ",").split(",")
    if len(parts) == 2 and all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        d, f = (int(part) for part in parts)
        return Geometry(f"{d}x{f}", d, f)
    raise ConfigurationError(
        f"geometry is {name!r}; expected one of {', '.join(GEOMETRIES)}, or d,f such as 4096,11008"
    )
