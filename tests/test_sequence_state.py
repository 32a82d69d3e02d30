"""The state of sequences: what happens to a cache happens to it."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import oracle
import pytest
import torch
from moyu_ext.errors import PatchStateError
from moyu_ext.methods import SRIDA, STDA, TDA
from moyu_ext.methods.base import SequenceRule
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.models.decoder import real_tokens
from moyu_ext.patching.patch import patch, report, unpatch
from moyu_ext.patching.sequence_state import SHORT, TAIL, SequenceState
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

Make = Callable[..., PreTrainedModel]
Prompt = Callable[..., Tensor]
F = 12


class Squares(SequenceRule):
    """a^2 is the statistic; the larger half is the set."""

    def statistic(self, a: Tensor) -> Tensor:
        return a.float().square()

    def choose(self, running_sum: Tensor, tokens: Tensor | int) -> Tensor:
        order = running_sum.argsort(dim=-1, descending=True, stable=True)
        chosen = torch.zeros_like(running_sum, dtype=torch.bool)
        return chosen.scatter_(-1, order[..., : F // 2], True)


RULES = [Squares(), Squares()]


def new_state(batch: int = 1, min_prompt: int = 8) -> SequenceState:
    return SequenceState("me", min_prompt, batch, [(F, torch.device("cpu"))] * 2)


def activations(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, n, F, generator=torch.Generator().manual_seed(seed))


def feed(state: SequenceState, a: Tensor, past: int, real: Tensor | None = None) -> None:
    """What the hooks and the MLPs do in a forward that learns."""
    learners = state.start(a.shape[1], past)
    entered = torch.ones(a.shape[:2], dtype=torch.bool) if real is None else real
    entered = entered & learners.unsqueeze(1)
    for i, layer in enumerate(state.layers):
        layer.learn(RULES[i], a * (i + 1), entered)
    state.learned(a.shape[1], past, entered)
    state.choose(RULES)


def sets(state: SequenceState, layer: int = 0) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in state.layers[layer].mask]


def top(a: Tensor) -> list[int]:
    return sorted(a.square().sum(0).argsort(descending=True)[: F // 2].tolist())


def test_chunks_equal_one_prompt() -> None:
    a = activations(2, 75)
    whole, chunks = new_state(2), new_state(2)
    feed(whole, a, 0)
    past = 0
    for n in (4, 40, 1 + SHORT, 3, 19):
        feed(chunks, a[:, past : past + n], past)
        past += n
    assert past == 75
    for one, two in zip(whole.layers, chunks.layers, strict=True):
        torch.testing.assert_close(one.total(), two.total())
        assert two.tail.shape[1] == TAIL
    torch.testing.assert_close(whole.layers[0].total(), a.square().sum(1))
    assert sets(whole) == sets(chunks) == [top(a[0]), top(a[1])]
    assert whole.tokens.tolist() == chunks.tokens.tolist() == [75, 75]


def test_padding_never_enters_even_if_it_is_nan() -> None:
    a = activations(2, 50)
    real = torch.ones(2, 50, dtype=torch.bool)
    real[0, :30] = False
    a[0, :30] = float("nan")
    state = new_state(2)
    feed(state, a, 0, real)
    assert sets(state) == [top(a[0, 30:]), top(a[1])]
    assert state.tokens.tolist() == [20, 50]


def test_buffers_are_updated_in_place() -> None:
    state = new_state(2)
    layer = state.layers[0]
    buffers = (layer.mask, layer.indices, layer.count)
    feed(state, activations(2, 20), 0)
    first = sets(state)
    state.reset()
    feed(state, activations(2, 20, seed=1), 0)
    state.reorder(torch.tensor([1, 0]))
    assert sets(state) != first
    for before, now in zip(buffers, (layer.mask, layer.indices, layer.count), strict=True):
        assert before.data_ptr() == now.data_ptr()
    union = sorted(set(sets(state)[0]) | set(sets(state)[1]))
    assert layer.indices[: int(layer.count)].tolist() == union
    assert int(state.sizes[0]) == F


@pytest.mark.parametrize("removed", [0, 1, 5, TAIL - 1, TAIL])
def test_crop_takes_back_what_was_removed(removed: int) -> None:
    """Assisted decoding: drafts that were rejected leave no trace, bit for bit."""
    a = activations(1, 60)
    state, clean = new_state(), new_state()
    feed(state, a, 0)
    state.crop(60 - removed)
    feed(clean, a[:, : 60 - removed], 0)
    state.choose(RULES)
    assert sets(state) == sets(clean) == [top(a[0, : 60 - removed])]
    assert state.tokens.tolist() == [60 - removed]
    assert state.closed and state.decodes(3), "a crop ends the prompt"
    for layer in state.layers:
        assert layer.tail.shape[1] == 0, "decode keeps no tail"


def test_crop_deeper_than_the_tail_decides_anew() -> None:
    state = new_state()
    feed(state, activations(1, 60), 0)
    state.crop(60 - TAIL - 1)
    assert state.tokens.tolist() == [0] and not state.decodes(1)
    late = activations(1, 9, seed=3)
    for i in range(8):
        feed(state, late[:, i : i + 1], 27 + i)
    assert state.decodes(1)
    assert sets(state) == [top(late[0, :8])]


def test_crop_within_decode_changes_nothing() -> None:
    state = new_state()
    feed(state, activations(1, 20), 0)
    assert state.decodes(1)
    state.close()
    before = sets(state)
    state.crop(22)
    state.crop(20)
    assert sets(state) == before and state.decodes(5)
    state.crop(19)
    assert not state.ready and state.tokens.tolist() == [0], "into the prompt: decided anew"


def test_crop_below_min_prompt_stays_a_prompt() -> None:
    state = new_state()
    feed(state, activations(1, 10), 0)
    state.crop(6)
    assert state.tokens.tolist() == [6] and state.open.all() and not state.decodes(1)
    feed(state, activations(1, 2, seed=1), 6)
    assert state.decodes(1) and not state.decodes(2)


def test_a_cache_shortened_without_crop_is_noticed() -> None:
    a, b = activations(1, 40), activations(1, 5, seed=9)
    state = new_state()
    feed(state, a, 0)
    feed(state, b, 30)  # short, and still a prompt: nothing says that it has ended
    want = a[0, :30].square().sum(0) + b[0].square().sum(0)
    torch.testing.assert_close(state.layers[0].total()[0], want)


def test_a_later_prompt_adds() -> None:
    a, b = activations(1, 12), activations(1, SHORT + 1, seed=1)
    state = new_state()
    feed(state, a, 0)
    assert state.decodes(1) and not state.decodes(2)
    state.close()
    assert state.decodes(SHORT) and not state.decodes(SHORT + 1)
    feed(state, b, 20)
    assert sets(state) == [top(torch.cat([a, b], 1)[0])]
    assert not state.closed
    state.crop(25)
    state.choose(RULES)
    assert sets(state) == [top(torch.cat([a, b[:, :5]], 1)[0])]
    state.crop(20)
    assert state.tokens.tolist() == [0]


def test_rows_follow_reorder_select_repeat() -> None:
    a = activations(3, 20)
    state = new_state(3)
    feed(state, a, 0)
    tops = [top(row) for row in a]
    state.reorder(torch.tensor([2, 2, 0]))
    assert sets(state) == [tops[2], tops[2], tops[0]]
    state.repeat(2)
    assert state.batch == 6
    assert sets(state) == [tops[i] for i in (2, 2, 2, 2, 0, 0)]
    assert state.sizes.tolist() == [6 * F // 2] * len(state.layers)
    state.select(torch.tensor([4, 0]))
    assert sets(state) == [tops[0], tops[2]]
    state.select(torch.tensor([False, True]))
    layer = state.layers[0]
    assert sets(state) == [tops[2]]
    assert layer.indices[: int(layer.count)].tolist() == tops[2]
    torch.testing.assert_close(layer.total()[0], a[2].square().sum(0))
    assert state.tokens.tolist() == [20]


def test_an_undecided_row_does_not_touch_the_others() -> None:
    """Row 1 has three real tokens; row 0 decides and stays decided while row 1 goes on learning."""
    a = activations(2, 12)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, :9] = False
    state = new_state(2)
    feed(state, a, 0, real)
    assert not state.ready
    assert sets(state) == [top(a[0]), list(range(F))]
    more = activations(2, 8, seed=4)
    for i in range(5):
        feed(state, more[:, i : i + 1], 12 + i)
        assert sets(state)[0] == top(a[0])
        assert state.open.tolist() == [False, True]
    assert state.ready and state.decodes(1)
    assert sets(state)[1] == top(torch.cat([a[1, 9:], more[1, :5]]))
    torch.testing.assert_close(state.layers[0].total()[0], a[0].square().sum(0))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_copied_cache_goes_on_alone(
    duplicate: Callable[[DynamicCache], DynamicCache], static: bool, tiny: Make, prompt: Prompt
) -> None:
    dense, model, ids = tiny(), tiny(), prompt(12)
    patch(model, SRIDA(0.5))
    cache = StaticCache(model.config, max_cache_len=40) if static else DynamicCache()
    kind = type(cache)
    model(ids, **passing(model, cache))
    assert isinstance(cache, kind) and type(cache).__name__ == kind.__name__
    other = duplicate(cache)
    tails = [prompt(5, seed=1), prompt(5, seed=2)]
    for tail, c in zip(tails, (cache, other), strict=True):
        steps = [model(tail[:, i : i + 1], **passing(model, c)).logits[0] for i in range(5)]
        text = torch.cat([ids, tail], 1)[0]
        governed, learned = oracle.roles(oracle.srida(0.5), 17, 12)
        want = oracle.logits(dense, text, oracle.srida(0.5), governed, learned)
        torch.testing.assert_close(torch.cat(steps), want[12:], rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_a_loaded_cache_is_counted_by_its_own_rows(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), SRIDA(0.5))
    cache = DynamicCache()
    model(prompt(12), **passing(model, cache))
    cache.batch_repeat_interleave(3)
    cache = pickle.loads(pickle.dumps(cache))
    cache.batch_select_indices(torch.tensor([1]))
    report(model, reset=True)
    model(prompt(1), **passing(model, cache))
    assert report(model).layers[0].tokens == 1 and report(model).density == 0.5


@torch.no_grad()
def test_a_compiled_prompt(tiny: Make, prompt: Prompt) -> None:
    """Compiled from the prompt on, as by `model.forward = torch.compile(model.forward)`."""
    model, plain = patch(tiny(), SRIDA(0.5)), patch(tiny(), SRIDA(0.5))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    caches = DynamicCache(), DynamicCache()
    for ids in (prompt(12), prompt(1), prompt(1, seed=2)):
        got = compiled(ids, **passing(model, caches[0])).logits
        want = plain(ids, **passing(plain, caches[1])).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert report(model).layers[0].tokens == report(plain).layers[0].tokens == 2


@torch.no_grad()
def test_cache_methods_carry_the_state(tiny: Make, prompt: Prompt) -> None:
    """One prompt, expanded to three rows, two of them kept, each with its own continuation."""
    dense, model, ids = tiny(), tiny(), prompt(12)
    patch(model, SRIDA(0.5))
    cache = DynamicCache()
    model(ids, **passing(model, cache))
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    tail = prompt(4, batch=2, seed=3)
    steps = [model(tail[:, i : i + 1], **passing(model, cache)).logits[:, 0] for i in range(4)]
    rule = oracle.srida(0.5)
    for row in (0, 1):
        text = torch.cat([ids[0], tail[row]])
        want = oracle.logits(dense, text, rule, *oracle.roles(rule, 16, 12))
        got = torch.stack([s[row] for s in steps])
        torch.testing.assert_close(got, want[12:], rtol=2e-4, atol=2e-4)
    cache.reset()
    model(ids, **passing(model, cache))
    assert report(model).layers[0].refreshes == 2


@torch.no_grad()
def test_a_batch_that_the_cache_does_not_have(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), SRIDA(0.5))
    cache = DynamicCache()
    model(prompt(12), **passing(model, cache))
    with pytest.raises(PatchStateError, match="belongs to 1 sequences, the forward has 2"):
        model(prompt(1, batch=2), **passing(model, cache))


@torch.no_grad()
def test_packed_sequences_are_refused(tiny: Make, prompt: Prompt) -> None:
    """Continuous batching: a sequence-level method names the per-token ones, which work."""
    model = patch(tiny(), SRIDA(0.5))
    packed = {"cu_seq_lens_q": torch.tensor([0, 5, 12]), "use_cache": False}
    with pytest.raises(PatchStateError, match=r"continuous.*Dense, TDA"):
        model(prompt(12), **packed)
    unpatch(model)
    patch(model, TDA(0.1))
    model(prompt(12), **packed)


@torch.no_grad()
def test_another_patch_does_not_use_the_state(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), SRIDA(0.5))
    cache = DynamicCache()
    model(prompt(12), **passing(model, cache))
    unpatch(model)
    patch(model, STDA(0.1))
    model(prompt(1), **passing(model, cache))
    assert report(model).layers[0].dense_tokens == 1, "undecided until it has seen enough itself"


@torch.no_grad()
def test_a_failed_forward_leaves_no_half_state(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), SRIDA(0.5))
    cache = DynamicCache()

    def fail(*_: object) -> None:
        raise RuntimeError("interrupted")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        model(prompt(12), **passing(model, cache))
    handle.remove()
    assert model.model.layers[0].mlp.context.current is None
    state = cache._moyu_state
    assert not any(layer.total().any() for layer in state.layers)
    cache = DynamicCache()
    model(prompt(12), **passing(model, cache))
    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        model(prompt(1), **passing(model, cache))
    handle.remove()
    assert report(model).layers[0].tokens == 0, "a decode step that failed is not counted"


def test_inference_mode_may_begin_and_end_anywhere(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), SRIDA(0.5))
    cache = DynamicCache()
    with torch.inference_mode():
        model(prompt(20), **passing(model, cache))
        model(prompt(1), **passing(model, cache))
    with torch.no_grad():
        model(prompt(1), **passing(model, cache))
        cache.reorder_cache(torch.tensor([0]))
        model(prompt(12), **passing(model, cache))
        cache.crop(-3)
        model(prompt(1), **passing(model, cache))
    assert report(model).layers[0].refreshes == 2


def test_statistics_keep_no_graph(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), SRIDA(0.5))
    out = model(prompt(12))
    state = cache_of(out)._moyu_state
    assert not any(layer.total().requires_grad for layer in state.layers)


def test_threads_do_not_mix(tiny: Make, prompt: Prompt) -> None:
    """generate() in a thread per sequence, as a streaming server does."""
    dense, model = tiny(), tiny()
    patch(model, SRIDA(0.5))
    prompts = [prompt(10 + i, seed=i) for i in range(3)]
    results: dict[int, Tensor] = {}

    def generate(i: int) -> None:
        results[i] = model.generate(prompts[i], max_new_tokens=12, do_sample=False)

    threads = [threading.Thread(target=generate, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, ids in enumerate(prompts):
        want = oracle.greedy(dense, ids[0], oracle.srida(0.5), 12)
        assert torch.equal(results[i][0], want)


def test_real_tokens() -> None:
    two = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert real_tokens(two, 2, 4, 0).tolist() == two.bool().tolist()
    assert real_tokens(two, 2, 2, 2).tolist() == [[True, True], [True, True]]
    assert real_tokens(None, 2, 2, 2) is None
    assert real_tokens(object(), 2, 2, 2) is None, "a block mask says nothing"
    # 4-D: a static cache of 6 columns, 4 new tokens, the first of row 0 is padding.
    seen = torch.ones(4, 6).tril().bool().expand(2, 1, 4, 6).clone()
    seen[0, :, :, 0] = False
    want = [[False, True, True, True], [True] * 4]
    assert real_tokens(seen, 2, 4, 0).tolist() == want
    additive = torch.zeros(2, 1, 4, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert real_tokens({"full_attention": additive}, 2, 4, 0).tolist() == want
    # Two of four new tokens behind two cached ones, in a sliding cache of three columns.
    sliding = torch.ones(1, 1, 2, 3).bool()
    assert real_tokens(sliding, 1, 2, 5).tolist() == [[True, True]]
