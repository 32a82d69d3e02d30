"""`moyu bench mlp`: one MLP at a published size, dense and sparse interleaved call by call."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..methods.base import check_count, check_density
from ..models.families import DTYPES
from ..packing.rows import Format
from .cases import Case, TorchDense, find_plan, takes_density
from .geometries import Geometry, geometry
from .machine import MIB, Bandwidth, Machine, require_memory
from .rows import Row, make_row
from .weights import Filler, mlp_layer

WORKING_SET = 1200 * 10**6  # bytes; also at least four last-level caches
DENSE_IMPL = "torch.nn.functional.linear"


@dataclass(frozen=True)
class MlpResult:
    """rows; the machine; GB/s by reader; layers: MLPs in rotation; warnings: reasons to doubt."""

    rows: list[Row]
    machine: Machine
    bandwidth_by_reader: dict[str, float]
    layers: int
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Everything, in what JSON knows."""
        return {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "machine": dataclasses.asdict(self.machine),
            "bandwidth_by_reader": self.bandwidth_by_reader,
            "warnings": self.warnings,
            "layers_in_rotation": self.layers,
        }


def measure_mlp(
    size: Geometry | str = "llama-2-7b",
    dtype: torch.dtype = torch.bfloat16,
    plans: Sequence[str] = ("given",),
    densities: Sequence[float] = (1.0, 0.5, 0.33, 0.1),
    rows: Sequence[int] = (1,),
    *,
    bits: int | None = None,
    group: int | None = None,
    repeats: int = 40,
    layers: int | None = None,
    seed: int = 0,
    bandwidth_bytes: int = 128 * MIB,
    progress: Callable[[int, int], None] | None = None,
) -> MlpResult:
    """Time one MLP on x [rows, d] under each plan and density, beside torch's dense MLP.

    Every timed call of a case follows a timed dense call, each on the next one of `layers` random
    MLPs (by default as many as make 1.2 GB and four last-level caches), so that weights always come
    from memory. Each round samples the read bandwidth. Each case's last result is checked against
    `reference` in float64 before its row is made. Medians are over `repeats` calls.

    plans: "given", "gate", "product"; "shadow-b" (b = 1..4 bits) for qRIDA's operator with the
    top k, "shadow-eps-b" with a threshold and "scores-b" for its shadow pass alone;
    "dense-neuron-major" for torch's dense MLP on the layout that a patched model keeps. bits,
    group: let the operators read packed rows; the dense MLP stays plain. progress: called with
    (rounds done, rounds in all).

    Raises ConfigurationError for unknown names, impossible numbers and too little memory,
    BenchmarkError for a wrong result.
    """
    size, wanted = check_request(size, dtype, plans, densities, rows, repeats, layers)
    machine = Machine.look()
    fmt = None if bits is None else Format(bits, 64 if group is None else group)
    one = size.matrices * size.d * size.f * dtype.itemsize
    read = one if fmt is None else size.matrices * size.f * fmt.row_bytes(size.d)
    count = layers or _layer_count(read, max(WORKING_SET, 4 * machine.cache_bytes), len(wanted))
    # Beside the rotation: W_down twice, and what preparing and checking a case widens.
    extra = size.d * size.f * (count * dtype.itemsize + 12) + 4 * bandwidth_bytes
    require_memory(
        count * (one + (0 if fmt is None else read)) + extra, f"{count} MLPs of {size.name}"
    )
    filler = Filler(dtype, seed)
    mlps = [mlp_layer(size, filler, fmt) for _ in range(count)]
    bandwidth = Bandwidth(bandwidth_bytes)
    timings = []
    rounds = 0
    with torch.inference_mode():
        for n in rows:
            x = filler.draw(n, size.d, deviation=1.0)
            dense = TorchDense(mlps, x, 1.0, seed)
            timing = _Timing([dense, *(kind(mlps, x, density, seed) for kind, density in wanted)])
            with _no_garbage_collection():
                for repeat in range(-1, repeats):  # the first round warms up
                    bandwidth.sample()
                    timing.round(warm_up=repeat < 0)
                    rounds += 1
                    if progress is not None:
                        progress(rounds, (repeats + 1) * len(rows))
            timings.append(timing)
        found = [
            make_row(
                name="mlp",
                device=machine.label,
                dtype=dtype_name(dtype, fmt, case),
                geometry=size.name,
                method=case.operator,
                plan=case.plan,
                rows=case.x.shape[0],
                density=case.density,
                microseconds=timing.microseconds[i],
                dense_microseconds=timing.microseconds[0],
                bytes=case.bytes,
                bandwidth_gbps=bandwidth.gbps,
                dense_impl=DENSE_IMPL,
                max_rel_err=timing.error(i),
            )
            for timing in timings
            for i, case in enumerate(timing.cases)
        ]
    return MlpResult(found, machine, bandwidth.by_reader, count, machine.warnings())


def dtype_name(dtype: torch.dtype, fmt: Format | None, case: Case) -> str:
    """What a row calls the weights that a case reads."""
    plain = fmt is None or isinstance(case, TorchDense)
    return str(dtype).removeprefix("torch.") if plain else str(fmt)


def check_request(
    size: Geometry | str,
    dtype: torch.dtype,
    plans: Sequence[str],
    densities: Sequence[float],
    rows: Sequence[int],
    repeats: int,
    layers: int | None,
) -> tuple[Geometry, list[tuple[type[Case], float]]]:
    """The geometry, and what to time beside the baseline; ConfigurationError for nonsense."""
    wanted = _cases(plans, densities)
    for value in (*rows, repeats, *(() if layers is None else (layers,))):
        check_count("rows, repeats or layers", value)
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype is {dtype}; expected float32, float16 or bfloat16")
    return geometry(size) if isinstance(size, str) else size, wanted


class _Timing:
    """The times, in microseconds, of cases[0], the baseline, and of the others."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases
        self.microseconds: list[list[float]] = [[] for _ in cases]
        self._last: dict[int, tuple[int, Tensor]] = {}
        self._step = 0

    def round(self, warm_up: bool) -> None:
        """Each case once, and the baseline before each."""
        for i in range(1, len(self.cases)):
            self._time(0, warm_up)
            self._time(i, warm_up)
        if len(self.cases) == 1:
            self._time(0, warm_up)

    def _time(self, i: int, warm_up: bool) -> None:
        k = self._step % len(self.cases[i].layers)
        self._step += 1
        call = self.cases[i].call
        start = time.perf_counter_ns()
        out = call(k)
        elapsed = (time.perf_counter_ns() - start) / 1e3
        self._last[i] = k, out
        if not warm_up:
            self.microseconds[i].append(elapsed)

    def error(self, i: int) -> float:
        """The relative error of case i's last timed result; BenchmarkError where it is wrong."""
        k, out = self._last[i]
        return self.cases[i].verify(k, out)


def _cases(plans: Sequence[str], densities: Sequence[float]) -> list[tuple[type[Case], float]]:
    """What to time beside the baseline, which always runs."""
    for density in densities:
        check_density(density)
    found: list[tuple[type[Case], float]] = []
    for kind in map(find_plan, plans):
        if takes_density(kind):
            found += [(kind, density) for density in densities]
        elif kind is not TorchDense:
            found.append((kind, 1.0))
    return found


def _layer_count(bytes_of_one: int, working_set: int, cases: int) -> int:
    """Enough MLPs for the working set, in a number with which every case meets every MLP."""
    count = max(3, -(-working_set // bytes_of_one))
    while math.gcd(count, 2 * max(1, cases)) > 1:
        count += 1
    return count


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
