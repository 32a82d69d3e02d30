"""Calibration text: from a list, a file, or the model itself, and cut into windows of ids."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from ..errors import ConfigurationError

WINDOW = 512
_SEPARATOR = "<|endoftext|>"
# No tokenizer needs more characters than this for one token, so a huge file is not read to its end.
_CHARACTERS_PER_TOKEN = 64
# Sampled texts end where the model ends them, so a round may yield little.
_ROUNDS = 16
_ROWS = 8


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, special tokens as the tokenizer adds them.

    `tokenizer`: a Hugging Face tokenizer, a `tokenizers.Tokenizer`, or anything with `encode`.
    """
    _refuse_string(tokenizer)
    if not callable(getattr(tokenizer, "encode", None)):
        raise ConfigurationError(
            f"tokenizer is {type(tokenizer).__name__}, which has no encode method; pass the "
            "model's tokenizer"
        )
    # Hugging Face tokenizers warn about texts longer than the model; windows() cuts them.
    quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
    encoded = tokenizer.encode(text, **quiet)
    return [int(i) for i in getattr(encoded, "ids", encoded)]


def _refuse_string(tokenizer: Any) -> None:
    if isinstance(tokenizer, str):  # it has an encode method, but of another kind
        raise ConfigurationError(
            f"tokenizer is the string {tokenizer!r}; pass the tokenizer itself: "
            "transformers.AutoTokenizer.from_pretrained(name)"
        )


def check_ids(model: nn.Module, ids: Iterable[int]) -> None:
    """Raise ConfigurationError where an id lies outside the model's vocabulary."""
    vocabulary = _embedding(model).num_embeddings
    low, high = 0, 0
    for i in ids:
        low, high = min(low, i), max(high, i)
    if low < 0 or high >= vocabulary:
        raise ConfigurationError(
            f"token id {low if low < 0 else high} is outside the model's vocabulary of "
            f"{vocabulary}; use the tokenizer that belongs to this model"
        )


def _embedding(model: nn.Module) -> nn.Embedding:
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if callable(getter) else None
    if not isinstance(embedding, nn.Embedding):
        raise ConfigurationError(
            f"{type(model).__name__} has no input embedding that get_input_embeddings() finds; "
            "expected a Hugging Face causal language model"
        )
    return embedding


def device(model: nn.Module) -> torch.device:
    """Where input ids have to lie."""
    return _embedding(model).weight.device


def longest_window(model: nn.Module) -> int:
    """Tokens of one window: `WINDOW`, or fewer where the model has fewer positions."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return min(WINDOW, positions) if isinstance(positions, int) and positions > 0 else WINDOW


def read_texts(texts: Sequence[str] | str | os.PathLike[str], max_tokens: int) -> list[str]:
    """The texts of a list, or of a UTF-8 file whose texts are parted by `<|endoftext|>`.

    Blank texts are left out. Raises ConfigurationError where nothing is left, the file cannot be
    read, or an entry is no string.
    """
    if isinstance(texts, (str, os.PathLike)):
        parts = _read_file(Path(texts), max_tokens).split(_SEPARATOR)
        found = [part.strip() for part in parts]
    elif isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise ConfigurationError(
            f"texts is {type(texts).__name__}; expected a list of strings, a file, or None"
        )
    else:
        found = list(texts)
        for index, text in enumerate(found):
            if not isinstance(text, str):
                raise ConfigurationError(
                    f"texts[{index}] is {type(text).__name__}; expected a string"
                )
    kept = [text for text in found if text.strip()]
    if not kept:
        raise ConfigurationError(
            f"texts: all of {len(found)} texts are empty; pass texts with words in them, or "
            "texts=None to let the model write its own"
        )
    return kept


def _read_file(path: Path, max_tokens: int) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(max_tokens * _CHARACTERS_PER_TOKEN)
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"texts: {path} is not UTF-8 text ({error})") from error
    except OSError as error:
        shown = str(path) if len(str(path)) < 80 else f"{str(path)[:77]}..."
        raise ConfigurationError(
            f"texts: cannot read the file {shown!r} ({error.strerror}); a string is the path of a "
            "text file, pass [text] for a single text"
        ) from error


def encode_texts(
    tokenizer: Any, texts: Iterable[str], max_tokens: int, window: int
) -> list[list[int]]:
    """Ids of the first texts, as many as give `max_tokens` with one window of each."""
    rows: list[list[int]] = []
    total = 0
    for text in texts:
        rows.append(encode(tokenizer, text))
        total += min(len(rows[-1]), window)
        if total >= max_tokens:
            break
    return rows


def windows(rows: Iterable[list[int]], max_tokens: int, window: int) -> list[list[int]]:
    """Cut rows of ids into windows: the first of every row, then the second of every row, ...

    Stops at `max_tokens`, with the last window shortened to meet it.
    """
    cuts = [(i, ids[i : i + window]) for ids in rows for i in range(0, len(ids), window)]
    result: list[list[int]] = []
    left = max_tokens
    for _, piece in sorted(cuts, key=lambda cut: cut[0]):
        if left > 0:
            result.append(piece[:left])
            left -= len(result[-1])
    return result


class _Draw(LogitsProcessor):
    """Noise with which the likeliest token is a sample at temperature 1 (Gumbel's trick): torch's
    own draw takes longer than a small model's forward."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator: torch.Generator | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.generator is None:
            self.generator = torch.Generator(scores.device).manual_seed(self.seed)
        # Not exponential_, which takes 8 times as long on a CPU.
        noise = torch.empty_like(scores, dtype=torch.float32).uniform_(generator=self.generator)
        return scores.float() - noise.log_().neg_().log_()


def write_own(
    model: nn.Module,
    tokenizer: Any,
    max_tokens: int,
    window: int,
    seed: int,
    *,
    whole: bool = False,
    at_once: int | None = None,
) -> list[list[int]]:
    """Text that the model writes: sampled from the beginning-of-text token at temperature 1.

    whole: rows of just `window` tokens, in which the model goes on behind an end of text. at_once:
    rows that are written together, by default as many as are needed. The
    global random state is left as it was. Raises ConfigurationError where the model cannot generate
    or has no token to begin with.
    """
    _refuse_string(tokenizer)
    generate = getattr(model, "generate", None)
    if not callable(generate):
        raise ConfigurationError(
            f"texts=None samples from the model, but {type(model).__name__} cannot generate; "
            "pass texts"
        )
    begin, end = _special_ids(model, tokenizer)
    check_ids(model, [begin])
    place = device(model)
    nowhere = _embedding(model).num_embeddings  # no token has this id
    rows: list[list[int]] = []
    total = 0
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        for round in range(_ROUNDS if at_once is None else -(-max_tokens // (window * at_once))):
            count = at_once or max(_ROWS, -(-(max_tokens - total) // window))
            out: Tensor = generate(
                input_ids=torch.full((count, 1), begin, device=place),
                attention_mask=torch.ones((count, 1), dtype=torch.long, device=place),
                max_new_tokens=max(min(window, max_tokens) - 1, 1),
                do_sample=False,
                logits_processor=LogitsProcessorList([_Draw(seed + round)]),
                num_beams=1,
                pad_token_id=min(end) if end else begin,
                **({"eos_token_id": nowhere} if whole else {}),
            )
            for ids in out.tolist():
                stop = next((i for i, t in enumerate(ids) if i and t in end), len(ids) - 1)
                stop = len(ids) - 1 if whole else stop
                rows.append(ids[: stop + 1])
                total += stop + 1
            if total >= max_tokens:
                break
    return rows


def _special_ids(model: nn.Module, tokenizer: Any) -> tuple[int, set[int]]:
    sources = (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer)
    begins = [getattr(source, "bos_token_id", None) for source in sources]
    ends: set[int] = set()
    for source in sources:
        end = getattr(source, "eos_token_id", None)
        ends |= {end} if isinstance(end, int) else set(end or ())
    begin = next((b for b in [*begins, *sorted(ends)] if isinstance(b, int)), None)
    if begin is None:
        raise ConfigurationError(
            "texts=None samples from the model, but neither the model nor the tokenizer has a "
            "beginning- or end-of-text token to start with; pass texts"
        )
    return begin, ends


@dataclass(frozen=True)
class Batch:
    """Windows of token ids, one forward's worth."""

    ids: Tensor  # [windows, longest], padded on the right
    real: Tensor  # bool, the same shape: False at padding
    lengths: list[int]


def make_batch(model: nn.Module, rows: list[list[int]], max_tokens: int, shortest: int) -> Batch:
    """Windows of rows of ids as one batch; those with fewer than `shortest` tokens are left out.

    Windows are as long as `longest_window` allows, and halved while more than three quarters of
    the batch would be padding (one long text among many short ones).
    Raises ConfigurationError where no window is left or an id is outside the vocabulary.
    """
    check_ids(model, (i for row in rows for i in row))
    window = longest_window(model)
    while True:
        pieces = [p for p in windows(rows, max_tokens, window) if len(p) >= shortest]
        if not pieces:
            raise ConfigurationError(
                f"texts: none has at least {shortest} tokens within max_tokens = {max_tokens}; "
                "pass longer texts or more tokens"
            )
        lengths = [len(piece) for piece in pieces]
        if 4 * sum(lengths) >= len(lengths) * max(lengths) or window // 2 < shortest:
            break
        window //= 2
    place = device(model)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in pieces], batch_first=True)
    real = torch.arange(ids.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return Batch(ids.to(place), real.to(place), lengths)
