"""Summaries: generation from prompts, and ROUGE against references."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigurationError
from ..models.text import device, encode

MEASURES = ("rouge1", "rouge2", "rougeL")
# Files of the data folder's summ/, by name.
SETS = {
    "xsum": "xsum_0shot.griffin.jsonl",
    "xsum-1shot": "xsum_1shot.griffin.jsonl",
    "cnn_dailymail": "cnn_dailymail_0shot.griffin.jsonl",
}
_HELD_OUT = 120  # the last items of each file are in no training text of the shipped models


@dataclass(frozen=True)
class Item:
    """One prompt, its reference summary, how long a summary may be, and where it ends."""

    prompt: str
    reference: str
    max_tokens: int
    stop: tuple[str, ...]


def load_items(data: Path, name: str, limit: int | None = None) -> list[Item]:
    """The held-out items of a set in `SETS`, at most `limit`.

    Raises ConfigurationError for an unknown name or a file that is not there.
    """
    if name not in SETS:
        raise ConfigurationError(f"summary set is {name!r}; expected one of {', '.join(SETS)}")
    path = data / "summ" / SETS[name]
    if not path.is_file():
        raise ConfigurationError(
            f"{name}: there is no {path}; pass --data with a folder that has summ/"
        )
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [
        Item(row["article"], row["summary_gt"], row["max_tokens"], tuple(row["stop"]))
        for row in rows[-_HELD_OUT:][:limit]
    ]


def truncate(ids: Sequence[int], length: int, first: int = 0) -> list[int]:
    """Ids cut to `length`, from the middle: `first` stay at the front (default: half), the rest at
    the end, where the instruction is."""
    if len(ids) <= length:
        return list(ids)
    head = first or length // 2
    return [*ids[:head], *ids[len(ids) - (length - head) :]]


def summarise(
    model: Any, tokenizer: Any, items: Sequence[Item], prompt_tokens: int, new_tokens: int
) -> list[str]:
    """Greedy summaries by the model, patched or not, from prompts of at most `prompt_tokens`."""
    place = device(model)
    found = []
    for item in items:
        ids = truncate(encode(tokenizer, item.prompt), prompt_tokens)
        prompt = torch.tensor([ids], device=place)
        with torch.no_grad():
            out = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=min(item.max_tokens, new_tokens),
                do_sample=False,
                num_beams=1,
                pad_token_id=0,
            )
        text = tokenizer.decode(out[0, len(ids) :].tolist(), skip_special_tokens=True)
        for stop in item.stop:
            text = text.split(stop)[0]
        found.append(text.strip())
    return found


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L (with stemming) per item, in [0, 1].

    Raises ConfigurationError where the rouge-score package is missing.
    """
    if len(predictions) != len(references):
        raise ConfigurationError(
            f"rouge: {len(predictions)} predictions for {len(references)} references"
        )
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigurationError(
            'ROUGE needs the package rouge-score: pip install "moyu_ext[eval]", or pip install '
            "rouge-score"
        ) from error
    scorer = RougeScorer(list(MEASURES), use_stemmer=True)
    found: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    for prediction, reference in zip(predictions, references, strict=True):
        scores = scorer.score(reference, prediction)
        for measure in MEASURES:
            found[measure].append(scores[measure].fmeasure)
    return found
