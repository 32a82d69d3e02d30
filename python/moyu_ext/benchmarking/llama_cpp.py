"""llama.cpp beside us: the same geometry, from GGUF files that are written here, in the same run.

Needs its `llama-bench` (a path, or on PATH) and, to write the files, the package `gguf`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch

from ..errors import ConfigurationError
from .geometries import Geometry

TYPES = ("bf16", "q8_0", "q4_0")
# Bits a weight: a block of 32 has its codes and a scale in 16 bits.
BITS = {"bf16": 16.0, "q8_0": 8.5, "q4_0": 4.5}


def find_llama_bench(path: str | None) -> Path | None:
    """The program: where `path` says, else on PATH, else None.

    Raises ConfigurationError where the path is not a program.
    """
    if path is None:
        found = shutil.which("llama-bench")
        return None if found is None else Path(found)
    program = Path(path).expanduser()
    if not (program.is_file() and os.access(program, os.X_OK)):
        raise ConfigurationError(
            f"llama-bench is {path!r}, which is no program; build llama.cpp and name its "
            "llama-bench"
        )
    return program


@dataclass
class LlamaBench:
    """Times of one token, in microseconds, by type of weights; bytes that a token reads."""

    program: Path
    folder: Path
    size: Geometry
    layers: int
    times: dict[str, list[float]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Write the files."""
        for kind in TYPES:
            write_gguf(self._file(kind), self.size, self.layers, kind)

    def _file(self, kind: str) -> Path:
        return self.folder / f"{kind}.gguf"

    def run(self, kind: str, tokens: int) -> None:
        """Decode `tokens` tokens from an empty cache, behind llama-bench's own warm-up."""
        command = [str(self.program), "-m", str(self._file(kind)), "-p", "0", "-n", str(tokens)]
        command += ["-r", "1", "-t", str(torch.get_num_threads()), "-ngl", "0", "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ConfigurationError(f"llama-bench failed on {kind}: {done.stderr.strip()[-500:]}")
        (result,) = json.loads(done.stdout)
        self.times.setdefault(kind, []).append(1e6 / result["avg_ts"])

    def bytes(self, kind: str) -> int:
        """Of all matrices but the table of embeddings."""
        return round(sum(n * d for _, n, d in matrices(self.size, self.layers)) * BITS[kind] / 8)


def matrices(size: Geometry, layers: int) -> list[tuple[str, int, int]]:
    """(name, rows, columns) of every matrix that a token reads."""
    kv = size.d // size.heads * size.kv_heads
    found = [("output.weight", size.vocabulary, size.d)]
    for i in range(layers):
        block = {
            **{"attn_q": (size.d, size.d), "attn_k": (kv, size.d), "attn_v": (kv, size.d)},
            **{"attn_output": (size.d, size.d), "ffn_gate": (size.f, size.d)},
            **{"ffn_up": (size.f, size.d), "ffn_down": (size.d, size.f)},
        }
        found += [(f"blk.{i}.{name}.weight", *shape) for name, shape in block.items()]
    return found


def write_gguf(path: Path, size: Geometry, layers: int, kind: str) -> None:
    """A Llama of this geometry with random weights of one type, and no vocabulary."""
    try:
        import gguf
    except ImportError as error:
        raise ConfigurationError(
            "llama.cpp's files are written with the package gguf; install it: pip install gguf"
        ) from error
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(size.d)
    writer.add_feed_forward_length(size.f)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(size.d // size.heads)
    writer.add_vocab_size(size.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    kinds = gguf.GGMLQuantizationType
    ggml = {"bf16": kinds.BF16, "q8_0": kinds.Q8_0, "q4_0": kinds.Q4_0}[kind]
    # One block of rows, repeated: what they hold changes no time.
    rows = 256
    normal = numpy.random.default_rng(0).standard_normal((rows, max(size.d, size.f)))
    drawn: dict[int, numpy.ndarray] = {}
    for name, n, d in [("token_embd.weight", size.vocabulary, size.d), *matrices(size, layers)]:
        if d not in drawn:
            drawn[d] = gguf.quants.quantize((normal[:, :d] * 0.02).astype(numpy.float32), ggml)
        data = numpy.resize(drawn[d], (n, drawn[d].shape[1]))
        writer.add_tensor(name, data, raw_dtype=ggml)
    ones = numpy.ones(size.d, dtype=numpy.float32)
    names = [f"blk.{i}.{part}_norm.weight" for i in range(layers) for part in ("attn", "ffn")]
    for name in [*names, "output_norm.weight"]:
        writer.add_tensor(name, ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
