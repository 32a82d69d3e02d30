"""The compiled decode step on caches and masks: rows, beams, crops, copies, turns, threads."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_support import decoded, error, family, steps
from moyu_ext.decoding.places import first_places
from moyu_ext.decoding.stack import NotTaken
from moyu_ext.methods import SRIDA, Dense
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.patching.patch import patch, report
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

Make = Callable[..., PreTrainedModel]
Prompt = Callable[..., Tensor]


def padded(prompt: Prompt) -> tuple[Tensor, Tensor]:
    ids, mask = prompt(10, batch=3), torch.ones(3, 10, dtype=torch.long)
    for row, blanks in enumerate((0, 4, 7)):
        ids[row, :blanks], mask[row, :blanks] = 0, 0
    return ids, mask


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Mistral"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 2},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20},
    ],
    ids=lambda how: "-".join(map(str, how)) or "greedy",
)
def test_generate(name: str, how: dict[str, Any], prompt: Prompt) -> None:
    """Left padding, beams, sampling and static caches give the same text."""
    ids, mask = padded(prompt)
    texts = []
    for patched in (False, True):
        model = family(name)
        if patched:
            patch(model, Dense())
        torch.manual_seed(0)
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=14, **how))
    assert torch.equal(*texts)
    used = report(model).step
    static = how.get("cache_implementation") == "static"
    if static and name != "Llama":
        assert list(used.left) == ["a cache layer of class StaticSlidingWindowLayer"]
    else:
        assert not used.left and used.tokens >= 3 * 13


def test_static_cache_by_hand(prompt: Prompt) -> None:
    model = family("Llama")
    ids, more = prompt(6), prompt(4, seed=1)
    want = steps(model, ids, more, [1] * 4)
    patch(model, Dense())
    cache = StaticCache(config=model.config, max_cache_len=10)
    with torch.no_grad():
        model(input_ids=ids, use_cache=True, **passing(model, cache))
        got = [
            model(input_ids=more[:, t : t + 1], use_cache=True, **passing(model, cache)).logits
            for t in range(4)
        ]
    assert error(torch.cat(got, 1), want) < 3e-6 and decoded(model) == 4
    assert int(cache.get_seq_length()) == 10


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_lookup_crops_the_cache(name: str, prompt: Prompt) -> None:
    """Assisted decoding feeds several tokens and takes some of them back."""
    ids = torch.cat([prompt(6)] * 3, 1)
    texts = []
    for patched in (False, True):
        model = family(name)
        if patched:
            patch(model, Dense())
        texts.append(model.generate(ids, max_new_tokens=20, prompt_lookup_num_tokens=3))
    assert torch.equal(*texts)
    assert report(model).step.tokens > 0 or name == "Mistral"


def test_a_cache_is_not_written_over(prompt: Prompt) -> None:
    """What somebody holds of a cache stays, whatever is decoded behind a crop or a copy."""
    model = patch(family("Llama"), Dense())
    ids, more = prompt(6), prompt(6, seed=1)
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids, use_cache=True))

        def step(cache: DynamicCache, t: int) -> Tensor:
            out = model(input_ids=more[:, t : t + 1], use_cache=True, **passing(model, cache))
            return out.logits

        first = step(cache, 0)
        held = cache.layers[0].keys
        before = held.clone()
        cache.crop(-1)
        step(cache, 1)
        assert torch.equal(held, before), "the cropped token is still what it was"
        cache.crop(-1)
        other = copy.deepcopy(cache)
        shallow = copy.copy(cache.layers[0])
        assert torch.equal(step(cache, 0), first)
        assert torch.equal(step(other, 0), first)
        a = step(cache, 2)
        step(other, 3)
        assert shallow.keys.shape[2] == 6
        cache.crop(-1)
        assert torch.equal(step(cache, 2), a)
        again = pickle.loads(pickle.dumps(cache))
        assert torch.equal(step(again, 4), step(cache, 4))


def test_the_cache_does_not_grow_anew_for_each_token(prompt: Prompt) -> None:
    model = patch(family("Llama"), Dense())
    cache = cache_of(model(input_ids=prompt(40), use_cache=True))
    homes = set()
    with torch.no_grad():
        for _ in range(200):
            model(input_ids=prompt(1), use_cache=True, **passing(model, cache))
            homes.add(cache.layers[1].keys.data_ptr())
    assert len(homes) == 1 and cache.layers[1].keys.shape[2] == 240


def test_generations_that_take_turns(prompt: Prompt) -> None:
    model = family("Mistral")
    texts = [(prompt(5), prompt(20, seed=1)), (prompt(11, seed=2), prompt(20, seed=3))]
    want = [steps(model, ids, more, [1] * 20) for ids, more in texts]
    patch(model, SRIDA(1.0))
    with torch.no_grad():
        caches = [cache_of(model(input_ids=ids, use_cache=True)) for ids, _ in texts]
        got: list[list[Tensor]] = [[], []]
        for t in range(20):
            for i, (_, more) in enumerate(texts):
                past = passing(model, caches[i])
                out = model(input_ids=more[:, t : t + 1], use_cache=True, **past)
                got[i].append(out.logits)
    for a, b in zip(got, want, strict=True):
        assert error(torch.cat(a, 1), b) < 3e-6


def test_turns_of_a_conversation(prompt: Prompt) -> None:
    """A second prompt behind what was decoded: many tokens, through the layers."""
    model = family("Gemma3")
    more = prompt(40, seed=1)
    cut = [1] * 6 + [20] + [1] * 6
    want = steps(model, prompt(12), more, cut)
    got = steps(patch(model, Dense()), prompt(12), more, cut)
    assert decoded(model) == 12 and error(got, want) < 3e-6


def test_threads(prompt: Prompt) -> None:
    model = family("Llama")
    jobs = [(prompt(6 + i, seed=i), prompt(12, seed=9 + i)) for i in range(3)]
    want = [steps(model, ids, more, [1] * 12) for ids, more in jobs]
    patch(model, SRIDA(1.0))
    got: list[Any] = [None] * 3

    def run(i: int) -> None:
        got[i] = steps(model, *jobs[i], [1] * 12)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 3e-6


@pytest.mark.parametrize(
    ("mask", "window", "want"),
    [
        (None, 0, [0, 0]),
        (None, 3, [2, 3]),
        (torch.tensor([[0, 0, 1, 1, 1, 1]]), 0, [2, 2]),
        (torch.tensor([[0, 0, 0, 1, 1, 1]]), 3, [3, 3]),
        (torch.ones(1, 6), 0, [0, 0]),
        (torch.ones(1, 1, 2, 6).tril(4).bool(), 0, [0, 0]),
        (torch.zeros(1, 1, 2, 6).masked_fill(torch.ones(2, 6).triu(5).bool(), -1e30), 0, [0, 0]),
    ],
)
def test_first_places(mask: Any, window: int, want: list[int]) -> None:
    assert first_places(mask, 1, 2, 4, 4, window) == want


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.tensor([[1, 0, 1, 1, 1, 1]]), "gaps"),
        (torch.tensor([[1, 1, 1, 1, 1, 0]]), "gaps"),
        (torch.ones(1, 5), "shape"),
        (torch.ones(1, 1, 2, 6).bool(), "gaps"),
        (torch.ones(1, 2, 2, 6).bool(), "shape"),
        ("a mask", "kind"),
    ],
)
def test_masks_that_are_not_taken(mask: Any, says: str) -> None:
    with pytest.raises(NotTaken, match=says):
        first_places(mask, 1, 2, 4, 4, 0)


def test_a_change_between_generations_is_seen(prompt: Prompt) -> None:
    """Within one generation the step looks at the model once, at the next one again."""
    model = patch(family("Llama"), Dense())
    ids = prompt(6)
    before = model.generate(ids, max_new_tokens=12)
    layer = model.model.layers[1].self_attn
    layer.o_proj.weight = torch.nn.Parameter(-layer.o_proj.weight.detach())
    after = model.generate(ids, max_new_tokens=12)
    plain = copy.deepcopy(model).generate(ids, max_new_tokens=12)
    assert torch.equal(after, plain) and not torch.equal(after, before)
    seen: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    model.generate(ids, max_new_tokens=5)
    handle.remove()
    assert len(seen) == 5, "the prompt and four tokens"


def test_threads_that_generate(prompt: Prompt) -> None:
    """A step that another thread's keeps out goes through the layers, with all of its tokens."""
    model = family("Mistral")
    prompts = [prompt(6 + i, seed=i) for i in range(4)]
    want = [model.generate(ids, max_new_tokens=40) for ids in prompts]
    patch(model, SRIDA(1.0))
    got: list[Any] = [None] * len(prompts)
    caches: list[Any] = [None] * len(prompts)

    def run(i: int) -> None:
        out = model.generate(prompts[i], max_new_tokens=40, return_dict_in_generate=True)
        got[i], caches[i] = out.sequences, cache_of(out)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, got, want))
    for ids, cache in zip(prompts, caches, strict=True):
        assert int(cache.get_seq_length()) == ids.shape[1] + 39
        assert {layer.keys.shape[2] for layer in cache.layers} == {8}, "the window's"
