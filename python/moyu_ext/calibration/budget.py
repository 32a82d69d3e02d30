"""`patch` with a budget: tuned once, remembered on disk, then patched with what was found."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from .._progress import steps
from ..errors import ArtifactError, ConfigurationError
from ..methods.base import Method
from ..models.families import find_mlps
from ..models.fingerprint import fingerprint
from ..patching.patch import check_patchable, layer_indices, show_budget
from ..patching.patch import patch as patch_with
from .tune import nats, tune
from .tuned import Tuned, machine

Model = TypeVar("Model", bound=nn.Module)
# What is remembered follows from this, too: raise it where `tune` finds something else.
_VERSION = 1


def patch(
    model: Model,
    method: Method | None = None,
    *,
    budget: float | str | None = None,
    layers: Iterable[int] | None = None,
    projections: bool = False,
    decode_step: bool = True,
) -> Model:
    """Let `method` decide which neurons the model's MLPs compute; in place, returns the model.

    Without a method or a budget no answer changes: all neurons are computed (but for those whose
    ReLU is exactly zero), by the project's kernels; nothing but rounding is different.

    budget: the loss that is allowed, as mean KL per token against the dense model in nats (0.01) or
    as a rise of perplexity ("1%"). The first time, the model writes some text, and `tune` finds
    what may be left out at that loss and verifies it on held-out text: about a minute for 135M
    parameters on two cores. What it found is remembered in `cache_directory()` by the model's
    fingerprint, the budget and the machine. A layer that would be no faster stays dense; `report`
    says what was found. `moyu_ext.tune` does the same on text of your own.
    layers: the indices of the MLPs to patch (negative ones count from the end), all by default.
    projections: also run the linear layers beside the MLPs (attention's, the head) with the
    project's own GEMV, up to 8 rows at a time (4 on a GPU): all of their neurons, so nothing but
    rounding changes.
    decode_step: on a CPU, run the decoder layers of a forward of 1 to 8 tokens that continues a
    cache in one compiled call, attention included, where the decoder is of a known class and
    computes what that class does, and let `generate` run greedy decoding and sampling in a loop
    that costs less; nothing but rounding changes. Other forwards, and those with hooks,
    output_attentions, gradients or unusual masks and caches, go through the layers as ever;
    `report` says how many, and why. The model keeps its parameters and their names; W_down is laid
    out neuron-major, so memory peaks one W_down above the model's (and QRIDA adds its shadows). For
    inference on the device the model is on.

    Raises UnsupportedModelError for a model that it does not know, ConfigurationError for a method,
    budget or layers that do not fit, for a budget where the model cannot write text, and for
    projections=True where no linear layer can be taken, ArtifactError for thresholds of another
    model, PatchStateError for a patched model or one in training mode. After an error the model is
    as it was.
    """
    tuned = None
    if budget is not None:
        if method is not None:
            raise ConfigurationError(
                f"method is {method!r} and budget {budget!r}; a budget finds its own method: give "
                "one of them"
            )
        limit = nats(budget)
        check_patchable(model)
        layers = layer_indices(layers, len(find_mlps(model)))
        tuned = remembered(model, limit, layers)
        method = tuned.method()
    patch_with(model, method, layers=layers, projections=projections, decode_step=decode_step)
    if tuned is not None:
        show_budget(model, tuned.report())
    return model


def cache_directory() -> Path:
    """Where budgets are remembered: $MOYU_CACHE, else moyu_ext in the user's cache directory."""
    own = os.environ.get("MOYU_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moyu_ext"


def remembered(model: nn.Module, budget: float, layers: list[int]) -> Tuned:
    """What `tune` finds on text that the model writes: from disk, or found now and kept there."""
    dtype = next(iter(find_mlps(model))).weights().dtype
    known = (_VERSION, fingerprint(model), budget, layers, machine(), str(dtype))
    key = hashlib.sha256(repr(known).encode()).hexdigest()[:32]
    folder = cache_directory() / "budgets" / key
    if folder.is_dir():
        try:
            tuned = Tuned.from_pretrained(folder)
            if tuned.fingerprint == known[1] and tuned.budget == budget:
                return tuned
        except ArtifactError as error:
            warnings.warn(f"{error}; the budget is found anew", stacklevel=3)
    with torch.inference_mode(False), steps("budget") as progress:
        tuned = tune(model, budget=budget, layers=layers, progress=progress)
    try:
        tuned.save_pretrained(folder)
    except OSError as error:
        warnings.warn(
            f"what was found for the budget cannot be kept in {folder} ({error.strerror}), and is "
            "looked for again next time; set MOYU_CACHE to a folder that can be written",
            stacklevel=3,
        )
    return tuned
