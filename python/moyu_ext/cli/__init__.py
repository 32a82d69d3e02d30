"""The command line: `moyu`, or `python -m moyu_ext`.

One file per command, thin: parse, call, print. Heavy imports wait until a command runs, so that
`--help` is quick and `moyu env` prints whatever is broken.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import MoyuError

# In the order of `moyu --help`. Each is a module here with a function of its name, or with an `app`
# where it has subcommands.
_COMMANDS = (
    "demo", "generate", "pack", "calibrate", "tune", "train_router", "split_experts", "eval",
    "bench", "study", "env",
)  # fmt: skip


class _Commands(TyperGroup):
    """Prints errors of the MoyuError family as one message and ends with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MoyuError as error:
            typer.echo(f"moyu: error: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version as installed

        typer.echo(f"moyu_ext {installed('moyu_ext')}")
        raise typer.Exit()


@app.callback()
def _moyu(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit."),
    ] = False,
) -> None:
    """Run Hugging Face language models with fewer MLP neurons, and see what that costs.

    \b
    Start with
        moyu demo                                   everything at once on a small model
        moyu generate stories_silu -p "One day"     stream text from a patched model
        moyu pack MODEL --bits 4 --out DIR          a packed copy: less memory, faster tokens
        moyu calibrate MODEL --out DIR              thresholds for your own model
        moyu tune MODEL --out DIR                   what to leave out for a loss that you allow
        moyu COMMAND --help                         options and examples

    MODEL is a Hugging Face directory, a hub id, a .gguf file, or a model that ships with moyu_ext:
    stories_silu or stories_relu.
    """


def _register(name: str) -> None:
    module = importlib.import_module(f"{__name__}.{name}")
    command = name.replace("_", "-")
    if hasattr(module, "app"):
        app.add_typer(module.app, name=command)
    else:
        app.command(command)(getattr(module, name))


for _name in _COMMANDS:
    if importlib.util.find_spec(f"{__name__}.{_name}") is not None:
        _register(_name)


def main() -> None:
    """Entry point of `moyu`."""
    app(prog_name="moyu")
