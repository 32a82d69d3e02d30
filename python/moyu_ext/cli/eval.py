"""`moyu eval`: quality of methods against dense: perplexity, agreement, tasks, ROUGE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._files import write_atomically
from ..errors import ConfigurationError
from . import common

if TYPE_CHECKING:
    from ..evaluation.corpus import Corpus

_STEM = "eval"


def eval(
    model: common.Model,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Where table, picture and JSON go; a run that was cut goes on."
        ),
    ] = Path("eval"),
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: dense, tda, cats, stda, srida, griffin, qrida, qrida-fitted, "
            "roda, roda-online, rida, or all. Default: those that need no training, and the input "
            "thresholds of TEAL for comparison."
        ),
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated lm-eval tasks: mmlu, truthfulqa_mc1, truthfulqa_mc2, winogrande, "
            "gsm8k, hellaswag, arc_easy, arc_challenge, piqa, openbookqa, social_iqa, boolq, "
            "last_word."
        ),
    ] = "",
    summaries: Annotated[
        str, typer.Option(help="Comma-separated: xsum, xsum-1shot, cnn_dailymail (ROUGE).")
    ] = "",
    prompt_tokens: Annotated[
        int, typer.Option(min=2, help="Longer prompts of summaries lose their middle.")
    ] = 384,
    summary_tokens: Annotated[int, typer.Option(min=1, help="Length of a summary.")] = 64,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Your own text; <|endoftext|> parts texts. One half calibrates, the other is "
            "scored.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Data folder with bench, summ, train_mix (or MOYU_DATA)."),
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(
            "--density",
            "-d",
            help="Density to measure methods that rank at, may be repeated. Default: five of them. "
            "Other points that DIR has already are dropped.",
            show_default=False,
        ),
    ] = None,
    cett: Annotated[
        list[float] | None,
        typer.Option(
            help="CETT target to measure methods with thresholds at, may be repeated. Default: "
            "five of them.",
            show_default=False,
        ),
    ] = None,
    router: Annotated[
        Path | None, typer.Option(metavar="DIR", help="From `moyu train-router`, for roda.")
    ] = None,
    experts: Annotated[
        Path | None, typer.Option(metavar="DIR", help="From `moyu split-experts`, for rida.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Prompt tokens of each text.")] = 64,
    continuation: Annotated[int, typer.Option(min=1, help="Tokens scored behind it.")] = 96,
    texts: Annotated[int, typer.Option(min=1, help="Texts scored.")] = 24,
    written: Annotated[
        int, typer.Option(min=0, help="Tokens the dense model writes, to see who agrees; 0: none.")
    ] = 64,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of each task and set, for a quick look.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For calibration, training and intervals.")] = 0,
    bits: common.Bits = None,
    group: common.Group = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    json: common.Json = None,
) -> None:
    """Measure what each method costs in quality, at several densities.

    Methods govern what they would govern in generation: a prompt runs dense and chooses the sets of
    sequence-level methods, the tokens behind it are scored under the method.

    Writes eval.json (all values, for going on), eval.md and eval.png; --json FILE gets the results
    without the values of each document.

    \b
    Examples
        moyu eval stories_silu --out eval
        moyu eval stories_relu --methods tda,srida,roda --router router
        moyu eval stories_silu --methods qrida,cats -d 0.2 -d 0.33
        moyu eval ./Llama-2-7b-hf --tasks mmlu,winogrande --summaries xsum --limit 100 --data data
    """
    common.check_json(json)
    common.make_directory(out)
    from ..calibration.calibrate import check_target
    from ..evaluation import evaluate, picture
    from ..evaluation.corpus import Corpus
    from ..evaluation.curves import CURVES, TRAINED, Workshop, check_names, points
    from ..evaluation.tasks import check_tasks
    from ..methods.base import check_density

    corpus = Corpus(data, text or ())
    names = _names(methods) or [name for name in CURVES if name not in TRAINED]
    names = list(CURVES) if names == ["all"] else names
    check_names(names)
    for value in density or ():
        check_density(value)
    for value in cett or ():
        check_target(value)
    # Said now, rather than after the work.
    check_tasks(_names(tasks), corpus.data)
    items = _items(corpus, _names(summaries), limit)
    lm, tokenizer = common.load_model(model, dtype, device, bits, group)
    shop = Workshop(lm, tokenizer, corpus.documents(train=True), seed=seed, log=_log)
    shop.densities = tuple(dict.fromkeys(density or ()))
    shop.targets = tuple(dict.fromkeys(cett or ()))
    if router is not None:
        from ..routers.router import Router

        shop.router = Router.from_pretrained(router)
        names += [] if methods else ["roda", "roda-online"]
    if experts is not None:
        from ..routers.experts import Experts

        shop.experts = Experts.from_pretrained(experts)
        names += [] if methods else ["rida"]
    chosen = points(shop, names)
    for option, given, word in (("--density", density, "density "), ("--cett", cett, "CETT ")):
        if given and not any(point.setting.startswith(word) for point in chosen):
            raise ConfigurationError(
                f"{option} is given, but none of {', '.join(names)} is measured by "
                f"{word.strip()}; leave it out, or name other --methods"
            )
    reference = methods in (None, "all")
    rows, ids = _ids(lm, tokenizer, corpus, context, continuation, texts)
    evaluation = evaluate.Evaluation(
        lm,
        tokenizer,
        rows,
        context,
        new_tokens=written,
        ids=ids,
        tasks=_names(tasks),
        data=corpus.data,
        limit=limit,
        summaries=items,
        prompt_tokens=prompt_tokens,
        summary_tokens=summary_tokens,
        calibration=shop.rows() if reference else None,
        basis=shop.identity(),
        seed=seed,
        log=_log,
    )
    found = evaluate.run(
        evaluation,
        chosen,
        out / f"{_STEM}.json",
        reference=reference,
    )
    results = found["rows"]
    picture.draw(results, out / f"{_STEM}.png", f"{model}: quality against density")
    columns, cells = picture.table(results)
    write_atomically(out / f"{_STEM}.md", picture.markdown(columns, cells).encode())
    _print(columns, cells)
    typer.echo(f"\nWrote {out / _STEM}.json, .md and .png")
    common.write_json(json, evaluate.brief(found))


def _names(text: str | None) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))


def _log(line: str) -> None:
    typer.echo(f"  {line}", err=True)


def _ids(
    lm: Any, tokenizer: Any, corpus: Corpus, context: int, continuation: int, texts: int
) -> tuple[Any, Any]:
    """Rows to score, and one long text for the sliding window."""
    import torch

    from ..models.text import encode, windows

    encoded = [encode(tokenizer, text) for text in corpus.documents()]
    length = context + continuation
    whole = [row for row in windows(encoded, 1 << 30, length) if len(row) == length]
    if not whole:
        raise ConfigurationError(
            f"no text has {length} tokens (--context {context} --continuation {continuation}); "
            "give longer texts with --text, or make these smaller"
        )
    if len(whole) < texts:
        typer.echo(f"  only {len(whole)} texts of {length} tokens are at hand", err=True)
    long = [i for row in encoded for i in row][: texts * length]
    return torch.tensor(whole[:texts]), torch.tensor(long)


def _items(corpus: Corpus, names: list[str], limit: int | None) -> dict[str, Any]:
    if not names:
        return {}
    if corpus.data is None:
        raise ConfigurationError(
            "--summaries reads summ/ of the data folder: pass --data DIR, or set MOYU_DATA"
        )
    from ..evaluation.rouge import load_items, rouge

    rouge([], [])  # a missing package
    return {name: load_items(corpus.data, name, limit) for name in names}


def _print(columns: list[str], cells: list[list[Any]]) -> None:
    lines = [columns, *([_cell(cell) for cell in row] for row in cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        parts = [
            text.ljust(width) if i < 2 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        typer.echo("  ".join(parts).rstrip())


def _cell(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)
