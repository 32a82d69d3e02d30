"""`moyu tune`: what a model can leave out for a loss that the user allows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._progress import steps
from . import common

if TYPE_CHECKING:
    from ..calibration.tuned import Tuned


def tune(
    model: common.Model,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Where prices, routers and the picture go.", show_default=False
        ),
    ],
    budget: Annotated[
        str,
        typer.Option(
            metavar="LOSS",
            help="Mean KL per token against the dense model in nats, such as 0.01, or a rise of "
            "perplexity, such as 1%.",
        ),
    ] = "0.01",
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text to tune and verify on; <|endoftext|> parts texts. Without it the "
            "model writes its own.",
        ),
    ] = None,
    router_bits: Annotated[int, typer.Option(min=1, max=4, help="Bits of the routers.")] = 3,
    context: Annotated[int, typer.Option(min=1, help="Prompt tokens of each row, dense.")] = 64,
    continuation: Annotated[int, typer.Option(min=1, help="Tokens scored behind them.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of text in all.")] = 4608,
    seed: Annotated[int, typer.Option(help="For the text that the model writes.")] = 0,
    bits: common.Bits = None,
    group: common.Group = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    json: common.Json = None,
) -> None:
    """Find what generation can leave out at a loss that you allow, and verify it.

    One forward and backward over the text say what errors in each layer cost; a router of a few
    bits then computes, estimates or skips each neuron of each token by what its weights are worth.
    A third of the text is held out and has the last word. Layers that gain no time stay dense.

    \b
    Examples
        moyu tune stories_silu --out tuned
        moyu tune ./Llama-2-7b-hf --texts mytexts.txt --budget 1% --out tuned
        moyu generate stories_silu -p "One day" --tuned tuned
        moyu generate stories_silu -p "One day" --budget 0.01     # the same, remembered
    """
    common.check_json(json)
    from ..calibration.tune import nats
    from ..calibration.tune import tune as run
    from .tune_figure import layers

    limit = nats(budget)
    common.make_directory(out, "tuning")
    lm, tokenizer = common.load_model(model, dtype, device, bits, group)
    with steps("tune", lines=True) as progress:
        tuned = run(
            lm,
            tokenizer,
            texts,
            budget=limit,
            bits=router_bits,
            context=context,
            continuation=continuation,
            max_tokens=max_tokens,
            seed=seed,
            progress=progress,
        )
    tuned.save_pretrained(out)
    layers(tuned, out / "layers.png")
    _print(model, tuned)
    typer.echo(f'\nSaved to {out}. Next: moyu generate {model} --tuned {out} -p "..."')
    common.write_json(json, {"command": "tune"} | tuned.as_dict())


def _print(name: str, tuned: Tuned) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if tuned.sparse:
        table = Table(title=f"{name}: {tuned.budget:.4g} nats", title_justify="left")
        for column in ("layer", "exact", "estimated", "predicted loss", "time of dense"):
            table.add_column(column, justify="right")
        dense = tuned.dense_seconds / len(tuned.layers)
        for index, layer in enumerate(tuned.layers):
            table.add_row(
                str(index),
                f"{layer.exact:.1%}",
                f"{layer.estimated:.1%}",
                f"{layer.loss:.5f}",
                f"{layer.seconds / dense:.0%}",
            )
        console.print(table)
        console.print(
            f"loss       KL {tuned.kl:.4f} nats (standard error {tuned.error:.4f}), budget "
            f"{tuned.budget:.4g}; predicted {tuned.predicted:.4f}; agreement "
            f"{tuned.agreement:.1%}; on {tuned.tokens} held-out tokens"
        )
    console.print(f"speed      {tuned.report()}" if tuned.sparse else str(tuned.report()))
