"""generate's loop of a patched model against that of transformers, setting by setting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from moyu_ext.decoding import loop
from moyu_ext.methods import SRIDA, Dense
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.patching.patch import patch, unpatch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.generation import (
    BaseStreamer,
    LogitsProcessor,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

Make = Callable[..., PreTrainedModel]
Prompt = Callable[..., Tensor]


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which loop ran: "ours" or "theirs", one entry per generation."""
    ran: list[str] = []
    run, theirs = loop._Loop.run, GenerationMixin._sample

    def ours(self: Any, out: Any) -> Any:
        ran.append("ours")
        return run(self, out)

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append("theirs")
        return theirs(self, *args, **kwargs)

    monkeypatch.setattr(loop._Loop, "run", ours)
    monkeypatch.setattr(GenerationMixin, "_sample", other)
    return ran


def both(model: PreTrainedModel, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """By the loop of transformers, then by ours, on the same patched model."""
    found = []
    for generate in (model.generate.__wrapped__, model.generate):
        torch.manual_seed(5)
        found.append(generate(*args, **kwargs))
    return found[0], found[1]


class Ban(LogitsProcessor):
    """No token that is in the text already."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, ids, -torch.inf)


class Late(StoppingCriteria):
    """Numbers for booleans, as some criteria give them."""

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((ids.shape[0],), int(ids.shape[1] > 14))


class Sum(StoppingCriteria):
    """Where the sequence's last tokens are even twice."""

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (ids[:, -1] % 2 == 0) & (ids[:, -2] % 2 == 0)


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "warped": {"do_sample": True, "temperature": 0.7, "top_k": 12, "top_p": 0.9},
    "two of each": {"do_sample": True, "num_return_sequences": 2},
    "penalty": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "banned": {"logits_processor": LogitsProcessorList([Ban()])},
    "stopping": {"stopping_criteria": StoppingCriteriaList([Sum()])},
    "stopping late": {"stopping_criteria": StoppingCriteriaList([Late()])},
    "end": {"eos_token_id": list(range(0, 101, 4))},
    "one end": {"eos_token_id": 50, "pad_token_id": 3},
    "everything": {
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True,
        "eos_token_id": list(range(0, 101, 9)),
    },
    "at least": {"min_new_tokens": 9, "eos_token_id": list(range(0, 101, 4))},
    "embeddings' length": {"max_length": 22},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_text(
    settings: dict[str, Any], batch: int, tiny: Make, prompt: Prompt, own: list[str]
) -> None:
    model = patch(tiny("qwen2"), Dense())
    ids = prompt(9, batch)
    mask = torch.ones_like(ids)
    if batch > 1:
        ids[1, :4], mask[1, :4] = 0, 0
    kwargs = {"max_new_tokens": 15, "attention_mask": mask, **settings}
    if "max_length" in kwargs:
        kwargs.pop("max_new_tokens")
    want, got = both(model, ids, **kwargs)
    assert own == ["theirs", "ours"]
    if not settings.get("return_dict_in_generate"):
        assert torch.equal(got, want) and got.is_contiguous()
        return
    assert type(got) is type(want) and torch.equal(got.sequences, want.sequences)
    for name in ("scores", "logits"):
        a, b = getattr(got, name), getattr(want, name)
        assert len(a) == len(b) and all(map(torch.equal, a, b))
    lengths = [int(cache_of(out).get_seq_length()) for out in (got, want)]
    assert lengths[0] == lengths[1] == got.sequences.shape[1] - 1


def test_a_conversation(tiny: Make, prompt: Prompt, own: list[str]) -> None:
    """The cache of one answer goes into the next call, as ids whole or only the new ones."""
    model = patch(tiny(), SRIDA(0.5))
    texts = []
    for generate in (model.generate.__wrapped__, model.generate):
        first = generate(prompt(12), max_new_tokens=6, return_dict_in_generate=True)
        text = torch.cat([first.sequences, prompt(5, seed=4)], 1)
        texts.append(generate(text, max_new_tokens=6, **passing(model, cache_of(first))))
    assert torch.equal(*texts) and own == ["theirs", "theirs", "ours", "ours"]


def test_embeddings(tiny: Make, prompt: Prompt, own: list[str]) -> None:
    model = patch(tiny(), Dense())
    embeds = model.model.embed_tokens(prompt(9)).detach()
    want, got = both(model, inputs_embeds=embeds, max_new_tokens=6)
    assert torch.equal(got, want)


def test_streamers(tiny: Make, prompt: Prompt, own: list[str]) -> None:
    class Keep(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def put(self, value: Tensor) -> None:
            self.seen.append(value.tolist())

        def end(self) -> None:
            self.seen.append("end")

    model = patch(tiny(), Dense())
    keeps = []
    for generate in (model.generate.__wrapped__, model.generate):
        keeps.append(Keep())
        generate(prompt(7), max_new_tokens=5, streamer=keeps[-1])
    assert keeps[0].seen == keeps[1].seen and keeps[1].seen[-1] == "end"
    assert own == ["theirs", "ours"]


def test_time(tiny: Make, prompt: Prompt, own: list[str]) -> None:
    model = patch(tiny(max_position_embeddings=1 << 15), Dense())
    begin = time.perf_counter()
    criteria = StoppingCriteriaList([MaxTimeCriteria(0.2)])
    out = model.generate(prompt(7), max_new_tokens=1 << 14, stopping_criteria=criteria)
    assert own == ["ours"] and time.perf_counter() - begin < 5 and out.shape[1] < 1 << 14


def test_a_long_text_is_warned_of(tiny: Make, prompt: Prompt, caplog: Any) -> None:
    transformers.utils.logging.enable_propagation()
    transformers.generation.stopping_criteria.logger.warning_once.cache_clear()
    model = patch(tiny(max_position_embeddings=12), Dense())
    model.generate(prompt(7), max_new_tokens=9)
    assert "exceeded the model's predefined" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        {"return_dict_in_generate": True, "output_hidden_states": True},
        {"custom_generate": lambda model, ids, **kwargs: ids},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_other_ways_stay_with_transformers(
    settings: dict[str, Any], tiny: Make, prompt: Prompt, own: list[str]
) -> None:
    model = patch(tiny(), Dense())
    want, got = both(model, prompt(9), max_new_tokens=6, **settings)
    assert "ours" not in own
    assert torch.equal(getattr(got, "sequences", got), getattr(want, "sequences", want))


def test_another_class_keeps_its_loop(tiny: Make, prompt: Prompt) -> None:
    model = tiny()

    class Own(type(model)):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            return super().prepare_inputs_for_generation(*args, **kwargs)

    model.__class__ = Own
    patch(model, Dense())
    assert "generate" not in model.__dict__


def test_it_comes_and_goes_with_the_patch(tiny: Make, prompt: Prompt, own: list[str]) -> None:
    model = patch(tiny(), Dense())
    assert model.generate.__doc__ == GenerationMixin.generate.__doc__
    unpatch(model)
    assert "generate" not in model.__dict__
    model.generate(prompt(4), max_new_tokens=2)
    assert own == ["theirs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_largest(dtype: torch.dtype) -> None:
    """As torch.argmax: the first of equals, both zeros, infinities, NaN, all below zero."""
    g = torch.Generator().manual_seed(0)
    nan, inf = float("nan"), float("inf")
    rows = [[1.0, 3, 3, 2], [-1, -0.5, -3, -0.5], [-0.0, 0.0, -1, 0.0], [-inf, -inf, -inf, -inf],
            [1, inf, nan, 2], [nan, 1, nan, 2], [0, 1e-7, -1, 0]]  # fmt: skip
    for row in rows:
        scores = torch.tensor([row], dtype=dtype)
        assert torch.equal(loop.largest(scores), scores.argmax(-1)), row
    many = torch.randn(5, 1000, generator=g).to(dtype)
    assert torch.equal(loop.largest(many), many.argmax(-1))
    assert torch.equal(loop.largest(many - 100), (many - 100).argmax(-1))
