"""What the tests of studies, routers and evaluation share: a tokenizer, texts, a subject."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from moyu_ext.studies.setting import Setting, Subject, subject_of
from transformers import PreTrainedModel

WORDS = [f"w{i}" for i in range(97)]


class WordTokenizer:
    """One id per word of WORDS, from 3 on; id 1 in front, as a BOS."""

    bos_token_id = 1
    eos_token_id = 2
    pad_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [3 + WORDS.index(word) for word in text.split() if word in WORDS]
        return [1, *ids] if add_special_tokens else ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(WORDS[i - 3] for i in map(int, ids) if i >= 3)

    def convert_ids_to_tokens(self, ids: int | list[int]) -> str | list[str]:
        if isinstance(ids, int):
            return "." if ids < 3 else WORDS[ids - 3]
        return [self.convert_ids_to_tokens(i) for i in ids]


def text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def texts_file(folder: Path, texts: int = 40, words: int = 64, name: str = "words.txt") -> Path:
    path = folder / name
    offset = sum(map(ord, name))
    pieces = [text(words, offset + seed) for seed in range(texts)]
    path.write_text("<|endoftext|>".join(pieces), encoding="utf-8")
    return path


def tiny_setting(
    tiny: Callable[..., PreTrainedModel], folder: Path, names: tuple[str, ...] = ("llama",)
) -> Setting:
    """A quick setting whose models are tiny ones and whose text is words."""
    files = [texts_file(folder, name=name) for name in ("words.txt", "other.txt")]
    setting = Setting(models=names, texts=files, quick=True)
    for name in names:
        setting._loaded[name] = tiny_subject(tiny, name)
    return setting


def tiny_subject(tiny: Callable[..., PreTrainedModel], name: str = "llama") -> Subject:
    return subject_of(name, tiny(name), WordTokenizer())
