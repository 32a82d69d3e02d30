"""The modules that stand in for a model's own: `SparseMLP` computes, `Bypass` only keeps weights.

A stand-in shares the original's parameters, children and hooks, so state_dict() keeps its names,
and it pickles and copies as the original. W_down stays a [d, f] parameter, but its memory is
neuron-major (strides (1, d)): a neuron is then one contiguous row in all three matrices.
"""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import PatchStateError
from ..methods.base import AdaptiveRule, Method, SequenceRule, TokenRule, compact
from ..models.families import LAYERS, MlpSite, check_weights
from ..models.weights import MlpWeights
from .passes import Context, Pass
from .sequence_state import LayerState

_SAMPLES = 64
_BITS = {2: torch.int16, 4: torch.int32}


class StandIn(nn.Module):
    """Takes an original module's place, with its parameters, children, buffers and hooks."""

    is_stand_in = True
    original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__.update(original.__dict__)
        self.__dict__.pop("forward", None)
        self.__dict__["_compiled_call_impl"] = None
        self.__dict__["_load_state_dict_post_hooks"] = OrderedDict(
            original._load_state_dict_post_hooks
        )
        # Not through setattr: the original must not become a child.
        self.__dict__["original"] = original

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As the original's class, by a function of the standard library: loading the pickle needs
        # no moyu_ext. (pickle refuses the usual __newobj__ for an object of another class.)
        twin = _plain(self.original, self.training)
        return copyreg._reconstructor, (type(twin), object, None), twin.__dict__  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        twin = copy.deepcopy(self.original, memo)
        twin.training = self.training
        make_contiguous(twin)
        memo[id(self)] = twin
        return twin


class _Watched:
    """One linear layer of an MLP as it was when its weights were read."""

    def __init__(self, site: MlpSite, name: str) -> None:
        self.name = f"{site.name}.{name}"
        self.children = site.module._modules
        self.key = name
        self.linear = self._linear()
        self.weight = self.linear.weight
        self.version, self.pointer = self._state()
        self.sample = self._sample()

    def _linear(self) -> Any:
        linear = self.children[self.key]
        return linear.__dict__.get("original", linear)  # behind a stand-in, where MLPs are inline

    def _state(self) -> tuple[int, int]:
        weight = self.weight  # inference tensors count no versions
        return 0 if weight.is_inference() else weight._version, weight.data_ptr()

    def _sample(self) -> Tensor:
        """Some of the values, bit by bit, so that a NaN equals itself."""
        flat = self.weight.detach().as_strided((self.weight.numel(),), (1,))  # either layout
        values = flat[:: max(1, len(flat) // _SAMPLES)].clone()
        return values if values.dtype == torch.uint8 else values.view(_BITS[values.element_size()])

    def rewritten(self) -> bool:
        """Whether the values are others although nothing counted it, as behind `weight.data`."""
        return not torch.equal(self._sample(), self.sample)

    def changed(self) -> bool:
        """Whether the layer, its parameter or the values (written in place) are others now."""
        linear = self._linear()
        if linear is not self.linear and type(linear) not in LAYERS:
            raise PatchStateError(
                f"{self.name} is a {type(linear).__name__} now, which a patched MLP does not run; "
                "call moyu_ext.unpatch(model) before you change its layers, and patch it again"
            )
        if self.children[self.key] is linear:  # a stand-in runs its hooks
            refuse_additions(linear, self.name)
        return (
            linear is not self.linear
            or linear._parameters.get("weight") is not self.weight
            or self._state() != (self.version, self.pointer)
        )


def refuse_additions(part: Any, name: str) -> None:
    """Raise PatchStateError for hooks on a part of a patched MLP, or a forward of its own."""
    if part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__:
        raise PatchStateError(
            f"{name} got forward hooks, or a forward of its own, which a patched MLP does not run; "
            "put them on the MLP, or call moyu_ext.unpatch(model) first"
        )


class Bypass(StandIn):
    """Hands its input on. Stands in for the later parts of an MLP without a module of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x."""
        return x


class SparseMLP(StandIn):
    """One MLP under a method: x [..., d] -> [..., d].

    Up to ops.MAX_ROWS (8) rows go through the method's operator. More rows run dense, at the speed
    of the matmuls. Where a rule has to hold although all neurons are computed, they are masked.
    """

    def __init__(self, site: MlpSite, method: Method, context: Context, slot: int) -> None:
        super().__init__(site.entry)
        self.site = site
        self.method = method
        self.context = context
        self.slot = slot
        self.d: int = site.d
        self.f: int = site.f
        weights = site.weights()
        self.weights: MlpWeights | None = weights
        self.rule = method.bind(site.index, weights)
        self.per_token = isinstance(self.rule, TokenRule)
        self._watched: list[_Watched] = []
        self._activation: tuple[Any, ...] = ()
        device = self.device
        # Never inference tensors: later forwards may run outside of inference_mode.
        with torch.inference_mode(False):
            self.active = torch.zeros(1, dtype=torch.int64, device=device)
            self.estimated = torch.zeros(1, dtype=torch.int64, device=device)
            self.tokens = torch.zeros(1, dtype=torch.int64, device=device)
            self.dense_tokens = torch.zeros(1, dtype=torch.int64, device=device)
        self.refreshes: int = 0
        # New values may need another layout, and the rule new column norms.
        self.register_load_state_dict_post_hook(SparseMLP._forget_weights)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.site.linear(self.site.family.up).weight.device

    def reset_counts(self) -> None:
        """Start the report anew: neurons active, tokens governed, tokens run dense. In place: the
        compiled decode step counts there."""
        for count in (self.active, self.estimated, self.tokens, self.dense_tokens):
            count.zero_()
        self.refreshes = 0

    def take_layout(self) -> None:
        """Make W_down neuron-major, in place in its parameter, and read the weights again."""
        down = self.site.linear(self.site.family.down).weight
        with torch.inference_mode(False):
            if not (down.dtype == torch.uint8 or down.data.t().is_contiguous()):
                down.data = down.data.t().contiguous().t()
            self.weights = self.site.weights()
            self._watched = [_Watched(self.site, name) for name in self.site.family.linears]
            # In a tuple, else it became a child.
            self._activation = (self._find_activation(),)
            for weight in (self.weights.gate, self.weights.up, self.weights.down_t):
                if weight is not None:
                    ops.use_huge_pages(weight)

    def _forget_weights(self, *_: Any) -> None:
        self.weights = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseMLP:
        super()._apply(fn, recurse)
        for name in ("active", "estimated", "tokens", "dense_tokens"):
            setattr(self, name, fn(getattr(self, name)))
        # Read again at the next forward: an MLP spread over a layer moves part by part.
        self.weights = None
        return self

    def read_weights(self) -> MlpWeights:
        """The weights as they are now, which the rule is bound to anew."""
        check_weights(self.site)
        self.take_layout()
        assert self.weights is not None
        self.rule = self.method.bind(self.site.index, self.weights)
        return self.weights

    def _find_activation(self) -> Any:
        found = getattr(self.site.module, self.site.family.activation)
        return getattr(found, "original", found)  # behind a stand-in, where MLPs are inline

    def _changed(self) -> bool:
        """Whether somebody gave the MLP other weights; a traced forward cannot tell. A prompt also
        looks at some values, since writing to `weight.data` leaves no trace."""
        if torch.compiler.is_compiling():
            return False
        name = f"{self.site.name}.{self.site.family.activation}"
        activation = self._find_activation()
        if activation is not self._activation[0]:
            raise PatchStateError(
                f"{name} is another one since the patch; call moyu_ext.unpatch(model) before you "
                "change its layers, and patch it again"
            )
        if isinstance(activation, nn.Module) and not self.site.family.inline:
            refuse_additions(activation, name)
        current = self.context.current
        prompt = current is not None and not current.decode
        return any(w.changed() or (prompt and w.rewritten()) for w in self._watched)

    def forward(self, x: Tensor) -> Tensor:
        """The MLP's output, [..., d]; PatchStateError in training mode, and where a part of the MLP
        was replaced since the patch."""
        if self.training:
            raise PatchStateError(
                f"{self.site.name} is in training mode, but a patched model only infers; call "
                "model.eval(), or moyu_ext.unpatch(model) to train"
            )
        weights = self.weights
        if weights is None or self._changed():
            weights = self.read_weights()
        current = self.context.current
        if self.per_token and (current is None or current.govern is None):
            return self._by_token(x, weights, current)
        if current is None:
            return self._dense(x, weights)
        if x.numel() != current.batch * current.length * self.d:
            raise PatchStateError(
                f"{self.site.name} got x {list(x.shape)} in a forward of {current.batch} sequences "
                f"of {current.length} tokens, so it cannot tell them apart; patch with a per-token "
                "method (Dense, TDA)"
            )
        if current.decode:
            return self._given(x, weights, current)
        return self._computed(x, weights, current)

    def _by_token(self, x: Tensor, weights: MlpWeights, current: Pass | None) -> Tensor:
        """A per-token rule: prompts run dense, what follows in up to 8 sequences obeys the rule."""
        n = x.numel() // self.d
        decode = n <= ops.MAX_ROWS  # without a pass, which knows the sequences, the rows decide
        if current is not None and not self.method.prefill:
            decode = current.decode and current.batch <= ops.MAX_ROWS
        if not decode and not self.method.prefill:
            return self._dense(x, weights)
        if not decode:
            everything = torch.ones(1, n, dtype=torch.bool, device=x.device)
            return self._computed(x, weights, Pass(1, n, govern=everything))
        rows = self._rows(x, weights)
        parts = [
            self.rule.apply(part, weights)  # type: ignore[union-attr]
            for part in rows.split(ops.MAX_ROWS)
        ]
        for _, counts in parts:
            if counts.dim() == 2:
                self.estimated.add_(counts[1].sum())
                counts = counts[0]
            self.active.add_(counts if counts.numel() == 1 else counts.sum())
        self.tokens.add_(n)
        out = parts[0][0] if len(parts) == 1 else torch.cat([out for out, _ in parts])
        return self._output(out, x)

    def _rows(self, x: Tensor, weights: MlpWeights) -> Tensor:
        """x as operators take it: contiguous [rows, d], under autocast in the weights' dtype."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(weights.dtype)
        return x.reshape(-1, self.d).contiguous()

    def _output(self, out: Tensor, x: Tensor) -> Tensor:
        """An operator's output in the shape of x, under autocast in its dtype, as a linear's is."""
        if torch.is_autocast_enabled(x.device.type):
            out = out.to(torch.get_autocast_dtype(x.device.type))
        return ops.inference_only(out.view(x.shape))

    def _given(self, x: Tensor, weights: MlpWeights, current: Pass) -> Tensor:
        rows = current.batch * current.length
        if rows > ops.MAX_ROWS:
            return self._dense(x, weights)
        return self._of_set(x, weights, current)

    def _of_set(self, x: Tensor, weights: MlpWeights, current: Pass) -> Tensor:
        assert current.state is not None
        layer = current.state.layers[self.slot]
        if isinstance(self.rule, AdaptiveRule):
            return self._adapted(x, weights, current)
        mask = None
        if current.batch > 1:
            mask = layer.mask
            if current.length > 1:
                mask = mask.repeat_interleave(current.length, 0)
        return self._sparse(x, weights, layer.indices, layer.count, mask)  # counted by a Meter

    def _adapted(self, x: Tensor, weights: MlpWeights, current: Pass) -> Tensor:
        """Decode under a rule that looks at the tokens and at their sequences."""
        assert current.state is not None
        assert isinstance(self.rule, AdaptiveRule)
        total = current.state.layers[self.slot].total().unsqueeze(1)
        tokens = current.state.tokens.to(x.device).view(-1, 1, 1)
        shape = (current.batch, current.length, self.d)
        active = self.rule.active(x.reshape(shape), total, tokens).view(-1, self.f)
        self.active.add_(active.sum())
        self.tokens.add_(active.shape[0])
        return self._sparse(x, weights, *compact(active))

    def _sparse(
        self, x: Tensor, weights: MlpWeights, indices: Tensor, count: Tensor, mask: Tensor | None
    ) -> Tensor:
        out = weights.given(self._rows(x, weights), indices, count, mask)
        return self._output(out, x)

    def _dense(self, x: Tensor, weights: MlpWeights) -> Tensor:
        _, product = weights.activations(x)
        self.dense_tokens.add_(x.numel() // self.d)
        return weights.down(product)

    def _computed(self, x: Tensor, weights: MlpWeights, current: Pass) -> Tensor:
        """All neurons, those masked that a governed token may not use."""
        gate, product = weights.activations(x)
        shape = (current.batch, current.length, self.f)
        a = product.view(shape)
        rows = current.batch * current.length
        layer, rest = None, None
        if current.state is not None:
            layer = current.state.layers[self.slot]
            assert isinstance(self.rule, SequenceRule)
            if current.learns:
                learn = current.learn
                layer.learn(self.rule, a, None if learn is None else learn.to(x.device))
            if current.choose:
                tokens = current.state.tokens.clamp_min(1).unsqueeze(1)
                layer.decide(self.rule, tokens.to(x.device))
        if current.govern is None:
            self.dense_tokens.add_(rows)
            return weights.down(product)
        govern = current.govern.to(x.device).unsqueeze(-1)
        if isinstance(self.rule, TokenRule):
            flat = (rows, self.f)
            active, estimated, rest = self.rule.judge(
                x.reshape(rows, self.d), gate.view(flat), product.view(flat)
            )
            active = active.view(shape)
            if estimated is not None:
                self.estimated.add_((estimated.view(shape) & govern).sum())
        else:
            assert layer is not None
            active = self._of_sequence(x, a, layer, current)
        if current.refresh is not None:
            active = active | current.refresh.to(x.device).unsqueeze(-1)
        governed = govern.sum()
        self.active.add_((active & govern).sum())
        self.tokens.add_(governed)
        self.dense_tokens.add_(rows - governed)
        if rest is None:
            a = a.masked_fill(govern & ~active, 0.0)
        else:
            a = torch.where(govern & ~active, rest.view(shape).to(a.dtype), a)
        return weights.down(a.view(product.shape))

    def _of_sequence(self, x: Tensor, a: Tensor, layer: LayerState, current: Pass) -> Tensor:
        """What each token may use under a sequence-level rule, bool [B, n or 1, f]."""
        rule, state = self.rule, current.state
        assert isinstance(rule, SequenceRule) and state is not None
        adaptive = isinstance(rule, AdaptiveRule)
        if not adaptive and (current.refresh is None or not current.choose):
            return layer.mask.bool().unsqueeze(1)
        total = layer.total().unsqueeze(1)
        tokens = state.tokens.clamp_min(1).to(x.device).view(-1, 1, 1)
        if current.refresh is not None and current.choose:
            # Scoring: what each token knows from the refreshed ones before it.
            again = current.refresh.to(x.device).unsqueeze(-1)
            s = rule.statistic(a.reshape(-1, self.f)).view(a.shape).masked_fill(~again, 0.0)
            total = total + s.cumsum(1) - s
            tokens = tokens + again.cumsum(1) - again.long()
        if isinstance(rule, AdaptiveRule):
            return rule.active(x.reshape(*a.shape[:2], self.d), total, tokens)
        return rule.choose(total, tokens)

    def extra_repr(self) -> str:
        """The method."""
        return f"{self.method!r}"


def make_contiguous(module: nn.Module) -> None:
    """Give every 2-D parameter row-major memory again; same parameters, same values."""
    for parameter in module.parameters():
        if not parameter.data.is_contiguous():
            parameter.data = parameter.data.contiguous()


def _plain(original: nn.Module, training: bool) -> nn.Module:
    """A shallow twin of the original with contiguous parameters, for pickling."""
    twin = copy.copy(original)
    twin.training = training
    twin._parameters = {
        name: parameter
        if parameter is None or parameter.is_contiguous()
        else nn.Parameter(parameter.data.contiguous(), parameter.requires_grad)
        for name, parameter in original._parameters.items()
    }
    twin._modules = {
        name: None if child is None else _plain(child, child.training)
        for name, child in original._modules.items()
    }
    return twin
