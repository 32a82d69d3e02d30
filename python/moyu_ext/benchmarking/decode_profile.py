"""`moyu bench decode --profile`: where a generated token's time goes, part by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..methods.base import Method, check_count
from ..models.families import find_mlps
from ..models.packed import pack
from ..patching.patch import decode_step_of, patch, report, unpatch
from .at_density import MakeMethod
from .geometries import Geometry, geometry
from .machine import MIB, Bandwidth, Machine
from .probes import clock
from .random_model import random_model

_SAMPLES = 4  # of the read bandwidth before each method


@dataclass(frozen=True)
class Part:
    """One part of a token: milliseconds measured, bytes that it has to read."""

    name: str
    ms: float
    bytes: int = 0

    def bound(self, gbps: float) -> float:
        """Milliseconds that its bytes take at the memory's bandwidth."""
        return self.bytes / gbps / 1e6


@dataclass(frozen=True)
class DecodeProfile:
    """A method's token: parts, and the whole as generate takes it, in milliseconds."""

    method: str
    density: float
    parts: list[Part]
    token_ms: float

    @property
    def outside_ms(self) -> float:
        """What is neither a product with weights nor attention."""
        return sum(part.ms for part in self.parts if not part.bytes)


@dataclass(frozen=True)
class ProfileResult:
    """Profiles of one model; gbps: the memory's bandwidth in the same run."""

    title: str
    profiles: list[DecodeProfile]
    machine: Machine
    bandwidth_by_reader: dict[str, float]
    warnings: list[str]

    @property
    def gbps(self) -> float:
        """Of the fastest reader."""
        return max(self.bandwidth_by_reader.values())

    def as_dict(self) -> dict[str, Any]:
        """Everything, in what JSON knows."""
        profiles = [
            asdict(profile) | {"outside_ms": profile.outside_ms} for profile in self.profiles
        ]
        return {
            "title": self.title,
            "machine": asdict(self.machine),
            "bandwidth_by_reader": self.bandwidth_by_reader,
            "profiles": profiles,
        }


def profile_decode(
    size: Geometry | str,
    methods: Sequence[Method | MakeMethod],
    dtype: torch.dtype = torch.bfloat16,
    *,
    bits: int | Mapping[str, int] | None = None,
    group: int | None = None,
    layers: int | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> ProfileResult:
    """Profile greedy generation of one sequence by a random model, packed to `bits`, under methods.

    Raises ConfigurationError for bad numbers or too little memory, and where the compiled decode
    step does not take the model, with the reason.
    """
    size = geometry(size) if isinstance(size, str) else size
    check_count("new_tokens", new_tokens)
    check_count("prompt_tokens", prompt_tokens)
    machine = Machine.look()
    model = random_model(
        size, dtype, layers=layers, positions=prompt_tokens + new_tokens + 8, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, size.vocabulary, (1, prompt_tokens), generator=generator)
    made = [m if isinstance(m, Method) else m(model) for m in methods]
    if bits is not None:
        pack(model, bits, group, progress=False)
    bandwidth, found = Bandwidth(128 * MIB), []
    for done, method in enumerate(made):
        if progress is not None:
            progress(done, len(made), method.name)
        for _ in range(_SAMPLES):
            bandwidth.sample()
        patch(model, method)
        try:
            found.append(profile_model(model, ids, new_tokens, repr(method)))
        finally:
            unpatch(model)
    what = str(dtype).removeprefix("torch.") if bits is None else f"{bits} bits"
    return ProfileResult(
        f"{size.name}{f', {layers} layers' if layers else ''}, {what}",
        found, machine, bandwidth.by_reader, machine.warnings(),
    )  # fmt: skip


@torch.inference_mode()
def profile_model(model: Any, ids: Tensor, new_tokens: int, label: str) -> DecodeProfile:
    """Profile greedy generation behind ids [1, n] by a patched model.

    ConfigurationError where no compiled decode step runs it.
    """
    step = decode_step_of(model)

    def generate(count: int) -> float:
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - start

    generate(4)
    report(model, reset=True)
    with clock([(model, model)]) as model_once:
        once = generate(1)
    head = model.get_output_embeddings()
    step.timed()
    with clock([(model, model)]) as in_model, clock([(head, head)]) as in_head:
        whole = generate(new_tokens + 1)
    python, spent = step.timed()
    used = report(model)
    if used.step.left or used.step.tokens != new_tokens:
        raise ConfigurationError(f"not every token took the compiled decode step: {used.step}")
    forwards, heads = sum(in_model[1:]), sum(in_head[1:])
    # The first forward and what generate does once are no part of a token.
    own = (whole - sum(in_model)) - (once - sum(model_once))
    in_step = sum(spent[:4])
    mlps = sum(site.weights().nbytes * layer.share
               for site, layer in zip(find_mlps(model), used.layers, strict=True))  # fmt: skip
    attention = [spec.attention for spec in step.stack.layers]
    tokens = ids.shape[1] + new_tokens / 2
    kept = sum(2 * a.kv_heads * a.head_dim * step.stack.dtype.itemsize for a in attention)
    times = [
        ("q, k, v", spent[0], sum(p.weight.nbytes for a in attention for p in (a.q, a.k, a.v))),
        (f"attention over {tokens:.0f} tokens", spent[1], round(kept * tokens)),
        ("o", spent[2], sum(a.o.weight.nbytes for a in attention)),
        ("MLPs", spent[3], round(mlps)),
        ("head", heads, head.weight.nbytes),
        ("norms, residuals", spent[4] - in_step, 0),
        ("the step in Python", python - spent[4], 0),
        ("the model around it", forwards - python - heads, 0),
        ("generate", own, 0),
    ]
    parts = [Part(name, 1e3 * seconds / new_tokens, read) for name, seconds, read in times]
    token = sum(part.ms for part in parts)
    return DecodeProfile(label, used.density, parts, token)
