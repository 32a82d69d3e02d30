"""`moyu bench mlp|decode`: speed as a ratio inside one run, every result checked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .._progress import steps
from ..errors import ConfigurationError
from . import common

if TYPE_CHECKING:
    from ..benchmarking import Machine, Row
    from ..benchmarking.decode import Side

app = typer.Typer(
    no_args_is_help=True,
    help="Measure speed: dense and sparse interleaved in one run, each result checked against "
    "plain PyTorch. Times differ from machine to machine; the ratios are what counts, and only on "
    "a machine that does nothing else.",
)
# Where there is no terminal to ask, wide enough for every column.
console = Console(width=None if sys.stdout.isatty() else 120)
_PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True}

Geometry = Annotated[
    str,
    typer.Option(
        "--geometry",
        "-g",
        help="llama-2-7b, llama-3-8b, llama-3.2-1b, tinyllama-1.1b or opt-6.7b, with random "
        "weights.",
    ),
]
DType = Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")]
CsvFile = Annotated[
    Path | None, typer.Option("--csv", metavar="FILE", help="Append the rows to FILE.")
]
Bits = Annotated[
    int | None,
    typer.Option("--bits", help="Packed weights of 3, 4, 5, 6 or 8 bits (default: not packed)."),
]
Group = Annotated[
    int | None, typer.Option("--group", help="Columns per scale of packed weights: 64 or 32.")
]
Seed = Annotated[int, typer.Option("--seed", help="Of weights and active sets.")]


@app.command()
def mlp(
    geometry: Geometry = "llama-2-7b",
    dtype: DType = "bfloat16",
    plan: Annotated[
        list[str],
        typer.Option(
            "--plan",
            "-p",
            help="When the active set is known: given (before the MLP: skips gate, up and down), "
            "gate (behind the gate: skips up and down), product (behind gate and up: skips down), "
            "shadow-1 to shadow-4 (qRIDA with that many bits, top k), shadow-eps-1 to shadow-eps-4 "
            "(with a threshold) and scores-1 to scores-4 (its shadow alone). dense-neuron-major: "
            "torch's dense MLP on the layout of a patched model. "
            "Repeatable.",
        ),
    ] = ["given", "gate", "product", "shadow-2"],  # noqa: B006
    density: Annotated[
        list[float],
        typer.Option("--density", "-d", help="Fraction of neurons that are active. Repeatable."),
    ] = [1.0, 0.5, 0.33, 0.1],  # noqa: B006
    rows: Annotated[
        list[int],
        typer.Option("--rows", "-r", help="Input rows, each with a set of its own. Repeatable."),
    ] = [1],  # noqa: B006
    repeats: Annotated[int, typer.Option("--repeats", help="Timed calls of each case.")] = 40,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            help="MLPs in rotation; by default so many that no weight is still in a cache.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="cpu, or cuda: there every case runs in a CUDA graph, beside torch's dense MLP "
            "eager, in a graph and compiled, and beside a Triton GEMV that masks inputs.",
        ),
    ] = "cpu",
    bits: Bits = None,
    group: Group = None,
    seed: Seed = 0,
    csv: CsvFile = None,
    json: common.Json = None,
) -> None:
    """Time one MLP, by plan and density, against torch's dense MLP.

    Before every call of a case comes one of the dense MLP, each on other weights, and the memory's
    read bandwidth is measured in between. --geometry also takes one MLP's size as d,f.

    Example: moyu bench mlp -g llama-3-8b --plan given -d 0.33 -d 0.1 --json mlp.json
    """
    from ..benchmarking import measure_mlp, measure_mlp_cuda

    _check_files(csv, json)
    if device not in ("cpu", "cuda"):
        raise ConfigurationError(f"device is {device!r}; expected cpu or cuda")
    packed: dict[str, Any] = {} if bits is None else {"bits": bits, "group": group}
    with steps("MLP") as step:
        step("building", 0, 1)
        result = (measure_mlp_cuda if device == "cuda" else measure_mlp)(
            geometry,
            _dtype(dtype),
            plan,
            density,
            rows,
            **packed,
            repeats=repeats,
            layers=layers,
            seed=seed,
            progress=lambda done, total: step("", done, total),
        )
    _print_machine(result.machine, result.bandwidth_by_reader, result.warnings)
    dense = {"torch": "torch dense"}  # on a GPU the method says which
    labels = [
        dense.get(row.method, row.method) if row.plan == "dense" else row.plan
        for row in result.rows
    ]
    _print_rows(f"{geometry}, {dtype}, {result.layers} MLPs in rotation", labels, result.rows)
    _save(csv, json, "bench mlp", result)


@app.command()
def decode(
    geometry: Geometry = "llama-3.2-1b",
    method: Annotated[
        list[str],
        typer.Option(
            "--method",
            "-m",
            help="qrida, srida, stda, tda, tda-gate, or dense (all neurons by our operator). "
            "Repeatable.",
        ),
    ] = ["srida"],  # noqa: B006
    density: Annotated[
        list[float],
        typer.Option("--density", "-d", help="Fraction of neurons that are active. Repeatable."),
    ] = [0.33],  # noqa: B006
    projections: Annotated[
        bool,
        typer.Option(
            "--projections",
            help="Measure each method also with attention's and the head's linear layers by the "
            "project's own GEMV.",
        ),
    ] = False,
    dtype: DType = "bfloat16",
    prompt_tokens: Annotated[int, typer.Option("--prompt", help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option("--new", help="Timed tokens per round.")] = 12,
    bits: Bits = None,
    group: Group = None,
    llama_bench: Annotated[
        str | None,
        typer.Option(
            "--llama-bench",
            metavar="PROGRAM",
            help="llama.cpp's llama-bench, to run beside; found on PATH with --llama-bench auto. "
            "It gets files of the same geometry in BF16, Q8_0 and Q4_0 (needs pip install gguf).",
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", help="Turns of unpatched and patched, one after the other.")
    ] = 3,
    layers: Annotated[
        int | None, typer.Option("--layers", help="Fewer layers than the model has, for a try.")
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Instead of rows, where a generated token's time goes under each method: "
            "products, attention, head, Python, generate, with bytes and share of bandwidth.",
        ),
    ] = False,
    seed: Seed = 0,
    csv: CsvFile = None,
    json: common.Json = None,
) -> None:
    """Time a whole model, plain and patched in turn.

    Builds it with random weights (llama-2-7b: 13.5 GB in bfloat16) and times prompt and decoded
    tokens, and what patching costs in memory and time. Threshold methods get their thresholds
    from a few random tokens, so that no calibration is needed.

    Example: moyu bench decode -g llama-2-7b --layers 4 -m qrida -m srida -d 0.33 --projections
    """
    from ..benchmarking import measure_decode, method_at
    from ..benchmarking.decode import ROWS
    from ..benchmarking.llama_cpp import find_llama_bench

    _check_files(csv, json)
    program = None
    if llama_bench is not None:
        program = find_llama_bench(None if llama_bench == "auto" else llama_bench)
        if program is None:
            raise ConfigurationError("--llama-bench auto: no llama-bench on PATH; name the program")
    methods = [
        method_at(name, value, prompt_tokens)
        for name in method
        for value in ([1.0] if name == "dense" else density)
    ]
    if profile:
        if csv is not None or program is not None or projections:
            raise ConfigurationError(
                "--profile goes with neither --csv nor --llama-bench nor --projections; leave "
                "either out (--json keeps a profile)"
            )
        _profile(
            geometry, methods, _dtype(dtype), json, bits=bits, group=group, layers=layers,
            prompt_tokens=prompt_tokens, new_tokens=new_tokens, seed=seed,
        )  # fmt: skip
        return
    with steps("decode") as step:
        step("building", 0, 1)
        result = measure_decode(
            geometry,
            methods,
            _dtype(dtype),
            projections=projections,
            bits=bits,
            group=group,
            llama_bench=program,
            layers=layers,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            seed=seed,
            progress=lambda done, total, text: step(text, done, total),
        )
    _print_machine(result.machine, result.bandwidth_by_reader, result.warnings)
    labels = [f"{name} {side.label}" for side in result.sides for name in ROWS]
    labels += [f"decode llama.cpp {row.dtype}" for row in result.rows[len(labels) :]]
    _print_rows(f"{geometry}, {dtype}, built in {result.build_seconds:.0f} s", labels, result.rows)
    _print_sides(result.sides, result.model_bytes, result.down_bytes)
    _save(csv, json, "bench decode", result)


def _profile(
    geometry: str, methods: list[Any], dtype: Any, json: Path | None, **settings: Any
) -> None:
    from ..benchmarking.decode_profile import profile_decode

    with steps("profile") as step:
        step("building", 0, len(methods))
        result = profile_decode(
            geometry,
            methods,
            dtype,
            progress=lambda d, total, text: step(text, d, total),
            **settings,
        )
    _print_machine(result.machine, result.bandwidth_by_reader, result.warnings)
    for profile in result.profiles:
        title = f"{result.title}, {profile.method}"
        table = _table(title, "", "ms", "of token", "MB", "GB/s", "of peak", "ms at peak")
        for part in profile.parts:
            read = part.bytes / part.ms / 1e6 if part.bytes else 0.0
            known = (f"{part.bytes / 1e6:.1f}", f"{read:.1f}", f"{read / result.gbps:.0%}",
                     f"{part.bound(result.gbps):.2f}") if part.bytes else ("",) * 4  # fmt: skip
            share = f"{part.ms / profile.token_ms:.0%}"
            table.add_row(part.name, f"{part.ms:.3f}", share, *known)
        total = sum(part.bytes for part in profile.parts)
        bound = sum(part.bound(result.gbps) for part in profile.parts)
        rate = total / profile.token_ms / 1e6
        table.add_row("token", f"{profile.token_ms:.3f}", "100%", f"{total / 1e6:.1f}",
                      f"{rate:.1f}", f"{rate / result.gbps:.0%}", f"{bound:.2f}")  # fmt: skip
        console.print(table)
        console.print(f"outside products and attention: {profile.outside_ms:.2f} ms", **_PLAIN)
    common.write_json(json, {"command": "bench decode --profile"} | result.as_dict())


def _dtype(name: str) -> Any:
    import torch

    dtype = getattr(torch, name, None)
    if name not in ("bfloat16", "float16", "float32"):
        raise ConfigurationError(f"dtype is {name!r}; expected bfloat16, float16 or float32")
    return dtype


def _print_machine(machine: Machine, readers: dict[str, float], warnings: list[str]) -> None:
    console.print(
        f"{machine.device}, {machine.threads} threads, {machine.isa}, load {machine.load:.2f}, "
        f"reads {max(readers.values()):.1f} GB/s",
        **_PLAIN,
    )
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {warning}", **_PLAIN)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title=title)
    for position, column in enumerate(columns):
        table.add_column(column, justify="right" if position else "left", no_wrap=True)
    return table


def _print_rows(title: str, labels: list[str], rows: list[Row]) -> None:
    table = _table(title, "", "rows", "density", "ms", "p20-p80", "GB/s", "of peak", "vs dense")
    for label, row in zip(labels, rows, strict=True):
        table.add_row(
            label,
            str(row.rows),
            f"{row.density:.3f}",
            f"{row.median_us / 1e3:.3f}",
            f"{row.p20_us / 1e3:.2f}-{row.p80_us / 1e3:.2f}",
            f"{row.gbps:.1f}",
            f"{row.fraction_of_bandwidth:.0%}",
            f"{row.speedup_vs_dense:.2f}x",
        )
    console.print(table)


def _print_sides(sides: list[Side], model_bytes: int, down_bytes: int) -> None:
    table = _table(
        f"patch (the model {model_bytes / 1e9:.2f} GB, one W_down {down_bytes / 1e6:.1f} MB)",
        *("", "density", "MLPs of token", "peak MB", "lasting MB", "seconds"),
    )
    for side in sides:
        table.add_row(
            side.label,
            f"{side.density:.3f}",
            f"{side.mlp_share:.0%}",
            _megabytes(side.patch_peak_bytes),
            _megabytes(side.patch_lasting_bytes),
            "" if side.method is None else f"{side.patch_seconds:.1f}",
        )
    console.print(table)


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def _check_files(csv: Path | None, json: Path | None) -> None:
    from ..benchmarking import check_csv

    common.check_json(json)
    if csv is not None:
        check_csv(csv)


def _save(csv: Path | None, json: Path | None, command: str, result: Any) -> None:
    from ..benchmarking import write_csv

    if csv is not None:
        write_csv(csv, result.rows)
    common.write_json(json, {"command": command} | result.as_dict())
