"""`moyu_ext.pack`: models on packed rows equal models on what the rows stand for."""

import copy
import json
import pickle

import pytest
import torch
from conftest import FAMILIES
from moyu_ext.integrations.quantizer import PackConfig
from moyu_ext.packing.layer import PackedLinear
from moyu_ext.packing.rows import Format
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import moyu_ext
from moyu_ext import ConfigurationError, PatchStateError, UnsupportedModelError, embedded


def twins(tiny, name="llama", bits=4, group=None, **config):
    """A packed model, and a plain one with the values that the packed rows stand for."""
    plain = tiny(name, **config)
    packed = moyu_ext.pack(copy.deepcopy(plain), bits, group)
    with torch.no_grad():
        for where, layer in packed.named_modules():
            if isinstance(layer, PackedLinear):
                fresh = nn.Parameter(layer.dequantise(torch.float32).to(layer.dtype).contiguous())
                plain.get_submodule(where).weight = fresh
    return packed, plain


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def greedy(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=10, do_sample=False, **kwargs)


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_model_is_the_dequantised_one(tiny, prompt, name, bits):
    packed, plain = twins(tiny, name, bits, 32 if bits % 2 else 64)
    ids = prompt(20, batch=2)
    right = logits(plain, ids)
    assert (logits(packed, ids) - right).norm() < 1e-5 * right.norm()  # unpacked and multiplied
    few = logits(packed, ids[:, :3])  # by the kernels, whose inputs are rounded
    assert (few - right[:, :3]).norm() < 2e-3 * right.norm()
    written = greedy(packed, ids)
    scores = logits(plain, written)[:, ids.shape[1] - 1 : -1]
    chosen = scores.gather(-1, written[:, ids.shape[1] :, None]).squeeze(-1)
    assert (scores.amax(-1) - chosen).max() < 2e-3 * scores.norm(dim=-1).max()  # up to ties


@pytest.mark.parametrize(
    "method",
    [
        moyu_ext.Dense(),
        moyu_ext.QRIDA(density=0.4),
        moyu_ext.QRIDA(density=0.4, guard="watch"),
        moyu_ext.SRIDA(density=0.5),
    ],
    ids=repr,
)
def test_every_plan_on_packed_weights_is_the_plan_on_what_they_stand_for(tiny, prompt, method):
    packed, plain = twins(tiny, "llama-bias", 6)
    ids = prompt(12)
    before = {name: p.clone() for name, p in packed.state_dict().items()}
    modules = list(packed.modules())
    for model in (packed, plain):
        moyu_ext.patch(model, method)
    assert torch.equal(greedy(packed, ids), greedy(plain, ids))
    ours, theirs = moyu_ext.report(packed), moyu_ext.report(plain)
    assert ours.density == theirs.density
    moyu_ext.unpatch(packed)
    assert all(a is b for a, b in zip(modules, packed.modules(), strict=True))
    assert all(torch.equal(before[name], p) for name, p in packed.state_dict().items())


def test_thresholds_calibrated_on_packed_weights_hold_their_target():
    folder = embedded.path("stories_silu")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    moyu_ext.pack(model, 4, progress=False)
    found = moyu_ext.calibrate(model, tokenizer, cett=0.2, max_tokens=512, progress=False)
    assert all(layer.cett <= 0.2 + 1e-6 for layer in found.layers)
    moyu_ext.patch(model, moyu_ext.TDA(found))
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert greedy(model, ids).shape[1] == ids.shape[1] + 10
    assert 0 < moyu_ext.report(model).density < 1


def test_a_tied_head_gets_packed_weights_of_its_own(tiny, prompt):
    model = tiny("llama", tie_word_embeddings=True)
    table = model.model.embed_tokens.weight
    before = table.clone()
    right = logits(model, prompt(9))
    moyu_ext.pack(model, 4)
    assert isinstance(model.lm_head, PackedLinear) and model.lm_head.format.bits == 8
    assert model.model.embed_tokens.weight is table and torch.equal(table, before)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()
    assert isinstance(model.lm_head, PackedLinear)
    assert logits(model, prompt(9)).shape == right.shape


def test_bits_by_name(tiny, prompt):
    model = moyu_ext.pack(tiny(), {"*.down_proj": 8, "*.mlp.*": 3, "*.q_proj": 4}, group=32)
    layer = model.model.layers[1]
    assert layer.mlp.down_proj.format == Format(8, 32) and layer.mlp.up_proj.format == Format(3, 32)
    assert layer.self_attn.q_proj.format == Format(4, 32)
    assert type(layer.self_attn.k_proj) is nn.Linear and type(model.lm_head) is nn.Linear
    moyu_ext.patch(model, moyu_ext.QRIDA(density=0.5))
    greedy(model, prompt(9))


def test_projections_of_a_packed_model_are_packed_already(tiny, prompt):
    model = moyu_ext.pack(tiny(), 8)
    moyu_ext.patch(model, moyu_ext.Dense(), projections=True)
    assert moyu_ext.report(model).projections == 0
    greedy(model, prompt(9))


def test_memory_is_that_of_the_rows(tiny):
    model = tiny(hidden_size=256, intermediate_size=512)
    before = sum(p.nbytes for m in model.model.layers.modules() for p in m.parameters(False))
    moyu_ext.pack(model, 4)
    after = sum(p.nbytes for m in model.model.layers.modules() for p in m.parameters(False))
    assert after < before * 4.6 / 32  # 4.5 bits of 32, and the norms


@pytest.mark.parametrize("bits", [4, {"*.mlp.*": 8}])
def test_saved_and_loaded(tiny, prompt, tmp_path, bits):
    ids = prompt(11)
    tiny("qwen2", tie_word_embeddings=True).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    moyu_ext.pack(model, bits)
    right = logits(model, ids)
    model.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(again, ids), right) and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    # Packing while loading gives the same rows.
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.bfloat16, quantization_config=PackConfig(bits=bits)
    )
    assert torch.equal(logits(loaded, ids), right)
    loaded.save_pretrained(tmp_path / "twice")
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("packed", "twice")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    moyu_ext.patch(again, moyu_ext.QRIDA(density=0.5))
    assert greedy(again, ids).shape == (1, 21)


def test_copies_and_pickles_stay_packed(tiny, prompt):
    model = moyu_ext.pack(tiny(), 4)
    right = logits(model, prompt(9))
    moyu_ext.patch(model, moyu_ext.SRIDA(density=0.5))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied.model.layers[0].mlp.down_proj, PackedLinear)
        assert torch.equal(logits(copied, prompt(9)), right)


def test_a_packed_layer_in_any_dtype(prompt):
    torch.manual_seed(0)
    layer = nn.Linear(70, 30).eval()
    packed = PackedLinear.of(layer, Format(8, 32))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for rows in (1, 9):
            x = torch.randn(rows, 70).to(dtype)
            out = packed(x)
            assert out.dtype == dtype
            right = layer(x.float())
            assert (out.float() - right).norm() < 2e-2 * right.norm()
    for rows in (packed.weight[:-1], packed.weight[:, :-4]):  # of a damaged file
        with pytest.raises(UnsupportedModelError, match="70 inputs and 30 outputs"):
            packed.hold(rows)
    with pytest.raises(PatchStateError, match="training mode"):
        packed.train()(torch.randn(1, 70))
    # A gradient for x, through the same weights; none for them.
    for rows in (1, 9):
        x = torch.randn(rows, 70, requires_grad=True)
        grad = torch.randn(rows, 30)
        packed.eval()(x).backward(grad)
        right = grad @ packed.dequantise(torch.float32)
        assert (x.grad - right).norm() < 1e-3 * right.norm()
    assert packed.weight.grad is None


def test_what_cannot_be_packed_is_refused_and_left_as_it_was(tiny):
    model = tiny()
    state = {name: p.clone() for name, p in model.state_dict().items()}
    for bits, group, match in (
        (7, None, "bits is 7"),
        (4, 48, "group is 48"),
        (True, None, "bits is True"),
        ({"*.mlp.*": 4, "*.nothing": 4}, None, "'\\*.nothing', which none"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            moyu_ext.pack(model, bits, group)
    with pytest.raises(PatchStateError, match="training mode"):
        moyu_ext.pack(model.train(), 4)
    model.eval()
    moyu_ext.patch(model, moyu_ext.Dense())
    with pytest.raises(PatchStateError, match="unpatch"):
        moyu_ext.pack(model, 4)
    moyu_ext.unpatch(model)
    assert all(torch.equal(state[name], p) for name, p in model.state_dict().items())
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ConfigurationError, match=r"layers\.2\.mlp\.up_proj\.weight reaches from"):
        moyu_ext.pack(model, 4)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    with pytest.raises(UnsupportedModelError, match="float64"):
        moyu_ext.pack(tiny().double(), 4)
    with pytest.raises(UnsupportedModelError, match="meta"):
        moyu_ext.pack(tiny().to("meta"), 4)
    with pytest.raises(UnsupportedModelError, match=r"no torch\.nn\.Linear"):
        moyu_ext.pack(nn.Embedding(4, 4).eval(), 4)
    with pytest.raises(PatchStateError, match="packed already"):
        moyu_ext.pack(moyu_ext.pack(tiny(), 8), 4)


def test_another_models_packed_layers_are_named(tiny, tmp_path):
    moyu_ext.pack(tiny(), 4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    layers["model.layers.7.mlp.up_proj"] = [4, 64]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.7\.mlp\.up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    layers["model.layers.0.mlp.up_proj"] = [9, 64]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="bits is 9"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_fitted_rounding_loses_less_and_leaves_the_rest(tiny):
    folder = embedded.path("stories_silu")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (embedded.path("stories_silu").parent / "heldout.txt").read_text()
    half = len(text) // 2
    ids = torch.tensor(tokenizer.encode(text[half:], verbose=False)[:512]).view(4, -1)
    right = logits(plain, ids).log_softmax(-1)

    def loss(**fit):
        packed = moyu_ext.pack(copy.deepcopy(plain), 4, **fit)
        got = logits(packed, ids).log_softmax(-1)
        return float((right.exp() * (right - got)).sum(-1).mean())

    before = {name: p.clone() for name, p in plain.named_parameters()}
    assert loss(tokenizer=tokenizer, texts=[text[:half]]) < 0.95 * loss()
    assert all(torch.equal(p, before[name]) for name, p in plain.named_parameters())


def test_a_fit_that_fails_leaves_the_model(tiny, monkeypatch):
    from moyu_ext.models import fitting

    model = tiny()
    with pytest.raises(ConfigurationError, match="without a tokenizer"):
        moyu_ext.pack(model, 4, texts=["words"])

    class Bytes:
        def encode(self, text, **_):
            return [3 + b % 90 for b in text.encode()]

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "pack_fitted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        moyu_ext.pack(model, 4, tokenizer=Bytes(), texts=["some words " * 20])
    assert not any(isinstance(m, PackedLinear) for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    monkeypatch.undo()
    moyu_ext.pack(model, 4, tokenizer=Bytes(), texts=["some words " * 20])
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 3 * 7 + 1
