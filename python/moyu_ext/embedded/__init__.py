"""The models and the held-out text that ship with the package, so that the demo needs no network.

Twin Llamas that the project trained itself (README.md here is their model card): `stories_silu`
with SwiGLU, `stories_relu` with ReLU in its place. `heldout.txt` was written for this project and
is in no training set.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigurationError

_HERE = Path(__file__).parent


def names() -> list[str]:
    """The embedded models."""
    return sorted(config.parent.name for config in _HERE.glob("*/config.json"))


def path(name: str) -> Path:
    """The Hugging Face directory of an embedded model.

    Raises ConfigurationError for a name that is not among `names()`.
    """
    if name not in names():
        raise ConfigurationError(
            f"no embedded model is called {name!r}; there are {', '.join(names()) or 'none'}"
        )
    return _HERE / name


def heldout() -> list[str]:
    """Short stories that no embedded model was trained on."""
    text = (_HERE / "heldout.txt").read_text(encoding="utf-8")
    return [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
