"""`moyu bench decode`: a whole model's tokens, unpatched and patched in turn in one run."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.base import Method, check_count
from ..models.cache import cache_of, passing
from ..models.families import MlpSite, down_projections, find_mlps
from ..models.packed import plan
from ..packing.layer import PackedLinear
from ..patching.patch import patch, report, unpatch
from .at_density import MakeMethod
from .check import verify, verify_linear, verify_step
from .geometries import Geometry, geometry
from .llama_cpp import TYPES, LlamaBench
from .machine import MIB, Bandwidth, Machine, MemoryWatch
from .probes import Seen, mlp_clock, products, recorded
from .random_model import random_model, weight_bytes
from .rows import Row, make_row, quantile

DENSE_IMPL = "transformers eager"
PROJECTIONS = "+projections"  # behind a method's name, in rows and tables
ROWS = ("decode", "decode-mlp", "prefill")  # of each side: a step, its MLPs alone, the prompt
_SAMPLES = 4  # of the read bandwidth before each run
_CLOCKED = 2  # steps per run in which the MLPs are timed


@dataclass
class Side:
    """What was measured of the unpatched model (method None) or under one method.

    Times in microseconds: `prefill` per prompt, `step` per decoded token, `choose` the first step,
    in which a sequence-level method chooses the set, `mlp` of all MLPs in a decode step, and
    `clocked` of those steps. added_bytes: what the method reads beside the weights. prefill_error,
    error: relative errors of the MLPs' outputs. Of the call of `patch`: the greatest extra memory
    and what stays, in bytes (None where unknown), and seconds. projections: whether `patch` was
    told so too. packed: whether the weights are packed rows.
    """

    name: str
    plan: str
    method: Method | None
    projections: bool = False
    packed: bool = False
    density: float = 1.0
    added_bytes: int = 0
    prefill_error: float = float("nan")
    error: float = float("nan")
    prefill: list[float] = field(default_factory=list)
    choose: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    mlp: list[float] = field(default_factory=list)
    clocked: list[float] = field(default_factory=list)
    patch_peak_bytes: int | None = None
    patch_lasting_bytes: int | None = None
    patch_seconds: float = float("nan")

    @property
    def label(self) -> str:
        """The method's name, with what else tells it from other sides."""
        name = f"{self.name} {self.plan}" if self.plan in ("gate", "product") else self.name
        name = f"packed {name}" if self.packed else name
        return name + PROJECTIONS * self.projections

    @property
    def mlp_share(self) -> float:
        """The MLPs' part of a decode step's time."""
        return quantile(self.mlp, 0.5) / quantile(self.clocked, 0.5)


@dataclass(frozen=True)
class DecodeResult:
    """rows per side: a decode step, its MLPs alone, the prompt, and in the end llama.cpp's, one per
    type of weights; sides: the unpatched model first; GB/s by reader; bytes of the model and of one
    W_down; seconds to build the model; warnings."""

    rows: list[Row]
    machine: Machine
    sides: list[Side]
    bandwidth_by_reader: dict[str, float]
    model_bytes: int
    down_bytes: int
    build_seconds: float
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Everything, in what JSON knows."""
        sides = [
            {
                "method": side.name if side.method is None else repr(side.method),
                "projections": side.projections,
                "density": side.density,
                "first_step_us": quantile(side.choose, 0.5),
                "mlp_share": side.mlp_share,
                "patch_seconds": side.patch_seconds,
                "patch_peak_bytes": side.patch_peak_bytes,
                "patch_lasting_bytes": side.patch_lasting_bytes,
            }
            for side in self.sides
        ]
        return {
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "machine": dataclasses.asdict(self.machine),
            "bandwidth_by_reader": self.bandwidth_by_reader,
            "warnings": self.warnings,
            "model_bytes": self.model_bytes,
            "one_down_bytes": self.down_bytes,
            "build_seconds": self.build_seconds,
            "sides": sides,
        }


def measure_decode(
    size: Geometry | str = "llama-3.2-1b",
    methods: Sequence[Method | MakeMethod] = (),
    dtype: torch.dtype = torch.bfloat16,
    *,
    projections: bool = False,
    bits: int | Mapping[str, int] | None = None,
    group: int | None = None,
    llama_bench: Path | None = None,
    layers: int | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 12,
    rounds: int = 3,
    seed: int = 0,
    bandwidth_bytes: int = 128 * MIB,
    progress: Callable[[int, int, str], None] | None = None,
) -> DecodeResult:
    """Time the prompt and each new token of a random model, plain Hugging Face beside each method.

    One round: the unpatched model, then for each method patch, run, unpatch. A run is a prompt of
    `prompt_tokens`, one step that is not counted, and `new_tokens` timed steps, for one sequence,
    greedy. In the first round every MLP's outputs, in the prompt and in a decode step, are checked
    against `reference` in float64 on the set in force, and so are the linear layers beside them.
    methods: or what makes one from the model (see `method_at`). projections: measure each method
    also with `patch(..., projections=True)`. bits, group: measure the methods on a packed copy of
    the model (`moyu_ext.pack`), and that copy unpatched. llama_bench: llama.cpp's program, which
    decodes as many tokens in each round, from files of the same geometry in BF16, Q8_0 and Q4_0.
    progress(done, total, what) is called before each run.

    Raises ConfigurationError for bad numbers or too little memory, BenchmarkError for a wrong
    result.
    """
    size = geometry(size) if isinstance(size, str) else size
    check_count("rounds", rounds)
    check_count("new_tokens", new_tokens)
    check_count("prompt_tokens", prompt_tokens)
    machine = Machine.look()
    start = time.perf_counter()
    # Positions for the steps that are not counted, too.
    positions = prompt_tokens + new_tokens + 8
    model = random_model(size, dtype, layers=layers, positions=positions, seed=seed)
    built = time.perf_counter() - start
    made = [m if isinstance(m, Method) else m(model) for m in methods]
    sides = [Side("unpatched", "dense", None)]
    if bits is not None:
        sides.append(Side("unpatched", "dense", None, packed=True))
    for more in (False, True)[: 1 + projections]:
        sides += [Side(m.name, m.plan, m, more, bits is not None) for m in made]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, size.vocabulary, (1, prompt_tokens), generator=generator)
    bandwidth = Bandwidth(bandwidth_bytes)
    runners = {False: _Runner(model, find_mlps(model), ids, new_tokens)}
    if bits is not None:
        packed = packed_copy(model, bits, group)
        runners[True] = _Runner(packed, find_mlps(packed), ids, new_tokens)
    with torch.inference_mode(), _llama(llama_bench, size, layers) as llama:
        model(input_ids=ids[:, :8], use_cache=False)  # torch's own set-up at a first call
        kinds = [] if llama is None else list(TYPES)
        total = rounds * (len(sides) + len(kinds))
        done = 0
        for r in range(rounds):
            for side in sides:
                if progress is not None:
                    progress(done, total, side.label)
                runner = runners[side.packed]
                with _patched(runner.model, side):
                    for _ in range(_SAMPLES):
                        bandwidth.sample()
                    runner.run(side)
                    if r == 0:
                        runner.check(side)
                done += 1
            for kind in kinds:
                if progress is not None:
                    progress(done, total, f"llama.cpp {kind}")
                llama.run(kind, new_tokens)  # type: ignore[union-attr]
                done += 1
    # The memory is as fast as the fastest stream of the run, whoever's it was.
    gbps = bandwidth.gbps
    for side in sides:
        read = runners[side.packed].bytes(side.plan, side.density) + side.added_bytes
        gbps = max(gbps, read / quantile(side.step, 0.5) / 1e3)
    for kind in kinds:
        gbps = max(gbps, llama.bytes(kind) / quantile(llama.times[kind], 0.5) / 1e3)  # type: ignore[union-attr]
    rows = []
    plain = str(dtype).removeprefix("torch.")
    shared: dict[str, Any] = {
        "device": machine.label,
        "geometry": size.name + (f" {layers} layers" if layers else ""),
        "bandwidth_gbps": gbps,
        "dense_impl": DENSE_IMPL,
    }
    for side in sides:
        runner = runners[side.packed]
        common = {
            **shared,
            "dtype": _format_name(bits, group) if side.packed else plain,
            "method": side.name + PROJECTIONS * side.projections,
        }
        for name, times, dense, read_by in (
            (ROWS[0], side.step, sides[0].step, runner.bytes),
            (ROWS[1], side.mlp, sides[0].mlp, runner.mlp_bytes),
        ):
            rows.append(
                make_row(
                    **common,
                    name=name,
                    plan=side.plan,
                    rows=1,
                    density=side.density,
                    microseconds=times,
                    dense_microseconds=dense,
                    bytes=read_by(side.plan, side.density) + side.added_bytes,
                    max_rel_err=side.error,
                )
            )
        rows.append(
            make_row(
                **common,
                name=ROWS[2],
                plan="dense",
                rows=prompt_tokens,
                density=1.0,
                microseconds=side.prefill,
                dense_microseconds=sides[0].prefill,
                bytes=runner.bytes("dense", 1.0),
                max_rel_err=side.prefill_error,
            )
        )
    for kind in kinds:
        assert llama is not None
        rows.append(
            make_row(
                **shared,
                dtype=kind,
                method="llama.cpp",
                name=ROWS[0],
                plan="dense",
                rows=1,
                density=1.0,
                microseconds=llama.times[kind],
                dense_microseconds=sides[0].step,
                bytes=llama.bytes(kind),
                max_rel_err=float("nan"),
            )
        )
    return DecodeResult(
        rows,
        machine,
        sides,
        bandwidth.by_reader,
        weight_bytes(model),
        size.d * size.f * dtype.itemsize,
        built,
        machine.warnings(),
    )


def packed_copy(
    model: nn.Module, bits: int | Mapping[str, int], group: int | None = None
) -> nn.Module:
    """A copy whose linear layers are packed; everything else is shared with the model."""
    formats, transposed = plan(model, bits, group), down_projections(model)
    memo: dict[int, Any] = {id(m): m for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, fmt in formats.items():
        layer: Any = model.get_submodule(name)
        memo[id(layer)] = PackedLinear.of(layer, fmt, transposed=name in transposed)
    return copy.deepcopy(model, memo)


def _format_name(bits: int | Mapping[str, int] | None, group: int | None) -> str:
    name = str(bits) if not isinstance(bits, Mapping) else ", ".join(map(str, bits.values()))
    return f"{name} bits in {64 if group is None else group}"


@contextmanager
def _llama(program: Path | None, size: Geometry, layers: int | None) -> Iterator[LlamaBench | None]:
    """llama.cpp with its files, which take as much of the disk as the model."""
    if program is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = LlamaBench(program, Path(folder), size, layers or size.layers or 1)
        bench.prepare()
        yield bench


@contextmanager
def _patched(model: nn.Module, side: Side) -> Iterator[None]:
    """The model under the side's method, and what patching cost; as it is where there is none."""
    if side.method is None:
        yield
        return
    start = time.perf_counter()
    with MemoryWatch() as memory:
        patch(model, side.method, projections=side.projections)
    side.patch_seconds = time.perf_counter() - start
    if memory.peak is not None and memory.lasting is not None:
        side.patch_peak_bytes = max(memory.peak, side.patch_peak_bytes or 0)
        side.patch_lasting_bytes = max(memory.lasting, side.patch_lasting_bytes or 0)
    try:
        yield
        used = report(model)
        side.density, side.added_bytes = used.density, used.added_bytes
    finally:
        unpatch(model)


def mlp_errors(
    model: nn.Module, sites: list[MlpSite], ids: Tensor, label: str
) -> tuple[float, float]:
    """The largest relative error of an MLP's output, in the prompt ids [1, n] and in a decode step;
    of the projections', too, where the patch took these. Raises BenchmarkError as `verify` does."""

    def worst(what: str, seen: list[Seen]) -> float:
        assert len(seen) == len(sites)
        return max(
            verify(f"{label}, {what}, {s.site.name}", s.out, s.x, s.site.weights(), s.active)
            for s in seen
        )

    with recorded(sites, governed=False) as prompt:
        token, cache = _forward(model, ids, None)
    token, cache = _forward(model, token, cache)
    with recorded(sites, governed=True) as step, products(model) as linears:
        _forward(model, token, cache)
    error = worst("decode step", step)
    for name, linear, x, out in linears:
        error = max(error, verify_linear(f"{label}, {name}", out, x, linear.weight, linear.bias))
    return worst("prompt", prompt), error


def _forward(model: nn.Module, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """The next tokens, greedily, and the cache."""
    out = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **passing(model, cache))
    return out.logits[:, -1].argmax(-1, keepdim=True), cache_of(out)


@dataclass(frozen=True)
class _Runner:
    """Runs one sequence through the model, whatever state that is in."""

    model: nn.Module
    sites: list[MlpSite]
    ids: Tensor
    new_tokens: int

    def run(self, side: Side) -> None:
        """A prompt and its decode steps; the times go to `side`."""
        elapsed, token, cache = self._forward(self.ids, None)
        side.prefill.append(elapsed)
        elapsed, token, cache = self._forward(token, cache)
        side.choose.append(elapsed)
        for _ in range(self.new_tokens):
            elapsed, token, cache = self._forward(token, cache)
            side.step.append(elapsed)
        for _ in range(_CLOCKED):  # not among the others: the clock's hooks cost time
            with mlp_clock(self.sites) as seconds:
                elapsed, token, cache = self._forward(token, cache)
            side.clocked.append(elapsed)
            side.mlp.append(sum(seconds) * 1e6)

    def check(self, side: Side) -> None:
        """The same once more, to compare what every MLP gives with the reference, and the compiled
        decode step with the layers' own forwards."""
        side.prefill_error, side.error = mlp_errors(self.model, self.sites, self.ids, side.label)
        # Where tokens choose their neurons one rounding changes a set, and with it what follows.
        if side.method is not None and side.method.level != "token":
            verify_step(side.label, *self._both_ways())

    def _both_ways(self) -> list[Tensor]:
        """Logits of a decode step, as it is measured and through the layers' own forwards."""
        found = []
        for around in (nullcontext, partial(mlp_clock, self.sites)):  # the step leaves out no hooks
            _, token, cache = self._forward(self.ids, None)
            with around():
                out = self.model(input_ids=token, use_cache=True, **passing(self.model, cache))
            found.append(out.logits)
        return found

    def _forward(self, tokens: Tensor, cache: Any) -> tuple[float, Tensor, Any]:
        start = time.perf_counter_ns()
        chosen, cache = _forward(self.model, tokens, cache)
        return (time.perf_counter_ns() - start) / 1e3, chosen, cache

    def bytes(self, plan: str, density: float) -> int:
        """Weights that a forward reads: all but a table of embeddings, and less of the MLPs."""
        total = weight_bytes(self.model)
        table = self.model.get_input_embeddings().weight  # type: ignore[operator]
        if table is not self.model.get_output_embeddings().weight:  # type: ignore[operator]
            total -= table.numel() * table.element_size()
        return total - self.mlp_bytes("dense", 1.0) + self.mlp_bytes(plan, density)

    def mlp_bytes(self, plan: str, density: float) -> int:
        """Those of them that are the MLPs'."""
        weights = [site.weights() for site in self.sites]
        return sum(round(w.share_read(plan, density) * w.nbytes) for w in weights)
