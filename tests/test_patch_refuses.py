"""Bad input: an error that names the value and the way out, and a model that is as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from moyu_ext.errors import (
    ArtifactError,
    ConfigurationError,
    MoyuError,
    PatchStateError,
    UnsupportedModelError,
)
from moyu_ext.methods import SRIDA, STDA, TDA, Dense, Method
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.patching import patch as patch_module
from moyu_ext.patching.patch import patch, report, scoring, unpatch
from moyu_ext.patching.sparse_mlp import SparseMLP
from snapshot import snapshot
from torch import Tensor, nn
from transformers import PreTrainedModel

Make = Callable[..., PreTrainedModel]
Prompt = Callable[..., Tensor]
BOTH = pytest.mark.parametrize("family", ["llama-bias", "opt"])
EACH = pytest.mark.parametrize(
    "method", [Dense(), TDA(0.1), TDA(0.1, score="gate"), STDA(0.1), SRIDA(0.5)], ids=repr
)


def mlp_of(model: PreTrainedModel, layer: int = 0) -> SparseMLP:
    decoder = getattr(model.model, "decoder", model.model)
    one = decoder.layers[layer]
    return one.fc1 if hasattr(one, "fc1") else one.mlp


def thresholds(layers: int = 3, fingerprint: str = "", score: str = "product") -> Any:
    return SimpleNamespace(epsilon=torch.full((layers,), 0.1), fingerprint=fingerprint, score=score)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[MoyuError], str]] = {
    "layers": (lambda: STDA(thresholds(4)), {}, ConfigurationError, "4 layers, the model has 3"),
    "fingerprint": (
        lambda: TDA(thresholds(fingerprint="0123")),
        {},
        ArtifactError,
        "fingerprint is 0123, this model's is",
    ),
    "score": (lambda: TDA(thresholds(score="gate")), {}, ConfigurationError, "score='gate'"),
    "class": (lambda: SRIDA, {}, ConfigurationError, "expected a method such as"),
    "string": (lambda: "srida", {}, ConfigurationError, "method is 'srida'"),
    "index": (SRIDA, {"layers": [0, 3]}, ConfigurationError, "contains 3; the model has 3 MLPs"),
    "negative": (SRIDA, {"layers": [-4]}, ConfigurationError, "between -3 and 2"),
    "no layers": (SRIDA, {"layers": []}, ConfigurationError, "layers is empty"),
    "float": (SRIDA, {"layers": [0.5]}, ConfigurationError, "expected indices"),
    "number": (SRIDA, {"layers": 1}, ConfigurationError, "expected indices"),
}


@BOTH
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, family: str, tiny: Make) -> None:
    method, options, error, message = REFUSED[name]
    model = tiny(family)
    before = snapshot(model)
    with pytest.raises(error, match=message) as raised:
        patch(model, method(), **options)
    assert isinstance(raised.value, MoyuError)
    assert snapshot(model) == before


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_refused_dtypes(dtype: torch.dtype, family: str, tiny: Make) -> None:
    model = tiny(family)
    if dtype == torch.float64:
        model.double()
    else:
        for parameter in model.parameters():
            parameter.requires_grad = False
            parameter.data = parameter.data.to(dtype)
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=str(dtype)):
        patch(model, SRIDA(0.5))
    assert snapshot(model) == before


def test_refused_meta_offloaded_quantised_unknown(tiny: Make) -> None:
    meta = tiny().to("meta")
    hooked = tiny()
    hooked.model.layers[2].mlp._hf_hook = object()
    quantised = tiny()
    for name in ("gate_proj", "up_proj", "down_proj"):
        torch.ao.quantization.quantize_dynamic  # noqa: B018  the API that this imitates
        linear = getattr(quantised.model.layers[1].mlp, name)
        linear.weight = type("Packed", (nn.Parameter,), {})(linear.weight.data)
    unknown = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)
    ).eval()
    for model, message in (
        (meta, "meta device"),
        (hooked, "accelerate hooks"),
        (quantised, "quantised or distributed"),
        (unknown, r"GPT2Block.*supported: gated MLPs"),
    ):
        before = snapshot(model)
        with pytest.raises(UnsupportedModelError, match=message):
            patch(model, SRIDA(0.5))
        assert snapshot(model) == before
    with pytest.raises(UnsupportedModelError, match="model is a str"):
        patch("a/path", SRIDA(0.5))  # type: ignore[type-var]


def test_states(tiny: Make, prompt: Prompt) -> None:
    model = tiny()
    with pytest.raises(PatchStateError, match=r"not patched; call moyu_ext\.patch"):
        unpatch(model)
    with pytest.raises(PatchStateError, match="not patched"):
        report(model)
    model.train()
    before = snapshot(model)
    with pytest.raises(PatchStateError, match=r"training mode.*model\.eval\(\)"):
        patch(model, SRIDA(0.5))
    assert snapshot(model) == before
    model.eval()
    patch(model, TDA(0.1))
    before = snapshot(model)
    for target in (model, model.model):
        with pytest.raises(PatchStateError, match=r"patched already; call moyu_ext\.unpatch"):
            patch(target, SRIDA(0.5))
    with pytest.raises(PatchStateError, match="pass the same object"):
        unpatch(model.model)
    assert snapshot(model) == before
    unpatch(model)
    with pytest.raises(PatchStateError, match="not patched"):
        unpatch(model)


@EACH
@BOTH
def test_training_is_refused(method: Method, family: str, tiny: Make, prompt: Prompt) -> None:
    model = patch(tiny(family), method)
    model.train()
    with pytest.raises(PatchStateError, match=r"training mode.*model\.eval\(\).*unpatch"):
        model(prompt(9))
    unpatch(model)
    assert all(module.training for module in model.modules()), "the mode stays as the user set it"


def test_backward_is_refused(tiny: Make, prompt: Prompt) -> None:
    """The operators have no gradient: an error rather than weights that stay as they are."""
    model = patch(tiny(), TDA(0.0))
    cache = cache_of(model(prompt(4)))
    with pytest.raises(PatchStateError, match=r"no gradient.*unpatch"):
        model(prompt(4), **passing(model, cache)).logits.sum().backward()


@BOTH
def test_a_failure_halfway_is_rolled_back(
    family: str, tiny: Make, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in the last layer's transposition: the others go back too."""
    model = tiny(family)
    before = snapshot(model)
    inner, calls = SparseMLP.take_layout, []

    def fail(self: SparseMLP) -> None:
        calls.append(self)
        inner(self)
        if len(calls) == 3:
            raise MemoryError("no room")

    monkeypatch.setattr(SparseMLP, "take_layout", fail)
    with pytest.raises(MemoryError, match="no room"):
        patch(model, SRIDA(0.5))
    assert len(calls) == 3 and snapshot(model) == before
    monkeypatch.undo()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(patch_module, "register", interrupt)
    with pytest.raises(KeyboardInterrupt):
        patch(model, SRIDA(0.5))
    assert snapshot(model) == before


def test_a_decoder_without_a_cache_argument(tiny: Make) -> None:
    """Sequence-level methods need to see the cache; per-token ones do not."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = tiny().model.layers

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0].mlp(x)

    model = Bare().eval()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=r"a cache.*Dense, TDA"):
        patch(model, SRIDA(0.5))
    assert snapshot(model) == before
    patch(model, TDA(0.0))
    assert model(torch.randn(1, 1, 32)).shape == (1, 1, 32)
    with pytest.raises(UnsupportedModelError, match="scoring"), scoring(model, 3):
        pass


def test_an_mlp_called_by_itself(tiny: Make) -> None:
    """Outside of a forward of the decoder there is no sequence: dense, and counted."""
    dense, model = tiny(), patch(tiny(), SRIDA(0.1))
    x = torch.randn(1, 1, 32)
    torch.testing.assert_close(mlp_of(model)(x), dense.model.layers[0].mlp(x))
    assert report(model).layers[0].dense_tokens == 1
