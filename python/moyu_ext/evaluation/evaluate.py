"""Quality of methods against dense on one model: the measurements behind `moyu eval`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import write_atomically
from ..errors import ConfigurationError
from ..methods.base import Method
from ..methods.online_roda import OnlineRODA
from ..methods.roda import RODA
from ..models.fingerprint import fingerprint
from .agreement import (
    Comparison,
    compare,
    continuation_logits,
    dense_text,
    from_logits,
    patched,
)
from .curves import Point
from .inputs import input_thresholds, masked_inputs
from .perplexity import perplexity
from .record import clean, versions
from .rouge import MEASURES, Item, rouge, summarise
from .router_recall import router_recall
from .statistics import bootstrap, sign_flip_p
from .tasks import TaskScore, run_tasks

INPUT_SPARSITIES = (0.3, 0.5, 0.67, 0.8)  # of the TEAL-like reference
_MEANING = 2  # counts up where a number's meaning changes, so that no file mixes two
TEAL = "input thresholds (TEAL), masked"


@dataclasses.dataclass
class Evaluation:
    """What methods are measured on.

    rows: ids [n, length], a prompt of `context` tokens and a continuation that is scored; without
    them nothing is compared. new_tokens: of text that the dense model writes behind the prompts,
    scored likewise; 0: none. ids: 1-D, for perplexity over sliding windows (per-token methods are
    then built with prefill=True; sequence-level ones have no such regime). tasks: names of
    `tasks.TASKS`, with `data` and `limit`; summaries: name -> items, with prompts of at most
    `prompt_tokens` and summaries of `summary_tokens`. calibration: ids [n, length] for the input
    thresholds. basis: what else results depend on, such as `Workshop.identity()`.
    """

    model: Any
    tokenizer: Any
    rows: Tensor | None
    context: int
    new_tokens: int = 0
    ids: Tensor | None = None
    tasks: Sequence[str] = ()
    data: Path | None = None
    limit: int | None = None
    summaries: dict[str, list[Item]] = dataclasses.field(default_factory=dict)
    prompt_tokens: int = 384
    summary_tokens: int = 64
    calibration: Tensor | None = None
    basis: str = ""
    seed: int = 0
    log: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self._dense: tuple[Tensor, Tensor, Tensor] | None = None
        self._baseline: dict[str, Any] = {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """That of the model's weights."""
        return fingerprint(self.model)

    @functools.cached_property
    def _common(self) -> str:
        rows = None if self.rows is None else self.rows.tolist()
        ids = None if self.ids is None else self.ids.tolist()
        summaries = {k: [i.prompt for i in v] for k, v in self.summaries.items()}
        content = [
            _MEANING,
            *(self.fingerprint, str(next(self.model.parameters()).dtype), self.basis),
            *(rows, self.context, self.new_tokens, ids, list(self.tasks), self.limit, summaries),
            *(self.prompt_tokens, self.summary_tokens, self.seed, versions()),
        ]
        return _digest(content)

    def key(self, label: str, basis: str = "") -> str:
        """What the results of the configuration of this name depend on."""
        return _digest([self._common, label, basis])

    def measure(self, point: Point) -> dict[str, Any]:
        """All results of one point. The model comes unpatched and is left so."""
        method = point.make()
        found: dict[str, Any] = {
            "method": point.curve,
            "setting": point.setting,
            "configuration": repr(method),
            "key": self.key(point.label, point.basis),
        }
        if self.rows is not None:
            found |= self._compared(method)
        if self.ids is not None:
            found["sliding_perplexity"] = self._sliding(method)
        if self.tasks:
            found["tasks"] = self._tasks(method)
        if self.summaries:
            found["rouge"] = self._rouge(method)
        return found

    def reference(self, sparsity: float) -> dict[str, Any]:
        """The TEAL-like input thresholds, quality only (see `inputs`)."""
        assert self.rows is not None and self.calibration is not None
        rows, dense, _ = self._texts()
        cut = input_thresholds(self.model, self.calibration, sparsity)
        with masked_inputs(self.model, cut, self.context, rows.shape[1]) as count:
            ours = continuation_logits(self.model, rows, self.context)
        # It needs no more than the inputs to know which columns of every matrix it reads.
        share = count.density
        comparison = from_logits(dense, ours, rows[:, self.context :], count.density, share)
        found = {"method": TEAL, "setting": f"{sparsity:.0%} asked"}
        found["key"] = self.key(f"{TEAL}, {sparsity}")
        return found | self._numbers(comparison)

    def _texts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows, dense logits on them, and the rows as the dense model continues them."""
        assert self.rows is not None
        if self._dense is None:
            self.log("dense logits")
            dense = continuation_logits(self.model, self.rows, self.context)
            written = self.rows[:, :0]
            if self.new_tokens:
                self.log("the dense model writes")
                written = dense_text(self.model, self.rows[:, : self.context], self.new_tokens)
            self._dense = (self.rows, dense, written)
        return self._dense

    def _compared(self, method: Method) -> dict[str, Any]:
        rows, dense, written = self._texts()
        found = self._numbers(compare(self.model, method, rows, self.context, dense))
        if isinstance(method, (RODA, OnlineRODA)):
            recall = router_recall(self.model, method, rows, self.context)
            found |= {f"router_{name}": recall.mean(name) for name in ("recall", "precision")}
        if written.shape[1]:
            generated = compare(self.model, method, written, self.context)
            found["generated_agreement"] = generated.agreement.mean().item()
            found["generated_kl"] = generated.kl.mean().item()
            found["generated_density"] = generated.density
        return found

    def _numbers(self, comparison: Comparison) -> dict[str, Any]:
        gap = comparison.loss - comparison.dense_loss
        interval = bootstrap(gap, self.seed)
        return {
            "density": comparison.density,
            "read": comparison.share,
            "perplexity": comparison.perplexity,
            "dense_perplexity": comparison.dense_perplexity,
            "change": comparison.change,
            "loss_rise": interval.mean,
            "loss_rise_low": interval.low,
            "loss_rise_high": interval.high,
            "p": sign_flip_p(gap, self.seed),
            "agreement": comparison.agreement.mean().item(),
            "kl": comparison.kl.mean().item(),
            "texts": len(gap),
        }

    def _sliding(self, method: Method) -> float | None:
        if method.level == "sequence":
            return None
        if any(field.name == "prefill" for field in dataclasses.fields(method)):  # type: ignore[arg-type]
            method = dataclasses.replace(method, prefill=True)  # type: ignore[type-var]
        with patched(self.model, method):
            return perplexity(self.model, self.ids).perplexity

    def _tasks(self, method: Method) -> dict[str, Any]:
        with patched(self.model, None if method.level == "none" else method):
            scores = run_tasks(
                self.model, self.tokenizer, self.tasks, self.data, self.limit, self.seed
            )
        if method.level == "none":
            self._baseline |= {score.task: score for score in scores}
        return {score.task: self._task(score) for score in scores}

    def _task(self, score: TaskScore) -> dict[str, Any]:
        found = {
            "metric": score.metric,
            "value": score.value,
            "stderr": score.stderr,
            "documents": score.documents,
            "per_document": score.per_document,
        }
        dense = self._baseline.get(score.task)
        if dense is not None and dense is not score:
            gap = torch.tensor(score.per_document) - torch.tensor(dense.per_document)
            found["difference"] = gap.mean().item()
            found["p"] = sign_flip_p(gap, self.seed)
        return found

    def _rouge(self, method: Method) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, items in self.summaries.items():
            with patched(self.model, method):
                texts = summarise(
                    self.model, self.tokenizer, items, self.prompt_tokens, self.summary_tokens
                )
            scores = rouge(texts, [item.reference for item in items])
            key = f"rouge {name}"
            if method.level == "none":
                self._baseline[key] = scores
            dense = self._baseline.get(key)
            found[name] = {
                measure: self._measure(values, None if dense is scores else dense, measure)
                for measure, values in scores.items()
            }
            found[name]["items"] = len(items)
        return found

    def _measure(
        self, values: list[float], dense: dict[str, list[float]] | None, name: str
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"value": 100 * sum(values) / len(values), "per_item": values}
        if dense is not None:
            gap = torch.tensor(values) - torch.tensor(dense[name])
            found["p"] = sign_flip_p(gap, self.seed)
        return found

    def restore(self, row: dict[str, Any]) -> None:
        """Take a finished dense row as the baseline of significance, after a resume."""
        for task, score in row.get("tasks", {}).items():
            names = ("metric", "value", "stderr", "documents", "per_document")
            self._baseline[task] = TaskScore(task, *(score[name] for name in names))
        for name, scores in row.get("rouge", {}).items():
            self._baseline[f"rouge {name}"] = {m: scores[m]["per_item"] for m in MEASURES}


def run(
    evaluation: Evaluation, chosen: Sequence[Point], path: Path | None, reference: bool = False
) -> dict[str, Any]:
    """Measure the points in order, dense first, and with `reference` the input thresholds; returns
    what the file holds.

    path: JSON file, written after every point. Rows that it has already are taken from it, so that
    an interrupted run goes on; rows of other settings are dropped from it.
    """
    ordered = sorted(chosen, key=lambda point: point.curve != "dense")
    work = [
        (evaluation.key(p.label, p.basis), p.label, functools.partial(evaluation.measure, p))
        for p in ordered
    ]
    if reference and evaluation.rows is not None and evaluation.calibration is not None:
        work += [
            (
                evaluation.key(f"{TEAL}, {s}"),
                f"{TEAL}, {s:.0%}",
                functools.partial(evaluation.reference, s),
            )
            for s in INPUT_SPARSITIES
        ]
    found = _known(path)
    found = {key: found[key] for key, _, _ in work if key in found}
    if ordered and ordered[0].curve == "dense" and work[0][0] in found:
        evaluation.restore(found[work[0][0]])
    if found:
        evaluation.log(f"{len(found)} of {len(work)} are in {path} already")
    content = _content(evaluation, [])
    for number, (key, label, measure) in enumerate(work, 1):
        if key not in found:
            evaluation.log(f"{number} of {len(work)}: {label}")
            found[key] = measure()
        # All that is known, also what comes later in the order: none of it is measured twice.
        rows = [found[key] for key, _, _ in work if key in found]
        content = _content(evaluation, rows)
        if path is not None:
            write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return content


def brief(content: dict[str, Any]) -> dict[str, Any]:
    """The results without the values of each document and item."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if k not in ("per_document", "per_item")}
            return {k: strip(v) for k, v in kept.items()}
        return [strip(item) for item in value] if isinstance(value, list) else value

    found: dict[str, Any] = strip(content)
    return found


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _known(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None or not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {row["key"]: row for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} is not a file that `moyu eval` wrote ({error}); name another, or delete it"
        ) from error


def _content(evaluation: Evaluation, rows: list[dict[str, Any]]) -> dict[str, Any]:
    config = getattr(evaluation.model, "config", None)
    name = os.path.basename(getattr(config, "_name_or_path", "") or "model")
    rows_used = evaluation.rows
    content = {
        "command": "eval",
        "model": name,
        "fingerprint": evaluation.fingerprint,
        "dtype": str(next(evaluation.model.parameters()).dtype).removeprefix("torch."),
        "seed": evaluation.seed,
        "context": evaluation.context,
        "continuation": None if rows_used is None else rows_used.shape[1] - evaluation.context,
        "new_tokens": evaluation.new_tokens,
        "limit": evaluation.limit,
        "versions": versions(),
        "rows": rows,
    }
    cleaned: dict[str, Any] = clean(content)
    return cleaned
