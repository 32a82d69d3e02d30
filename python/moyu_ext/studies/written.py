"""Text where neither a data folder nor --text gives any: shipped, sampled or drawn from patterns.

Domain "stories": the shipped ones, then stories that the embedded twins write in turn (sampled at
temperature 0.9 behind fixed openings; a loss on these is lower than on human text). The other
domains are patterns filled at random: word problems, small functions, and the shipped stories'
words in random order. They differ from stories on purpose, and are no natural text.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch

from .. import embedded
from ..models.text import encode

AUTHORS = ("stories_silu", "stories_relu")
OPENINGS = (
    "Once upon a time, there was a",
    "One day, a little girl named",
    "There was a boy who loved to",
    "In a small house in the forest lived",
    "Tom and his mom went to the",
    "The old dog was very",
    "It was a cold morning and",
    "A little bird wanted to",
)
TOKENS = 256
WORDS = 220  # of a text filled from patterns; several hundred tokens
_TEMPERATURE = 0.9

_NAMES = ("Anna", "Ben", "Carla", "David", "Ella", "Finn", "Grace", "Hugo")
_THINGS = ("apples", "pens", "books", "eggs", "tickets", "marbles", "chairs", "stamps")
_SUMS = (
    "{A} has {m} {x} and buys {n} more. How many {x} does {A} have? {m} + {n} = {s}.",
    "{A} and {B} share {p} {x} equally. Each gets {p} / 2 = {h} {x}.",
    "A shop sells {x} for ${n} each. {A} buys {m}, which costs {m} * {n} = ${t}.",
    "{A} had {s} {x}, gave {n} to {B} and kept {s} - {n} = {m}.",
)
_FIELDS = ("total", "count", "index", "value", "left", "right", "size", "result")
_CODE = (
    "def {f}({a}, {b}):\n    return {a} {o} {b} + {n}\n",
    "for {a} in range({n}):\n    if {a} {o} {m} == 0:\n        {b}.append({a})\n",
    "{a} = [{b} {o} {n} for {b} in {f}]\nprint(len({a}), {m})\n",
    "while {a} < {n}:\n    {a} += {m}\n    {b} = {f}({a})\n",
)


def documents(domain: str, train: bool, count: int, seed: int) -> list[str]:
    """`count` texts of a domain in `DOMAINS`; those to train on and the others never meet."""
    if domain == "stories":
        texts = _stories(2 * count, seed)
        return [*texts[1::2]] if train else [*embedded.heldout(), *texts[::2]]
    return [DOMAINS[domain](random.Random(f"{domain} {train} {seed} {i}")) for i in range(count)]


def _sums(rng: random.Random) -> str:
    parts: list[str] = []
    while len(" ".join(parts).split()) < WORDS:
        m, n = rng.randrange(2, 60), rng.randrange(2, 30)
        values = {"m": m, "n": n, "s": m + n, "t": m * n, "p": 2 * m, "h": m}
        a, b = rng.sample(_NAMES, 2)
        parts.append(rng.choice(_SUMS).format(A=a, B=b, x=rng.choice(_THINGS), **values))
    return " ".join(parts)


def _code(rng: random.Random) -> str:
    parts: list[str] = []
    while len(" ".join(parts).split()) < WORDS:
        a, b, f = rng.sample(_FIELDS, 3)
        values = {"n": rng.randrange(2, 99), "m": rng.randrange(2, 9), "o": rng.choice("+-*%")}
        parts.append(rng.choice(_CODE).format(a=a, b=b, f=f, **values))
    return "\n".join(parts)


def _words(rng: random.Random) -> str:
    return " ".join(rng.choices(" ".join(embedded.heldout()).split(), k=WORDS))


DOMAINS: dict[str, Any] = {"stories": None, "sums": _sums, "code": _code, "words": _words}


@functools.cache
def _stories(count: int, seed: int) -> tuple[str, ...]:
    """`count` stories of `TOKENS` tokens; numbers 4i and 4i + 1 are by the first author."""
    texts = [""] * count
    for place, author in enumerate(AUTHORS):
        model, tokenizer = _author(author)
        mine = [i for i in range(count) if i // 2 % len(AUTHORS) == place]
        prompts = {i: encode(tokenizer, OPENINGS[i // 4 % len(OPENINGS)]) for i in mine}
        for length in sorted({len(prompt) for prompt in prompts.values()}):  # no padding
            chosen = [i for i in mine if len(prompts[i]) == length]
            ids = torch.tensor([prompts[i] for i in chosen])
            out = _sample(model, ids, seed + 1000 * place + length)
            for i, row in zip(chosen, out.tolist(), strict=True):
                texts[i] = tokenizer.decode(row, skip_special_tokens=True)
    return tuple(texts)


def _sample(model: Any, ids: torch.Tensor, seed: int) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out: torch.Tensor = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS - ids.shape[1],
            min_new_tokens=TOKENS - ids.shape[1],
            do_sample=True,
            temperature=_TEMPERATURE,
            top_k=0,
            top_p=1.0,
            num_beams=1,
            pad_token_id=0,
        )
    return out


def _author(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = embedded.path(name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)
