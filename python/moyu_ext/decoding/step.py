"""The decode step of a whole decoder in one call, and what has to hold for it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache

from .. import ops
from .._load import _C
from ..methods.base import Compiled
from ..models.cache import NAMES
from ..models.decoder import Arguments
from ..models.weights import MlpWeights
from .check import check_stack
from .compiled import DTYPES, attention_dict, mlp_dict, norm_tuple
from .places import first_places
from .room import NoRoom, check_cache, extend, make_room, show_all
from .stack import NotTaken, Rotations, Stack
from .watch import Watch, capturing

_EVERYTHING = (0, 0, 0)
_ATTENTION = "attention_mask"
# Arguments of a decoder's forward that the step understands.
_KNOWN = {"input_ids", _ATTENTION, "position_ids", "inputs_embeds", "use_cache", *NAMES}


class Governor(Protocol):
    """What the step asks of the patch's MLPs."""

    def plan(self, index: int) -> tuple[Compiled, MlpWeights, Tensor, Tensor, Tensor] | None:
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


class _Thread(threading.local):
    """What a thread's forwards know of those before: whether the last one was a step that looked
    at the model, whether the next ones need not, a cache that does not show its last tokens yet."""

    looked = False
    trusts = False
    unseen: Any = None

    def show(self) -> None:
        if self.unseen is not None:
            show_all(self.unseen)
            self.unseen = None


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
        self._thread = _Thread()
        self._places: list[Any] = []
        self._sets: Any = None
        self._make_output: Callable[[Tensor, Any], Any] | None = None
        self._build()

    def timed(self) -> tuple[float, list[float]]:
        """Seconds of the steps since the last call: in all, and compiled: q, k, v; attention; o;
        MLPs; everything. Parts are counted from the first call on."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds, [nanoseconds / 1e9 for nanoseconds in self._compiled.spent()]

    @contextmanager
    def trust(self) -> Iterator[None]:
        """Within the block, this thread's steps do not look whether the model is as it was, where
        its last forward was one that did: between them runs no code but the caller's, which looks
        at the cache when the block is over."""
        thread = self._thread
        before = thread.trusts
        thread.trusts = thread.looked
        try:
            yield
        finally:
            thread.trusts = before
            thread.show()

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
            self._thread.looked = False
            self._thread.show()
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
            if not (self._thread.trusts or self._watch.holds()):
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
            trusts = self._thread.trusts
            for i, layer in enumerate(cache.layers):
                extend(layer, length, i == 0 or not trusts)  # the first one tells the length
            if trusts:
                self._thread.unseen = cache
        finally:
            self._lock.release()
        self.taken += rows
        self._thread.looked = True
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
        if capturing():
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
        self._compiled = _C.DecodeStep(DTYPES[stack.dtype], stack.d, norm_tuple(stack.last))
        self._watch = Watch(stack)
        self._places = [None] * len(stack.layers)
        self._rotations = Rotations(stack.decoder, stack.kinds)
        self._kind_of = [spec.kind for spec in stack.layers]
        self._shapes = [(s.attention.kv_heads, s.attention.head_dim) for s in stack.layers]
        self._sets = None
        for i, spec in enumerate(stack.layers):
            plan = self.governor.plan(i)
            mlp = {"plan": "outside"} if plan is None else mlp_dict(*plan)
            if plan is not None:
                self._watch.add_plan(self.governor.module(i))
            mlp |= {"before": norm_tuple(spec.before_mlp), "after": norm_tuple(spec.after_mlp)}
            self._compiled.add_layer(attention_dict(spec), mlp)

    def check(self) -> None:
        """Try it out, see `check_stack`: NotTaken where it computes something else."""
        if self._watch.hooked():
            raise NotTaken("its modules had hooks when it was patched")
        mlps = [self.governor.module(i) for i in range(len(self.stack.layers))]
        self._make_output = _output_maker(check_stack(self.stack, mlps, self.original))


def _output_maker(out: Any) -> Callable[[Tensor, Any], Any]:
    kind = type(out)
    name = next(name for name in NAMES if hasattr(out, name))

    def make(hidden: Tensor, cache: Any) -> Any:
        return kind(last_hidden_state=hidden, **{name: cache})

    return make
