"""Rows of results: their columns, their provenance, and how they reach a file."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch

from .._files import write_atomically
from ..errors import ConfigurationError, MoyuError


class BenchmarkError(MoyuError, RuntimeError):
    """A result that does not agree with the reference; no row is written."""


@dataclass(frozen=True)
class Row:
    """One measured case, in the order of the columns of benchmarks/results/*.csv.

    name: mlp, decode or prefill. method: the operator (mlp) or the method (decode). plan: when the
    active set is known. rows: input rows, for prefill the prompt's tokens. density: the realised
    one. bytes: the weights that the case must read. fraction_of_bandwidth: gbps over the machine's
    read bandwidth in the same run. speedup_vs_dense: median of the dense baseline over this median.
    max_rel_err: against `moyu_ext.reference`. Unknown numbers are NaN, and empty in a file.
    """

    name: str
    device: str
    dtype: str
    geometry: str
    method: str
    plan: str
    rows: int
    density: float
    median_us: float
    p20_us: float
    p80_us: float
    bytes: int
    gbps: float
    bandwidth_gbps: float
    fraction_of_bandwidth: float
    speedup_vs_dense: float
    dense_impl: str
    max_rel_err: float
    torch: str
    commit: str


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def make_row(
    *,
    microseconds: Sequence[float],
    dense_microseconds: Sequence[float],
    bytes: int,
    bandwidth_gbps: float,
    **rest: Any,
) -> Row:
    """The row of a case from its times, the baseline's times and the machine's bandwidth."""
    median = quantile(microseconds, 0.5)
    gbps = bytes / median / 1e3
    return Row(
        median_us=median,
        p20_us=quantile(microseconds, 0.2),
        p80_us=quantile(microseconds, 0.8),
        bytes=bytes,
        gbps=gbps,
        bandwidth_gbps=bandwidth_gbps,
        fraction_of_bandwidth=gbps / bandwidth_gbps,
        speedup_vs_dense=quantile(dense_microseconds, 0.5) / median,
        torch=torch.__version__,
        commit=commit(),
        **rest,
    )


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, linear between neighbours."""
    return float(numpy.quantile(values, q))


def commit() -> str:
    """The clone's git commit, "+" where the code differs from it; else the package's version.

    MOYU_COMMIT says it where a package was installed from a clone that is not there any more.
    """
    if known := os.environ.get("MOYU_COMMIT"):
        return known
    root = Path(__file__).resolve().parents[3]
    if (root / ".git").exists() and (root / "csrc" / "moyu.h").exists():
        try:
            head = _git(root, "rev-parse", "--short=12", "HEAD")
            changed = _git(root, "status", "--porcelain", "--", "csrc", "moyu_ext", "python")
        except (OSError, subprocess.CalledProcessError):
            return "unknown"  # no git here, or no commit yet
        return head + ("+" if changed else "")
    return f"v{version('moyu_ext')}"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def check_csv(path: str | Path) -> None:
    """Raise ConfigurationError where `path` cannot take rows: other columns, or no directory."""
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise ConfigurationError(f"{path}: the directory {path.absolute().parent} does not exist")
    if not path.exists():
        return
    if path.is_dir():
        raise ConfigurationError(f"{path} is a directory; name a file")
    first = path.read_text().partition("\n")[0]
    if first and first != ",".join(COLUMNS):
        raise ConfigurationError(
            f"{path} has the columns {first!r}, these rows have {','.join(COLUMNS)!r}; write to "
            "another file"
        )


def write_csv(path: str | Path, rows: Iterable[Row]) -> None:
    """Append rows to a CSV file, atomically; a new file gets the header.

    Raises ConfigurationError as `check_csv` does.
    """
    check_csv(path)
    path = Path(path)
    out = io.StringIO(path.read_text() if path.exists() else "")
    text = out.getvalue()
    out.seek(0, io.SEEK_END)
    if text and not text.endswith("\n"):
        out.write("\n")
    writer = csv.writer(out, lineterminator="\n")
    if not text:
        writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_cell(value) for value in dataclasses.astuple(row)])
    write_atomically(path, out.getvalue().encode())


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.6g}"
