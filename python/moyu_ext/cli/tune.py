"""`moyu tune`: thresholds per layer for a budget of perplexity."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._progress import steps
from ..errors import ConfigurationError
from . import common

if TYPE_CHECKING:
    from ..calibration.tune import Tuned

_PERCENT = re.compile(r"\s*([0-9.]+(?:e-?[0-9]+)?)\s*(%?)\s*", re.IGNORECASE)


def tune(
    model: common.Model,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Where thresholds, shadows and the picture go.", show_default=False
        ),
    ],
    max_perplexity_increase: Annotated[
        str, typer.Option(metavar="PERCENT", help="The budget: 1%, or 0.01.")
    ] = "1%",
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="UTF-8 text to tune and verify on; <|endoftext|> parts texts. Without it the "
            "model writes its own.",
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="qrida or tda.")] = "qrida",
    score: Annotated[
        str, typer.Option(help="What tda compares: product (neuron norm) or gate.")
    ] = "product",
    router_bits: Annotated[
        str | None,
        typer.Option(
            help="Shadows that qrida may choose from, per layer: 1..4 or gate/up, such as "
            "2,2/1,3. [default: 1,2/1,2,3]",
            show_default=False,
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Prompt tokens of each row, dense.")] = 64,
    continuation: Annotated[int, typer.Option(min=1, help="Tokens scored behind them.")] = 192,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of text in all.")] = 16384,
    measure_speed: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="TOKENS",
            help="Also generate this many tokens, dense and at the chosen point, by turns.",
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="For the text that the model writes.")] = 0,
    bits: common.Bits = None,
    group: common.Group = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    json: common.Json = None,
) -> None:
    """Find the thresholds that save the most bytes for a given rise of perplexity.

    How much each layer loses when neurons are left out is measured layer by layer, and the budget
    is spent where it saves the most. One half of the text decides, the other verifies.

    \b
    Examples
        moyu tune stories_silu --out tuned
        moyu tune ./Llama-2-7b-hf --texts mytexts.txt --max-perplexity-increase 0.5% --out tuned
        moyu tune stories_silu --method tda --out tuned-tda
        moyu generate stories_silu -p "One day" --thresholds tuned
    """
    common.check_json(json)
    limit = percent(max_perplexity_increase)
    pairs = None if router_bits is None else bit_pairs(router_bits)
    if score not in ("product", "gate"):
        raise ConfigurationError(f"--score is {score!r}; expected product or gate")
    if score == "gate" and method != "tda":
        raise ConfigurationError(f"--score gate goes with --method tda, not with {method}")
    if router_bits is not None and method != "qrida":
        raise ConfigurationError(f"--router-bits goes with --method qrida, not with {method}")
    common.make_directory(out, "thresholds")
    lm, tokenizer = common.load_model(model, dtype, device, bits, group)
    from ..calibration.tune import BITS
    from ..calibration.tune import tune as run
    from ..methods import TDA
    from .tune_figure import frontier

    kind: Any = TDA(0.0, score=score) if method == "tda" else method
    with steps("tune", lines=True) as progress:
        tuned = run(
            lm,
            tokenizer,
            texts,
            max_perplexity_increase=limit,
            method=kind,
            bits=BITS if pairs is None else pairs,
            context=context,
            continuation=continuation,
            max_tokens=max_tokens,
            seed=seed,
            progress=progress,
        )
    tuned.save_pretrained(out)
    result: dict[str, Any] = {"command": "tune", "model": tuned.thresholds.model} | tuned.as_dict()
    if measure_speed:
        result["measured"] = _speed(lm, tuned, measure_speed)
    frontier(tuned, out / "frontier.png", result.get("measured", {}).get("speedup"))
    _print(model, tuned, result.get("measured"))
    typer.echo(f'\nSaved to {out}. Next: moyu generate {model} --thresholds {out} -p "..."')
    common.write_json(json, result)


def percent(text: str) -> float:
    """`1%` or `0.01` as 0.01."""
    match = _PERCENT.fullmatch(text)
    try:
        assert match is not None
        value = float(match[1])
    except (AssertionError, ValueError) as error:
        raise ConfigurationError(
            f"--max-perplexity-increase is {text!r}; expected a number such as 1% or 0.01"
        ) from error
    return value / 100 if match[2] else value


def bit_pairs(text: str) -> list[tuple[int, int]]:
    """`1,2/1` as [(1, 1), (2, 1)]."""
    from ..shadow.pack import check_bits

    pairs = []
    for part in text.split(","):
        try:
            values = [int(number) for number in part.split("/")]
        except ValueError as error:
            raise ConfigurationError(
                f"--router-bits is {text!r}; expected numbers from 1 to 4 or pairs gate/up, such "
                "as 2,2/1"
            ) from error
        if len(values) > 2:
            raise ConfigurationError(
                f"--router-bits has {part!r}; expected a number or a pair gate/up"
            )
        for value in values:
            check_bits(value)
        pairs.append((values[0], values[-1]))
    return pairs


def _speed(model: Any, tuned: Tuned, tokens: int) -> dict[str, float]:
    """Tokens/s of greedy decoding, dense and tuned by turns in one run, medians of three."""
    import statistics
    import time

    import torch

    from ..models.cache import cache_of, passing
    from ..patching.patch import patch, unpatch

    def decode() -> float:
        ids = torch.full((1, 8), 1, device=model.device)
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=True)
            begin = time.perf_counter()
            for _ in range(tokens):
                ids = out.logits[:, -1:].argmax(-1)
                past = passing(model, cache_of(out))
                out = model(input_ids=ids, use_cache=True, **past)
        return tokens / (time.perf_counter() - begin)

    rates: dict[str, list[float]] = {"dense": [], "tuned": []}
    for _ in range(3):
        rates["dense"].append(decode())
        patch(model, tuned.method())
        rates["tuned"].append(decode())
        unpatch(model)
    dense, sparse = (statistics.median(rates[name]) for name in ("dense", "tuned"))
    return {"dense": dense, "tuned": sparse, "speedup": sparse / dense}


def _print(name: str, tuned: Tuned, measured: dict[str, float] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    thresholds = tuned.thresholds
    table = Table(title=f"{name}: {thresholds.method}", title_justify="left")
    for column in ("layer", "threshold", "bits", "density", "CETT"):
        table.add_column(column, justify="right")
    for index, layer in enumerate(thresholds.layers):
        bits = "/".join(map(str, thresholds.bits[index])) if thresholds.bits else "-"
        table.add_row(
            str(index), f"{layer.epsilon:.4g}", bits, f"{layer.density:.1%}", f"{layer.cett:.3f}"
        )
    table.add_section()
    table.add_row("mean", "", "", f"{thresholds.density:.1%}", f"{thresholds.cett:.3f}")
    console = Console()
    console.print(table)
    console.print(
        f"perplexity {tuned.increase:+.2%} (standard error {tuned.error:.2%}) on {tuned.tokens} "
        f"held-out tokens, limit {tuned.max_increase:+.2%}\n"
        f"bytes      {tuned.point.share:.1%} of the dense MLPs' per token: at most "
        f"{tuned.point.speedup:.2f}x as fast a decode step"
    )
    if measured is not None:
        console.print(
            f"speed      {measured['tuned']:.1f} tokens/s, dense {measured['dense']:.1f} "
            f"({measured['speedup']:.2f}x)"
        )
