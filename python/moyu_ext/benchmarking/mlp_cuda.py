"""`moyu bench mlp --device cuda`: the same cases on a GPU, each in a CUDA graph, in turn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError
from ..packing.rows import Format
from ..reference import ACTIVATIONS
from .cases import Case, TorchDense, takes_density
from .geometries import Geometry
from .input_mask import InputMask, why_not
from .int4_peer import TorchInt4
from .machine import Machine
from .mlp import MlpResult, check_request, dtype_name
from .rows import Row, make_row, quantile
from .weights import Filler, MlpLayer, mlp_layer

COPY_BYTES = 1 << 30
_DENSE = ("torch eager", "torch CUDA graph", "torch.compile CUDA graph")


def require_gpu() -> torch.device:
    """The current GPU; ConfigurationError where there is none."""
    if not torch.cuda.is_available():
        raise ConfigurationError(
            f"device is 'cuda', but torch {torch.__version__} finds no CUDA device; run on a "
            "machine with an NVIDIA GPU and a CUDA build of torch, or use device cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


def capture(work: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """A replay of work's launches as one CUDA graph, and the tensors that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and loads what it needs
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    return graph.replay, out


def microseconds(work: Callable[[], object]) -> float:
    """The GPU's time for work, between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


class _Timed:
    """A case that runs all layers at once; its times per layer, in microseconds."""

    def __init__(self, case: Case, method: str, in_graph: bool) -> None:
        self.case = case
        self.method = method
        self.times: list[float] = []
        self._count = len(case.layers)
        if in_graph:
            self._work, self._outs = capture(self._run)
        else:
            self._work, self._outs = self._eager, self._run()

    def _run(self) -> list[Tensor]:
        return [self.case.call(k) for k in range(self._count)]

    def _eager(self) -> None:
        self._outs = self._run()

    def verify(self) -> float:
        """The error of the last layer's result after a replay of its own."""
        k = self._count - 1
        self._outs[k].fill_(math.nan)  # what a replay must write again
        self._work()
        return self.case.verify(k, self._outs[k])

    def time(self, keep: bool) -> None:
        took = microseconds(self._work) / self._count
        if keep:
            self.times.append(took)


class _Compiled(TorchDense):
    """torch's dense MLP as torch.compile makes it."""

    def prepare(self, generator: torch.Generator) -> None:
        """See `Case`."""
        super().prepare(generator)
        self._mlp = torch.compile(_dense, dynamic=False)

    def call(self, k: int) -> Tensor:
        """See `Case`."""
        w = self.layers[k].plain
        biases = (w.gate_bias, w.up_bias, w.down_bias)
        out: Tensor = self._mlp(self.x, w.gate, w.up, self.downs[k], *biases, w.activation)
        return out


def _dense(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    act = ACTIVATIONS[activation]
    h = F.linear(x, up, up_bias)
    a = act(h) if gate is None else act(F.linear(x, gate, gate_bias)) * h
    return F.linear(a, down, down_bias)


def measure_mlp_cuda(
    size: Geometry | str = "llama-2-7b",
    dtype: torch.dtype = torch.float16,
    plans: Sequence[str] = ("given",),
    densities: Sequence[float] = (1.0, 0.5, 0.33, 0.1),
    rows: Sequence[int] = (1,),
    *,
    bits: int | None = None,
    group: int | None = None,
    repeats: int = 200,
    layers: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> MlpResult:
    """`measure_mlp` on the current GPU, with times per MLP between CUDA events.

    A call runs the MLPs of all layers, whose weights together exceed the L2 four times also at the
    smallest density, so that nothing is found in it. Baselines: torch's linear eager, in a CUDA
    graph, and under torch.compile in a CUDA graph; speedup_vs_dense is against the fastest of them,
    which dense_impl names. The input-masking peer (plan input-mask) runs at the same densities
    wherever it can: Triton, one row, gated, SiLU. bits, group: let the operators read packed rows,
    of 4 or 8 bits; in bfloat16 torch's own 4-bit product is measured beside them. bandwidth_gbps
    counts what a copy reads and writes.

    Raises ConfigurationError as `measure_mlp` does and without a GPU, BenchmarkError for a wrong
    result.
    """
    size, cases = check_request(size, dtype, plans, densities, rows, repeats, layers)
    device = require_gpu()
    fmt = None if bits is None else Format(bits, 64 if group is None else group)
    machine = dataclasses.replace(Machine.look(), device=_device_name(device))
    warnings = machine.warnings()
    reason = why_not() if fmt is None else "it has no packed weights"
    if reason is not None:
        warnings.append(f"the input-masking peer is left out: {reason}")
    one = (
        size.matrices * size.f * (size.d * dtype.itemsize if fmt is None else fmt.row_bytes(size.d))
    )
    touched = one * max(0.02, min((density for _, density in cases), default=1.0))
    count = layers or min(
        16 if fmt is None else 48, max(4, math.ceil(4 * _l2_bytes(device) / touched))
    )
    filler = Filler(dtype, seed, device)
    mlps = [mlp_layer(size, filler, fmt) for _ in range(count)]
    copies = [torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    copy_times: list[float] = []
    found: list[Row] = []
    with torch.inference_mode():
        for turn, n in enumerate(rows):
            x = filler.draw(n, size.d, deviation=1.0)
            timed = _prepare(mlps, x, cases, seed, with_peer=reason is None, size=size)
            errors = [t.verify() for t in timed]
            for repeat in range(-1, repeats):  # the first round warms up
                for t in timed:
                    t.time(keep=repeat >= 0)
                if repeat < 0 or repeat % 8 == 0:
                    copy_times.append(microseconds(lambda: copies[1].copy_(copies[0])))
                if progress is not None:
                    progress(turn * (repeats + 1) + repeat + 2, len(rows) * (repeats + 1))
            gbps = 2 * COPY_BYTES / quantile(copy_times[1:] or copy_times, 0.5) / 1e3
            best = min(timed[: len(_DENSE)], key=lambda t: quantile(t.times, 0.5))
            found += [
                make_row(
                    name="mlp",
                    device=machine.device,
                    dtype=dtype_name(dtype, fmt, t.case),
                    geometry=size.name,
                    method=t.method,
                    plan=t.case.plan,
                    rows=n,
                    density=t.case.density,
                    microseconds=t.times,
                    dense_microseconds=best.times,
                    bytes=t.case.bytes,
                    bandwidth_gbps=gbps,
                    dense_impl=best.method,
                    max_rel_err=error,
                )
                for t, error in zip(timed, errors, strict=True)
            ]
    return MlpResult(found, machine, {"copy, read and written": gbps}, count, warnings)


def _prepare(
    mlps: list[MlpLayer],
    x: Tensor,
    cases: Sequence[tuple[type[Case], float]],
    seed: int,
    *,
    with_peer: bool,
    size: Geometry,
) -> list[_Timed]:
    """The three dense ones, then the cases, then the peer at the same densities."""
    dense = TorchDense(mlps, x, 1.0, seed)
    timed = [
        _Timed(dense, _DENSE[0], in_graph=False),
        _Timed(dense, _DENSE[1], in_graph=True),
        _Timed(_Compiled(mlps, x, 1.0, seed), _DENSE[2], in_graph=True),
    ]
    made = [kind(mlps, x, density, seed) for kind, density in cases]
    if mlps[0].weights.packed is not None and x.dtype == torch.bfloat16 and not size.biased:
        made.append(TorchInt4(mlps, x, 1.0, seed))
    if with_peer and x.shape[0] == 1 and size.gated and size.activation == "silu":
        densities = dict.fromkeys(density for kind, density in cases if takes_density(kind))
        made += [InputMask(mlps, x, density, seed) for density in densities]
    return timed + [_Timed(case, case.operator, in_graph=True) for case in made]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
