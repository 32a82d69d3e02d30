"""Training of RODA's routers (DejaVu, arXiv 2310.17157) on a model's own activations."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .._artifact import check_free
from .._files import write_atomically
from .._progress import steps
from ..errors import ConfigurationError
from ..methods.base import check_count
from ..models.families import find_mlps
from ..models.fingerprint import fingerprint
from ..models.forward import require_plain
from ..models.weights import MlpWeights
from ..routers.router import QUANTILES, LayerRouter, Router
from .calibrate import calibrate
from .router_data import LayerInputs, chunks, neuron_norms, read_windows, record
from .thresholds import Thresholds

RANKS = (1 / 16, 1 / 8, 1 / 4)  # of d, tried where no rank is given
_BATCH = 256
_RATE = 0.003


def train_router(
    model: nn.Module,
    tokenizer: Any = None,
    texts: Sequence[str] | str | os.PathLike[str] | None = None,
    *,
    cett: float = 0.2,
    recall: float = 0.92,
    rank: int | None = None,
    max_tokens: int = 32768,
    epochs: int = 6,
    thresholds: Thresholds | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Router:
    """A predictor of the active neurons for each layer, trained on what the model reads.

    Labels: neuron i is active for x where ||n_i(x)|| >= epsilon, epsilon at the CETT target
    (calibrated on the same texts, or `thresholds`). The predictor W_2 W_1 x + b starts from the
    truncated SVD of the gate (of up, where there is none) and is trained with a logistic loss in
    which active neurons weigh as much as inactive ones together, and more the larger their norm.
    Each layer's threshold is the largest whose recall on validation text is at least `recall`.

    rank: width between the two linear layers; None: of d/16, d/8 and d/4 the one that reads the
    fewest weights, r (d + f) + density * weights of the MLP, at that recall.
    texts: as for `calibrate`; None: the model writes its own. max_tokens: of text, 80 % of it to
    train on. out: directory for the router; finished layers are kept there, so that a training
    that was interrupted goes on. progress: a bar on stderr, if that is a terminal.

    Trains on the device of the model's weights; its global random state is left alone. Memory: up
    to 2 GiB of recorded inputs. The model is left as it was.

    Raises ConfigurationError for values or texts that cannot be used, PatchStateError for a patched
    model or one in training mode, UnsupportedModelError where the MLPs are not known, ArtifactError
    where `out` holds an artefact of another kind.
    """
    if out is not None:  # not after the training
        check_free(out, "router")
    _check(cett, recall, rank, max_tokens, epochs)
    sites = find_mlps(model)
    require_plain(model, sites)
    parts = read_windows(model, tokenizer, texts, max_tokens, seed)
    mark = fingerprint(model)
    if thresholds is None:
        thresholds = calibrate(
            model, tokenizer, texts, cett=cett, sequential=False, progress=progress, seed=seed
        )
    elif thresholds.fingerprint != mark:
        raise ConfigurationError(
            f"thresholds were calibrated on another model ({thresholds.fingerprint}, this one is "
            f"{mark}); leave them out, or calibrate this model"
        )
    key = _key(mark, thresholds, recall, rank, epochs, seed, parts.train)
    done = _Partial(out, key)
    layers = {i: layer for i in range(len(sites)) if (layer := done.load(i)) is not None}
    missing = [i for i in range(len(sites)) if i not in layers]
    with steps("router", progress) as show:
        for index, inputs in record(model, sites, missing, parts):
            show(f"layer {index + 1} of {len(sites)}", len(layers), len(sites))
            epsilon = thresholds.layers[index].epsilon
            weights = sites[index].weights()
            layers[index] = train_layer(inputs, weights, epsilon, recall, rank, epochs, seed)
            done.save(index, layers[index])
    router = Router(
        layers=tuple(layers[i] for i in range(len(sites))),
        fingerprint=mark,
        cett=thresholds.cett,
        recall=recall,
        tokens=parts.tokens,
        seed=seed,
        model=thresholds.model,
    )
    if out is not None:
        router.save_pretrained(out)
        done.clear(len(sites))
    return router


def _check(cett: float, recall: float, rank: int | None, max_tokens: int, epochs: int) -> None:
    for name, value in (("cett", cett), ("recall", recall)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise ConfigurationError(f"{name} is {value!r}; expected a number in (0, 1)")
    for name, count in (("rank", rank), ("max_tokens", max_tokens), ("epochs", epochs)):
        if count is not None:
            check_count(name, count)


def train_layer(
    inputs: LayerInputs,
    weights: MlpWeights,
    epsilon: float,
    recall: float,
    rank: int | None = None,
    epochs: int = 6,
    seed: int = 0,
) -> LayerRouter:
    """The predictor of one layer; see `train_router`."""
    d, f = weights.d, weights.f
    ranks = [rank] if rank is not None else sorted({max(1, round(share * d)) for share in RANKS})
    matrices = 3 if weights.gated else 2
    candidates = []
    for r in ranks:
        layer = _fit(inputs, weights, epsilon, recall, min(r, d), epochs, seed)
        candidates.append((layer.rank * (d + f) + layer.density * matrices * d * f, layer))
    return min(candidates, key=lambda pair: pair[0])[1]


def _fit(
    inputs: LayerInputs,
    weights: MlpWeights,
    epsilon: float,
    recall: float,
    rank: int,
    epochs: int,
    seed: int,
) -> LayerRouter:
    place = weights.device
    x = inputs.train.to(place).float()
    first, second, bias = _start(x, weights, epsilon, rank)
    parameters = [first, second, bias]
    steps = epochs * -(-len(x) // _BATCH)
    optimiser = torch.optim.Adam(parameters, lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps + 1)
    generator = torch.Generator().manual_seed(seed)
    scale = _positive_weight(inputs.train, weights, epsilon)
    seen = torch.zeros(weights.f, device=place)
    with torch.enable_grad():
        for _ in range(epochs):
            for batch in torch.randperm(len(x), generator=generator).split(_BATCH):
                rows = x[batch.to(place)]
                norms = neuron_norms(rows, weights)
                labels = (norms >= epsilon).float()
                seen += labels.sum(0)
                # A neuron twice the threshold costs twice as much to miss, up to four times.
                size = (norms / max(epsilon, 1e-30)).clamp(1, 4)
                weight = torch.where(labels > 0, scale * size, torch.ones_like(size))
                scores = rows @ first.t() @ second.t() + bias
                loss = F.binary_cross_entropy_with_logits(scores, labels, weight)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
    trained = [p.detach() for p in parameters]
    threshold, quantiles = _thresholds(inputs.validation, weights, epsilon, recall, *trained)
    rate = seen.cpu() / (epochs * len(x))
    return _measured(inputs.test, weights, epsilon, threshold, quantiles, rate, *trained)


def _start(
    x: Tensor, weights: MlpWeights, epsilon: float, rank: int
) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """W_1, W_2 from the SVD of what the gate does to inputs like these, and a bias of zero.

    Weighted by the inputs' second moments: directions that x never takes need no rank.
    """
    matrix = weights.rows(weights.first).float()
    moments = x.t() @ x / len(x)
    values, vectors = torch.linalg.eigh(moments)
    root = values.clamp_min(values.max() * 1e-6).sqrt()
    u, s, v = torch.linalg.svd((matrix @ vectors) * root, full_matrices=False)
    first = (v[:rank] / root) @ vectors.t()
    second = u[:, :rank] * s[:rank]
    # Scores of about unit size, whatever the scale of the weights.
    spread = (x[:1024] @ first.t() @ second.t()).std().clamp_min(1e-30)
    return (
        nn.Parameter(first.contiguous()),
        nn.Parameter((second / spread).contiguous()),
        nn.Parameter(torch.zeros(weights.f, device=x.device)),
    )


def _positive_weight(x: Tensor, weights: MlpWeights, epsilon: float) -> float:
    """(inactive / active) over a sample of tokens, within [1, 50]."""
    share = (neuron_norms(x[:2048], weights) >= epsilon).float().mean().item()
    return min(50.0, max(1.0, (1 - share) / max(share, 1e-6)))


def _thresholds(
    x: Tensor,
    weights: MlpWeights,
    epsilon: float,
    recall: float,
    first: Tensor,
    second: Tensor,
    bias: Tensor,
) -> tuple[float, Tensor]:
    """The largest threshold that meets the recall, and the quantiles of all scores."""
    found, scores = [], []
    for part in chunks(x):
        score = part.to(first.device).float() @ first.t() @ second.t() + bias
        found.append(score[neuron_norms(part, weights) >= epsilon])
        scores.append(score.flatten())
    active = torch.cat(found).sort().values.cpu()
    whole = torch.cat(scores).sort().values.cpu()
    places = torch.linspace(0, len(whole) - 1, QUANTILES, dtype=torch.float64).round().long()
    if len(active) == 0:  # a layer that is silent on this text
        return whole[-1].item() + 1.0, whole[places]
    missed = min(int((1 - recall) * len(active)), len(active) - 1)
    return active[missed].item(), whole[places]


def _measured(
    x: Tensor,
    weights: MlpWeights,
    epsilon: float,
    threshold: float,
    quantiles: Tensor,
    rate: Tensor,
    first: Tensor,
    second: Tensor,
    bias: Tensor,
) -> LayerRouter:
    counts = torch.zeros(4, dtype=torch.float64)  # hits, labels, predicted, all
    energy = torch.zeros(2, dtype=torch.float64)
    for part in chunks(x):
        norms = neuron_norms(part, weights)
        labels = norms >= epsilon
        score = part.to(first.device).float() @ first.t() @ second.t() + bias
        predicted = ~(score < threshold)
        sizes = [(labels & predicted).sum(), labels.sum(), predicted.sum()]
        counts += torch.tensor([*map(float, sizes), float(labels.numel())], dtype=torch.float64)
        squares = norms.double().square()
        found = [squares[labels & predicted].sum(), squares[labels].sum()]
        energy += torch.tensor([*map(float, found)], dtype=torch.float64)
    hits, positives, chosen, everything = counts.tolist()
    return LayerRouter(
        first=first.cpu(),
        second=second.cpu(),
        bias=bias.cpu(),
        quantiles=quantiles,
        rate=rate,
        epsilon=epsilon,
        threshold=threshold,
        recall=hits / positives if positives else 1.0,
        precision=hits / chosen if chosen else 1.0,
        density=chosen / everything,
        energy=(energy[0] / energy[1]).item() if positives else 1.0,
        labels=positives / everything,
    )


def _key(mark: str, thresholds: Thresholds, *settings: Any) -> str:
    """What a finished layer depends on."""
    text = json.dumps([mark, thresholds.epsilon.tolist(), settings])
    return hashlib.sha256(text.encode()).hexdigest()


class _Partial:
    """Finished layers in the directory of a router that is still being trained."""

    def __init__(self, out: str | os.PathLike[str] | None, key: str) -> None:
        self.folder = None if out is None else Path(out)
        self.key = key
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def _file(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"layer_{index:03d}.safetensors"

    def load(self, index: int) -> LayerRouter | None:
        """The layer, if it was trained with the same settings."""
        file = self._file(index)
        if file is None or not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except SafetensorError:
            return None  # half written by another program: train the layer again
        if metadata.get("key") != self.key:
            return None
        return LayerRouter(**tensors, **json.loads(metadata["numbers"]))

    def save(self, index: int, layer: LayerRouter) -> None:
        file = self._file(index)
        if file is None:
            return
        fields = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}
        tensors = {k: v.contiguous() for k, v in fields.items() if isinstance(v, Tensor)}
        numbers = {k: v for k, v in fields.items() if not isinstance(v, Tensor)}
        metadata = {"key": self.key, "numbers": json.dumps(numbers)}
        write_atomically(file, safetensors.torch.save(tensors, metadata))

    def clear(self, layers: int) -> None:
        for index in range(layers):
            file = self._file(index)
            if file is not None:
                file.unlink(missing_ok=True)
