"""`moyu demo`: the whole idea on two small models that ship with the package."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._progress import steps
from ..errors import MoyuError
from . import common

if TYPE_CHECKING:
    from rich.console import Console

    from .demo_measure import ModelResult, Row

# The ReLU twin comes second: the same training, the activation function alone differs.
_MODELS = {"stories_silu": "SwiGLU", "stories_relu": "ReLU"}
_GEOMETRY = "llama-2-7b"
_PLANS = {
    "shadow-2": "from a 2-bit copy (QRIDA)",
    "given": "before the MLP (STDA, SRIDA)",
    "gate": "after the gate (TDA, gate)",
    "product": "after gate and up (TDA, product)",
}
_DENSITIES = (1.0, 0.5, 0.33, 0.1)
_REPEATS = 15


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the picture is written.")] = Path(
        "demo"
    ),
    speed: Annotated[
        bool, typer.Option(help="Also time the operator at the size of LLaMA-2-7B (2 GB memory).")
    ] = True,
    json: common.Json = None,
    quick: Annotated[bool, typer.Option("--quick", hidden=True)] = False,
) -> None:
    """Calibrate, patch and compare on a small model.

    No network, under three minutes on two cores. For each of the two models that ship with
    moyu_ext (SwiGLU, and its ReLU twin): thresholds are calibrated, every method runs against the
    dense model on held-out text, and a story is generated. Then the operator is timed at the size
    of LLaMA-2-7B against torch's dense MLP on this machine. Last, a picture is drawn.

    \b
    Examples
        moyu demo
        moyu demo --out results --json results/demo.json
        moyu demo --no-speed
    """
    common.check_json(json)
    common.make_directory(out)
    started = time.perf_counter()
    from rich.console import Console

    from .demo_figure import draw
    from .demo_measure import CETT, Size

    size = Size(calibration=256, context=24, story=8) if quick else Size()
    console = Console(highlight=False, soft_wrap=True)
    results = []
    for name in list(_MODELS)[: 1 if quick else None]:
        results.append(_one_model(console, name, size))
    measured = _speed(console) if speed and not quick else {}
    picture = out / "moyu_demo.png"
    draw(results, CETT, picture)
    console.print(f"\nPicture: {picture} (density per layer, CETT against the threshold)")
    moyu = common.program()
    console.print(
        f"Took {time.perf_counter() - started:.0f} s. Next, with words or a model of yours:"
    )
    console.print(f'  {moyu} generate stories_silu -p "One day, a dog"', markup=False)
    console.print(f"  {moyu} calibrate MODEL --out DIR", markup=False)
    console.print(f"  {moyu} --help", markup=False)
    content = {
        "command": "demo",
        "models": [dataclasses.asdict(result) for result in results],
        "speed": measured,
        "picture": str(picture),
    }
    common.write_json(json, content)


def _one_model(console: Console, name: str, size: Any) -> ModelResult:
    model, tokenizer = common.load_model(name, "float32")
    from .demo_measure import count_steps, measure

    begun, total = itertools.count(), count_steps()
    with steps(name) as step:
        result = measure(name, model, tokenizer, size, lambda text: step(text, next(begun), total))
    console.print(
        f"\n[bold]{name}[/bold]: a Llama with {_MODELS[name]}, {result.parameters / 1e6:.1f} M "
        f"parameters, {result.layers} layers of {result.neurons} neurons"
    )
    _table(console, result)
    _stories(console, result)
    return result


def _table(console: Console, result: ModelResult) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("target", no_wrap=True)
    for column in ("density", "perplexity", "vs dense", "same token"):
        table.add_column(column, justify="right")
    for row in result.rows:
        table.add_row(
            row.name,
            row.target,
            f"{row.density:.1%}",
            f"{row.perplexity:.2f}",
            f"{row.increase:+.1%}" if row.name != "Dense" else "",
            f"{row.agreement:.1%}",
        )
    console.print(table, soft_wrap=False)
    console.print(
        "density     neurons computed, of all; realised, not asked for\n"
        f"perplexity  of {result.heldout_tokens} held-out tokens as in generation: prompt dense, "
        "rest by the method\n"
        "same token  how often it goes on as the dense model does, after the same text\n"
        "TDA and QRIDA choose neurons for each token; STDA and SRIDA once, by the prompt, and lose "
        "more."
    )


def _stories(console: Console, result: ModelResult) -> None:
    rows = {row.name: row for row in result.rows}
    shown = [rows["Dense"], *(rows[n] for n in ("QRIDA", "TDA, product") if n in rows)][:2]
    shown.append(rows["SRIDA, contribution"])
    for row in shown:
        console.print(f"\n[bold]{_caption(row)}[/bold]")
        for line in textwrap.wrap(" ".join(row.story.split()), 96):
            console.print(f"  {line}", markup=False)


def _caption(row: Row) -> str:
    return row.name if row.name == "Dense" else f"{row.name}, {row.density:.0%} of the neurons"


def _speed(console: Console) -> dict[str, Any]:
    import torch
    from rich import box
    from rich.table import Table

    from ..benchmarking import measure_mlp

    console.print(
        f"\n[bold]Speed[/bold]: one MLP at the size of {_GEOMETRY}, one token, bfloat16, on this "
        "machine"
    )
    try:
        with steps("speed") as step:
            found = measure_mlp(
                _GEOMETRY,
                torch.bfloat16,
                tuple(_PLANS),
                _DENSITIES,
                repeats=_REPEATS,
                progress=lambda done, total: step(f"round {done} of {total}", done, total),
            )
    except MoyuError as error:
        console.print(f"  not measured: {error}", markup=False)
        return {}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("the set is known", no_wrap=True)
    for density in _DENSITIES:
        table.add_column(f"{density:.0%}", justify="right")
    for plan, known in _PLANS.items():
        rows = [row for row in found.rows if row.plan == plan]
        table.add_row(known, *(f"{row.speedup_vs_dense:.2f}x" for row in rows))
    console.print(table, soft_wrap=False)
    dense = next(row for row in found.rows if row.plan == "dense")
    console.print(
        f"Times faster than torch's dense MLP ({dense.median_us / 1e3:.1f} ms) where that share of "
        "the neurons is\n"
        f"computed; medians of {_REPEATS} calls in turn, every result checked. "
        f"{found.machine.threads} threads of\n"
        f"{found.machine.label}."
    )
    for warning in found.warnings:
        console.print(f"Warning: {warning}", markup=False)
    return {
        "rows": [dataclasses.asdict(row) for row in found.rows],
        "machine": dataclasses.asdict(found.machine),
        "warnings": found.warnings,
    }
