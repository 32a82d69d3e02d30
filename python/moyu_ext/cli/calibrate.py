"""`moyu calibrate`: thresholds for a model's MLPs at a CETT target."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigurationError
from . import common

if TYPE_CHECKING:
    from ..calibration.thresholds import Thresholds


def calibrate(
    model: common.Model,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Where the thresholds are written.", show_default=False),
    ],
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text to calibrate on; <|endoftext|> parts texts. Without it the model "
            "writes its own.",
        ),
    ] = None,
    cett: Annotated[
        float,
        typer.Option(help="Target: mean relative error of an MLP's output, in [0, 1)."),
    ] = 0.2,
    method: Annotated[
        str, typer.Option(help="tda or qrida (per token), or stda (per sequence).")
    ] = "tda",
    score: Annotated[
        str, typer.Option(help="What tda compares: product (neuron norm) or gate.")
    ] = "product",
    bits: Annotated[
        int | None, typer.Option(help="For qrida: bits of its copies of gate and up, 1 to 4.")
    ] = None,
    on: Annotated[
        str,
        typer.Option(
            help="token, or with stda continuation: sets chosen on the first half of a text, "
            "error measured on the second."
        ),
    ] = "token",
    granularity: Annotated[
        str, typer.Option(help="One threshold per layer, or one for the model.")
    ] = "layer",
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential/--one-pass",
            help="Each layer sees the sparsified layers below it, or all see the dense model.",
        ),
    ] = True,
    max_tokens: Annotated[int, typer.Option(min=1, help="Calibration tokens.")] = 4096,
    seed: Annotated[int, typer.Option(help="For the text that the model writes.")] = 0,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    json: common.Json = None,
) -> None:
    """Find the thresholds that meet an error target.

    A neuron whose contribution to the MLP's output is below its layer's threshold is left out.
    CETT is the norm of all that is left out, relative to the output; the thresholds saved are the
    largest whose mean CETT stays at the target (0.2 in the paper).

    \b
    Examples
        moyu calibrate stories_silu --out thresholds
        moyu calibrate ./Llama-2-7b-hf --texts mytexts.txt --cett 0.1 --out thresholds
        moyu calibrate stories_silu --method stda --on continuation --out thresholds-stda
        moyu generate stories_silu -p "One day" --thresholds thresholds
    """
    common.check_json(json)
    if score not in ("product", "gate"):
        raise ConfigurationError(f"--score is {score!r}; expected product or gate")
    if score == "gate" and method != "tda":
        raise ConfigurationError(f"--score gate goes with --method tda, not with {method}")
    common.make_directory(out, "thresholds")
    lm, tokenizer = common.load_model(model, dtype, device)
    import moyu_ext

    # calibrate() reads score and bits off the method; the threshold of this one is not used.
    kind: Any = moyu_ext.TDA(0.0, score=score) if method == "tda" else method
    if bits is not None:
        kind = common.build_method(method, bits=bits)
    thresholds = moyu_ext.calibrate(
        lm,
        tokenizer,
        texts,
        cett=cett,
        method=kind,
        on=on,
        granularity=granularity,
        sequential=sequential,
        max_tokens=max_tokens,
        seed=seed,
    )
    thresholds.save_pretrained(out)
    _print(model, thresholds)
    typer.echo(f"Saved to {out}. Next:")
    typer.echo(f'  {common.program()} generate {model} --thresholds {out} -p "Once upon a time"')
    common.write_json(json, {"command": "calibrate"} | dataclasses.asdict(thresholds))


def _print(name: str, thresholds: Thresholds) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{name}: {thresholds.method}, CETT {thresholds.cett}, {thresholds.tokens} tokens",
        title_justify="left",
    )
    table.add_column("layer", justify="right")
    for column in ("threshold", "density", "CETT mean", "p50", "p95", "max"):
        table.add_column(column, justify="right")
    for index, layer in enumerate(thresholds.layers):
        table.add_row(
            str(index),
            f"{layer.epsilon:.4g}",
            f"{layer.density:.1%}",
            *(f"{value:.3f}" for value in (layer.cett, layer.p50, layer.p95, layer.max)),
        )
    table.add_section()
    table.add_row("mean", "", f"{thresholds.density:.1%}")
    Console().print(table)
