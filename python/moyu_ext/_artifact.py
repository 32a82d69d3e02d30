"""A directory with `moyu_config.json` and `moyu.safetensors`, written and read as one thing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ._files import write_atomically
from .errors import ArtifactError, ConfigurationError

CONFIG_FILE = "moyu_config.json"
TENSOR_FILE = "moyu.safetensors"
T = TypeVar("T")


def save(
    directory: str | os.PathLike[str],
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write both files, each atomically; the configuration names the other's checksum, so that an
    interrupted save over an older artefact is found when it is loaded.

    Raises ArtifactError where an artefact of another kind is in the directory.
    """
    check_free(directory, kind)
    content = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
    whole = {"kind": kind, **config, "tensors_sha256": hashlib.sha256(content).hexdigest()}
    folder = folder_of(directory, kind)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TENSOR_FILE, content)
    write_atomically(folder / CONFIG_FILE, (json.dumps(whole, indent=2) + "\n").encode())


def check_free(directory: str | os.PathLike[str], kind: str) -> None:
    """Raise ArtifactError where `save` would overwrite an artefact of another kind: all share their
    file names. One of the same kind may be replaced."""
    path = folder_of(directory, kind) / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError):  # nothing there, or nothing that can be loaded again
        return
    found = config.get("kind", kind) if isinstance(config, dict) else kind
    if found != kind:
        raise ArtifactError(
            f"{path.parent} holds saved {found}, which {kind} would overwrite (both have the "
            f"same file names); save into another folder, or delete {CONFIG_FILE} and "
            f"{TENSOR_FILE} there first"
        )


def folder_of(directory: str | os.PathLike[str], kind: str) -> Path:
    """The directory of an artefact. Raises ConfigurationError where it is no path."""
    if not isinstance(directory, (str, os.PathLike)):
        raise ConfigurationError(
            f"directory is {directory!r}; expected the path of the folder for the {kind}"
        )
    return Path(directory)


def load(
    directory: str | os.PathLike[str], kind: str, version: int, again: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration that was saved, and the tensors. `again`: how to make the artefact anew.

    Raises ArtifactError where a file is missing, truncated, corrupt, of another kind, from another
    save or of another format version, ConfigurationError where `directory` is no path.
    """
    folder = folder_of(directory, kind)
    config = _config(folder, kind, version, again)
    content = _read(folder / TENSOR_FILE, kind)
    actual, expected = hashlib.sha256(content).hexdigest(), config.pop("tensors_sha256")
    if actual != expected:
        raise ArtifactError(
            f"{folder / TENSOR_FILE} is truncated, corrupt or from another save: its SHA-256 is "
            f"{actual}, {CONFIG_FILE} expects {expected}; {again}"
        )
    try:
        return config, safetensors.torch.load(content)
    except SafetensorError as error:
        raise ArtifactError(
            f"{folder / TENSOR_FILE} holds no tensors ({error}); {again}"
        ) from error


def save_layers(
    directory: str | os.PathLike[str], kind: str, record: Any, tensors: Sequence[str]
) -> None:
    """`save` a dataclass whose `layers` are dataclasses; tensors: their fields that are tensors."""
    config = _fields(record, skip=("layers",))
    config["layers"] = [_fields(layer, skip=tensors) for layer in record.layers]
    found = {
        f"{index}.{name}": getattr(layer, name)
        for index, layer in enumerate(record.layers)
        for name in tensors
    }
    save(directory, kind, config, found)


def load_layers(
    directory: str | os.PathLike[str],
    kind: str,
    make: Callable[..., T],
    make_layer: Callable[..., Any],
    tensors: Sequence[str],
    version: int,
    again: str,
) -> T:
    """What `save_layers` wrote, made anew. Raises ArtifactError, see `load`."""
    config, found = load(directory, kind, version, again)
    try:
        layers = tuple(
            make_layer(**numbers, **{name: found[f"{index}.{name}"] for name in tensors})
            for index, numbers in enumerate(config.pop("layers"))
        )
        return make(layers=layers, **config)
    except (TypeError, KeyError, ConfigurationError) as error:
        raise ArtifactError(f"{directory} holds no usable {kind} ({error}); {again}") from error


def _fields(record: Any, skip: Sequence[str]) -> dict[str, Any]:
    names = (field.name for field in dataclasses.fields(record))
    return {name: getattr(record, name) for name in names if name not in skip}


def _config(folder: Path, kind: str, version: int, again: str) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    content = _read(path, kind)
    try:
        config = json.loads(content)
    except ValueError as error:
        raise ArtifactError(f"{path} is truncated or not JSON ({error}); {again}") from error
    found = config.pop("kind", None) if isinstance(config, dict) else None
    if found != kind:
        raise ArtifactError(
            f"{path} describes {found or 'nothing known'}, expected {kind}; {again}"
        )
    if config.get("format_version") != version:
        raise ArtifactError(
            f"{path} has format version {config.get('format_version')!r}, this moyu_ext reads "
            f"{version}; {again}, or use the moyu_ext that wrote it"
        )
    if "tensors_sha256" not in config:
        raise ArtifactError(f"{path} lacks tensors_sha256; {again}")
    return config


def _read(path: Path, kind: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path} ({error.strerror}); expected a folder with {CONFIG_FILE} and "
            f"{TENSOR_FILE} of a saved {kind}"
        ) from error
