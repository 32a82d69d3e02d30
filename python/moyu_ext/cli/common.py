"""What the commands share: their common options, loading a model, building a method, JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import embedded
from .._files import check_writable, write_atomically
from ..errors import ConfigurationError, MoyuError

if TYPE_CHECKING:
    from ..methods import Method

Model = Annotated[
    str,
    typer.Argument(
        help="A Hugging Face directory, a hub id, a .gguf file, or a model that ships with "
        "moyu_ext (stories_silu, stories_relu).",
        show_default=False,
    ),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Also write the results to FILE, as JSON."),
]
Dtype = Annotated[
    str,
    typer.Option(help="float32, float16 or bfloat16; auto takes the checkpoint's."),
]
Bits = Annotated[
    int | None,
    typer.Option(help="Pack the weights to 3, 4, 5, 6 or 8 bits while loading (default: do not)."),
]
Group = Annotated[
    int | None, typer.Option(help="Columns per scale of packed weights: 64 (default) or 32.")
]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1, ...")]

_DTYPES = ("auto", "float32", "float16", "bfloat16")
_DEFAULT = "lossless"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def program() -> str:
    """How this user calls the command line from here."""
    if shutil.which("moyu"):
        return "moyu"
    script = Path(sys.executable).with_name("moyu")
    return os.path.relpath(script) if script.exists() else "python -m moyu_ext"


def check_json(path: Path | None) -> None:
    """Raise ConfigurationError now, rather than after the work, where FILE cannot be written."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigurationError(f"--json {path} is a directory; name a file")
    if not path.absolute().parent.is_dir():
        raise ConfigurationError(
            f"--json {path}: the directory {path.absolute().parent} does not exist; create it first"
        )
    try:
        check_writable(path)
    except OSError as error:
        raise _unwritable(path, error) from error


def make_directory(path: Path, kind: str | None = None) -> None:
    """Make the directory of --out now, rather than after the work. kind: what will be saved there.

    Raises ConfigurationError where that cannot be done, ArtifactError where an artefact of another
    kind is in the way.
    """
    if kind is not None:
        from .._artifact import check_free

        check_free(path, kind)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"--out {path} cannot be made a directory ({error.strerror}); name another"
        ) from error


def write_json(path: Path | None, content: Any) -> None:
    """Write `content` to FILE, if one was named; NaN and infinity become null.

    Raises ConfigurationError where that fails.
    """
    if path is not None:
        try:
            write_atomically(path, (json.dumps(_finite(content), indent=2) + "\n").encode())
        except OSError as error:  # full, or gone since `check_json`
            raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"--json {path} cannot be written ({error.strerror}); name a file in a folder where you "
        "may write"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "cpu",
    bits: int | None = None,
    group: int | None = None,
) -> tuple[Any, Any]:
    """The model, in eval mode, and its tokenizer; packed where there are `bits`.

    Raises ConfigurationError with the way out where MODEL is nothing that can be loaded.
    """
    if dtype not in _DTYPES:
        raise ConfigurationError(f"--dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
    if bits is not None:
        from ..packing.rows import Format

        Format(bits, 64 if group is None else group)
    elif group is not None:
        raise ConfigurationError(f"--group is {group}, which goes with --bits; give both")
    source = _source(name)
    packed = bits is not None or str(source).endswith(".gguf")
    if packed and device != "cpu":
        raise ConfigurationError(f"packed weights run on the CPU; leave --device {device} out")
    import torch
    import transformers

    _check_device(device)
    local = isinstance(source, Path)
    if local:
        transformers.utils.logging.disable_progress_bar()
    else:
        typer.echo(f"{name} is not a directory here; asking the Hugging Face hub", err=True)
    # Its reasons come with the exception; the warnings of each retry only bury them.
    _quiet_hub()
    from ..integrations.load import load

    try:
        exact = dtype if dtype == "auto" else getattr(torch, dtype)
        model, tokenizer = load(source, bits=bits, group=group, dtype=exact)
    except MoyuError:
        raise
    except Exception as error:  # transformers, safetensors, tokenizers: each has its own family
        raise ConfigurationError(_why_not(name, local, error)) from error
    return model.to(torch.device(device)), tokenizer


def _source(name: str) -> str | Path:
    """A directory, or a hub id."""
    if name in embedded.names():
        return embedded.path(name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    ships = f"moyu_ext ships {' and '.join(embedded.names())}"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigurationError(
                f"{name} has no config.json; expected a directory that save_pretrained wrote. "
                f"{ships}"
            )
        return path
    close = difflib.get_close_matches(name, embedded.names(), n=1, cutoff=0.8)
    if close:
        raise ConfigurationError(f"there is no model {name!r}; did you mean {close[0]}?")
    if path.exists() or name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        raise ConfigurationError(
            f"there is no directory {name!r}; MODEL is a Hugging Face directory, a hub id such as "
            f"meta-llama/Llama-3.2-1B, or a shipped model: {ships}"
        )
    return name


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigurationError(f"--device is {device!r}; expected cpu or cuda") from error
    if kind not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device is {device!r}; moyu_ext runs on cpu and cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            f"--device is {device!r}, but this torch ({torch.__version__}) sees no GPU; "
            "`moyu env` prints what it sees"
        )


def _quiet_hub() -> None:
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


def _why_not(name: str, local: bool, error: Exception) -> str:
    reason = " ".join(str(error).split())
    reason = reason if len(reason) < 400 else f"{reason[:400]} ..."
    if local:
        return (
            f"{name} does not load as a causal language model ({type(error).__name__}: {reason}); "
            "expected config.json, weights and a tokenizer, as save_pretrained writes them"
        )
    return (
        f"cannot get {name} from the Hugging Face hub ({reason}). Check the spelling and the "
        f"network; or run `hf download {name} --local-dir DIR` where there is one and pass DIR; "
        f"or use a shipped model: {' or '.join(embedded.names())}"
    )


def build_method(name: str | None, **options: Any) -> Method:
    """The method of that name, with those of its options that are not None.

    `thresholds`, `router` and `experts` are directories. Without a name: the method that the
    artefact was made for, qrida with options of its own, else one that changes no answer. Raises
    ConfigurationError for options that the method lacks or needs.
    """
    from ..calibration.thresholds import Thresholds
    from ..methods import METHODS

    given = {key: value for key, value in options.items() if value is not None}
    default = _DEFAULT
    if given.keys() & {"density", "bits", "guard"}:
        default = "qrida"
    if "thresholds" in given:
        directory = given["thresholds"]
        given["thresholds"] = Thresholds.from_pretrained(directory)
        default = given["thresholds"].method
    if "router" in given:
        from ..routers.router import Router

        given["router"] = Router.from_pretrained(given["router"])
        default = "roda"
    if "experts" in given:
        from ..routers.experts import Experts

        given["experts"] = Experts.from_pretrained(given["experts"])
        default = "rida"
    name = default if name is None else name
    if name not in METHODS:
        raise ConfigurationError(f"--method is {name!r}; expected one of {', '.join(METHODS)}")
    kind = METHODS[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if "thresholds" in given and "score" in fields:
        given.setdefault("score", given["thresholds"].score)
    if "shadows" in fields and "thresholds" in given and given["thresholds"].shadows:
        given["shadows"] = _shadows(directory)
    for option in sorted(given.keys() - fields.keys()):
        takes = ", ".join(f"--{_option(field)}" for field in fields if field in options)
        raise ConfigurationError(
            f"--{_option(option)} does not go with {name}, which takes {takes or 'no options'}"
        )
    for field in fields.values():
        if field.default is dataclasses.MISSING and field.name not in given:
            raise ConfigurationError(_missing(name, field.name))
    return kind(**given)


def _option(field: str) -> str:
    return "router-bits" if field == "bits" else field  # --bits are those of packed weights


def _shadows(directory: Path) -> Any:
    """Fitted shadows beside the thresholds that were found with them."""
    from ..shadow.store import FILE, Shadows

    if not (directory / FILE).is_file():
        raise ConfigurationError(
            f"--thresholds {directory} were found with fitted shadows, and {FILE} is not beside "
            "them; save those there too: shadows.save_pretrained(DIR)"
        )
    return Shadows.from_pretrained(directory)


def _missing(name: str, option: str) -> str:
    if option == "thresholds":
        return (
            f"{name} needs calibrated thresholds: run `moyu calibrate MODEL --method {name} --out "
            "DIR` first and pass --thresholds DIR"
        )
    if option == "router":
        return (
            f"{name} needs a trained router: run `moyu train-router MODEL --out DIR` first and "
            "pass --router DIR"
        )
    if option == "experts":
        return (
            f"{name} needs an MLP split into experts: run `moyu split-experts MODEL --out DIR` "
            "first and pass --experts DIR"
        )
    return f"{name} needs {option}, which has no command line option yet; use it from Python"
