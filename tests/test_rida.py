"""RIDA: splitting into experts, their router and artefact, and the method."""

from pathlib import Path

import pytest
import torch
from moyu_ext.calibration.split_experts import balanced_kmeans, expert_energy, split_experts
from moyu_ext.evaluation.perplexity import generation_perplexity
from moyu_ext.methods.rida import RIDA
from moyu_ext.models.families import find_mlps
from moyu_ext.reference import sparse_mlp
from moyu_ext.routers.experts import Experts
from study_support import WordTokenizer, text

from moyu_ext import ArtifactError, ConfigurationError, patch, report, unpatch

TEXTS = [text(60, seed) for seed in range(40)]


def make(model, **settings) -> Experts:
    options = {"experts": 8, "max_tokens": 2400, "epochs": 3} | settings
    return split_experts(model, WordTokenizer(), TEXTS, **options)


@pytest.fixture(scope="module")
def split(tiny) -> tuple[torch.nn.Module, Experts]:
    model = tiny("llama-relu")
    return model, make(model)


def test_balanced_kmeans_finds_clusters_of_one_size() -> None:
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[5.0, 0.0], [0.0, 5.0], [-5.0, 0.0]])
    truth = torch.arange(30) % 3
    rows = centres[truth] + 0.1 * torch.randn(30, 2, generator=g)
    # From one row of each cluster; k-means itself may start badly.
    for seed in range(20):
        found = balanced_kmeans(rows, 3, torch.Generator().manual_seed(seed))
        assert found.bincount(minlength=3).tolist() == [10, 10, 10]
        same = (found.unsqueeze(0) == found.unsqueeze(1)) == (
            truth.unsqueeze(0) == truth.unsqueeze(1)
        )
        if same.all():
            return
    pytest.fail("no start out of 20 found the clusters")


@pytest.mark.parametrize("how", ["kmeans", "coactivation", "random"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_experts_are_groups_of_one_size(tiny, name: str, how: str) -> None:
    experts = make(tiny(name), split=how, epochs=1)
    for layer in experts.layers:
        assert layer.assignment.bincount(minlength=8).tolist() == [12] * 8
        assert layer.chance == 0.5
        assert layer.captured <= layer.oracle + 1e-6


def test_coactivation_groups_neurons_that_fire_together() -> None:
    """Neurons are made of three planted groups, each alive on its own third of the tokens."""
    from moyu_ext.calibration.router_data import LayerInputs
    from moyu_ext.calibration.split_experts import split_layer
    from moyu_ext.models.weights import MlpWeights

    g = torch.Generator().manual_seed(0)
    d, f = 12, 48
    groups = torch.arange(f) % 3
    x = torch.zeros(600, d)
    for i in range(600):
        x[i, i % 3] = 1 + 0.1 * torch.rand(1, generator=g).item()
    up = torch.zeros(f, d)
    up[torch.arange(f), groups] = 0.5 + torch.rand(f, generator=g)
    weights = MlpWeights(None, up, torch.randn(f, d, generator=g), None, None, None, "relu")
    inputs = LayerInputs(x, x[:60], x[:60])
    layer = split_layer(inputs, weights, 3, "coactivation", 30, 0)
    for group in range(3):
        assert len(layer.assignment[groups == group].unique()) == 1
    assert layer.captured > 0.95  # two of three experts always hold the one that is alive
    random = split_layer(inputs, weights, 3, "random", 30, 0)
    assert random.captured < 0.9


def test_expert_energy() -> None:
    norms = torch.tensor([[1.0, 2.0, 3.0]])
    assert expert_energy(norms, torch.tensor([1, 0, 1]), 2).tolist() == [[4.0, 10.0]]


@pytest.mark.parametrize("rows", [1, 4])
def test_apply_computes_the_chosen_experts(split, rows: int) -> None:
    model, experts = split
    w = find_mlps(model)[0].weights()
    w = type(w)(
        **{
            k: v.detach().contiguous() if isinstance(v, torch.Tensor) else v
            for k, v in vars(w).items()
        }
    )
    x = torch.randn(rows, w.d, generator=torch.Generator().manual_seed(rows))
    rule = RIDA(experts, density=0.25).bind(0, w)
    out, counts = rule.apply(x, w)
    assert counts.tolist() == [24] * rows
    layer = experts.layers[0]
    best = layer.scores(x).topk(2, -1).indices
    active = (layer.assignment.view(1, -1, 1) == best.unsqueeze(1)).any(-1)
    assert torch.equal(rule.active(x, x, x), active)
    expected = sparse_mlp(
        x, w.gate, w.up, w.down_t, None, None, None, None, None, active.to(torch.uint8),
        w.activation,
    )  # fmt: skip
    assert torch.allclose(out, expected, atol=1e-5)


def test_all_experts_are_the_dense_model(split, prompt) -> None:
    model, experts = split
    ids = prompt(40)
    dense = generation_perplexity(model, ids, context=10, continuation=30).loss
    losses = []
    for density in (0.125, 0.5, 1.0):
        patch(model, RIDA(experts, density=density))
        losses.append(generation_perplexity(model, ids, context=10, continuation=30).loss)
        assert report(model).density == pytest.approx(density)
        unpatch(model)
    assert losses[2] == pytest.approx(dense, abs=1e-5)
    assert abs(losses[0] - dense) > abs(losses[1] - dense) / 4 > 0


def test_router_learns_more_than_chance(split) -> None:
    _, experts = split
    assert experts.mean("chance") + 0.03 < experts.mean("captured") < experts.mean("oracle")


def test_artefact_round_trip_and_foreign_models(split, tiny, tmp_path: Path) -> None:
    _, experts = split
    experts.save_pretrained(tmp_path)
    loaded = Experts.from_pretrained(tmp_path)
    assert torch.equal(loaded.layers[1].assignment, experts.layers[1].assignment)
    assert loaded.split == "kmeans" and loaded.layers[2].captured == experts.layers[2].captured
    with pytest.raises(ArtifactError, match="split from another model"):
        patch(tiny("llama-relu", seed=1), RIDA(experts))
    with pytest.raises(ConfigurationError, match="have 3 layers, the model has 2"):
        patch(tiny("llama-relu", num_hidden_layers=2), RIDA(experts))
    from moyu_ext.routers.router import Router

    with pytest.raises(ArtifactError, match="describes experts, expected router"):
        Router.from_pretrained(tmp_path)


def test_impossible_values_are_named(tiny, split) -> None:
    with pytest.raises(ConfigurationError, match=r"experts is 7, but .* has 96 neurons"):
        make(tiny(), experts=7)
    with pytest.raises(ConfigurationError, match="split is 'x'; expected one of kmeans"):
        make(tiny(), split="x")
    with pytest.raises(ConfigurationError, match="expected Experts from split_experts"):
        RIDA(None)
    with pytest.raises(ConfigurationError, match="density is 0"):
        RIDA(split[1], density=0)


def test_splitting_is_repeatable_and_leaves_the_random_state(tiny) -> None:
    model = tiny()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = make(model, split="coactivation", epochs=1)
    assert torch.rand(1) == expected
    second = make(model, split="coactivation", epochs=1)
    assert torch.equal(first.layers[0].assignment, second.layers[0].assignment)
    assert torch.equal(first.layers[0].second, second.layers[0].second)
