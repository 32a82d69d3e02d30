"""GGUF files: ggml's blocks as packed rows, and what cannot be read."""

import os
from pathlib import Path

import numpy
import pytest
import torch

import moyu_ext
from moyu_ext import ArtifactError, ConfigurationError, UnsupportedModelError

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

from moyu_ext.benchmarking.geometries import Geometry  # noqa: E402
from moyu_ext.benchmarking.llama_cpp import TYPES, matrices, write_gguf  # noqa: E402
from moyu_ext.integrations.gguf import _order  # noqa: E402
from moyu_ext.packing import ggml  # noqa: E402
from moyu_ext.packing.reference import dequantise  # noqa: E402
from moyu_ext.packing.rows import Format, pack_rows, unpack_codes  # noqa: E402


def blocks(kind: str, rows: int, d: int) -> numpy.ndarray:
    """Rows of random blocks of this type, their scales finite and of ordinary size."""
    bits, size, weights = ggml.TYPES[kind]
    draw = numpy.random.default_rng(bits + size)
    data = draw.integers(0, 256, (rows * d // weights, size), dtype=numpy.uint8)
    for at in (0, 2) if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else (0,):
        numbers = (draw.standard_normal(len(data)) * 0.01).astype(numpy.float16)
        data[:, at : at + 2] = numbers.view(numpy.uint8).reshape(-1, 2)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", ggml.TYPES)
@pytest.mark.parametrize("d", [256, 768])
def test_codes_of_a_file_stand_for_the_same_values(kind: str, d: int) -> None:
    data = blocks(kind, 9, d)
    right = torch.tensor(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    codes = ggml.codes_of(kind, torch.from_numpy(data))
    fmt = Format(ggml.TYPES[kind][0], 32)
    got = dequantise(unpack_codes(pack_rows(codes, fmt), d), d)
    # Exact but for Q4_K's and Q5_K's products, rounded to float16: scale (times 31), and offset.
    bound = 2**-11 * 2 * float(right.abs().max()) if kind.endswith("K") else 0.0
    assert float((got - right).abs().max()) <= bound


def test_a_row_of_blocks_that_fill_no_whole_block_of_64() -> None:
    data = blocks("Q4_1", 3, 96)
    right = torch.tensor(gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q4_1))
    rows = pack_rows(ggml.codes_of("Q4_1", torch.from_numpy(data)), Format(4, 32))
    assert torch.equal(dequantise(unpack_codes(rows, 96), 96), right)


def test_rows_of_q_and_k_come_back_from_where_llama_cpp_puts_them() -> None:
    class Config:
        num_attention_heads, num_key_value_heads, head_dim, hidden_size = 4, 2, 8, 32

        def get_text_config(self) -> "Config":
            return self

    for part, heads in (("q_proj", 4), ("k_proj", 2)):
        weight = torch.randn(heads * 8, 5)
        # What its converter does to them.
        stored = weight.view(heads, 2, 4, 5).transpose(1, 2).reshape(heads * 8, 5)
        order = _order("llama", f"model.layers.0.self_attn.{part}", Config())
        assert order is not None and torch.equal(stored[order], weight)
    assert _order("llama", "model.layers.0.self_attn.v_proj", Config()) is None
    assert _order("qwen2", "model.layers.0.self_attn.q_proj", Config()) is None


def test_files_for_llama_bench_have_the_geometrys_matrices(tmp_path: Path) -> None:
    size = Geometry("tiny", 64, 128, 2, 4, 2, 96)
    for kind in TYPES:
        write_gguf(tmp_path / f"{kind}.gguf", size, 2, kind)
        reader = gguf.GGUFReader(tmp_path / f"{kind}.gguf")
        found = {t.name: tuple(int(n) for n in t.shape[::-1]) for t in reader.tensors}
        for name, n, d in matrices(size, 2):
            assert found[name] == (n, d)
        assert {t.tensor_type.name for t in reader.tensors} == {kind.upper(), "F32"}


def test_what_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no file"):
        moyu_ext.load(tmp_path / "none.gguf")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(range(40)))
    with pytest.raises(ArtifactError, match="no whole GGUF file"):
        moyu_ext.load(bad)
    with pytest.raises(ConfigurationError, match="has its own codes"):
        moyu_ext.load(bad, bits=4)
    for architecture, parts, match in (("mamba", 1, "'mamba'; known are"), ("llama", 3, "3 parts")):
        path = tmp_path / f"{architecture}.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_uint16("split.count", parts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UnsupportedModelError, match=match):
            moyu_ext.load(path)
    whole = tmp_path / "q4_0.gguf"
    write_gguf(whole, Geometry("tiny", 64, 128, 1, 4, 2, 96), 1, "q4_0")
    whole.write_bytes(whole.read_bytes()[:-4000])
    with pytest.raises(ArtifactError):
        moyu_ext.load(whole)


def test_a_real_file_is_its_dequantised_model() -> None:
    folder = Path(os.environ.get("MOYU_MODELS", Path.home() / ".cache" / "moyu_ext" / "models"))
    if not (folder / "smollm2.gguf").exists():
        pytest.skip(f"no real models in {folder}; python tools/real_models.py makes them")
    import transformers

    model, tokenizer = moyu_ext.load(folder / "smollm2.gguf", dtype=torch.float32, progress=False)
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "smollm2", dtype=torch.float32
    ).eval()
    ids = tokenizer("The capital of France is Paris, and the river there is", return_tensors="pt")
    with torch.no_grad():
        p, q = (m(**ids).logits.log_softmax(-1) for m in (dense, model))
    # All codes are the file's but down's, which are rounded again at 8 bits.
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 3e-3
