"""generate() on a patched model against the oracle, for every way of decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from conftest import FAMILIES
from moyu_ext.methods import SRIDA, STDA, TDA, Dense, Method
from moyu_ext.models.cache import NAMES, cache_of, passing
from moyu_ext.patching.patch import patch, report, unpatch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

TOLERANCE = 2e-4  # float32, three layers, logits of order 10


@dataclass
class Case:
    """A method and the oracle's rule, on a model whose thresholds they share."""

    method: Method
    rule: oracle.Rule


def case(name: str, model: PreTrainedModel) -> Case:
    g = torch.Generator().manual_seed(7)
    text = torch.randint(3, 101, (40,), generator=g)
    if name == "tda":
        eps = oracle.quantiles(model, text)
        return Case(TDA(eps), oracle.tda(eps))
    if name == "tda-gate":
        eps = oracle.quantiles(model, text, score="gate")
        return Case(TDA(eps, score="gate"), oracle.tda(eps, "gate"))
    if name == "stda":
        eps = oracle.quantiles(model, text, rms=True)
        return Case(STDA(eps), oracle.stda(eps))
    if name == "srida":
        return Case(SRIDA(0.5), oracle.srida(0.5))
    assert name == "griffin"
    return Case(SRIDA(0.4, score="griffin"), oracle.srida(0.4, "griffin"))


METHODS = ("tda", "tda-gate", "stda", "srida", "griffin")
SEQUENCE = ("stda", "srida", "griffin")

Make = Callable[..., PreTrainedModel]
Prompt = Callable[..., Tensor]


def run(model: PreTrainedModel, ids: Tensor, new: int = 10, **kwargs: Any) -> Any:
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False} | kwargs
    return model.generate(
        ids, return_dict_in_generate=True, output_logits=True, output_scores=True, **settings
    )


def check(
    dense: PreTrainedModel,
    rule: oracle.Rule,
    sequence: Tensor,
    steps: Tensor,
    prompt: int,
    learned_prompt: int | None = None,
    min_prompt: int = 8,
) -> None:
    """The logits of each step [new, V] are the oracle's, for one unpadded sequence.

    learned_prompt: what the first forward left in the statistic, where it is not the prompt.
    """
    governed, learned = oracle.roles(rule, len(sequence), learned_prompt or prompt, min_prompt)
    want = oracle.logits(dense, sequence, rule, governed, learned)
    torch.testing.assert_close(
        steps.float(), want[prompt - 1 : prompt - 1 + len(steps)], rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(family: str, name: str, tiny: Make, prompt: Prompt) -> None:
    dense, model, ids = tiny(family), tiny(family), prompt(12)
    c = case(name, dense)
    out = run(patch(model, c.method), ids)
    check(dense, c.rule, out.sequences[0], torch.cat(out.logits), 12)
    assert torch.equal(out.sequences[0], oracle.greedy(dense, ids[0], c.rule, 10))
    rows = report(model)
    assert all(layer.tokens == 9 and layer.dense_tokens == 12 for layer in rows.layers)
    assert 0.1 < rows.density < 0.8


@pytest.mark.parametrize("name", METHODS)
def test_sampling_and_several_sequences(name: str, tiny: Make, prompt: Prompt) -> None:
    dense, model = tiny(), tiny()
    c = case(name, dense)
    torch.manual_seed(1)
    out = run(patch(model, c.method), prompt(9), do_sample=True, num_return_sequences=3)
    assert len({tuple(row) for row in out.sequences.tolist()}) == 3
    for row, sequence in enumerate(out.sequences):
        check(dense, c.rule, sequence, torch.stack([step[row] for step in out.logits]), 9)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("name", METHODS)
def test_batch_with_left_padding(
    name: str, family: str, cache: str | None, tiny: Make, prompt: Prompt
) -> None:
    """Each row is what it would be alone: no other row, no padding enters it."""
    dense, model = tiny(family), tiny(family)
    c = case(name, dense)
    # The fourth row has fewer than min_prompt tokens: it stays dense until it has seen eight.
    lengths = [12, 9, 16, 3, 10, 16, 1, 14]
    ids, mask = left_padded(lengths, prompt)
    out = run(patch(model, c.method), ids, attention_mask=mask, cache_implementation=cache)
    for row, length in enumerate(lengths):
        sequence = out.sequences[row, 16 - length :]
        check(dense, c.rule, sequence, torch.stack([s[row] for s in out.logits]), length)


def left_padded(lengths: list[int], prompt: Prompt) -> tuple[Tensor, Tensor]:
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = prompt(length, seed=row)[0]
        mask[row, width - length :] = 1
    return ids, mask


@pytest.mark.parametrize("name", METHODS)
def test_beams(name: str, tiny: Make, prompt: Prompt) -> None:
    dense, model = tiny(), tiny()
    c = case(name, dense)
    ids, mask = left_padded([12, 9], prompt)
    out = run(patch(model, c.method), ids, attention_mask=mask, num_beams=4, num_return_sequences=2)
    steps = model.compute_transition_scores(
        out.sequences, out.scores, out.beam_indices, normalize_logits=False
    )
    for row, sequence in enumerate(out.sequences):
        length = (12, 9)[row // 2]
        text = sequence[12 - length :]
        governed, learned = oracle.roles(c.rule, len(text), length)
        want = oracle.logits(dense, text, c.rule, governed, learned).log_softmax(-1)
        chosen = want[length - 1 : -1].gather(1, text[length:, None])[:, 0]
        torch.testing.assert_close(steps[row], chosen, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", METHODS)
def test_static_cache(name: str, tiny: Make, prompt: Prompt) -> None:
    dense, model = tiny(), tiny()
    c = case(name, dense)
    patch(model, c.method)
    for seed in (0, 1):  # generate() resets and reuses a static cache
        out = run(model, prompt(11, seed=seed), cache_implementation="static")
        check(dense, c.rule, out.sequences[0], torch.cat(out.logits), 11)


@pytest.mark.parametrize("chunk", [3, 4, 9])
@pytest.mark.parametrize("name", SEQUENCE)
def test_chunked_prefill(name: str, chunk: int, tiny: Make, prompt: Prompt) -> None:
    """Chunks of a prompt are the prompt, also those short enough for the operator."""
    dense, model = tiny(), tiny()
    c = case(name, dense)
    out = run(patch(model, c.method), prompt(11), prefill_chunk_size=chunk)
    check(dense, c.rule, out.sequences[0], torch.cat(out.logits), 11)
    assert report(model).layers[0].refreshes == 1


@pytest.mark.parametrize("name", METHODS)
def test_prompt_lookup(name: str, tiny: Make, prompt: Prompt) -> None:
    """Drafts are verified under the rule; rejected ones leave nothing behind."""
    dense, model = tiny(seed=3), tiny(seed=3)
    c = case(name, dense)
    ids = prompt(6).repeat(1, 4)  # every n-gram has a continuation to draft from
    forwards: list[tuple[int, int]] = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        past = next(kwargs[n] for n in NAMES if n in kwargs).get_seq_length()
        forwards.append((kwargs["input_ids"].shape[1], past))

    patch(model, c.method)
    model.register_forward_pre_hook(record, with_kwargs=True)
    out = run(model, ids, new=24, prompt_lookup_num_tokens=4)
    lengths = [length for length, _ in forwards]
    assert lengths[0] > ids.shape[1] and max(lengths[1:]) > 1, "nothing was drafted"
    kept = forwards[1][1]
    check(dense, c.rule, out.sequences[0], torch.cat(out.logits), ids.shape[1], kept)


@pytest.mark.parametrize("name", METHODS)
def test_early_exit(name: str, tiny: Make, prompt: Prompt) -> None:
    """Self-speculation drafts with the first layers; the others learn nothing from that."""
    model = tiny()
    patch(model, case(name, tiny()).method)
    out = run(model, prompt(12), new=12, assistant_early_exit=2)
    assert out.sequences.shape == (1, 24) and model.config.num_hidden_layers == 3


@pytest.mark.parametrize("name", METHODS)
def test_assisted_decoding(name: str, tiny: Make, prompt: Prompt) -> None:
    """An assistant of its own, patched too; and a verification of more than eight tokens."""
    dense, model, assistant = tiny(), tiny(), tiny()
    c = case(name, dense)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    patch(assistant, SRIDA(0.9))
    out = run(patch(model, c.method), prompt(12), new=20, assistant_model=assistant)
    assert report(assistant).layers[0].tokens > 0
    forward_tokens = report(model).layers[0]
    assert forward_tokens.tokens > 19, "no draft was rejected, or none was made"
    steps = torch.cat(out.logits)
    # The first forward drafted too; what it accepted was learned. Try both.
    accepted = int(forward_tokens.dense_tokens)
    failures = []
    for kept in range(12, accepted + 1):
        try:
            check(dense, c.rule, out.sequences[0], steps, 12, kept)
            return
        except AssertionError as error:
            failures.append(error)
    raise failures[0]


def test_verification_longer_than_short(tiny: Make, prompt: Prompt) -> None:
    """A draft of more than eight tokens runs dense; greedy text is then a prompt's continuation."""
    model = tiny(seed=3)
    patch(model, SRIDA(0.5))
    out = run(model, prompt(6).repeat(1, 4), new=24, prompt_lookup_num_tokens=12)
    assert out.sequences.shape[1] == 48
    assert report(model).layers[0].refreshes >= 1


@pytest.mark.parametrize("new_turn", [1, 5, 12])
@pytest.mark.parametrize("name", METHODS)
def test_second_turn(name: str, new_turn: int, tiny: Make, prompt: Prompt) -> None:
    """A long second turn adds to the statistic, a short one obeys the first turn's set."""
    dense, model = tiny(), tiny()
    c = case(name, dense)
    patch(model, c.method)
    first = run(model, prompt(12))
    ids = torch.cat([first.sequences, prompt(new_turn, seed=5)], 1)
    second = run(model, ids, **passing(model, cache_of(first)))
    length = second.sequences.shape[1]
    start = first.sequences.shape[1] - 1  # the last token of the first turn was not run yet
    governed, learned = oracle.roles(c.rule, length, 12)
    if new_turn + 1 > 8:
        governed[start : ids.shape[1]] = False
        learned[start : ids.shape[1]] = not c.rule.per_token
    want = oracle.logits(dense, second.sequences[0], c.rule, governed, learned)
    got = torch.cat([*first.logits, *second.logits])
    where = [*range(11, 21), *range(ids.shape[1] - 1, length - 1)]
    torch.testing.assert_close(got, want[where], rtol=TOLERANCE, atol=TOLERANCE)
    refreshes = 2 if new_turn == 12 else 1
    assert report(model).layers[0].refreshes == (refreshes if name in SEQUENCE else 0)


@torch.no_grad()
def decode(model: PreTrainedModel, ids: Tensor, cache: DynamicCache) -> Tensor:
    return model(input_ids=ids, **passing(model, cache), use_cache=True).logits[:, -1]


@pytest.mark.parametrize("name", METHODS)
def test_interleaved_generations(name: str, tiny: Make, prompt: Prompt) -> None:
    """Two generations take turns on one model; neither sees the other's set."""
    dense, model = tiny(), tiny()
    c = case(name, dense)
    patch(model, c.method)
    texts, caches = [prompt(12), prompt(15, seed=4)], [DynamicCache(), DynamicCache()]
    steps: list[list[Tensor]] = [[], []]
    pending = list(texts)
    for _ in range(8):
        for i in (0, 1):
            last = decode(model, pending[i], caches[i])
            steps[i].append(last)
            pending[i] = last.argmax(-1, keepdim=True)
            texts[i] = torch.cat([texts[i], pending[i]], 1)
    for i, length in enumerate((12, 15)):
        check(dense, c.rule, texts[i][0], torch.cat(steps[i]), length)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_several_tokens_of_several_sequences(
    name: str, family: str, tiny: Make, prompt: Prompt
) -> None:
    """In decode, three tokens each of two sequences: each row obeys its own sequence's set."""
    dense, model = tiny(family), tiny(family)
    c = case(name, dense)
    patch(model, c.method)
    ids, cache = prompt(16, batch=2), DynamicCache()
    pieces = [ids[:, :12], ids[:, 12:13], ids[:, 13:]]
    got = torch.cat([model(piece, **passing(model, cache)).logits for piece in pieces], 1)
    for row in (0, 1):
        want = oracle.logits(dense, ids[row], c.rule, *oracle.roles(c.rule, 16, 12))
        torch.testing.assert_close(got[row], want, rtol=TOLERANCE, atol=TOLERANCE)
    rows = report(model)
    assert rows.layers[0].tokens == 8
    assert rows.density == 0.5 or name != "srida"


@pytest.mark.parametrize("name", METHODS)
def test_without_cache_is_dense_and_counted(name: str, tiny: Make, prompt: Prompt) -> None:
    dense, model, ids = tiny(), tiny(), prompt(12)
    want = run(dense, ids, use_cache=False)
    out = run(patch(model, case(name, dense).method), ids, use_cache=False)
    assert torch.equal(out.sequences, want.sequences)
    layer = report(model).layers[0]
    assert layer.tokens == 0 and layer.dense_tokens == sum(range(12, 22))


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("name", SEQUENCE)
def test_one_token_prompt(name: str, family: str, tiny: Make, prompt: Prompt) -> None:
    """Dense until eight tokens are seen, then by their statistic."""
    dense, model = tiny(family), tiny(family)
    c = case(name, dense)
    out = run(patch(model, c.method), prompt(1), new=14)
    check(dense, c.rule, out.sequences[0], torch.cat(out.logits), 1)
    layer = report(model).layers[0]
    assert (layer.dense_tokens, layer.tokens, layer.refreshes) == (8, 6, 1)


@pytest.mark.parametrize("method", [SRIDA(0.5, min_prompt=1), SRIDA(0.5, min_prompt=20)])
def test_min_prompt(method: SRIDA, tiny: Make, prompt: Prompt) -> None:
    dense, model = tiny(), tiny()
    out = run(patch(model, method), prompt(10), new=14)
    rule = oracle.srida(0.5)
    check(dense, rule, out.sequences[0], torch.cat(out.logits), 10, min_prompt=method.min_prompt)


@pytest.mark.parametrize("family", ["llama-bias", "opt"])
@pytest.mark.parametrize("kind", [TDA, STDA])
def test_empty_set(kind: Any, family: str, tiny: Make, prompt: Prompt) -> None:
    """No neuron is active: what is left of the MLP is the output bias."""
    dense, model = tiny(family), tiny(family)
    out = run(patch(model, kind(float("inf"))), prompt(12))
    rule = oracle.tda(float("inf")) if kind is TDA else oracle.stda(float("inf"))
    check(dense, rule, out.sequences[0], torch.cat(out.logits), 12)
    assert report(model).density == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "llama-bias", "gemma", "opt"])
@pytest.mark.parametrize(
    "method", [Dense(), TDA(0.0), TDA(0.0, score="gate"), STDA(0.0), SRIDA(1.0)]
)
def test_density_one_is_dense(
    method: Method, family: str, dtype: torch.dtype, tiny: Make, prompt: Prompt
) -> None:
    """All neurons: off float64 by at most twice what plain PyTorch in the same dtype is off."""
    dense, model = tiny(family, dtype=dtype), tiny(family, dtype=dtype)
    exact = tiny(family, dtype=torch.float64)
    exact.load_state_dict(dense.state_dict())
    ids, tail = prompt(12), prompt(6, seed=2)
    patch(model, method)
    outputs = []
    for net in (exact, dense, model):
        cache = DynamicCache()
        steps = [decode(net, ids, cache)]
        steps += [decode(net, tail[:, i : i + 1], cache) for i in range(6)]
        outputs.append(torch.cat(steps).double())
    want, plain, ours = outputs
    floor = torch.finfo(dtype).eps * want.abs().max()
    assert (ours - want).abs().max() <= 2 * (plain - want).abs().max() + 2 * floor
    assert report(model).density == 1


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_prefill_obeys_tda(family: str, tiny: Make, prompt: Prompt) -> None:
    """TDA(prefill=True) governs the prompt too, below and above the operator's eight rows."""
    dense, model = tiny(family), tiny(family)
    eps = oracle.quantiles(dense, prompt(40)[0])
    patch(model, TDA(eps, prefill=True))
    for length in (5, 20):
        out = run(model, prompt(length))
        check_everything = torch.ones(length + 10, dtype=torch.bool)
        want = oracle.logits(
            dense, out.sequences[0], oracle.tda(eps), check_everything, ~check_everything
        )
        got = torch.cat(out.logits)
        torch.testing.assert_close(got, want[length - 1 : -1], rtol=TOLERANCE, atol=TOLERANCE)
    assert report(model).layers[0].dense_tokens == 0


def test_more_rows_than_the_operator_takes(tiny: Make, prompt: Prompt) -> None:
    """Nine rows run dense, and the report says so."""
    dense, model, ids = tiny(), tiny(), prompt(12, batch=9)
    want = run(dense, ids)
    for method in (TDA(1.0), SRIDA(0.1)):
        out = run(patch(model, method), ids)
        assert torch.equal(out.sequences, want.sequences)
        layer = report(model).layers[0]
        assert layer.tokens == 0 and layer.dense_tokens == 9 * 12 + 9 * 9
        unpatch(model)
    # Also while one row, with three tokens, is undecided.
    ids, mask = left_padded([12] * 8 + [3], prompt)
    want = run(dense, ids, attention_mask=mask)
    out = run(patch(model, SRIDA(0.1)), ids, attention_mask=mask)
    assert torch.equal(out.sequences, want.sequences)


def test_only_some_layers(tiny: Make, prompt: Prompt) -> None:
    dense, model = tiny(), tiny()
    patch(model, SRIDA(0.5), layers=[0, -1])
    rule = oracle.srida(0.5)
    inner = rule.keep
    rule.keep = lambda layer, a, *rest: (
        torch.ones(a.shape[1], dtype=torch.bool) if layer == 1 else inner(layer, a, *rest)
    )
    out = run(model, prompt(12))
    check(dense, rule, out.sequences[0], torch.cat(out.logits), 12)
    assert [layer.index for layer in report(model).layers] == [0, 2]
