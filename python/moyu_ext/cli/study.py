"""`moyu study`: the paper's theory, figures and tables, run on models of your choice."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigurationError
from .common import make_directory

if TYPE_CHECKING:
    from ..studies import Study
    from ..studies.setting import Setting


def study(
    name: Annotated[
        str,
        typer.Argument(help="Which study: see below, or `all`.", show_default=False),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model to study, may be repeated: a shipped one, one of the data folder, a "
            "directory or a hub id. Default: stories_silu and stories_relu, and stories260K where "
            "the data folder has it."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where figures, JSON and verdicts go.")
    ] = Path("studies"),
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Data folder with train_mix/heldout, bench, summ, models."
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Use your own text, one file per domain; <|endoftext|> parts texts.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="For everything that is drawn.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: a look, not a verdict.")
    ] = False,
    bench: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Rows of `moyu bench decode --json` for table 3. Default: the committed ones.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Skip studies whose results are there already.")
    ] = False,
) -> None:
    """Test a claim, figure or table of the paper.

    Each study writes figures (PNG), numbers (JSON) and a verdict (Markdown): claim, measured,
    holds or fails or holds only if.

    \b
    Studies
        gradient        why activations shrink in training: eq. 1-6, and on real models
        training        when over-activation appears: tiny models of four activations
        history         eq. 7-10: does importance depend on the history, and a router
        inertia         figures 1-4: overlap of active sets, what a prompt's set covers
        heavy-hitters   section 3.2.2, table 5: removing what attention dwells on
        prompt-length   section 4.4: what a shorter prompt costs each method
        tables          tables 1-5, the paper's figures beside what is measured here
        qrida           a router made of the weights, against other ways to rank neurons
        qrida-bytes     top-k or thresholds, per layer and per token
        frontier        bytes against KL: bits, tiers, other rules, llama.cpp's formats
        qrida-guard     CETT on text of another kind, with the guard and without
        all             all of them, and all verdicts in findings.md

    \b
    Without --data and --text the text is made from the seed: shipped stories, stories that the
    shipped twins write, and patterns filled at random.

    \b
    Examples
        moyu study gradient --out results
        moyu study inertia --model ./Llama-2-7b-hf --text mytexts.txt --out results
        moyu study all --data ../data --out results --resume
    """
    from ..studies import STUDIES, find
    from ..studies.setting import Setting

    chosen = list(STUDIES.values()) if name == "all" else [find(name)]
    _check_out(out)
    setting = Setting(
        models=model or (),
        data=data,
        texts=text or (),
        seed=seed,
        quick=quick,
        bench=bench,
        log=lambda line: typer.echo(f"  {line}", err=True),
    )
    _quiet()
    for one in chosen:
        _run(one, setting, out, resume)
    if name == "all":
        from ..studies.findings import write_findings

        typer.echo(f"all verdicts: {write_findings(out)}")


def _check_out(out: Path) -> None:
    """Find out now, rather than after the work, whether files can be written to the directory."""
    make_directory(out)
    try:
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"--out {out} cannot be written to ({error.strerror}); name another directory"
        ) from error


def _run(study: Study, setting: Setting, out: Path, resume: bool) -> None:
    from ..studies.report import Report

    stem = out / study.name.replace("-", "_")
    if resume and _finished(stem.with_suffix(".json"), setting):
        typer.echo(f"{study.name}: already in {stem}.json", err=True)
        return
    typer.echo(f"{study.name}: {study.title} ({study.source})", err=True)
    report = Report(study.name, study.title, study.source, out)
    start = time.monotonic()
    study.load().run(setting, report)
    report.write(setting.describe())
    for claim in report.claims:
        typer.echo(f"[{claim.verdict}] {claim.claim}")
        if claim.condition:
            typer.echo(f"    {claim.condition}")
        typer.echo(f"    measured: {claim.measured}")
    typer.echo(f"{study.name}: {time.monotonic() - start:.0f} s, wrote {stem}.md", err=True)


def _finished(path: Path, setting: Setting) -> bool:
    """Whether the file holds this study under the same setting (and the same models, if named)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    models = {Path(name).name for name in setting.models}
    known = set(found.get("models", {}))
    return found.get("setting") == setting.describe() and (not models or models == known)


def _quiet() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
