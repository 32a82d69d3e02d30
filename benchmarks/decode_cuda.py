"""Whole-model generation on a GPU: Hugging Face dense beside a patched model, in one run.

All hold the same random weights, all run in the same mode: `static` is generate() with a static
cache, which compiles the decode step into CUDA graphs; `deferred` is the same where generate()
asks one token later whether to stop, as it does on Apple's GPUs, so that the host need not wait;
`loop` is the step without generate(), greedy tokens fed back on the GPU; `dynamic` is generate(),
eager. Runs alternate.
Before a row is written, the patched model's logits are compared with those of the same rule in
plain PyTorch (moyu_ext.scoring); and where tokens choose their neurons, so that one rounding
changes a set and with it the text, every MLP's output in an eager decode step with the reference.

    python benchmarks/decode_cuda.py --method stda --density 0.3288 --csv benchmarks/results/x.csv

With --profile it runs a few decode steps for a profiler instead: only these are recorded
(cudaProfilerStart/Stop), and every patched MLP is a range "method, layer". With --kernels it prints
the time of each kernel in the generated tokens, by torch.profiler, and no row.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moyu_ext.benchmarking import check_csv, geometry, method_at, write_csv
from moyu_ext.benchmarking.decode import PROJECTIONS, mlp_errors, packed_copy
from moyu_ext.benchmarking.geometries import Geometry
from moyu_ext.benchmarking.random_model import random_model, weight_bytes
from moyu_ext.benchmarking.rows import BenchmarkError, Row, make_row, quantile
from moyu_ext.methods.base import Method, TokenRule
from moyu_ext.models.cache import cache_of, passing
from moyu_ext.models.families import find_mlps
from moyu_ext.models.weights import read_share
from moyu_ext.patching.patch import is_patched
from moyu_ext.patching.sparse_mlp import SparseMLP
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity
from transformers import PreTrainedModel, StaticCache
from transformers.generation.utils import DeferredStopCheck

import moyu_ext

MODES = ("static", "deferred", "loop", "dynamic")
ALLOWED = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest logit


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", default="llama-2-7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a try")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument(
        "--method", default="stda", help="stda, srida, qrida, tda, tda-gate or dense"
    )
    parser.add_argument("--density", type=float, default=0.3288)
    parser.add_argument(
        "--bits", type=int, choices=[4, 8], help="measure the method on packed weights, too"
    )
    parser.add_argument("--group", type=int, default=64, choices=[32, 64])
    parser.add_argument("--mode", default="static", choices=MODES)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=1024, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument(
        "--projections", action="store_true", help="also with patch(..., projections=True)"
    )
    parser.add_argument(
        "--lock", type=Path, help="of several runs with this file, one at a time is measured"
    )
    parser.add_argument("--profile", action="store_true", help="run for nsys; nothing is measured")
    parser.add_argument("--kernels", action="store_true", help="print the kernels' times, no rows")
    return parser.parse_args()


@contextmanager
def deferred_stop_check() -> Iterator[None]:
    """transformers' stop check that does not wait for the device, which it uses on "mps" only."""
    right = DeferredStopCheck.is_supported

    def supported(device: torch.device, *args: Any, **kwargs: Any) -> bool:
        return bool(right(torch.device("mps"), *args, **kwargs))

    DeferredStopCheck.is_supported = staticmethod(supported)
    try:
        yield
    finally:
        DeferredStopCheck.is_supported = staticmethod(right)


@dataclass
class Generator:
    """Greedy generation of `new` tokens behind ids [1, n], always of the same lengths."""

    model: PreTrainedModel
    ids: Tensor
    new: int
    mode: str
    cache: StaticCache | None = None  # of `loop`: kept, since its graphs read it where it is
    step: Callable[[Tensor], Tensor] | None = None

    def run(self) -> None:
        """Generate, for the time that it takes."""
        if self.mode == "loop":
            self._loop(lambda logits: None)
        else:
            self._generate()

    def logits(self) -> tuple[Tensor, Tensor]:
        """The whole text [1, n + new], and the logits of the new tokens [1, new, vocabulary]."""
        if self.mode == "loop":
            kept: list[Tensor] = []
            text = self._loop(lambda logits: kept.append(logits.clone()))
        else:
            out = self._generate(return_dict_in_generate=True, output_logits=True)
            text, kept = out.sequences, out.logits
        return text, torch.stack(tuple(kept), 1)

    def _generate(self, **kwargs: Any) -> Any:
        if self.mode in ("static", "deferred"):
            kwargs["cache_implementation"] = "static"
        with deferred_stop_check() if self.mode == "deferred" else nullcontext():
            return self.model.generate(
                self.ids,
                max_new_tokens=self.new,
                min_new_tokens=self.new,
                do_sample=False,
                **kwargs,
            )

    @torch.inference_mode(False)  # a compiled step must not meet inference tensors in one call only
    @torch.no_grad()
    def _loop(self, look: Callable[[Tensor], None]) -> Tensor:
        model = self.model
        if self.cache is None:
            self.cache = StaticCache(model.config, max_cache_len=self.ids.shape[1] + self.new)
            past = passing(model, self.cache)
            self.step = torch.compile(
                lambda token: model(input_ids=token, use_cache=True, **past).logits[:, -1],
                mode="reduce-overhead",
            )
        assert self.step is not None
        self.cache.reset()
        logits = model(
            input_ids=self.ids, use_cache=True, logits_to_keep=1, **passing(model, self.cache)
        ).logits[:, -1]
        text = [self.ids]
        while True:
            look(logits)
            text.append(logits.argmax(-1, keepdim=True))
            if len(text) > self.new:
                return torch.cat(text, 1)
            torch.compiler.cudagraph_mark_step_begin()
            logits = self.step(text[-1])


def seconds(device: torch.device, work: Callable[[], Any]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def checked_error(generator: Generator) -> float:
    """The largest error relative to the largest element; BenchmarkError where it is too large.

    Of generation's logits against the rule's in plain PyTorch; for a rule of tokens, of an MLP.
    """
    model, prompt = generator.model, generator.ids.shape[1]
    patched = is_patched(model)
    sites = find_mlps(model)
    if patched and isinstance(sites[0].entry.rule, TokenRule):
        with torch.inference_mode():
            return mlp_errors(model, sites, generator.ids, "patched")[1]
    text, logits = generator.logits()
    got = logits.double()
    reference = moyu_ext.scoring(model, prompt) if patched else nullcontext()
    with torch.inference_mode(), reference:  # a packed model's prompts go by torch's matmul
        right = model(input_ids=text, use_cache=False).logits
    want = right[:, prompt - 1 : -1].double()
    # The first token comes from the prompt's dense pass, on both sides.
    error = float((got - want).abs().max() / want.abs().max())
    if not error <= ALLOWED[model.dtype]:
        raise BenchmarkError(f"relative error of the logits {error:.2e}: no row is written")
    return error


def copy_gbps(device: torch.device) -> float:
    """Bytes read plus bytes written per second of a device-to-device copy."""
    size = 1 << 30 if device.type == "cuda" else 1 << 26
    a, b = (torch.full((size,), i, dtype=torch.uint8, device=device) for i in range(2))
    times = [seconds(device, lambda: b.copy_(a)) for _ in range(12)]
    return 2 * size / quantile(times[2:], 0.5) / 1e9


@contextmanager
def lock(file: Path | None) -> Iterator[Callable[[], None]]:
    """Several runs prepare at once; one that calls what it gets here goes on when no other prepares
    or measures, until the end of the block."""
    if file is None:
        yield lambda: None
        return
    with file.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_SH)
        yield lambda: fcntl.flock(opened, fcntl.LOCK_EX)


def patched_twin(dense: PreTrainedModel, method: Method, projections: bool) -> PreTrainedModel:
    """A patched copy; all weights are shared but W_down, which has another layout."""
    own = {id(site.linear(site.family.down).weight) for site in find_mlps(dense)}
    shared = {id(p): p for p in dense.parameters() if id(p) not in own}
    return moyu_ext.patch(
        copy.deepcopy(dense, shared), method, projections=projections, decode_step=False
    )


def packed_sides(args: argparse.Namespace, dense: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The model with packed weights, and with the method on top of them."""
    sides = {}
    for name in dict.fromkeys(("dense", args.method)):
        packed = packed_copy(dense, args.bits, args.group)
        if name != "dense":
            method = method_at(name, args.density, args.prompt)(packed)
            moyu_ext.patch(packed, method)
        sides[f"{name}, {args.bits} bits"] = packed
    return sides


def measure(
    args: argparse.Namespace,
    dense: PreTrainedModel,
    models: dict[str, PreTrainedModel],
    wait: Callable[[], None],
) -> list[Row]:
    """Rows of the dense model and of the patched ones; `wait` comes before the first time."""
    size, device = geometry(args.geometry), dense.device
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(3, size.vocabulary, (1, args.prompt), generator=g).to(device)
    sides = {
        name: Generator(model, ids, args.new, args.mode)
        for name, model in {"dense": dense, **models}.items()
    }
    errors = {"dense": 0.0}
    times: dict[str, list[float]] = {name: [] for name in sides}
    bandwidth = []
    for name, model in models.items():
        errors[name] = checked_error(sides[name])
        if is_patched(model):
            moyu_ext.report(model, reset=True)
    for turn in range(args.rounds + 1):  # the first one compiles and captures
        if turn == 1:
            wait()
        for name, side in sides.items():
            took = seconds(device, side.run)
            if turn:
                times[name].append(took * 1e6)
        if turn:
            bandwidth.append(copy_gbps(device))
    if skipped := counters["inductor"]["cudagraph_skips"]:
        raise BenchmarkError(
            f"{skipped} compiled graphs ran without a CUDA graph: no row is written"
        )
    rows = []
    for name, side in sides.items():
        plan, density, read = bytes_read(side.model, size)
        rows.append(
            make_row(
                name=f"generate-{args.prompt}+{args.new}-{args.mode}",
                device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                dtype=args.dtype,
                geometry=args.geometry + (f"/{args.layers}" if args.layers else ""),
                method=name,
                plan=plan,
                rows=1,
                density=density,
                microseconds=times[name],
                dense_microseconds=times["dense"],
                bytes=read * args.new,
                bandwidth_gbps=quantile(bandwidth, 0.5),
                dense_impl=f"transformers {args.mode}",
                max_rel_err=errors[name],
            )
        )
    return rows


def bytes_read(model: PreTrainedModel, size: Geometry) -> tuple[str, float, int]:
    """(plan, density, bytes of weights that a decode step must read)."""
    read = weight_bytes(model)
    if not size.tied:  # of the embedding a token reads one row
        read -= model.get_input_embeddings().weight.nbytes
    if not is_patched(model):
        return "dense", 1.0, read
    plan = getattr(model, "_moyu_patch").method.plan  # noqa: B009
    used = moyu_ext.report(model)
    matrices = 3 if size.gated else 2
    skipped = 1 - read_share(plan, used.density, matrices)
    read -= round(skipped * sum(site.weights().nbytes for site in find_mlps(model)))
    return plan, used.density, read + used.added_bytes


@contextmanager
def named_layers(model: nn.Module, method: str) -> Iterator[None]:
    """A range around every patched MLP: "stda layer 7"."""
    handles = []

    def end(*_: Any) -> None:
        torch.cuda.nvtx.range_pop()

    for module in model.modules():
        if not isinstance(module, SparseMLP):
            continue

        def begin(*_: Any, name: str = f"{method} layer {module.site.index}") -> None:
            torch.cuda.nvtx.range_push(name)

        handles.append(module.register_forward_pre_hook(begin))
        handles.append(module.register_forward_hook(end))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def print_kernels(args: argparse.Namespace, models: dict[str, PreTrainedModel]) -> None:
    size = geometry(args.geometry)
    for name, model in models.items():
        ids = torch.randint(3, size.vocabulary, (1, args.prompt)).to(model.device)
        side = Generator(model, ids, args.new, args.mode)
        side.run()
        plain = seconds(model.device, side.run)
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
            side.run()
        kernels = [e for e in p.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(e.self_device_time_total for e in kernels)
        print(f"{name}: {plain * 1e6:.0f} us without the profiler, {busy:.0f} us in kernels")
        for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:16]:
            each = e.self_device_time_total / e.count
            print(f"{e.self_device_time_total:10.0f} {e.count:6d} {each:9.2f}  {e.key[:100]}")


def profile(args: argparse.Namespace, model: PreTrainedModel) -> None:
    size = geometry(args.geometry)
    ids = torch.randint(3, size.vocabulary, (1, args.prompt)).to(model.device)
    Generator(model, ids, 4, args.mode).run()  # loads, allocates, compiles
    with named_layers(model, args.method), torch.inference_mode():
        out = model(input_ids=ids, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        for step in range(2 + args.new):
            if step == 2:  # the first decode step chooses the set
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            torch.cuda.nvtx.range_push(f"token {step}")
            past = passing(model, cache_of(out))
            out = model(input_ids=token, use_cache=True, **past)
            token = out.logits[:, -1:].argmax(-1)
            torch.cuda.nvtx.range_pop()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main() -> None:
    args = arguments()
    if args.csv:
        check_csv(args.csv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("decode_cuda: no CUDA device, or a CPU-only torch; nothing is measured")
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    with lock(args.lock) as wait:
        dense = random_model(
            geometry(args.geometry), dtype, layers=args.layers,
            positions=args.prompt + args.new + 8, device=args.device,
        )  # fmt: skip
        method = method_at(args.method, args.density, args.prompt)(dense)
        if args.profile:
            profile(args, moyu_ext.patch(dense, method, projections=args.projections))
            return
        models = {args.method: patched_twin(dense, method, projections=False)}
        if args.projections:
            models[args.method + PROJECTIONS] = patched_twin(dense, method, projections=True)
        if args.bits:
            models = packed_sides(args, dense)
        if args.kernels:
            print_kernels(args, {"dense": dense, **models})
            return
        rows = measure(args, dense, models, wait)
        for row in rows:
            print(row)
        if args.csv:
            write_csv(args.csv, rows)


if __name__ == "__main__":
    main()
