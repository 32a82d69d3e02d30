"""`moyu pack`: a model's linear layers as packed weights, saved to a directory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigurationError
from . import common


def pack(
    model: common.Model,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where the packed model is written.", show_default=False),
    ],
    bits: Annotated[int, typer.Option(help="3, 4, 5, 6 or 8 bits a weight.")] = 8,
    group: common.Group = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            "--texts",
            metavar="FILE",
            help="Fit the rounding to this UTF-8 text (its first 16,384 tokens): minutes, and much "
            "less is lost below 6 bits.",
            show_default=False,
        ),
    ] = None,
    dtype: common.Dtype = "auto",
    json: common.Json = None,
) -> None:
    """Pack a model's weights and save it with its tokenizer.

    This loses something: at 8 bits hardly any, below 6 bits small models lose much. Every command
    takes the directory; in Python: model, tokenizer = moyu_ext.load(DIR). A .gguf file keeps its
    codes.

    \b
    Examples
        moyu pack ./Llama-2-7b-hf --bits 4 --texts book.txt --out llama-4bit
        moyu generate llama-4bit -p "The capital of France is"
    """
    common.check_json(json)
    if out.is_dir() and any(out.iterdir()):
        raise ConfigurationError(f"--out {out} is not empty; name a new directory")
    common.make_directory(out)
    gguf = model.endswith(".gguf")
    if gguf and texts is not None:
        raise ConfigurationError(
            "--texts fits the rounding of plain weights, but a .gguf file keeps its codes; leave "
            "--texts out, or pack the model's own directory"
        )
    packed = None if gguf or texts is not None else bits
    start = time.perf_counter()
    lm, tokenizer = common.load_model(model, dtype, "cpu", packed, group)
    from ..packing.layer import PackedLinear

    if texts is not None:
        from ..models.packed import pack as pack_model

        pack_model(lm, bits, group, tokenizer=tokenizer, texts=texts)
    layers = [m for m in lm.modules() if isinstance(m, PackedLinear)]
    lm.save_pretrained(out)
    tokenizer.save_pretrained(out)
    weights = sum(m.in_features * m.out_features for m in layers)
    held = sum(m.weight.nbytes for m in layers)
    total = sum(p.nbytes for p in lm.parameters())
    seconds = time.perf_counter() - start
    typer.echo(
        f"{len(layers)} layers packed in {seconds:.0f} s: {8 * held / weights:.2f} bits a weight, "
        f"{total / 1e6:.0f} MB with what is not packed. Saved to {out}."
    )
    result = {
        "command": "pack",
        "model": model,
        "layers": len(layers),
        "bits_a_weight": 8 * held / weights,
        "bytes": total,
        "seconds": seconds,
    }
    common.write_json(json, result)
