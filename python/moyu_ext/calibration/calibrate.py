"""`calibrate`: thresholds for a model's MLPs from one forward over calibration text.

All windows of text go through the model as one batch. When it comes to an MLP, that layer's
threshold is searched on the inputs it was given, and (with sequential=True) the layer answers with
the neurons below the threshold left out, so that the layers above see what they will see in use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._progress import Step, steps
from ..errors import ConfigurationError
from ..methods.qrida import QRIDA
from ..models.families import MlpSite, find_mlps
from ..models.fingerprint import fingerprint
from ..models.forward import answer_mlps, require_plain
from ..models.text import Batch, encode_texts, longest_window, make_batch, read_texts, write_own
from ..models.weights import MlpWeights
from .cett import LayerTokens, largest_epsilon
from .thresholds import LayerThreshold, Thresholds

# A prompt shorter than this says too little about a sequence (the same as STDA's min_prompt).
_MIN_PROMPT = 8
_QUANTILES = 64


def calibrate(
    model: nn.Module,
    tokenizer: Any = None,
    texts: Sequence[str] | str | os.PathLike[str] | None = None,
    *,
    cett: float = 0.2,
    method: Any = None,
    max_tokens: int = 4096,
    sequential: bool = True,
    progress: bool = True,
    on: str = "token",
    granularity: str = "layer",
    seed: int = 0,
) -> Thresholds:
    """The largest thresholds whose mean CETT on calibration tokens is at most `cett`.

    CETT(x; eps) is the norm of what the neurons below eps would have added to the MLP's output,
    relative to that output (arXiv 2406.12569, eq. 14; see `moyu_ext.calibration.cett`), in
    float32, averaged over the tokens of the texts (padding never enters).

    `texts`: a list of strings, the path of a UTF-8 text file, or None: the model writes its own by
    sampling (`seed`). At most `max_tokens` tokens are used, in windows of at most 512.
    `method`: None, "tda" or `TDA` (thresholds on the neuron norm; a TDA with score="gate": on
    |act(g_i)|), "stda" or `STDA`, or "qrida" or a `QRIDA` (thresholds on the norm that its shadow
    estimates; CETT is the true one of what they drop).
    `on`: "token": eps compares with one token's scores. "continuation" (STDA): the set is chosen
    from the first half of each text, which stays dense, and CETT is measured on the second.
    `sequential`: layers in order, each seeing what the sparsified layers below it produce; else
    all from the dense model. `granularity`: "layer", or "model" for one eps, where the mean runs
    over tokens and layers.
    `progress`: a bar on stderr, if that is a terminal.

    A target of 0, or one that no layer can meet with any neuron left out, gives eps 0 and density
    1. Memory: tokens * d for the batch, O(f * d) for the layer in work. The model is left as it
    was, also when an exception or an interrupt ends the calibration.

    Raises ConfigurationError for a value or text that cannot be used, PatchStateError for a
    patched model or one in training mode, UnsupportedModelError where the MLPs are not known.
    """
    name, score, method = _method(method)
    _check(cett, max_tokens, on, granularity, name)
    sites = find_mlps(model)
    require_plain(model, sites)
    with torch.no_grad(), steps("calibrate", progress) as report:
        window = longest_window(model)
        if texts is None:
            report("the model writes its calibration text", 0, 1)
            rows = write_own(model, tokenizer, max_tokens, window, seed)
        else:
            rows = encode_texts(tokenizer, read_texts(texts, max_tokens), max_tokens, window)
        shortest = 2 * _MIN_PROMPT if on == "continuation" else 1
        batch = make_batch(model, rows, max_tokens, shortest)
        scorer = method.scorer if score == "shadow" else None
        run = _Run(model, sites, batch, scorer or score, on, sequential, report)
        epsilons = None
        if granularity == "model":
            epsilons = [run.one_epsilon(cett)] * len(sites)
        layers = run.layers(cett, epsilons)
    config = getattr(model, "config", None)
    return Thresholds(
        layers=tuple(layers),
        cett=float(cett),
        fingerprint=fingerprint(model),
        score=score,
        method=name,
        on=on,
        granularity=granularity,
        sequential=sequential,
        tokens=run.measured,
        model=_model_id(getattr(config, "_name_or_path", "") or type(model).__name__),
        dtype=str(sites[0].weights().dtype).removeprefix("torch."),
        bits=tuple(method.bits_of(i) for i in range(len(sites))) if score == "shadow" else (),
        shadows=method.shadows.key if score == "shadow" and method.shadows else "",
    )


def _method(method: Any) -> tuple[str, str, Any]:
    """The name of a method given as name, class or instance, the score it compares, and itself."""
    name = "tda" if method is None else method
    name = name if isinstance(name, str) else getattr(method, "name", None)
    name = name.lower() if isinstance(name, str) else name
    if name not in ("tda", "stda", "qrida"):
        raise ConfigurationError(
            f"method is {method!r}; thresholds are calibrated for TDA, STDA and QRIDA (None means "
            "TDA)"
        )
    if name == "qrida":
        return name, "shadow", method if isinstance(method, QRIDA) else QRIDA()
    return name, getattr(method, "score", "product") if name == "tda" else "product", method


def check_target(cett: float) -> None:
    """Raise ConfigurationError unless cett is a number in [0, 1)."""
    if isinstance(cett, bool) or not isinstance(cett, (int, float)) or not 0 <= cett < 1:
        raise ConfigurationError(
            f"cett is {cett!r}; expected a number in [0, 1), such as 0.2: the error of the MLP's "
            "output relative to it. At 1 every neuron may go, so nothing is left to calibrate"
        )


def _check(cett: float, max_tokens: int, on: str, granularity: str, name: str) -> None:
    check_target(cett)
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ConfigurationError(f"max_tokens is {max_tokens!r}; expected an integer >= 1")
    if on not in ("token", "continuation"):
        raise ConfigurationError(f'on is {on!r}; expected "token" or "continuation"')
    if on == "continuation" and name != "stda":
        raise ConfigurationError(
            f'on="continuation" follows the rule of STDA, but the method is {name}; '
            'pass method="stda", or on="token"'
        )
    if granularity not in ("layer", "model"):
        raise ConfigurationError(f'granularity is {granularity!r}; expected "layer" or "model"')


def _model_id(name: str) -> str:
    """A hub id as it is; of a local folder only its own name."""
    return os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name


class _Run:
    """One calibration: forwards of one batch whose MLPs are answered by this class."""

    def __init__(
        self,
        model: nn.Module,
        sites: list[MlpSite],
        batch: Batch,
        score: str | Callable[[int, MlpWeights], Callable[[Tensor], Tensor]],
        on: str,
        sequential: bool,
        report: Step,
    ) -> None:
        self._model, self._sites, self._batch = model, sites, batch
        self._score, self._sequential, self._report = score, sequential, report
        self._lengths = batch.lengths if on == "continuation" else None
        self.measured = 0

    def _tokens(self, index: int, x: Tensor) -> LayerTokens:
        weights = self._sites[index].weights()
        score = self._score(index, weights) if callable(self._score) else self._score
        tokens = LayerTokens(x, weights, score, self._lengths)
        self.measured = tokens.measured
        return tokens

    def layers(self, target: float, epsilons: list[float] | None) -> list[LayerThreshold]:
        """Every layer's threshold (searched unless given) and what it does, in one forward."""
        found: list[LayerThreshold] = []

        def visit(index: int, x: Tensor) -> Tensor:
            self._report(f"layer {index + 1} of {len(self._sites)}", index, len(self._sites))
            tokens = self._tokens(index, x)
            try:
                layer = _layer(tokens, target, None if epsilons is None else epsilons[index])
            except ConfigurationError as error:
                raise ConfigurationError(f"layer {index}: {error}") from error
            found.append(layer)
            return tokens.output(layer.epsilon if self._sequential else 0.0)

        answer_mlps(self._model, self._sites, self._batch, visit)
        self._report("done", len(self._sites), len(self._sites))
        return found

    def one_epsilon(self, target: float) -> float:
        """One threshold for all layers: the mean of CETT over tokens and layers meets the target.

        Sequential: one forward per threshold that is tried, else one per pass of the search.
        """
        quantiles: list[Tensor] = []

        def look(index: int, x: Tensor) -> Tensor:
            tokens = self._tokens(index, x)
            quantiles.append(tokens.quantiles(_QUANTILES))
            return tokens.output(0.0)

        answer_mlps(self._model, self._sites, self._batch, look)
        forwards = 0

        def one_pass(epsilons: list[float]) -> list[float]:
            nonlocal forwards
            forwards += 1
            self._report(f"one threshold, forward {forwards}", 0, len(self._sites))
            total = torch.zeros(len(epsilons), dtype=torch.float64)

            def visit(index: int, x: Tensor) -> Tensor:
                tokens = self._tokens(index, x)
                total.add_(_means(tokens, epsilons))
                return tokens.output(epsilons[0] if self._sequential else 0.0)

            answer_mlps(self._model, self._sites, self._batch, visit)
            means: list[float] = (total / len(self._sites)).tolist()
            return means

        def mean_cett(epsilons: list[float]) -> list[float]:
            if not self._sequential:
                return one_pass(epsilons)
            return [one_pass([epsilon])[0] for epsilon in epsilons]

        return largest_epsilon(mean_cett, target, torch.cat(quantiles))


def _means(tokens: LayerTokens, epsilons: list[float]) -> Tensor:
    return tokens.measure(epsilons)[0].double().mean(1).cpu()


def _layer(tokens: LayerTokens, target: float, epsilon: float | None) -> LayerThreshold:
    if epsilon is None:
        means = lambda cuts: _means(tokens, cuts).tolist()  # noqa: E731
        epsilon = largest_epsilon(means, target, tokens.quantiles(_QUANTILES))
        if tokens.measure([epsilon])[1].item() == 1:
            epsilon = 0.0
    ratios, density = tokens.measure([epsilon])
    ordered = ratios[0].double().cpu()
    p50, p95 = ordered.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    return LayerThreshold(
        epsilon=epsilon,
        density=density.item(),
        cett=ordered.mean().item(),
        p50=p50,
        p95=p95,
        max=ordered.max().item(),
    )
