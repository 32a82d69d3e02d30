"""`moyu train-router`: predictors of the active neurons, for the method RODA."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import common

if TYPE_CHECKING:
    from ..routers.router import Router


def train_router(
    model: common.Model,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where the router is written.", show_default=False),
    ],
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text to train on; <|endoftext|> parts texts. Without it the model writes "
            "its own.",
        ),
    ] = None,
    cett: Annotated[
        float, typer.Option(help="The neurons to find: those that TDA keeps at this CETT target.")
    ] = 0.2,
    recall: Annotated[
        float, typer.Option(help="Share of them that each layer's threshold has to find.")
    ] = 0.92,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Width between the two linear layers. Default: of d/16, d/8 and d/4 the one that "
            "reads the fewest weights.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of text: 80 % train, 10 % thresholds, 10 % report.")
    ] = 32768,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the tokens.")] = 6,
    seed: Annotated[int, typer.Option(help="For the split, the batches and own text.")] = 0,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    json: common.Json = None,
) -> None:
    """Train a router that names the active neurons before the MLP runs.

    One predictor per layer, W2 W1 x + b, trained on the inputs that the model's own MLPs get while
    it reads. Layers that are finished stay in DIR, so a training that was interrupted goes on when
    it is started again with the same options.

    \b
    Examples
        moyu train-router stories_relu --out router
        moyu train-router ./opt-6.7b --texts mytexts.txt --device cuda --out router
        moyu generate stories_relu -p "One day" --method roda --router router
    """
    common.check_json(json)
    common.make_directory(out, "router")
    lm, tokenizer = common.load_model(model, dtype, device)
    from ..calibration.train_router import train_router as train

    router = train(
        lm,
        tokenizer,
        texts,
        cett=cett,
        recall=recall,
        rank=rank,
        max_tokens=max_tokens,
        epochs=epochs,
        out=out,
        seed=seed,
    )
    _print(model, router)
    typer.echo(f"\nSaved to {out}.")
    content = {
        field.name: getattr(router, field.name)
        for field in dataclasses.fields(router)
        if field.name != "layers"
    }
    content["layers"] = [_numbers(router, i) for i in range(len(router.layers))]
    common.write_json(json, {"command": "train-router"} | content)


def _numbers(router: Router, index: int) -> dict[str, float]:
    layer = router.layers[index]
    names = ("rank", "threshold", "recall", "precision", "density", "energy", "labels")
    return {"layer": index} | {name: getattr(layer, name) for name in names}


def _print(name: str, router: Router) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{name}: router on held-out text, {router.tokens} tokens trained on, labels at CETT "
        f"{router.cett}",
        title_justify="left",
    )
    columns = ("recall", "precision", "density", "energy", "labels")
    table.add_column("layer", justify="right")
    table.add_column("rank", justify="right")
    for column in columns:
        table.add_column(column, justify="right")
    for index, layer in enumerate(router.layers):
        values = (f"{getattr(layer, column):.1%}" for column in columns)
        table.add_row(str(index), str(layer.rank), *values)
    table.add_section()
    table.add_row("mean", "", *(f"{router.mean(column):.1%}" for column in columns))
    Console().print(table)
