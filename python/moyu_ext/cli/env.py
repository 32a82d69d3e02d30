"""`moyu env`: what is installed and loaded, for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from .. import embedded
from .._cpu import cpu_name
from . import common

_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "typer", "rich", "matplotlib")
# Prefixes of variables that change what moyu_ext and its OpenMP runtime do.
_VARIABLES = ("MOYU_", "OMP_", "KMP_", "GOMP_", "CUDA_VISIBLE_DEVICES")
_MAPS = Path("/proc/self/maps")


def env(json: common.Json = None) -> None:
    """Print a report for bug reports.

    Versions, instruction sets, CUDA, build options, loaded OpenMP runtimes. It always prints,
    whatever is broken, and says what is.

    \b
    Examples
        moyu env
        moyu env --json env.json
    """
    common.check_json(json)
    facts = collect()
    for section, values in facts.items():
        typer.echo(f"{section}:")
        for key, value in values.items():
            typer.echo(f"  {key}: {_text(value)}")
    common.write_json(json, facts)


def collect() -> dict[str, dict[str, Any]]:
    """Facts by section; a section that cannot be had says why under "broken"."""
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "moyu_ext": _package,
        "machine": _machine,
        "versions": _versions,
        "torch": _torch,
        "extension": _extension,
        "openmp": _openmp,  # behind those that load libraries
        "environment": _variables,
    }
    facts: dict[str, dict[str, Any]] = {}
    for name, collect_section in sections.items():
        try:
            facts[name] = collect_section()
        except Exception as error:  # a report of what is broken must not break
            facts[name] = {"broken": f"{type(error).__name__}: {error}"}
    return facts


def _package() -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "version": version("moyu_ext"),
        "location": str(Path(__file__).parents[1]),
        "shipped models": embedded.names(),
    }


def _machine() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable cores": usable,
    }


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _torch() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "threads": torch.get_num_threads(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "built for cuda": torch.version.cuda,
        "gpus": gpus,
    }


def _extension() -> dict[str, Any]:
    from .._load import load_extension

    extension = load_extension()
    return {
        "file": str(extension.__file__),
        "instruction set": extension.isa_name(),
        "instruction sets": extension.isa_list(),
        **extension.build_info(),
    }


def _openmp() -> dict[str, Any]:
    if not _MAPS.exists():
        return {"loaded runtimes": f"unknown: this system has no {_MAPS}"}
    libraries = {line.split(maxsplit=5)[-1].strip() for line in _MAPS.read_text().splitlines()}
    runtimes = sorted(p for p in libraries if re.search(r"/lib(gomp|iomp5|omp)\b[^/]*$", p))
    return {"loaded runtimes": runtimes}


def _variables() -> dict[str, Any]:
    return {key: os.environ[key] for key in sorted(os.environ) if key.startswith(_VARIABLES)}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None else str(value)
