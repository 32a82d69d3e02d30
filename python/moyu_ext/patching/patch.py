"""patch, unpatch, report, scoring: the functions that a user calls on a model."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from ..decoding.loop import generate_with
from ..decoding.room import NoRoom
from ..decoding.stack import NotTaken, Stack, read_stack
from ..decoding.step import DecodeStep
from ..errors import ConfigurationError, PatchStateError, UnsupportedModelError
from ..methods.base import Method
from ..methods.lossless import Lossless
from ..models.decoder import find_decoder
from ..models.families import MlpSite, check_hooks, find_mlps
from ..models.fingerprint import fingerprint
from .governor import PatchedMlps
from .passes import Context, ScoringHooks, SequenceHooks, TokenHooks, register
from .projections import Projection, find_projections
from .report import BudgetReport, LayerReport, Report, StepReport
from .sparse_mlp import Bypass, SparseMLP, StandIn, make_contiguous

Model = TypeVar("Model", bound=nn.Module)
_PATCH = "_moyu_patch"


@dataclass
class _Patch:
    """What `unpatch` needs to know; kept on the model."""

    method: Method
    mlps: list[SparseMLP]
    decoder: nn.Module | None
    context: Context
    hooks: SequenceHooks | None
    projections: int = 0
    step: DecodeStep | str = ""  # or why there is none
    budget: BudgetReport | None = None
    undo: list[Callable[[], None]] = field(default_factory=list)

    def revert(self) -> None:
        while self.undo:
            self.undo.pop()()


def check_patchable(model: object) -> None:
    """Raise UnsupportedModelError for what is no model, PatchStateError for one that is patched
    already or in training mode."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"patch: model is a {type(model).__name__}; expected the loaded model, a "
            "torch.nn.Module"
        )
    if any(isinstance(module, StandIn) for module in model.modules()):
        raise PatchStateError("the model is patched already; call moyu_ext.unpatch(model) first")
    if model.training:
        raise PatchStateError(
            "the model is in training mode, but a patched model only infers; call model.eval() "
            "before patch"
        )


@torch.inference_mode(False)
@torch.no_grad()
def patch(
    model: Model,
    method: Method | None = None,
    *,
    layers: Iterable[int] | None = None,
    projections: bool = False,
    decode_step: bool = True,
) -> Model:
    """Patch with a method (None: `Lossless`); see `calibration.budget.patch`, which users call."""
    check_patchable(model)
    if method is None:
        method = Lossless()
    if not isinstance(method, Method):
        raise ConfigurationError(
            f"method is {method!r}; expected a method such as moyu_ext.QRIDA(density=0.33) or "
            "moyu_ext.STDA(thresholds)"
        )
    sites = find_mlps(model)
    method.validate(len(sites), lambda: fingerprint(model))
    context = Context()
    chosen = [sites[index] for index in layer_indices(layers, len(sites))]
    for site in chosen:
        check_hooks(site)
    mlps = [SparseMLP(site, method, context, slot) for slot, site in enumerate(chosen)]
    stack = sites[0].stack
    decoder = find_decoder(model, stack)
    hooks, token_hooks = None, None
    if method.level == "sequence":
        if decoder is None:
            raise UnsupportedModelError(
                f"{type(model).__name__}: no module around {stack} takes input_ids and "
                "a cache, so a sequence-level method has no sequences to follow; patch "
                "with a per-token method (Dense, TDA)"
            )
        hooks = SequenceHooks(decoder, context, mlps, method.min_prompt, method.refresh)
    elif decoder is not None:
        token_hooks = TokenHooks(decoder, context)
    linears = find_projections(model, sites) if projections else []
    patched = _Patch(method, mlps, decoder, context, hooks, len(linears))
    try:
        for mlp in mlps:
            _install(mlp, patched.undo)
        for parent, name in linears:
            projection = Projection(getattr(parent, name))
            projection.use_huge_pages()
            _replace(parent, name, projection, patched.undo)
        following = hooks or token_hooks
        if decoder is not None and following is not None:
            patched.undo.append(register(decoder, following))
            _pickle_without(decoder, patched.undo)
        if decoder is not model:
            _pickle_without(model, patched.undo)
        if decode_step:
            patched.step = _install_step(model, patched, sites)
        else:
            patched.step = "decode_step=False"
    except BaseException:
        patched.revert()
        raise
    model.__dict__[_PATCH] = patched
    return model


@torch.inference_mode(False)
@torch.no_grad()
def unpatch(model: Model) -> Model:
    """Give the model its own modules back: the same objects, parameters and bits; returns it.

    Raises PatchStateError where the model is not patched.
    """
    _patch_of(model).revert()
    del model.__dict__[_PATCH]
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` was called on this model object."""
    return _PATCH in model.__dict__


def report(model: nn.Module, *, reset: bool = False) -> Report:
    """Realised densities since the patch, see `Report`; reset=True starts the counts anew.

    Raises PatchStateError where the model is not patched.
    """
    patched = _patch_of(model)
    rows = []
    meters = [] if patched.hooks is None else list(patched.hooks.meters.values())
    for mlp in patched.mlps:
        active, tokens, dense = (int(t) for t in (mlp.active, mlp.tokens, mlp.dense_tokens))
        active += sum(int(meter.used[mlp.slot]) for meter in meters)
        tokens += sum(int(meter.tokens) for meter in meters)
        density = active / (tokens * mlp.f) if tokens else float("nan")
        site = mlp.site
        guard = getattr(mlp.rule, "guard", None)
        added = mlp.rule.added_bytes
        estimated = int(mlp.estimated) / (tokens * mlp.f) if tokens else 0.0
        rows.append(
            LayerReport(
                site.index,
                site.name,
                mlp.f,
                density,
                tokens,
                dense,
                mlp.refreshes,
                None if guard is None else guard.report(),
                added,
                site.weights().share_read(patched.method.plan, density, added, estimated),
                estimated,
            )
        )
        if reset:
            mlp.reset_counts()
            if guard is not None:
                guard.reset()
    if reset:
        for meter in meters:
            meter.reset()
    step = patched.step
    if isinstance(step, str):
        steps = StepReport(0, 0, {}, step)
    else:
        steps = StepReport(len(step.stack.layers), step.taken, dict(step.left))
        if reset:
            step.reset()
    return Report(repr(patched.method), tuple(rows), patched.projections, steps, patched.budget)


def show_budget(model: nn.Module, budget: BudgetReport) -> None:
    """Let `report` say what a patched model's method was tuned to."""
    _patch_of(model).budget = budget


@contextmanager
def scoring(model: nn.Module, context_length: int | Sequence[int]) -> Iterator[None]:
    """Within the block, a forward treats its text as generation would have: for evaluation.

    Columns before `context_length` (one number, or one per row of the batch, counted with padding)
    are the prompt: dense, and for a sequence-level method the statistic. Later columns are the
    continuation: under the method's rule or the set chosen, all in one forward. Sequences with
    fewer than `min_prompt` real tokens of context stay dense. Without gradient. It holds for the
    forwards of the thread that entered it.

    Raises PatchStateError where the model is not patched or the forward continues a cache,
    ConfigurationError for an impossible length.
    """
    patched = _patch_of(model)
    lengths = list(context_length) if isinstance(context_length, Iterable) else [context_length]
    if not lengths or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in lengths):
        raise ConfigurationError(
            f"context_length is {context_length!r}; expected the number of context tokens, >= 0, "
            "or one per row"
        )
    if patched.decoder is None:
        raise UnsupportedModelError(
            f"scoring: no module of {type(model).__name__} takes input_ids and a cache"
        )
    hooks = ScoringHooks(
        patched.decoder, patched.context, context_length, patched.method.prefill, patched.hooks
    )
    context = patched.context
    remove = register(patched.decoder, hooks)
    context.scoring += 1
    try:
        yield
    finally:
        remove()
        context.scoring -= 1
        context.current = None  # an interrupt keeps forward hooks from running


def decode_step_of(model: nn.Module) -> DecodeStep:
    """The compiled decode step of a patched model; ConfigurationError where there is none, with the
    reason."""
    step = _patch_of(model).step
    if isinstance(step, str):
        raise ConfigurationError(f"no compiled decode step runs this model: {step}")
    return step


def _patch_of(model: nn.Module) -> _Patch:
    patched = getattr(model, "__dict__", {}).get(_PATCH)
    if patched is None:
        raise PatchStateError(
            f"this {type(model).__name__} is not patched; call moyu_ext.patch(model, method) "
            "first, and pass the same object here"
        )
    return patched


def _install_step(model: nn.Module, patched: _Patch, sites: list[MlpSite]) -> DecodeStep | str:
    """Let decode steps take the place of the decoder's forward, and the loop around them that of
    generate's; or why that cannot be."""
    decoder = patched.decoder
    if decoder is None or any(site.family.inline for site in sites):
        return "the decoder is not of a known shape"
    if "forward" in decoder.__dict__:
        return "the decoder has a forward of its own"
    layers = [site.layer for site in sites]

    def read() -> Stack:
        return read_stack(decoder, layers)

    governor = PatchedMlps(sites, patched.mlps, patched.method, patched.context)
    try:
        step = DecodeStep(read(), read, governor)
        step.check()
    except (NotTaken, NoRoom) as reason:
        return str(reason)
    except Exception as error:  # the model patches without a step, whatever its parts are
        return f"trying the step out failed: {error!r}"

    @functools.wraps(decoder.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return step.forward(*args, **kwargs)

    decoder.__dict__["forward"] = forward
    patched.undo.append(lambda: decoder.__dict__.pop("forward", None))
    generate = generate_with(model, step)
    if generate is not None:
        model.__dict__["generate"] = generate
        patched.undo.append(lambda: model.__dict__.pop("generate", None))
    return step


def layer_indices(layers: Iterable[int] | None, count: int) -> list[int]:
    """Ascending indices >= 0 of `count` MLPs; ConfigurationError where `layers` are none."""
    if layers is None:
        return list(range(count))
    chosen: set[int] = set()
    try:
        wanted = [operator.index(index) for index in layers]
    except TypeError as error:
        raise ConfigurationError(
            f"layers is {layers!r}; expected indices between {-count} and {count - 1}"
        ) from error
    for index in wanted:
        if not -count <= index < count:
            raise ConfigurationError(
                f"layers contains {index}; the model has {count} MLPs: expected indices between "
                f"{-count} and {count - 1}"
            )
        chosen.add(index % count)
    if not chosen:
        raise ConfigurationError("layers is empty; name at least one layer, or None for all")
    return sorted(chosen)


def _install(mlp: SparseMLP, undo: list[Callable[[], None]]) -> None:
    site = mlp.site
    down = site.linear(site.family.down)
    undo.append(lambda: make_contiguous(down))
    mlp.take_layout()
    if not site.family.inline:
        _replace(site.layer, site.child, mlp, undo)
        return
    for name in (site.family.activation, site.family.down):
        _replace(site.layer, name, Bypass(getattr(site.layer, name)), undo)
    _replace(site.layer, site.family.up, mlp, undo)


def _replace(
    parent: nn.Module, name: str, stand_in: StandIn, undo: list[Callable[[], None]]
) -> None:
    def revert() -> None:
        stand_in.original.training = stand_in.training
        setattr(parent, name, stand_in.original)

    undo.append(revert)
    setattr(parent, name, stand_in)


def _pickle_without(module: nn.Module, undo: list[Callable[[], None]]) -> None:
    """Let copies and pickles of this module forget the patch: they are the unpatched model."""

    before = set(module.__dict__)

    def __getstate__() -> dict[str, Any]:
        state = dict(module.__dict__)
        state.pop("__getstate__")
        state.pop(_PATCH, None)
        for ours in ("forward", "generate"):
            if ours not in before:
                state.pop(ours, None)
        for hooks in ("_forward_pre_hooks", "_forward_hooks"):
            kept = {
                key: hook
                for key, hook in state[hooks].items()
                if not isinstance(
                    getattr(hook, "__self__", None), (TokenHooks, SequenceHooks, ScoringHooks)
                )
            }
            state[hooks] = type(state[hooks])(kept)
            for suffix in ("_with_kwargs", "_always_called"):
                flags = state.get(hooks + suffix)
                if flags is not None:
                    state[hooks + suffix] = type(flags)(
                        (key, flag) for key, flag in flags.items() if key in kept
                    )
        return state

    module.__dict__["__getstate__"] = __getstate__
    undo.append(lambda: module.__dict__.pop("__getstate__", None))
