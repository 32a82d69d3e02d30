"""Prompt or decode is decided by the sequence and its cache, never by the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import oracle
import pytest
import torch
from moyu_ext.methods import TDA, Dense, Method
from moyu_ext.models.cache import cache_of, passing
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from moyu_ext import QRIDA, patch, report

Make = Callable[..., PreTrainedModel]
Prompt = Callable[..., Tensor]
NEW = 8


def method_of(name: str, model: PreTrainedModel) -> Method:
    if name == "qrida":
        return QRIDA(0.3)
    text = torch.randint(3, 101, (40,), generator=torch.Generator().manual_seed(7))
    score = "gate" if name == "tda-gate" else "product"
    return TDA(oracle.quantiles(model, text, score=score), score=score)


def generate(model: PreTrainedModel, ids: Tensor, **settings: Any) -> Tensor:
    """The new tokens, [batch, NEW]."""
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | settings
    return model.generate(ids, **settings)[:, ids.shape[1] :]


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    return {"ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("length", [1, 2, 5, 8, 9, 20])
@pytest.mark.parametrize("score", ["product", "gate"])
def test_a_prompt_is_a_prompt_however_short(
    tiny: Make, prompt: Prompt, length: int, score: str
) -> None:
    model = tiny()
    ids = prompt(length)
    text = torch.randint(3, 101, (40,), generator=torch.Generator().manual_seed(7))
    eps = oracle.quantiles(model, text, score=score)
    want = oracle.greedy(model, ids[0], oracle.tda(eps, score), NEW)[length:]
    patch(model, TDA(eps, score=score))
    assert torch.equal(generate(model, ids)[0], want)
    layer = report(model).layers[0]
    assert (layer.dense_tokens, layer.tokens) == (length, NEW - 1)


@pytest.mark.parametrize("name", ["tda", "tda-gate", "qrida"])
@pytest.mark.parametrize("batch", [2, 4, 8])
def test_a_sequence_of_a_batch_gets_the_tokens_that_it_gets_alone(
    tiny: Make, prompt: Prompt, name: str, batch: int
) -> None:
    model = tiny()
    patch(model, method_of(name, model))
    lengths = [1, 2, 5, 8, 9, 20, 3, 7][:batch]
    rows = [prompt(n, seed=i)[0] for i, n in enumerate(lengths)]
    alone = [generate(model, row.unsqueeze(0))[0] for row in rows]
    assert torch.equal(generate(model, **padded(rows)), torch.stack(alone))


@pytest.mark.parametrize("name", ["tda", "qrida"])
def test_a_chunk_of_eight_sequences_obeys_the_rule_as_one_does(
    tiny: Make, prompt: Prompt, name: str
) -> None:
    """32 rows, four of each sequence: more than an operator takes at once."""
    model = tiny()
    dense = tiny()
    patch(model, method_of(name, model))
    ids = prompt(16, batch=8)

    def logits(of: PreTrainedModel, part: Tensor) -> Tensor:
        with torch.no_grad():
            cache = cache_of(of(part[:, :12]))
            return of(part[:, 12:], **passing(of, cache)).logits

    together = logits(model, ids)
    for row in range(8):
        torch.testing.assert_close(together[row], logits(model, ids[row : row + 1])[0])
    assert not torch.allclose(together, logits(dense, ids), atol=1e-2)


@pytest.mark.parametrize("chunk", [1, 3, 8, 9, 16])
def test_chunks_of_a_prompt_follow_their_length(tiny: Make, prompt: Prompt, chunk: int) -> None:
    """The first chunk is the prompt, as are later ones of more than 8 tokens."""
    ids = prompt(20)[0]
    model = tiny()
    text = torch.randint(3, 101, (40,), generator=torch.Generator().manual_seed(7))
    eps = oracle.quantiles(model, text)
    starts = torch.arange(20) // chunk
    sizes = torch.bincount(starts)[starts]
    governed = (starts > 0) & (sizes <= 8)
    want = oracle.logits(model, ids, oracle.tda(eps), governed, torch.zeros_like(governed))
    patch(model, TDA(eps))
    cache, parts = None, []
    with torch.no_grad():
        for part in ids.split(chunk):
            out = model(part.unsqueeze(0), **({} if cache is None else passing(model, cache)))
            cache = cache_of(out)
            parts.append(out.logits[0])
    torch.testing.assert_close(torch.cat(parts), want, rtol=2e-4, atol=2e-4)


def test_a_cache_that_was_reset_begins_anew(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), QRIDA(0.3))
    cache = StaticCache(config=model.config, max_cache_len=32)
    for _ in range(2):
        with torch.no_grad():
            model(prompt(5), **passing(model, cache))
        cache.reset()
    assert report(model).layers[0].dense_tokens == 10


def test_without_a_cache_every_forward_is_a_prompt(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), QRIDA(0.3))
    with torch.no_grad():
        model(prompt(1), use_cache=False)
    assert (report(model).layers[0].dense_tokens, report(model).layers[0].tokens) == (1, 0)


def test_nine_sequences_run_dense(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), Dense())
    generate(model, prompt(3, batch=9))
    assert report(model).layers[0].tokens == 0


def test_a_failed_forward_leaves_no_pass_behind(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), QRIDA(0.3))
    with torch.no_grad(), pytest.raises(IndexError):
        model(torch.tensor([[1000]]))
    with torch.no_grad():
        model.model.layers[0].mlp(torch.randn(1, 1, 32))  # outside of a forward the rows decide
    assert report(model).layers[0].tokens == 1
