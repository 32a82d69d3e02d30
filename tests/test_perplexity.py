"""Perplexity against sums written out token by token."""

import math
from typing import Any

import pytest
import torch
from moyu_ext.errors import ConfigurationError
from moyu_ext.evaluation import generation_perplexity, perplexity
from moyu_ext.methods.stda import STDA
from moyu_ext.methods.tda import TDA
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.patching.patch import patch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class Letters:
    """a = 0, b = 1, ...: a tokenizer without files."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=26,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, 26, shape, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, context: Tensor, token: Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=context.unsqueeze(0)).logits[0, -1].double()
    return -logits.log_softmax(-1)[token].item()


@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [(2, 8, 4), (8, 8, 4), (9, 8, 4), (30, 8, 4), (30, 8, 7), (30, 9, 1), (31, 64, 32)],
)
def test_each_token_is_scored_once_with_its_context(
    model: LlamaForCausalLM, length: int, window: int, stride: int
) -> None:
    ids = random_ids(length)
    losses = []
    for t in range(1, length):
        # The first window that holds token t and a token before it.
        begin = next(b for b in range(0, length, stride) if b < t < b + window)
        losses.append(loss_of(model, ids[begin:t], ids[t]))
    found = perplexity(model, ids, window=window, stride=stride)
    assert found.tokens == length - 1
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_text_ids_lists_and_defaults_agree(model: LlamaForCausalLM) -> None:
    text = "thequickbrownfoxjumpsoverthelazydog" * 4
    ids = Letters().encode(text)
    expected = perplexity(model, torch.tensor(ids), window=64, stride=32)
    assert perplexity(model, Letters(), text) == expected
    assert perplexity(model, ids) == expected
    assert perplexity(model, torch.tensor([ids])) == expected


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(model: LlamaForCausalLM) -> None:
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, random_ids(50)).perplexity == pytest.approx(26, rel=1e-6)
    found = generation_perplexity(model, random_ids(3, 50), context=20, continuation=30)
    assert found.perplexity == pytest.approx(26, rel=1e-6)
    assert found.tokens == 90


def test_generation_perplexity_of_a_dense_model(model: LlamaForCausalLM) -> None:
    ids = random_ids(3, 25)  # the last 5 columns are not asked for
    losses = [loss_of(model, row[:t], row[t]) for row in ids for t in range(12, 20)]
    found = generation_perplexity(model, ids, context=12, continuation=8)
    assert found.tokens == 24
    assert found.loss == pytest.approx(sum(losses) / 24, rel=1e-5)
    # One long row is cut into rows, the rest left out.
    flat = torch.cat([ids[:, :20].flatten(), random_ids(7)])
    again = generation_perplexity(model, flat.tolist(), context=12, continuation=8)
    assert again.tokens == 24
    assert again.loss == pytest.approx(found.loss, rel=1e-6)


@pytest.mark.parametrize("method", ["tda", "stda"])
def test_generation_perplexity_is_that_of_decoding_token_by_token(
    model: LlamaForCausalLM, method: str
) -> None:
    ids = random_ids(2, 30)
    dense = generation_perplexity(model, ids, context=12, continuation=18)
    sliding = perplexity(model, ids[0]).loss
    patch(model, TDA(0.5) if method == "tda" else STDA(0.5))
    losses = []
    for row in ids:
        with torch.no_grad():
            out = model(input_ids=row[:12].unsqueeze(0), use_cache=True)
            for token in row[12:]:
                losses.append(-out.logits[0, -1].double().log_softmax(-1)[token].item())
                out = model(input_ids=token.view(1, 1), **passing(model, cache_of(out)))
    found = generation_perplexity(model, ids, context=12, continuation=18)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert abs(found.loss - dense.loss) > 1e-3, "the method must have had an effect"
    # A sliding window is all prompt, and these methods leave prompts dense.
    assert perplexity(model, ids[0]).loss == pytest.approx(sliding, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1],), "at least 2 tokens, got 1"),
        (([],), "at least 2 tokens, got 0"),
        (([1, 26],), "token id 26 is outside the model's vocabulary of 26"),
        (([1, -1],), "token id -1"),
        ((Letters(),), "Letters without a text"),
        ((None, "abc"), "NoneType, which has no encode"),
    ],
)
def test_impossible_ids_raise(
    model: LlamaForCausalLM, arguments: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        perplexity(model, *arguments)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 8), (8, 0), (8, 9), (0, None)])
def test_impossible_windows_raise(model: LlamaForCausalLM, window: int, stride: int | None) -> None:
    with pytest.raises(ConfigurationError, match=f"window is {window}"):
        perplexity(model, random_ids(20), window=window, stride=stride)


@pytest.mark.parametrize(
    ("shape", "context", "continuation", "message"),
    [
        ((2, 9), 5, 5, r"\[2, 9\]"),
        ((9,), 5, 5, r"\[9\]"),
        ((2, 2, 20), 5, 5, r"\[2, 2, 20\]"),
        ((0, 20), 5, 5, r"\[0, 20\]"),
        ((2, 20), 0, 5, "context is 0"),
        ((2, 20), 5, 0, "continuation 0"),
    ],
)
def test_impossible_rows_raise(
    model: LlamaForCausalLM, shape: tuple[int, ...], context: int, continuation: int, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        generation_perplexity(model, random_ids(*shape), context=context, continuation=continuation)
