"""What one forward of the decoder does with its tokens, decided once for all layers by hooks on the
decoder: they see the cache, the mask and the lengths, which no MLP sees."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ConfigurationError, PatchStateError
from ..methods.base import AdaptiveRule, SequenceRule
from ..models.cache import cache_of
from ..models.decoder import Arguments, real_tokens
from .sequence_state import SHORT, SequenceState, attach, in_place, state_of


@dataclass(frozen=True)
class Pass:
    """The tokens of one forward: `batch` sequences of `length` tokens.

    decode: every token obeys the rule, or its sequence's set. Otherwise all neurons are computed,
    tokens in `learn` (bool [batch, length]; None: all) enter the statistic if `learns`, and tokens
    in `govern` (None: none) obey the rule or set; those of them in `refresh` (None: none) by using
    all neurons.
    choose: the set is chosen in between, for scoring.
    """

    batch: int
    length: int
    state: SequenceState | None = None
    decode: bool = False
    learns: bool = False
    learn: Tensor | None = None
    govern: Tensor | None = None
    refresh: Tensor | None = None
    choose: bool = False


class Context(threading.local):
    """How the hooks reach the MLPs: the pass of this thread's current forward, if any, and how many
    blocks of `scoring` the thread is in."""

    current: Pass | None = None
    scoring: int = 0


class Layer(Protocol):
    """What the hooks need to know of a patched MLP."""

    f: int
    rule: Any
    refreshes: int

    @property
    def device(self) -> torch.device:
        """Where the weights are."""


class Meter:
    """Counts decode under fixed sets for the report: once per forward, since 32 layers that each
    add to a number of their own are 32 kernels per token on a GPU.

    used int64 [layers]: neurons active, over tokens; tokens int64 [1].
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.used = in_place(torch.zeros(layers, dtype=torch.int64, device=device))
            self.tokens = in_place(torch.zeros(1, dtype=torch.int64, device=device))

    def add(self, sizes: Tensor, batch: int, length: int) -> None:
        """A forward of `length` tokens for each of `batch` sequences; sizes [layers]: the sum of
        the sequences' sets."""
        self.used.add_(sizes, alpha=length)
        self.tokens.add_(batch * length)

    def reset(self) -> None:
        """Start anew."""
        self.used.zero_()
        self.tokens.zero_()


_BEGUN = "_moyu_begun"


class TokenHooks:
    """Forward hooks on the decoder for a per-token method: prompt or decode, see `Pass`."""

    def __init__(self, decoder: nn.Module, context: Context) -> None:
        self.arguments = Arguments(decoder)
        self.context = context

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: decide the pass."""
        if self.context.scoring:
            return  # other hooks decide
        self.context.current = None
        if kwargs.get("cu_seq_lens_q") is not None:
            return  # tokens of many sequences in one row: each obeys the rule where rows allow
        batch, length = self.arguments.shape(args, kwargs)
        begun = _begun(self.arguments.cache(args, kwargs))
        if begun is not None:
            self.context.current = Pass(batch, length, decode=begun and length <= SHORT)

    def after(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook: forget the pass."""
        if self.context.scoring:
            return
        self.context.current = None
        cache = self.arguments.cache(args, kwargs)
        if cache is None and output is not None:
            cache = cache_of(output)
        if hasattr(cache, "get_seq_length"):
            setattr(cache, _BEGUN, True)


def _begun(cache: Any) -> bool | None:
    """Whether a cache holds tokens already; None where it does not say."""
    if not hasattr(cache, "get_seq_length"):
        return False if cache is None else None
    if torch.compiler.is_compiling():
        # A traced forward must not look at a number that lies on the device.
        return getattr(cache, _BEGUN, False)
    try:
        return int(cache.get_seq_length()) > 0
    except ValueError:  # recurrent states alone
        return None


class SequenceHooks:
    """Forward hooks on the decoder for a sequence-level method."""

    def __init__(
        self,
        decoder: nn.Module,
        context: Context,
        layers: Sequence[Layer],
        min_prompt: int,
        refresh: int | None = None,
    ) -> None:
        self.arguments = Arguments(decoder)
        self.context = context
        self.layers = layers
        self.min_prompt = min_prompt
        self.refresh = refresh
        self.owner = uuid.uuid4().hex
        device = layers[0].device
        self.meters = {device: Meter(len(layers), device)}  # a model may move

    @property
    def rules(self) -> list[SequenceRule]:
        """The layers' rules; read anew, since moving a model binds them anew."""
        return [layer.rule for layer in self.layers]

    def new_state(self, batch: int) -> SequenceState:
        """An empty state for `batch` sequences."""
        shapes = [(layer.f, layer.device) for layer in self.layers]
        return SequenceState(self.owner, self.min_prompt, batch, shapes)

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: decide the pass."""
        if self.context.scoring:
            return  # other hooks decide
        batch, length = self.arguments.shape(args, kwargs)
        cache = self.arguments.cache(args, kwargs)
        state = state_of(cache, self.owner)
        if state is not None and state.batch != batch:
            if _columns(cache) > 0:
                raise PatchStateError(
                    f"the cache belongs to {state.batch} sequences, the forward has {batch}; "
                    "expand a cache with batch_repeat_interleave or batch_select_indices, so that "
                    "the sets of a sequence-level method can follow"
                )
            state = None  # emptied, and used for another batch
        if state is not None and state.decodes(length) and not self._due(state):
            if self.refresh is not None and not torch.compiler.is_compiling():
                state.steps += length
            if not torch.compiler.is_compiling() and not state.closed:
                state.close()
            state.closed = True
            self.context.current = Pass(batch, length, state, decode=True)
            return
        self.context.current = self._slow(batch, length, cache, state, args, kwargs)

    def _due(self, state: SequenceState) -> bool:
        """Whether the next token is a refresh; never in a traced forward, which cannot count."""
        return (
            self.refresh is not None
            and not torch.compiler.is_compiling()
            and state.ready
            and state.steps + 1 >= self.refresh
        )

    def _slow(
        self,
        batch: int,
        length: int,
        cache: Any,
        state: SequenceState | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Pass | None:
        if kwargs.get("cu_seq_lens_q") is not None:
            raise PatchStateError(
                "the forward packs the tokens of several sequences into one row (continuous "
                "batching), so a sequence-level method cannot tell them apart; patch with a "
                "per-token method (Dense, TDA), or use generate()"
            )
        if not hasattr(cache, "get_seq_length"):
            if cache is not None or self.arguments.get("use_cache", args, kwargs) is False:
                return None  # no cache to keep a state on: dense
            past = 0
        else:
            past = _columns(cache)
        if state is None:
            state = self.new_state(batch)
            if cache is not None:
                attach(cache, state)
        again = past > 0 and length <= SHORT and self._due(state)
        learners = state.start(length, past, again)
        if (state.pending & ~learners).any():
            self.choose(state)
        if state.closed and state.ready:
            return Pass(batch, length, state, decode=True)
        mask = self.arguments.get("attention_mask", args, kwargs)
        real = real_tokens(mask, batch, length, past)
        if learners.all():
            used = torch.ones(batch, length, dtype=torch.bool) if again else None
            return Pass(batch, length, state, learns=True, learn=real, govern=used, refresh=used)
        learn = learners.unsqueeze(1).expand(batch, length)
        if real is not None:
            learn = learn.to(real.device) & real
        govern = None
        if batch * length <= ops.MAX_ROWS:  # more rows run dense, as they do in decode
            govern = (~learners).unsqueeze(1).expand(batch, length)
        return Pass(batch, length, state, learns=True, learn=learn, govern=govern)

    def after(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook: keep what the layers learned."""
        if self.context.scoring:
            return
        current, self.context.current = self.context.current, None
        if current is None or current.state is None:
            return
        state = current.state
        if current.decode:
            if output is not None:  # else the forward raised
                self._count(current)
            return
        if output is None:  # some layers have learned, some have not
            state.reset()
            return
        cache = self.arguments.cache(args, kwargs)
        if cache is None:
            cache = cache_of(output)
            if cache is None:
                return
            attach(cache, state)
            past = 0
        else:
            past = _columns(cache) - current.length
        entered = torch.ones(current.batch, current.length, dtype=torch.bool)
        if current.learn is not None:
            entered &= current.learn.cpu()
        state.learned(current.length, past, entered)
        # Chosen now rather than by the first decode step, which then has nothing left to decide
        # and can be captured in a graph.
        self.choose(state)

    def _count(self, current: Pass) -> None:
        # Adaptive rules count in their layers, and what has more rows runs dense.
        rows = current.batch * current.length
        if rows > ops.MAX_ROWS or isinstance(self.layers[0].rule, AdaptiveRule):
            return
        assert current.state is not None
        sizes = current.state.sizes
        if sizes.device not in self.meters:
            self.meters.setdefault(sizes.device, Meter(len(self.layers), sizes.device))
        self.meters[sizes.device].add(sizes, current.batch, current.length)

    def choose(self, state: SequenceState) -> None:
        """Choose the sets whose statistic changed, and count that in the report."""
        fresh = state.choose(self.rules)
        for layer in self.layers:
            layer.refreshes += fresh


class ScoringHooks:
    """Forward hooks on the decoder that score a continuation in one forward, see `scoring`."""

    def __init__(
        self,
        decoder: nn.Module,
        context: Context,
        context_length: int | Sequence[int],
        everywhere: bool,
        sequences: SequenceHooks | None,
    ) -> None:
        self.arguments = Arguments(decoder)
        self.context = context
        self.context_length = context_length
        self.everywhere = everywhere
        self.sequences = sequences
        self.thread = threading.get_ident()

    def before(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: decide the pass."""
        if threading.get_ident() != self.thread:
            return
        batch, length = self.arguments.shape(args, kwargs)
        cache = self.arguments.cache(args, kwargs)
        past = _columns(cache) if hasattr(cache, "get_seq_length") else 0
        if past:
            raise PatchStateError(
                f"scoring: the cache already holds {past} tokens; expected the whole text, context "
                "and continuation, in one forward"
            )
        lengths = torch.as_tensor(self.context_length)
        if lengths.dim() == 1 and lengths.numel() != batch:
            raise ConfigurationError(
                f"scoring: {lengths.numel()} context lengths for a batch of {batch}; pass one "
                "number, or one per row"
            )
        govern = torch.arange(length) >= lengths.reshape(-1, 1).expand(batch, 1)
        mask = self.arguments.get("attention_mask", args, kwargs)
        real = real_tokens(mask, batch, length, 0)
        if real is None:
            real = torch.ones_like(govern)
        real = real.cpu()
        if self.sequences is None:
            governed = torch.ones_like(govern) if self.everywhere else govern
            self.context.current = Pass(batch, length, govern=governed & real)
            return
        learn = ~govern & real
        state = self.sequences.new_state(batch)
        state.tokens = learn.sum(1)
        enough = state.tokens >= state.min_prompt
        for layer in self.sequences.layers:
            layer.refreshes += int(enough.sum())
        govern = govern & real & enough.unsqueeze(1)
        refresh = None
        every = self.sequences.refresh
        if every is not None:
            refresh = govern & (govern.cumsum(1) % every == 0)
        self.context.current = Pass(
            batch,
            length,
            state,
            learns=True,
            learn=learn,
            govern=govern,
            refresh=refresh,
            choose=True,
        )

    def after(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Forward hook: forget the pass."""
        if threading.get_ident() == self.thread:
            self.context.current = None


def register(
    decoder: nn.Module, hooks: TokenHooks | SequenceHooks | ScoringHooks
) -> Callable[[], None]:
    """Put the hooks on the decoder; returns what takes them off again."""
    handles = [
        decoder.register_forward_pre_hook(hooks.before, with_kwargs=True),
        # always_call: an interrupted forward must not leave its pass behind.
        decoder.register_forward_hook(hooks.after, with_kwargs=True, always_call=True),
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _columns(cache: Any) -> int:
    """Tokens in the cache."""
    try:
        return int(cache.get_seq_length())
    except ValueError as error:  # a cache of recurrent states alone
        raise PatchStateError(
            f"{type(cache).__name__} does not count its tokens ({error}), so a sequence-level "
            "method cannot follow it; patch with a per-token method (Dense, TDA)"
        ) from error
