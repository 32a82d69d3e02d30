"""`moyu split-experts`: group neurons into experts and fit a router, for the method RIDA."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from . import common


def split_experts(
    model: common.Model,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where the experts are written.", show_default=False),
    ],
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text to fit on; <|endoftext|> parts texts. Without it the model writes "
            "its own.",
        ),
    ] = None,
    experts: Annotated[int, typer.Option(min=1, help="Experts per MLP; must divide f.")] = 16,
    split: Annotated[
        str, typer.Option(help="kmeans (gate rows), coactivation, or random.")
    ] = "kmeans",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of text.")] = 16384,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the tokens.")] = 6,
    seed: Annotated[int, typer.Option(help="For the grouping, the batches and own text.")] = 0,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    json: common.Json = None,
) -> None:
    """Split dense MLPs into experts that a router chooses per token.

    Without further training this costs much quality: `moyu eval` shows how much on your model.

    \b
    Examples
        moyu split-experts stories_silu --out experts
        moyu split-experts ./Llama-2-7b-hf --experts 32 --split coactivation --device cuda --out e
    """
    common.check_json(json)
    common.make_directory(out, "experts")
    lm, tokenizer = common.load_model(model, dtype, device)
    from ..calibration.split_experts import split_experts as run

    found = run(
        lm,
        tokenizer,
        texts,
        experts=experts,
        split=split,
        max_tokens=max_tokens,
        epochs=epochs,
        seed=seed,
    )
    found.save_pretrained(out)
    for index, layer in enumerate(found.layers):
        typer.echo(
            f"layer {index}: the router's half of the experts holds {layer.captured:.1%} of the "
            f"squared norms, the best half {layer.oracle:.1%}"
        )
    typer.echo(f"Saved to {out}.")
    content = {
        field.name: getattr(found, field.name)
        for field in dataclasses.fields(found)
        if field.name != "layers"
    }
    content["layers"] = [
        {"captured": layer.captured, "oracle": layer.oracle, "chance": layer.chance}
        for layer in found.layers
    ]
    common.write_json(json, {"command": "split-experts"} | content)
