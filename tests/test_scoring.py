"""scoring: a continuation in one forward, as generation would have treated it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import oracle
import pytest
import torch
from moyu_ext.errors import ConfigurationError, PatchStateError
from moyu_ext.methods import SRIDA, STDA, TDA, Method
from moyu_ext.models.cache import passing
from moyu_ext.patching.patch import patch, report, scoring
from moyu_ext.patching.sequence_state import ATTRIBUTE
from snapshot import snapshot
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

Make = Callable[..., PreTrainedModel]
Prompt = Callable[..., Tensor]
BOTH = pytest.mark.parametrize("family", ["llama-bias", "opt"])
CONTEXT, TOTAL = 13, 30


@BOTH
@pytest.mark.parametrize("name", ["tda", "gate", "stda", "srida"])
@torch.no_grad()
def test_scoring_is_generation_in_one_forward(
    name: str, family: str, tiny: Make, prompt: Prompt
) -> None:
    dense, model, ids = tiny(family), tiny(family), prompt(TOTAL)
    eps = oracle.quantiles(dense, ids[0])
    method, rule = {
        "tda": (TDA(eps), oracle.tda(eps)),
        "gate": (TDA(0.3, score="gate"), oracle.tda(0.3, "gate")),
        "stda": (STDA(eps), oracle.stda(eps)),
        "srida": (SRIDA(0.4), oracle.srida(0.4)),
    }[name]
    patch(model, method)
    with scoring(model, CONTEXT):
        got = model(ids).logits[0]
    sets = int(name in ("stda", "srida"))
    assert report(model).layers[0].refreshes == sets
    want = oracle.logits(dense, ids[0], rule, *oracle.roles(rule, TOTAL, CONTEXT))
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)
    cache = DynamicCache()
    steps = [model(ids[:, :CONTEXT], **passing(model, cache)).logits[0]]
    for t in range(CONTEXT, TOTAL):
        steps.append(model(ids[:, t : t + 1], **passing(model, cache)).logits[0])
    torch.testing.assert_close(got, torch.cat(steps), rtol=2e-4, atol=2e-4)
    layer = report(model).layers[0]
    assert layer.tokens == 2 * (TOTAL - CONTEXT) and layer.dense_tokens == 2 * CONTEXT
    assert layer.refreshes == 2 * sets


@BOTH
@pytest.mark.parametrize("name", ["tda", "srida"])
@torch.no_grad()
def test_scoring_a_batch(name: str, family: str, tiny: Make, prompt: Prompt) -> None:
    """Padding left or right, a context per row, and a row with too little context."""
    dense, model = tiny(family), tiny(family)
    eps = oracle.quantiles(dense, prompt(30)[0])
    method, rule = {
        "tda": (TDA(eps), oracle.tda(eps)),
        "srida": (SRIDA(0.4), oracle.srida(0.4)),
    }[name]
    patch(model, method)
    lengths, contexts = [20, 15, 12], [11, 9, 4]
    for side in ("left", "right"):
        ids = torch.zeros(3, 20, dtype=torch.long)
        mask = torch.zeros(3, 20, dtype=torch.long)
        columns = []
        for row, n in enumerate(lengths):
            where = slice(20 - n, 20) if side == "left" else slice(0, n)
            ids[row, where], mask[row, where] = prompt(n, seed=row)[0], 1
            columns.append(where)
        starts = [
            c + (w.start if side == "left" else 0) for c, w in zip(contexts, columns, strict=True)
        ]
        # lm-eval pads right and passes no mask.
        given = mask if side == "left" else None
        with scoring(model, starts):
            got = model(ids, attention_mask=given).logits
        for row, n in enumerate(lengths):
            governed, learned = oracle.roles(rule, n, contexts[row])
            if name == "srida" and contexts[row] < 8:
                governed[:] = False  # in one forward it can't decide halfway: dense
            want = oracle.logits(dense, ids[row, columns[row]], rule, governed, learned)
            torch.testing.assert_close(got[row, columns[row]], want, rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_scoring_ends_with_its_block(tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(), SRIDA(0.5))
    before = snapshot(model)
    with pytest.raises(KeyError), scoring(model, 4):
        raise KeyError
    assert snapshot(model) == before
    model.generate(prompt(12), max_new_tokens=4, do_sample=False)
    assert report(model).layers[0].tokens == 3


@torch.no_grad()
@pytest.mark.parametrize("method", [TDA(0.1), SRIDA(0.5)], ids=repr)
def test_an_interrupt_leaves_nothing_behind(method: Method, tiny: Make, prompt: Prompt) -> None:
    """KeyboardInterrupt is no Exception: torch does not run forward hooks behind it."""
    model, ids = patch(tiny(), method), prompt(12)
    want = model.generate(ids, max_new_tokens=4, do_sample=False)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupted(block: AbstractContextManager[None]) -> None:
        handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), block:
            model(ids)
        handle.remove()

    for block in (scoring(model, 4), nullcontext()):
        interrupted(block)
        report(model, reset=True)
        model(ids)
        assert report(model).layers[0].tokens == 0  # a prompt is dense
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), want)


@torch.no_grad()
def test_scoring_is_for_its_thread_and_nests(tiny: Make, prompt: Prompt) -> None:
    model, ids = patch(tiny(), SRIDA(0.5)), prompt(TOTAL)
    want = model.generate(ids[:, :12], max_new_tokens=6, do_sample=False)
    with scoring(model, CONTEXT):
        logits = model(ids, use_cache=True).logits
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(model.generate, ids[:, :12], max_new_tokens=6, do_sample=False)
            assert torch.equal(job.result(), want)
        with scoring(model, CONTEXT + 4):
            inner = model(ids).logits
        assert not torch.equal(inner, logits)
        out = model(ids, use_cache=True)
        assert torch.equal(out.logits, logits)
        assert not hasattr(out.past_key_values, ATTRIBUTE)


@torch.no_grad()
def test_bad_scoring(tiny: Make, prompt: Prompt) -> None:
    model = tiny()
    with pytest.raises(PatchStateError, match="not patched"), scoring(model, 3):
        pass
    patch(model, SRIDA(0.5))
    for length in (-1, 2.5, [3, -1], [], True):
        with pytest.raises(ConfigurationError, match="context_length is"), scoring(model, length):
            pass
    with scoring(model, [3, 4]), pytest.raises(ConfigurationError, match="2 context lengths for"):
        model(prompt(9))
    cache = DynamicCache()
    model(prompt(9), **passing(model, cache))
    with scoring(model, 3), pytest.raises(PatchStateError, match="already holds 9 tokens"):
        model(prompt(9), **passing(model, cache))
