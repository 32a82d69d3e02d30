"""Text by domain, in two parts that never meet: to calibrate and train on, and to measure on."""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import embedded
from ..errors import ConfigurationError
from ..models.text import read_texts

DATA_VARIABLE = "MOYU_DATA"
SHIPPED = "shipped stories"  # the domain where there is neither a data folder nor --text
# Domain -> held-out file of the data folder, and the name of its training part in docs.json.xz.
DOMAINS = {
    "stories": ("stories", "stories"),
    "news": ("cnndm", "cnndm"),
    "book": ("pride_prejudice_mod", "book"),
    "code": ("code", "code"),
    "web": ("c4", "c4"),
    "bbc": ("xsum", "xsum"),
}
_ENOUGH = 1 << 20  # tokens; more of one file is never read
_PIECE = 2000  # characters of one document where a file has no separators


class Corpus:
    """The text at hand: the user's files, else the data folder, else the shipped stories.

    Raises ConfigurationError for a data folder that is not there.
    """

    def __init__(self, data: Path | None = None, texts: Sequence[Path] = ()) -> None:
        if data is None and os.environ.get(DATA_VARIABLE):
            data = Path(os.environ[DATA_VARIABLE])
        if data is not None and not data.is_dir():
            raise ConfigurationError(
                f"data folder {data} is not a directory; pass --data DIR or set {DATA_VARIABLE} "
                "to the folder with models/ and train_mix/heldout/"
            )
        self.data = data
        self.texts = list(texts)

    def describe(self) -> str:
        """Where the text comes from, without paths."""
        if self.texts:
            return ", ".join(path.name for path in self.texts)
        return "data folder" if self.data else SHIPPED

    def digest(self) -> str:
        """Of the content of all that `documents` reads."""
        content: list[Any]
        if self.texts:
            content = [read_texts(path, _ENOUGH) for path in self.texts]
        elif self.data is None:
            content = embedded.heldout()
        else:
            files = [*map(self._heldout, DOMAINS), self._training]
            content = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def domains(self) -> list[str]:
        """Names of the domains, the main one first."""
        if self.texts:
            return [path.stem for path in self.texts]
        if self.data is None:
            return [SHIPPED]
        return [name for name in DOMAINS if self._heldout(name).is_file()]

    def documents(self, domain: str | None = None, train: bool = False) -> list[str]:
        """The texts of a domain (the main one by default): to measure on, or with `train` to
        calibrate and train on. Raises ConfigurationError for a domain without text."""
        known = self.domains()
        name = domain or (known[0] if known else "stories")
        if name not in known:
            raise ConfigurationError(
                f"no text of domain {name!r}; at hand: {', '.join(known) or 'none'}. Pass "
                f"--text FILE, or --data DIR with train_mix/heldout/"
            )
        if self.texts:
            return _halves(read_texts(self.texts[known.index(name)], _ENOUGH))[train]
        if self.data is None:
            return _halves(embedded.heldout())[train]
        file = self._training
        if train and file.is_file():
            return _training_documents(file)[DOMAINS[name][1]]
        whole = read_texts(self._heldout(name), _ENOUGH)
        return _halves(whole)[train] if not file.is_file() else whole

    @property
    def _training(self) -> Path:
        assert self.data is not None
        return self.data / "train_mix" / "docs.json.xz"

    def _heldout(self, name: str) -> Path:
        assert self.data is not None
        return self.data / "train_mix" / "heldout" / f"{DOMAINS[name][0]}.txt"


@functools.cache
def _training_documents(file: Path) -> dict[str, list[str]]:
    documents: dict[str, list[str]] = {}
    with lzma.open(file, "rt", encoding="utf-8") as opened:
        for domain, text in json.load(opened):
            documents.setdefault(domain, []).append(text)
    return documents


def _halves(texts: list[str]) -> tuple[list[str], list[str]]:
    """Every other text, and the rest; a file without separators is cut into pieces first."""
    if len(texts) < 4:
        texts = [
            text[start : start + _PIECE] for text in texts for start in range(0, len(text), _PIECE)
        ]
    return texts[::2], texts[1::2]
