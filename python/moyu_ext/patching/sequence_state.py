"""The state of sequence-level methods: per sequence, the prompt statistic and the set it chose.

It hangs on the cache object of the call, because it belongs to the sequences in that cache: two
generations that take turns on one model never mix. The cache's class is replaced by a subclass
whose reorder, repeat, select, crop and reset carry the state along.

Phases, per sequence. PROMPT ("open"): its tokens run dense and enter the statistic. DECODE: the set
is fixed. An open sequence with at least `min_prompt` tokens goes to DECODE with the first
single-token forward or `crop` (assisted decoding crops after every verification). In DECODE a
forward of at most SHORT tokens obeys the set; a longer one is a new turn's prompt and opens the
sequence again. A prompt's last chunk of exactly one token is therefore taken for a decode step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..methods.base import SequenceRule

SHORT = 8  # new tokens per sequence that still are decode: verification of drafts, short turns
TAIL = 32  # last tokens whose statistics are kept apart, so that a crop can take them back
# Floats of one block of per-token statistics: on a CPU about an L2 cache; a GPU wants few launches.
_BLOCK, _BLOCK_GPU = 1 << 19, 1 << 25
ATTRIBUTE = "_moyu_state"


Function = TypeVar("Function", bound=Callable[..., Any])


def _plainly(function: Function) -> Function:
    """Without gradient, and never with inference tensors: a sequence may begin in inference_mode
    and go on outside, where those can't be written to."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return cast(Function, wrapper)


def in_place(buffer: Tensor) -> Tensor:
    """The buffer, marked as one that keeps its memory: a compiled decode step reads it where it is
    and does not copy it into its CUDA graph's memory at every token."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(buffer, guard=False)
    return buffer


class LayerState:
    """One layer's share. B sequences, f neurons; sums are float32.

    base [B, f] + tail [B, T <= TAIL, f] is the running sum; mask uint8 [B, f] the sets; indices
    int32 [f] and count int32 [1] their union. The buffers mask, indices and count are updated in
    place, so that a captured graph stays valid.
    """

    @_plainly
    def __init__(self, batch: int, f: int, device: torch.device) -> None:
        self.base = torch.zeros(batch, f, device=device)
        self.tail = torch.zeros(batch, 0, f, device=device)
        self.mask = torch.ones(batch, f, dtype=torch.uint8, device=device)
        self.indices = torch.arange(f, dtype=torch.int32, device=device)
        self.count = torch.full((1,), f, dtype=torch.int32, device=device)
        for buffer in (self.mask, self.indices, self.count):
            in_place(buffer)

    @_plainly
    def learn(self, rule: SequenceRule, a: Tensor, real: Tensor | None) -> None:
        """Add activations a [B, n, f] of the tokens that are `real` (bool [B, n]; None: all)."""
        batch, n, f = a.shape
        step = max(1, (_BLOCK if a.is_cpu else _BLOCK_GPU) // (batch * f))
        # Block by block: a float32 copy of all activations would cost more than the statistic.
        for start in range(0, max(0, n - TAIL), step):
            stop = min(start + step, n - TAIL)
            self.base += self._statistic(rule, a, real, start, stop).sum(1)
        last = self._statistic(rule, a, real, max(0, n - TAIL), n)
        tail = torch.cat([self.tail, last], 1)
        if tail.shape[1] > TAIL:
            self.base += tail[:, :-TAIL].sum(1)
            tail = tail[:, -TAIL:].clone()
        self.tail = tail

    @staticmethod
    def _statistic(
        rule: SequenceRule, a: Tensor, real: Tensor | None, start: int, stop: int
    ) -> Tensor:
        batch, _, f = a.shape
        s = rule.statistic(a[:, start:stop].reshape(-1, f)).view(batch, stop - start, f)
        # Selected, not multiplied: what attention leaves on padding may be NaN.
        return s if real is None else s.masked_fill_(~real[:, start:stop, None], 0.0)

    def total(self) -> Tensor:
        """The running sum, float32 [B, f]."""
        return self.base + self.tail.sum(1)

    @_plainly
    def decide(self, rule: SequenceRule, tokens: Tensor) -> None:
        """Choose every row's set from the running sum over `tokens` [B, 1] tokens."""
        self.mask.copy_(rule.choose(self.total(), tokens))

    def fold(self) -> None:
        """Give up the tail: what it holds is final."""
        if self.tail.shape[1]:
            self.base += self.tail.sum(1)
            self.tail = self.tail[:, :0].clone()

    def unite(self) -> None:
        """Recompute the union of the rows' sets, in place."""
        union = self.mask.amax(0).float()
        indices, count = ops.threshold_compact(union, union.new_full((1,), 0.5))
        self.indices.copy_(indices.view(-1))
        self.count.copy_(count.view(-1))


class SequenceState:
    """The state of the B sequences of one cache; see the module's docstring for the phases.

    `owner` names the patch that made it: the state of another patch is never used. Per sequence, on
    the host: tokens seen, open, pending (the statistic changed since the set was chosen), counted
    (this turn's choice is in the report), and the columns of the cache between which a crop can be
    followed exactly (`begin`: the tail is complete from here; `end`: nothing was learned after).
    """

    def __init__(
        self, owner: str, min_prompt: int, batch: int, layers: Sequence[tuple[int, torch.device]]
    ) -> None:
        self.owner = owner
        self.min_prompt = min_prompt
        self.batch = batch
        self.layers = [LayerState(batch, f, device) for f, device in layers]
        with torch.inference_mode(False):
            sizes = torch.zeros(len(layers), dtype=torch.int64, device=layers[0][1])
        self.sizes = in_place(sizes)  # per layer, the sum of the sets' sizes; in place, too
        self._forget()

    def _forget(self) -> None:
        batch = self.batch
        self.tokens = torch.zeros(batch, dtype=torch.int64)
        self.open = torch.ones(batch, dtype=torch.bool)
        self.pending = torch.ones(batch, dtype=torch.bool)
        self.counted = torch.zeros(batch, dtype=torch.bool)
        self.begin = torch.zeros(batch, dtype=torch.int64)
        self.end = torch.zeros(batch, dtype=torch.int64)
        self.columns = torch.zeros(0, dtype=torch.int64)  # of the tail's entries
        self.real = torch.zeros(batch, 0, dtype=torch.bool)  # which of them entered, per sequence
        # Two summaries, so that a decode step reads no tensor: every sequence has its set; every
        # sequence is in DECODE.
        self.ready = False
        self.closed = False
        self.steps = 0  # tokens decoded since the statistic changed; counted where that matters

    @_plainly
    def reset(self) -> None:
        """Forget everything but the buffers."""
        for layer in self.layers:
            layer.base.zero_()
            layer.tail = layer.tail[:, :0].clone()
            layer.mask.fill_(1)
        self._forget()

    def decodes(self, length: int) -> bool:
        """Whether a forward of `length` tokens per sequence is plain decode for every sequence."""
        return self.ready and (length == 1 or (self.closed and length <= SHORT))

    @_plainly
    def close(self) -> None:
        """Every sequence is in DECODE from here."""
        self.closed = True
        self.open.fill_(False)
        self.begin.copy_(self.end)
        self.columns = self.columns[:0]
        self.real = self.real[:, :0]
        for layer in self.layers:
            layer.fold()

    def _settle(self) -> None:
        # A compiled decode step only sets `closed`.
        if self.closed and self.open.any():
            self.close()

    @_plainly
    def start(self, length: int, past: int, refresh: bool = False) -> Tensor:
        """Begin a forward of `length` tokens behind `past` cached ones: which sequences learn.

        refresh: all of them, although they decode.
        """
        self._settle()
        if past == 0:
            self.reset()
        elif past < int(self.end.max()):
            # Shortened behind our back, without crop(); nothing tells that its prompt is over.
            self.crop(past, over=False)
        if length > SHORT or refresh:
            self.counted &= self.open
            self.open.fill_(True)
            self.closed = False
        elif length == 1:
            self._end_prompt()
        return self.open

    def _end_prompt(self) -> None:
        ending = self.open & (self.tokens >= self.min_prompt)
        self.open &= ~ending
        self.begin = torch.where(ending, self.end, self.begin)
        if not self.open.any() and not self.closed:
            self.close()

    @_plainly
    def learned(self, length: int, past: int, entered: Tensor) -> None:
        """After the layers learned: bool [B, length], which tokens entered the statistic."""
        learners = self.open
        self.steps = 0
        self.tokens += entered.sum(1)
        columns = torch.cat([self.columns, torch.arange(past, past + length)])
        self.columns = columns[-TAIL:]
        for layer in self.layers:  # one that did not run (early exit) has learned nothing
            missing = self.columns.numel() - layer.tail.shape[1]
            if missing > 0:
                layer.tail = F.pad(layer.tail, (0, 0, 0, missing))
        self.real = torch.cat([self.real, entered], 1)[:, -TAIL:]
        self.end = torch.where(learners, past + length, self.end)
        if columns.numel() > TAIL:
            first = torch.maximum(self.begin, self.columns[0])
            self.begin = torch.where(learners, first, self.begin)
        self.pending |= learners
        self.ready = False

    @_plainly
    def choose(self, rules: Sequence[SequenceRule]) -> int:
        """Choose the sets of sequences whose statistic changed; how many chose in a new turn."""
        enough = self.tokens >= self.min_prompt
        tokens = self.tokens.clamp_min(1).unsqueeze(1)
        for layer, rule in zip(self.layers, rules, strict=True):
            device = layer.mask.device
            chosen = rule.choose(layer.total(), tokens.to(device))
            # A sequence that has seen too little keeps all neurons.
            chosen |= ~enough.to(device).unsqueeze(1)
            keep = ~self.pending.to(device).unsqueeze(1)
            layer.mask.copy_(torch.where(keep, layer.mask, chosen.to(torch.uint8)))
            layer.unite()
        self._measure()
        fresh = self.pending & enough & ~self.counted
        self.counted |= fresh
        self.pending = torch.zeros_like(self.pending)
        self.ready = bool(enough.all())
        return int(fresh.sum())

    # What happens to a cache happens to the state.

    @_plainly
    def crop(self, length: int, over: bool = True) -> None:
        """The cache now holds `length` columns. `over`: a crop ends a prompt, see above."""
        self._settle()
        late = self.end > length
        if late.any():
            lost = late & (self.begin > length)
            keep = self.columns < length
            self.tokens -= (self.real & ~keep).sum(1)
            self.tokens = torch.where(lost, 0, self.tokens)
            self.columns = self.columns[keep]
            self.real = self.real[:, keep] & ~lost.unsqueeze(1)
            for layer in self.layers:
                layer.tail = layer.tail[:, keep.to(layer.tail.device)]
                gone = lost.to(layer.tail.device)
                layer.base[gone] = 0.0
                layer.tail[gone] = 0.0
            self.open |= lost
            self.counted &= ~lost
            self.begin = torch.where(lost, length, self.begin)
            self.end = torch.where(late, length, self.end)
            self.pending |= late
            self.ready = False
            self.closed = self.closed and not bool(lost.any())
        if over and not self.closed:
            self._end_prompt()

    @_plainly
    def reorder(self, rows: Tensor) -> None:
        """Sequence i continues what sequence rows[i] was."""
        self._take(rows)  # the old union still covers every set; only `select` makes it smaller

    @_plainly
    def select(self, rows: Tensor) -> None:
        """Keep these sequences (indices, or a bool mask)."""
        self._take(rows.nonzero().view(-1) if rows.dtype == torch.bool else rows)
        for layer in self.layers:
            layer.unite()

    @_plainly
    def repeat(self, times: int) -> None:
        """Each sequence becomes `times` neighbouring ones."""
        self._take(torch.arange(self.batch).repeat_interleave(times))

    def _measure(self) -> None:
        for size, layer in zip(self.sizes, self.layers, strict=True):
            size.copy_(layer.mask.sum(dtype=torch.int64))

    def _take(self, rows: Tensor) -> None:
        for layer in self.layers:
            index = rows.to(layer.base.device)
            layer.base = layer.base[index]
            layer.tail = layer.tail[index]
            mask = layer.mask[index]
            same = mask.shape == layer.mask.shape
            layer.mask = layer.mask.copy_(mask) if same else in_place(mask)
        self._measure()
        rows = rows.cpu()
        for name in ("tokens", "open", "pending", "counted", "begin", "end", "real"):
            setattr(self, name, getattr(self, name)[rows])
        self.batch = rows.numel()


def attach(cache: Any, state: SequenceState) -> None:
    """Hang the state on the cache, and make the cache carry it along."""
    cls: Any = type(cache)
    if not getattr(cls, "_moyu_follows", False):
        cache.__class__ = with_state(cls)
    setattr(cache, ATTRIBUTE, state)


def state_of(cache: Any, owner: str) -> SequenceState | None:
    """The state that this patch hung on the cache, if any."""
    state = getattr(cache, ATTRIBUTE, None)
    return state if state is not None and state.owner == owner else None


@functools.cache
def with_state(base: Any) -> Any:
    """The subclass of a cache class whose state follows its rows and columns."""

    def following(name: str) -> Any:
        original = getattr(base, name)

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            _follow(self, name, *args, **kwargs)
            return result

        return method

    members: dict[str, Any] = {name: following(name) for name in _EVENTS if hasattr(base, name)}

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # This class has no name that pickle could find; the base has.
        _, _, *rest = base.__reduce_ex__(self, protocol)
        return (_restore, (base,), *rest)

    members |= {"__reduce_ex__": __reduce_ex__, "_moyu_follows": True, "__module__": __name__}
    return type(base.__name__, (base,), members)


def _restore(base: Any) -> Any:
    cls = with_state(base)
    return cls.__new__(cls)


def _follow(cache: Any, name: str, *args: Any, **kwargs: Any) -> None:
    state: SequenceState | None = getattr(cache, ATTRIBUTE, None)
    if state is None:
        return
    if name == "crop":
        # Its argument has meant a length and a number of tokens; the cache knows what is left.
        state.crop(int(cache.get_seq_length()))
    elif name == "reset":
        state.reset()
    else:
        value = args[0] if args else next(iter(kwargs.values()))
        getattr(state, _EVENTS[name])(value)


_EVENTS = {
    "reorder_cache": "reorder",
    "batch_repeat_interleave": "repeat",
    "batch_select_indices": "select",
    "crop": "crop",
    "reset": "reset",
}
