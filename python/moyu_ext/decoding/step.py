"""The decode step of a whole decoder in one call, and what has to hold for it."""

from __future__ import annotations

import operator
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.utils import output_capturing

from .. import ops
from .._load import _C
from ..methods.base import Compiled
from ..models.cache import NAMES, cache_of
from ..models.decoder import Arguments
from ..models.weights import MlpWeights
from ..packing.rows import format_of
from ..reference import ACTIVATIONS
from .places import first_places
from .room import NoRoom, check_cache, extend, make_room
from .stack import (
    AttentionSpec,
    LayerSpec,
    Norm,
    NotTaken,
    Probe,
    Projection,
    Rotations,
    Stack,
    differs,
)

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_NOTHING = (0, 0, 0, 0)
_EVERYTHING = (0, 0, 0)
_ATTENTION = "attention_mask"
# Arguments of a decoder's forward that the step understands.
_KNOWN = {"input_ids", _ATTENTION, "position_ids", "inputs_embeds", "use_cache", *NAMES}


class Governor(Protocol):
    """What the step asks of the patch's MLPs."""

    def plan(self, index: int) -> tuple[Compiled, MlpWeights, Tensor, Tensor] | None:
        """What layer `index` computes without Python, its weights, and its counters of active
        neurons and tokens; None where its MLP has to be called."""

    def module(self, index: int) -> Any:
        """The MLP of layer `index`, to be called."""

    def ready(self, rows: int) -> bool | None:
        """Whether the MLPs' plans may run in this forward of so many rows, False where the MLPs
        have to be called, None where the whole forward is no decode step."""

    def sets(self) -> tuple[list[tuple[int, int, int]], list[Tensor]] | None:
        """Addresses of each layer's indices, count and mask in this forward, and what keeps them
        alive; None: no sets."""


class DecodeStep:
    """Runs a decoder's decode steps. `forward` takes the place of the decoder's own.

    taken: tokens of the steps run; left: forwards that went the old way although they continued a
    cache with few tokens, by reason.
    """

    def __init__(self, stack: Stack, read: Callable[[], Stack], governor: Governor) -> None:
        self.stack = stack
        self.read = read
        self.governor = governor
        self.decoder = stack.decoder
        self.arguments = Arguments(stack.decoder)
        self.original = stack.decoder.forward
        self.taken = 0
        self.seconds = 0.0
        self.left: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._places: list[Any] = []
        self._sets: Any = None
        self._make_output: Callable[[Tensor, Any], Any] | None = None
        self._build()

    def timed(self) -> tuple[float, list[float]]:
        """Seconds of the steps since the last call: in all, and compiled: q, k, v; attention; o;
        MLPs; everything. Parts are counted from the first call on."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds, [nanoseconds / 1e9 for nanoseconds in self._compiled.spent()]

    def reset(self) -> None:
        """Count anew."""
        self.taken = 0
        self.left.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.original(*args, **kwargs)
        cache = self.arguments.cache(args, kwargs)
        if cache is None:
            return self.original(*args, **kwargs)
        batch, length = self.arguments.shape(args, kwargs)
        if batch * length > ops.MAX_ROWS:
            return self.original(*args, **kwargs)
        begun = time.perf_counter()
        try:
            out = self._step(args, kwargs, cache, batch, length)
            if out is not None:
                self.seconds += time.perf_counter() - begun
                return out
        except (NotTaken, NoRoom) as reason:
            self.left[str(reason)] += 1
        return self.original(*args, **kwargs)

    def _step(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any, batch: int, length: int
    ) -> Any:
        """None where there is no token in the cache yet."""
        rows = batch * length
        layers: list[Any] = cache.layers if isinstance(cache, Cache) else []
        if layers and not any(getattr(layer, "is_initialized", True) for layer in layers):
            return None
        self._check_call(args, kwargs)
        check_cache(cache, len(self.stack.layers))
        if not self._lock.acquire(blocking=False):
            raise NotTaken("another thread's step runs")
        try:
            if not self._watch.holds():
                self._rebuild()
            held = self._make_room(cache, batch, length)
            past = int(cache.get_seq_length())
            if past == 0:
                return None
            get = self.arguments.get
            ids, embeds = get("input_ids", args, kwargs), get("inputs_embeds", args, kwargs)
            x = self.stack.embed(ids, embeds)
            if x.dtype != self.stack.dtype or not x.is_cpu:
                raise NotTaken("inputs of another dtype or device")
            positions = get("position_ids", args, kwargs)
            if positions is None:
                positions = torch.arange(past, past + length).unsqueeze(0)
            mask = get(_ATTENTION, args, kwargs)
            kinds, keep = self._kinds(x, positions, mask, held, past, batch, length)
            ready = self.governor.ready(rows)
            if ready is None:
                raise NotTaken("a forward that is no decode step of its method")
            hidden = self._run(x.contiguous(), rows, length, kinds, ready)
            del keep
            for layer in cache.layers:
                extend(layer, length)
        finally:
            self._lock.release()
        self.taken += rows
        assert self._make_output is not None
        return self._make_output(hidden.view(x.shape), cache)

    def _check_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.decoder.training or torch.is_grad_enabled():
            raise NotTaken("gradients or training mode")
        if torch.is_autocast_enabled("cpu"):
            raise NotTaken("autocast")
        for name, value in kwargs.items():
            if name not in _KNOWN and value is not None and value is not False:
                raise NotTaken(f"the argument {name}")
        if _capturing():
            raise NotTaken("a model around it that records its states")
        config = self.decoder.config
        if config.output_attentions or config.output_hidden_states:
            raise NotTaken("output_attentions or output_hidden_states")
        use = self.arguments.get("use_cache", args, kwargs)
        if not (config.use_cache if use is None else use):
            raise NotTaken("use_cache=False")

    def _kinds(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Any,
        held: list[int],
        past: int,
        batch: int,
        length: int,
    ) -> tuple[list[tuple[Any, ...]], list[Tensor]]:
        stack, kinds, keep = self.stack, [], []
        rotations = self._rotations.at(x, positions)
        for kind, name in enumerate(stack.kinds):
            of_kind = {n for n, own in zip(held, self._kind_of, strict=True) if own == kind}
            if len(of_kind) != 1:
                raise NoRoom("a cache whose layers differ in length")
            (own,) = of_kind
            first = first_places(
                mask.get(name) if isinstance(mask, Mapping) else mask,
                batch, length, past, own, stack.windows[kind],
            )  # fmt: skip
            cos, sin = rotations[kind]
            if cos.dim() != 3 or cos.shape[:2] not in (
                (1, length), (batch, length),
            ):  # fmt: skip
                raise NotTaken("positions of another shape")
            rotated = cos.shape[-1]
            keep += [cos, sin]
            stride = length * rotated if cos.shape[0] > 1 else 0
            kinds.append((own, first, cos.data_ptr(), sin.data_ptr(), rotated, stride))
        return kinds, keep

    def _make_room(self, cache: Any, batch: int, length: int) -> list[int]:
        """Tokens that each layer of the cache holds."""
        dtype, all_held = self.stack.dtype, []
        for i, (layer, shape) in enumerate(zip(cache.layers, self._shapes, strict=True)):
            held, places = make_room(layer, length, dtype, (batch, *shape))
            all_held.append(held)
            if self._places[i] is not places:
                self._compiled.set_cache(
                    i, places.keys, places.values, places.sequence_stride, places.head_stride
                )
                self._places[i] = places
        return all_held

    def _run(
        self, x: Tensor, rows: int, length: int, kinds: list[tuple[Any, ...]], ready: bool
    ) -> Tensor:
        of_sequences = self.governor.sets()
        sets = [_EVERYTHING] * len(self.stack.layers) if of_sequences is None else of_sequences[0]
        if sets != self._sets:
            self._compiled.set_sets(sets)
            self._sets = sets
        hidden = torch.empty(rows, self.stack.d, dtype=self.stack.dtype)
        mlp_x = torch.empty(rows, self.stack.d, dtype=self.stack.dtype)
        layer = self._compiled.start(
            x.data_ptr(), hidden.data_ptr(), mlp_x.data_ptr(), rows, length, kinds, not ready
        )
        shape = (rows // length, length, self.stack.d)
        while layer >= 0:
            y = self.governor.module(layer)(mlp_x.view(shape)).contiguous()
            if y.shape != shape or y.dtype != self.stack.dtype:
                raise RuntimeError(f"the MLP of layer {layer} gave {list(y.shape)} {y.dtype}")
            layer = self._compiled.resume(y.data_ptr())
        return hidden

    def _rebuild(self) -> None:
        """Something was moved or replaced since: read it again."""
        self.stack = self.read()
        self._build()

    def _build(self) -> None:
        stack = self.stack
        self._compiled = _C.DecodeStep(_DTYPES[stack.dtype], stack.d, _norm(stack.last))
        self._watch = Watch(stack)
        self._places = [None] * len(stack.layers)
        self._rotations = Rotations(stack.decoder, stack.kinds)
        self._kind_of = [spec.kind for spec in stack.layers]
        self._shapes = [(s.attention.kv_heads, s.attention.head_dim) for s in stack.layers]
        self._sets = None
        for i, spec in enumerate(stack.layers):
            plan = self.governor.plan(i)
            mlp = {"plan": "outside"} if plan is None else _mlp(*plan)
            if plan is not None:
                self._watch.add_plan(self.governor.module(i), *plan)
            mlp |= {"before": _norm(spec.before_mlp), "after": _norm(spec.after_mlp)}
            self._compiled.add_layer(_attention(spec), mlp)

    @torch.no_grad()
    def check(self) -> None:
        """Run the decoder's own forward and the step on random tokens, with something else in the
        place of each MLP; NotTaken where they differ."""
        if self._watch.hooked():
            raise NotTaken("its modules had hooks when it was patched")
        stack, decoder = self.stack, self.decoder
        generator = torch.Generator().manual_seed(0)
        shape = (ops.MAX_ROWS * 2, stack.d)
        ids = torch.randint(decoder.embed_tokens.num_embeddings, (2, 9), generator=generator)
        probes = [
            Probe(torch.randn(shape, generator=generator).to(stack.dtype)).eval()
            for _ in stack.layers
        ]
        undo = [_put(spec.layer, self.governor.module(i), probes[i])
                for i, spec in enumerate(stack.layers)]  # fmt: skip
        states: dict[str, list[Tensor]] = {}
        governor, self.governor = self.governor, _Probed(probes)
        try:
            self._build()
            for way, forward in (("own", self.original), ("step", self.forward)):
                cache = cache_of(self.original(input_ids=ids[:, :5], use_cache=True))
                if not isinstance(cache, DynamicCache):
                    raise NotTaken("it makes a cache of another kind")
                states[way] = []
                for begin, end in ((5, 6), (6, 9)):
                    for probe in probes:
                        probe.seen.clear()
                    past = {name: cache for name in NAMES if self.arguments.knows(name)}
                    out = forward(input_ids=ids[:, begin:end], use_cache=True, **past)
                    states[way] += [probe.seen[0].reshape(-1, stack.d) for probe in probes]
                    states[way].append(out.last_hidden_state.reshape(-1, stack.d))
                    if way == "own":
                        self._make_output = _output_maker(out)
            if self.left:
                raise NotTaken(next(iter(self.left)))
        finally:
            self.governor = governor
            self.reset()
            for put_back in undo:
                put_back()
        count = len(probes) + 1
        for begin in (0, count):
            part = slice(begin, begin + count)
            if found := differs(states["step"][part], states["own"][part], stack.dtype):
                raise NotTaken(found)
        self._build()


class _Probed:
    """The governor of a check: every MLP is a probe."""

    def __init__(self, probes: list[Probe]) -> None:
        self.probes = probes

    def plan(self, index: int) -> None:
        return None

    def module(self, index: int) -> Any:
        return self.probes[index]

    def ready(self, rows: int) -> bool:
        return True

    def sets(self) -> None:
        return None


def _put(layer: Any, mlp: nn.Module, probe: Probe) -> Callable[[], None]:
    (name,) = [name for name, child in layer._modules.items() if child is mlp]
    layer._modules[name] = probe

    def put_back() -> None:
        layer._modules[name] = mlp

    return put_back


def _output_maker(out: Any) -> Callable[[Tensor, Any], Any]:
    kind = type(out)
    name = next(name for name in NAMES if hasattr(out, name))

    def make(hidden: Tensor, cache: Any) -> Any:
        return kind(last_hidden_state=hidden, **{name: cache})

    return make


_VERSION = operator.attrgetter("_version")


class Watch:
    """Whether everything that the compiled step has addresses of is still in its place, and nothing
    was hooked onto what it does not call."""

    def __init__(self, stack: Stack) -> None:
        self._owners: list[Mapping[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._tensors: list[Tensor] = []
        self._dicts: list[Mapping[str, Any]] = []
        self._hooks: list[Any] = []
        self._counted: list[Tensor] = []
        for spec in stack.layers:
            for module in (spec.layer, *_parts(spec)):
                self._add_module(module)
        self._add_module(stack.decoder.norm)
        rotary = stack.decoder.rotary_emb
        for name, buffer in rotary._buffers.items():
            self._add(rotary._buffers, name)
            self._counted.append(buffer)
        self._add(stack.decoder._modules, "layers")
        for i, spec in enumerate(stack.layers):
            self._add(stack.decoder.layers._modules, str(i), spec.layer)
        self._settle()

    def _add(self, owner: Mapping[str, Any], name: str, value: Any = None) -> None:
        self._owners.append(owner)
        self._names.append(name)
        self._values.append(owner[name] if value is None else value)

    def _add_module(self, module: nn.Module) -> None:
        self._dicts.append(module.__dict__)
        self._hooks += [module._forward_hooks, module._forward_pre_hooks]
        for name, child in module._modules.items():
            if child is not None:
                self._add(module._modules, name)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self._add(module._parameters, name)
                self._tensors.append(parameter)

    def add_plan(
        self, module: Any, plan: Compiled, weights: MlpWeights, active: Tensor, tokens: Tensor
    ) -> None:
        """Watch what an MLP's plan reads, too. A new value in its weights counts: the rule knows
        their norms."""
        self._add(module.__dict__, "rule")
        self._add(module.__dict__, "weights")
        self._add(module.__dict__, "active")
        self._add(module.__dict__, "tokens")
        self._add_module(module)
        for part in module._modules.values():
            if part is not None:
                self._add_module(part)
                self._counted += [p for p in part._parameters.values() if p is not None]
        self._settle()

    def _settle(self) -> None:
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        self._counted = [t for t in self._counted if not t.is_inference()]
        self._versions = list(map(_VERSION, self._counted))

    def hooked(self) -> bool:
        """Whether there are hooks, or forwards of single objects. transformers' own hooks, which
        stay behind a call with output_attentions, do not count."""
        every = nn.modules.module
        return (
            (any(self._hooks) and not all(map(_is_transformers, self._hooks)))
            or any(map(operator.contains, self._dicts, repeat("forward")))
            or bool(every._global_forward_hooks or every._global_forward_pre_hooks)
        )

    def holds(self) -> bool:
        """Whether nothing moved; NotTaken where something is hooked."""
        if self.hooked():
            raise NotTaken("hooks on its modules")
        return (
            all(map(operator.is_, map(operator.getitem, self._owners, self._names), self._values))
            and list(map(Tensor.data_ptr, self._tensors)) == self._addresses
            and list(map(_VERSION, self._counted)) == self._versions
        )


def _capturing() -> bool:
    """Whether a module around the decoder collects what its layers give."""
    collector = getattr(output_capturing, "_active_collector", None)
    return collector is not None and collector.get() is not None


def _is_transformers(hooks: Mapping[int, Any]) -> bool:
    return all(
        getattr(hook, "__module__", "") == output_capturing.__name__ for hook in hooks.values()
    )


def _parts(spec: LayerSpec) -> list[nn.Module]:
    """The modules of a layer that the step does not call."""
    attention: Any = spec.layer.self_attn
    norms = [m for name, m in spec.layer.named_children() if name.endswith("layernorm")]
    return [*norms, attention, *attention.children()]


def _norm(norm: Norm | None) -> tuple[int, float, float]:
    return (0, 0.0, 0.0) if norm is None else (norm.weight.data_ptr(), norm.eps, norm.offset)


def _linear(p: Projection) -> tuple[int, int, int, int]:
    return p.weight.data_ptr(), p.bits, p.group, 0 if p.bias is None else p.bias.data_ptr()


def _attention(spec: LayerSpec) -> dict[str, Any]:
    a: AttentionSpec = spec.attention
    linears = {name: _linear(getattr(a, name)) for name in ("q", "k", "v", "o")}
    norms = {name: _norm(getattr(a, name)) for name in ("before", "after", "q_norm", "k_norm")}
    plain = ("wide_norms", "rotary", "heads", "kv_heads", "head_dim", "scale", "softcap")
    return {
        **linears,
        **norms,
        **{name: getattr(a, name) for name in plain},
        "residual_scale": spec.residual_scale,
        "kind": spec.kind,
    }


def _mlp(plan: Compiled, w: MlpWeights, active: Tensor, tokens: Tensor) -> dict[str, Any]:
    def matrix(weight: Tensor | None, bias: Tensor | None) -> tuple[int, int, int, int]:
        if weight is None:
            return _NOTHING
        bits, group = 0, 0
        if w.packed is not None:
            fmt = format_of(weight, w.d)
            bits, group = fmt.bits, fmt.group
        return weight.data_ptr(), bits, group, 0 if bias is None else bias.data_ptr()

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    return {
        "plan": plan.plan,
        "gate": matrix(w.gate, w.gate_bias),
        "up": matrix(w.up, w.up_bias),
        "down_t": matrix(w.down_t, w.down_bias),
        "f": w.f,
        "activation": list(ACTIVATIONS).index(w.activation),
        "scale": address(plan.scale),
        "epsilon": address(plan.epsilon),
        "records": address(plan.records),
        "bits_gate": plan.bits[0],
        "bits_up": plan.bits[1],
        "k": plan.k,
        "active": active.data_ptr() if plan.counts else 0,
        "tokens": tokens.data_ptr() if plan.counts else 0,
    }
