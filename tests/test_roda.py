"""RODA: the router's artefact, its training, and the method."""

import json
from pathlib import Path

import pytest
import torch
from moyu_ext.calibration import train_router as train
from moyu_ext.calibration.train_router import train_router
from moyu_ext.evaluation.perplexity import generation_perplexity
from moyu_ext.methods.base import Method, compact
from moyu_ext.methods.online_roda import OnlineRODA
from moyu_ext.methods.roda import RODA
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.models.families import find_mlps
from moyu_ext.reference import sparse_mlp
from moyu_ext.routers.router import LayerRouter, Router
from study_support import WordTokenizer, text

from moyu_ext import ArtifactError, ConfigurationError, PatchStateError, patch, report, unpatch

TEXTS = [text(60, seed) for seed in range(40)]


def make(model, tmp_path: Path | None = None, **settings) -> Router:
    options = {"epochs": 3, "max_tokens": 2400, "rank": 8, "progress": False} | settings
    return train_router(model, WordTokenizer(), TEXTS, out=tmp_path, **options)


@pytest.fixture(scope="module")
def trained(tiny) -> tuple[torch.nn.Module, Router]:
    model = tiny("llama-relu")
    return model, make(model)


def exact_router(model, threshold: float = 0.0) -> Router:
    """The router of a ReLU model that knows the gate: W_2 W_1 = W_gate, at full rank."""
    layers = []
    for site in find_mlps(model):
        w = site.weights()
        quantiles = torch.linspace(-1, 1, 201)
        layers.append(
            LayerRouter(
                torch.eye(w.d), w.gate.detach().float(), torch.zeros(w.f), quantiles,
                torch.full((w.f,), 0.5), 1e-30, threshold, *(1.0, 1.0, 0.5, 1.0, 0.5),
            )
        )  # fmt: skip
    from moyu_ext.models.fingerprint import fingerprint

    return Router(tuple(layers), fingerprint(model), 0.2, 0.9, 0)


def test_a_router_that_knows_the_gate_changes_nothing(tiny, prompt) -> None:
    model = tiny("llama-relu")
    dense = model.generate(prompt(12), max_new_tokens=20, do_sample=False)
    patch(model, RODA(exact_router(model, 1e-30)))
    sparse = model.generate(prompt(12), max_new_tokens=20, do_sample=False)
    found = report(model).density
    unpatch(model)
    assert torch.equal(dense, sparse)
    assert 0.3 < found < 0.7  # half of the gates of a random model are negative


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_computes_the_predicted_neurons(trained, rows: int, dtype: torch.dtype) -> None:
    model, router = trained
    site = find_mlps(model)[1]
    w = site.weights()
    layer = router.layers[1]
    x = torch.randn(rows, w.d, generator=torch.Generator().manual_seed(rows)).to(dtype)
    w = type(w)(
        **{
            name: value.detach().to(dtype).contiguous()
            if isinstance(value, torch.Tensor)
            else value
            for name, value in vars(w).items()
        }
    )
    rule = RODA(router).bind(1, w)
    out, counts = rule.apply(x, w)
    first, second = layer.first.to(dtype).float(), layer.second.to(dtype).float()
    hidden = (x.float() @ first.t()).to(dtype).float()
    scores = (hidden @ second.t()).to(dtype).float() + layer.bias
    clear = (scores - layer.threshold).abs() > 0.05  # roundings may differ at the threshold
    active = rule.active(x, x, x)
    assert torch.equal((active == (scores >= layer.threshold)) | ~clear, torch.ones_like(active))
    assert counts.tolist() == active.sum(-1).tolist() and counts.dtype == torch.int32
    expected = sparse_mlp(
        x, w.gate, w.up, w.down_t, None, None, None, None, None, active.to(torch.uint8),
        w.activation,
    )  # fmt: skip
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(out.float(), expected.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("bad", ["x", "router"])
def test_nan_counts_as_active(tiny, bad: str) -> None:
    """So that it reaches the output, rather than be left out in silence."""
    model = tiny("llama-relu")
    w = find_mlps(model)[0].weights()
    router = exact_router(model, threshold=1e9)
    x = torch.ones(2, w.d)
    if bad == "x":
        x[1, 3] = torch.nan
        wanted = torch.tensor([False, True])[:, None].expand(2, w.f)
    else:
        router.layers[0].bias[5] = torch.nan
        wanted = (torch.arange(w.f) == 5).expand(2, w.f)
    assert torch.equal(RODA(router).bind(0, w).choose(x), wanted)
    online = OnlineRODA(router).bind(0, w)
    seen = torch.zeros(2, w.f)
    assert torch.equal(online.active(x, seen, torch.ones(2, 1)), wanted)


def test_union_of_rows() -> None:
    indices, count, mask = compact(torch.tensor([[True, False, False], [False, False, True]]))
    assert indices[: int(count)].tolist() == [0, 2]
    assert mask is not None and mask.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert mask.dtype == torch.uint8
    indices, count, mask = compact(torch.tensor([[False, True]]))
    assert indices[: int(count)].tolist() == [1] and mask is None


def test_training_finds_what_is_active(tiny) -> None:
    """The signs of a ReLU model's gate are linear in x, so a predictor of full rank learns them."""
    model = tiny("llama-relu")
    router = make(model, rank=32, epochs=20, recall=0.95)
    assert router.mean("recall") > 0.9
    labels = router.mean("labels")
    assert router.mean("density") < 2 * labels < 0.6
    assert router.mean("precision") > 0.5
    assert router.mean("energy") >= router.mean("recall")
    narrow = make(model, rank=1, epochs=20, recall=0.95)
    assert narrow.mean("density") > 1.2 * router.mean("density")


def test_numbers_are_those_of_held_out_text(trained) -> None:
    """Recall, precision and density, recomputed from the model on the router's test windows."""
    model, router = trained
    from moyu_ext.calibration.calibrate import calibrate
    from moyu_ext.calibration.router_data import neuron_norms, read_windows, record

    parts = read_windows(model, WordTokenizer(), TEXTS, 2400, 0)
    sets = [{tuple(row) for row in part} for part in (parts.train, parts.validation, parts.test)]
    assert all(sets) and not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    thresholds = calibrate(model, WordTokenizer(), TEXTS, sequential=False, progress=False)
    sites = find_mlps(model)
    ((index, inputs),) = record(model, sites, [2], parts)
    norms = neuron_norms(inputs.test, sites[index].weights())
    labels = norms >= thresholds.layers[2].epsilon
    layer = router.layers[2]
    predicted = layer.scores(inputs.test) >= layer.threshold
    hits = (labels & predicted).sum().item()
    assert layer.recall == pytest.approx(hits / labels.sum().item(), abs=1e-3)
    assert layer.precision == pytest.approx(hits / predicted.sum().item(), abs=1e-3)
    assert layer.density == pytest.approx(predicted.float().mean().item(), abs=1e-3)
    assert layer.labels == pytest.approx(labels.float().mean().item(), abs=1e-6)
    assert layer.epsilon == thresholds.layers[2].epsilon
    active = (neuron_norms(inputs.train, sites[index].weights()) >= layer.epsilon).float()
    assert torch.allclose(layer.rate, active.mean(0), atol=1e-5)


def test_the_parts_share_no_text(tiny) -> None:
    """Long texts are cut into windows; all windows of a text belong to one part."""
    from moyu_ext.calibration.router_data import read_windows

    texts = [text(600, seed) for seed in range(12)]  # three windows of at most 256 each
    parts = read_windows(tiny(), WordTokenizer(), texts, 1 << 20, 0)
    groups = (parts.train, parts.validation, parts.test)
    assert sum(len(row) for part in groups for row in part) == 12 * 601
    encoded = [WordTokenizer().encode(t) for t in texts]

    def sources(rows: list[list[int]]) -> set[int]:
        return {
            i
            for row in rows
            for i, ids in enumerate(encoded)
            if any(ids[at : at + len(row)] == row for at in (0, 256, 512))
        }

    found = [sources(part) for part in groups]
    assert sum(map(len, found)) == 12 and len(set.union(*found)) == 12
    # One text: its windows have to be divided.
    alone = read_windows(tiny(), WordTokenizer(), texts[:1], 1 << 20, 0)
    assert alone.train and alone.validation and alone.test


def test_the_threshold_meets_the_recall_on_validation_text(trained) -> None:
    model, _ = trained
    low, high = make(model, recall=0.6), make(model, recall=0.97)
    assert low.mean("density") < high.mean("density")
    assert low.mean("recall") == pytest.approx(0.6, abs=0.1)
    assert high.mean("recall") > 0.9


def test_a_density_can_be_asked_for(trained, prompt) -> None:
    model, router = trained
    for density in (0.2, 0.7):
        patch(model, RODA(router, density=density))
        model.generate(prompt(12), max_new_tokens=30, do_sample=False)
        found = report(model).density
        unpatch(model)
        assert found == pytest.approx(density, abs=0.12)


def test_ranks_are_chosen_by_what_they_read(tiny) -> None:
    router = make(tiny("llama-relu"), rank=None)
    assert {layer.rank for layer in router.layers} <= {2, 4, 8}
    assert make(tiny("llama-relu"), rank=1000).layers[0].rank == 32  # never above d


def test_ungated_models_and_biases(tiny, prompt) -> None:
    for name in ("opt", "llama-bias"):
        model = tiny(name)
        patch(model, RODA(make(model)))
        model.generate(prompt(12), max_new_tokens=5, do_sample=False)
        assert 0 < report(model).density <= 1
        unpatch(model)


def test_scoring_and_generation_agree(trained, prompt) -> None:
    """One forward under `scoring` and decode through the operator give the same losses."""
    model, router = trained
    ids = prompt(40)
    patch(model, RODA(router))
    scored = generation_perplexity(model, ids, context=10, continuation=30).loss
    with torch.no_grad():
        output = model(ids[:, :10], use_cache=True)
        logits = [output.logits[:, -1]]
        for t in range(10, 39):
            output = model(ids[:, t : t + 1], **passing(model, cache_of(output)))
            logits.append(output.logits[:, -1])
    unpatch(model)
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), ids[0, 10:])
    dense = generation_perplexity(model, ids, context=10, continuation=30).loss
    assert loss.item() == pytest.approx(scored, abs=1e-4)
    assert abs(dense - scored) > 1e-3


def test_training_leaves_the_model_and_random_state_alone(tiny) -> None:
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    make(model)
    assert torch.rand(1) == expected
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_training_is_repeatable(trained) -> None:
    model, router = trained
    again = make(model)
    assert torch.equal(router.layers[1].first, again.layers[1].first)
    assert router.layers[2].threshold == again.layers[2].threshold


def test_an_interrupted_training_goes_on(tiny, tmp_path: Path, monkeypatch) -> None:
    model = tiny("llama-relu")
    whole = make(model)
    calls: list[int] = []
    layer = train.train_layer

    def counting(inputs, weights, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return layer(inputs, weights, *args)

    monkeypatch.setattr(train, "train_layer", counting)
    with pytest.raises(KeyboardInterrupt):
        make(model, tmp_path)
    assert len(list(tmp_path.glob("layer_*.safetensors"))) == 2
    router = make(model, tmp_path)
    assert len(calls) == 4  # only the third layer again
    assert torch.equal(router.layers[0].second, whole.layers[0].second)
    assert not list(tmp_path.glob("layer_*")) and (tmp_path / "moyu.safetensors").is_file()
    # Other settings: nothing of an older training is used.
    calls[:] = [1] * 4
    make(model, tmp_path, recall=0.7)
    assert len(calls) == 7


def test_layers_of_another_recall_are_not_used(tiny, tmp_path: Path, monkeypatch) -> None:
    """The recall decides the threshold, so that a layer kept from another one is wrong."""
    model = tiny("llama-relu")
    calls: list[int] = []
    layer = train.train_layer

    def counting(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return layer(*args)

    monkeypatch.setattr(train, "train_layer", counting)
    with pytest.raises(KeyboardInterrupt):
        make(model, tmp_path, recall=0.9)
    router = make(model, tmp_path, recall=0.6)
    assert len(calls) == 3 + 3
    assert router.layers[0].threshold == make(model, recall=0.6).layers[0].threshold


def test_partial_layers_of_other_settings_are_not_used(tiny, tmp_path: Path, monkeypatch) -> None:
    model = tiny("llama-relu")
    make(model, tmp_path)
    partial = train._Partial(tmp_path, "another key")
    partial.save(0, make(model, recall=0.5).layers[0])
    calls: list[int] = []
    layer = train.train_layer
    monkeypatch.setattr(train, "train_layer", lambda *a: calls.append(1) or layer(*a))
    make(model, tmp_path)
    assert len(calls) == 3
    (tmp_path / "layer_000.safetensors").write_bytes(b"half a file")
    make(model, tmp_path)
    assert len(calls) == 6


def test_artefact_round_trip(trained, tmp_path: Path) -> None:
    _, router = trained
    router.save_pretrained(tmp_path)
    loaded = Router.from_pretrained(tmp_path)
    assert loaded.fingerprint == router.fingerprint and loaded.recall == router.recall
    for mine, other in zip(router.layers, loaded.layers, strict=True):
        for name in ("first", "second", "bias", "quantiles", "rate"):
            assert torch.equal(getattr(mine, name), getattr(other, name))
        assert (mine.threshold, mine.recall, mine.density) == (
            other.threshold, other.recall, other.density,
        )  # fmt: skip


def test_broken_artefacts_are_named(trained, tmp_path: Path) -> None:
    _, router = trained
    with pytest.raises(ArtifactError, match=r"cannot read .*moyu_config.json"):
        Router.from_pretrained(tmp_path / "nowhere")
    router.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "moyu_config.json").read_text())
    for change, message in (
        ({"kind": "thresholds"}, "describes thresholds, expected router"),
        ({"format_version": 99}, "has format version 99, this moyu_ext reads 1"),
        ({"tensors_sha256": "0"}, "truncated, corrupt or from another save"),
        ({"layers": [{"threshold": 1.0}]}, "holds no usable router"),
    ):
        (tmp_path / "moyu_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ArtifactError, match=message):
            Router.from_pretrained(tmp_path)
    (tmp_path / "moyu_config.json").write_text("{")
    with pytest.raises(ArtifactError, match="truncated or not JSON"):
        Router.from_pretrained(tmp_path)


def test_a_router_of_another_model_is_refused(trained, tiny) -> None:
    _, router = trained
    with pytest.raises(ArtifactError, match=r"trained on another model.*train one on this model"):
        patch(tiny("llama-relu", seed=1), RODA(router))
    with pytest.raises(ConfigurationError, match="router has 3 layers, the model has 2 MLPs"):
        patch(tiny("llama-relu", num_hidden_layers=2), RODA(router))


def test_impossible_values_are_named(trained, tiny) -> None:
    model, router = trained
    for bad, message in (
        ({"recall": 1.5}, "recall is 1.5"),
        ({"cett": 0}, "cett is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"epochs": True}, "epochs is True"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            make(model, **bad)
    with pytest.raises(ConfigurationError, match="at least 3 are needed"):
        train_router(model, WordTokenizer(), [text(4, 0)], max_tokens=8, progress=False)
    with pytest.raises(ConfigurationError, match=r"density is 1\.5"):
        RODA(router, density=1.5)
    with pytest.raises(ConfigurationError, match="expected a Router"):
        RODA("router")
    with pytest.raises(PatchStateError, match="training mode"):
        make(tiny().train())
    patch(model)
    try:
        with pytest.raises(PatchStateError, match="is patched"):
            make(model)
    finally:
        unpatch(model)


def test_roda_is_a_method_with_the_given_plan(trained) -> None:
    method = RODA(trained[1])
    assert isinstance(method, Method) and (method.name, method.level) == ("roda", "token")
    assert method.plan == "given" and repr(method).startswith("RODA(<3 layers, rank 8>")


def test_compiled_decode_is_one_graph(trained) -> None:
    model, router = trained
    patch(model, RODA(router))
    mlp = model.model.layers[1].mlp
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = mlp(x)
        compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")(x)
    unpatch(model)
    assert torch.allclose(expected, compiled, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "density"), [("stories_relu", 0.25), ("mix4m_relu", 0.25)])
def test_recall_on_the_relu_twins(data_dir: Path, name: str, density: float) -> None:
    from moyu_ext.studies.setting import Setting

    setting = Setting(data=data_dir)
    subject = setting.subject(name)
    documents = setting.corpus.documents(train=True)
    router = train_router(
        subject.model, subject.tokenizer, documents, max_tokens=16384, progress=False
    )
    assert router.mean("recall") >= 0.9
    assert router.mean("density") <= density
