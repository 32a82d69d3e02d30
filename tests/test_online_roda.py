"""OnlineRODA: the predictor that follows its sequence, in scoring, in decode and across texts."""

import pytest
import torch
from moyu_ext.calibration.train_router import train_router
from moyu_ext.evaluation.agreement import compare
from moyu_ext.evaluation.perplexity import generation_perplexity
from moyu_ext.evaluation.router_recall import router_recall
from moyu_ext.methods import METHODS
from moyu_ext.methods.online_roda import PRIOR, OnlineRODA
from moyu_ext.methods.roda import RODA
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.models.families import find_mlps
from moyu_ext.routers.router import Router
from study_support import WordTokenizer, text
from transformers import StaticCache

from moyu_ext import ArtifactError, ConfigurationError, patch, report, unpatch


@pytest.fixture(scope="module")
def trained(tiny) -> tuple[torch.nn.Module, Router]:
    model = tiny("llama-relu")
    texts = [text(60, seed) for seed in range(40)]
    router = train_router(
        model, WordTokenizer(), texts, rank=8, epochs=3, max_tokens=2400, progress=False
    )
    return model, router


def decode(model, ids: torch.Tensor, context: int) -> torch.Tensor:
    """Logits of the tokens behind the context, one forward per token: [rows, n, vocabulary]."""
    with torch.no_grad():
        out = model(ids[:, :context], use_cache=True)
        logits = [out.logits[:, -1]]
        for t in range(context, ids.shape[1] - 1):
            out = model(ids[:, t : t + 1], **passing(model, cache_of(out)))
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def loss(logits: torch.Tensor, ids: torch.Tensor, context: int) -> float:
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, context:].flatten()
    ).item()


@pytest.mark.parametrize("refresh", [None, 5, 1])
@pytest.mark.parametrize("batch", [1, 3])
def test_decode_is_what_scoring_says(trained, prompt, refresh: int | None, batch: int) -> None:
    model, router = trained
    ids = prompt(39, batch)
    dense = generation_perplexity(model, ids, context=10, continuation=29).loss
    patch(model, OnlineRODA(router, density=0.3, refresh=refresh))
    scored = generation_perplexity(model, ids, context=10, continuation=29).loss
    one_forward = report(model, reset=True)
    found = loss(decode(model, ids, 10), ids, 10)
    stepwise = report(model)
    unpatch(model)
    assert found == pytest.approx(scored, abs=1e-4)
    if refresh == 1:
        assert scored == pytest.approx(dense, abs=1e-5)
        assert stepwise.density == one_forward.density == 1
        return
    assert abs(dense - scored) > 1e-3
    # The last token's forward is in scoring alone; all others must agree to the neuron.
    assert stepwise.density == pytest.approx(one_forward.density, abs=0.01)
    if refresh == 5:
        assert [layer.refreshes for layer in stepwise.layers] == [batch * (1 + 28 // 5)] * 3


def test_refreshed_tokens_count_with_all_their_neurons(trained, prompt) -> None:
    model, router = trained
    densities = []
    for refresh in (None, 2):
        patch(model, OnlineRODA(router, density=0.2, refresh=refresh))
        decode(model, prompt(41), 10)
        found = report(model)
        densities.append(found.density)
        assert found.layers[0].tokens == 30 and found.layers[0].dense_tokens == 10
        unpatch(model)
    assert densities[1] > 0.5 > densities[0]


def test_the_shift_is_the_log_odds_of_what_was_seen(trained) -> None:
    model, router = trained
    w = find_mlps(model)[1].weights()
    layer = router.layers[1]
    rule = OnlineRODA(router).bind(1, w)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 32, generator=g)
    counts = torch.randint(0, 21, (4, 96), generator=g).float()
    rate = layer.rate.double().clamp(1e-3, 1 - 1e-3)
    seen = ((counts + PRIOR * rate) / (20 + PRIOR)).clamp(1e-3, 1 - 1e-3)
    scores = layer.scores(x) + (seen / (1 - seen)).log() - (rate / (1 - rate)).log()
    expected = scores >= layer.threshold
    clear = (scores - layer.threshold).abs() > 1e-4
    found = rule.active(x, counts, torch.full((4, 1), 20))
    assert torch.equal(found[clear], expected[clear])
    # Nothing seen: the offline router.
    plain = RODA(router).bind(1, w).active(x, x, x)
    none = rule.active(x, torch.zeros(4, 96), torch.zeros(4, 1))
    assert ((none != plain) & ((layer.scores(x) - layer.threshold).abs() > 1e-4)).sum() == 0
    a = torch.randn(5, 96, generator=g)
    norms = a.abs() * w.column_norms()
    assert torch.equal(rule.statistic(a).bool(), norms >= layer.epsilon)


def test_it_finds_neurons_that_training_took_for_silent(trained, prompt) -> None:
    """A router that never saw any neuron active learns from the prompt which ones are."""
    model, router = trained
    layers = []
    for layer in router.layers:
        values = vars(layer) | {"rate": torch.full_like(layer.rate, 1e-3)}
        values |= {"first": layer.first * 0, "threshold": 0.0, "bias": layer.bias * 0 - 3.0}
        layers.append(type(layer)(**values))
    blind = Router(tuple(layers), router.fingerprint, 0.2, 0.9, 0)
    ids = prompt(60, 2)
    found = [
        compare(model, method, ids, 30).kl.mean().item()
        for method in (RODA(blind), OnlineRODA(blind, refresh=8))
    ]
    assert found[1] < found[0] / 2
    recalls = [router_recall(model, method, ids, 30) for method in (RODA(blind), OnlineRODA(blind))]
    assert recalls[0].mean("recall") == recalls[0].mean("density") == 0
    assert recalls[1].mean("recall") > 0.5 and recalls[1].mean("density") < 0.9


@pytest.mark.parametrize("refresh", [None, 4])
def test_recall_counts_what_a_loop_counts(trained, prompt, refresh: int | None) -> None:
    """One layer, token by token: the sums over what ran with all neurons before."""
    model, router = trained
    ids = prompt(20, 2)
    found = router_recall(model, OnlineRODA(router, density=0.3, refresh=refresh), ids, 8)
    offline = router_recall(model, RODA(router, density=0.3), ids, 8)
    w = find_mlps(model)[0].weights()
    seen: list[torch.Tensor] = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    counts = torch.zeros(6)  # hits, positives, chosen, used, all; offline hits
    rule = OnlineRODA(router, density=0.3).bind(0, w)
    plain = RODA(router, density=0.3).bind(0, w)
    offline_positives = 0.0
    for x in seen[0].detach():
        total, tokens = torch.zeros(96), 0
        for t in range(20):
            a = torch.relu(w.gate @ x[t]) * (w.up @ x[t])
            labels = (a.abs() * w.column_norms() >= router.layers[0].epsilon).detach()
            dense = t < 8 or (refresh is not None and (t - 7) % refresh == 0)
            active = rule.active(x[t], total, torch.tensor([tokens]))
            if t >= 8:
                counts[3] += 96 if dense else active.sum()
                counts[4] += 96
                counts[5] += (plain.active(x[t : t + 1], x, x)[0] & labels).sum()
                offline_positives += labels.sum().item()
                if not dense:
                    counts[:3] += torch.stack([(active & labels).sum(), labels.sum(), active.sum()])
            if dense:
                total, tokens = total + labels, tokens + 1
    assert found.recall[0] == pytest.approx((counts[0] / counts[1]).item(), abs=0.01)
    assert found.precision[0] == pytest.approx((counts[0] / counts[2]).item(), abs=0.01)
    assert found.density[0] == pytest.approx((counts[3] / counts[4]).item(), abs=0.01)
    assert offline.recall[0] == pytest.approx(counts[5].item() / offline_positives, abs=0.01)
    with pytest.raises(ConfigurationError, match="context is 20"):
        router_recall(model, RODA(router), ids, 20)


def test_two_sequences_do_not_mix(trained, prompt) -> None:
    model, router = trained
    first, second = prompt(12, seed=1), prompt(20, seed=2)
    patch(model, OnlineRODA(router, refresh=4))
    alone = decode(model, torch.cat([first, first], 1), 12)
    with torch.no_grad():
        a = model(first, use_cache=True)
        b = model(second, use_cache=True)
        logits = [a.logits[:, -1]]
        for t in range(11):
            a = model(first[:, t : t + 1], **passing(model, cache_of(a)))
            b = model(second[:, t : t + 1], **passing(model, cache_of(b)))
            logits.append(a.logits[:, -1])
    unpatch(model)
    assert torch.equal(alone, torch.stack(logits, 1))


def test_generate_with_padding_and_beams(trained, prompt) -> None:
    model, router = trained
    patch(model, OnlineRODA(router, refresh=4))
    ids = prompt(12)
    alone = model.generate(ids, max_new_tokens=12, do_sample=False)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    both = model.generate(
        torch.cat([padded, prompt(15, seed=5)]),
        attention_mask=torch.cat([(padded != 0).long(), torch.ones(1, 15, dtype=torch.long)]),
        max_new_tokens=12,
        do_sample=False,
    )
    beams = model.generate(ids, max_new_tokens=12, do_sample=False, num_beams=3)
    unpatch(model)
    assert torch.equal(both[0, 3:], alone[0])
    assert beams.shape == (1, 24)


def test_it_is_registered_and_its_errors_are_named(trained, tiny) -> None:
    _, router = trained
    assert METHODS["roda-online"] is OnlineRODA and METHODS["roda"] is RODA
    assert repr(OnlineRODA(router)) == "OnlineRODA(<3 layers>, density=None, refresh=32)"
    with pytest.raises(ConfigurationError, match="expected a Router"):
        OnlineRODA(None)
    with pytest.raises(ConfigurationError, match="refresh is 0"):
        OnlineRODA(router, refresh=0)
    with pytest.raises(ConfigurationError, match="density is 2"):
        OnlineRODA(router, density=2)
    with pytest.raises(ArtifactError, match="trained on another model"):
        patch(tiny("llama-relu", seed=1), OnlineRODA(router))


def test_a_compiled_decode_step_is_one_graph(trained, prompt) -> None:
    """What counts tokens on the host must not be traced: each step would be another graph."""
    model, router = trained
    patch(model, OnlineRODA(router, density=0.2, refresh=32))
    ids = prompt(30)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(model, fullgraph=True, backend="eager")
    cache = StaticCache(model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids[:, :20], **passing(model, cache))
        for t in range(20, 28):
            step(ids[:, t : t + 1], **passing(model, cache))
    unpatch(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
