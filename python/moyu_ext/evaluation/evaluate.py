"""Quality of methods against dense on one model: the measurements behind `moyu eval`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import write_atomically
from ..calibration.thresholds import fingerprint
from ..errors import ConfigurationError
from ..methods.base import Method
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
from .statistics import bootstrap, sign_flip_p
from .tasks import TaskScore, run_tasks

INPUT_SPARSITIES = (0.3, 0.5, 0.67, 0.8)  # of the TEAL-like reference


@dataclasses.dataclass
class Evaluation:
    """What methods are measured on.

    rows: ids [n, length], a prompt of `context` tokens and a continuation that is scored; without
    them nothing is compared. new_tokens: of text that the dense model writes behind the prompts,
    scored likewise; 0: none. ids: 1-D, for perplexity over sliding windows (per-token methods are
    then built with prefill=True; sequence-level ones have no such regime). tasks: names of
    `tasks.TASKS`, with `data` and `limit`; summaries: name -> items, with prompts of at most
    `prompt_tokens` and summaries of `summary_tokens`.
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
    seed: int = 0
    log: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self._dense: tuple[Tensor, Tensor, Tensor] | None = None
        self._baseline: dict[str, Any] = {}

    def key(self, point: Point) -> str:
        """What a point's result depends on."""
        rows = None if self.rows is None else self.rows.tolist()
        ids = None if self.ids is None else self.ids.tolist()
        summaries = {k: [i.prompt for i in v] for k, v in self.summaries.items()}
        content = [
            *(fingerprint(self.model), str(next(self.model.parameters()).dtype), point.label),
            *(rows, self.context, self.new_tokens, ids, list(self.tasks), self.limit, summaries),
            *(self.prompt_tokens, self.summary_tokens, self.seed, versions()),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]

    def measure(self, point: Point) -> dict[str, Any]:
        """All results of one point. The model comes unpatched and is left so."""
        method = point.make()
        found: dict[str, Any] = {
            "method": point.curve,
            "setting": point.setting,
            "configuration": repr(method),
            "key": self.key(point),
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

    def reference(self) -> list[dict[str, Any]]:
        """The TEAL-like input thresholds, quality only (see `inputs`)."""
        if self.rows is None:
            return []
        rows, dense, _ = self._texts()
        found = []
        for sparsity in INPUT_SPARSITIES:
            cut = input_thresholds(self.model, rows[:, : self.context], sparsity)
            with masked_inputs(self.model, cut, self.context) as count:
                ours = continuation_logits(self.model, rows, self.context)
            comparison = from_logits(dense, ours, rows[:, self.context :], count.density)
            row = {"method": "input thresholds (TEAL), masked", "setting": f"{sparsity:.0%} asked"}
            found.append(row | self._numbers(comparison))
        return found

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
) -> list[dict[str, Any]]:
    """Measure the points in order, dense first; rows that `path` has already are taken from it.

    path: JSON file, written after every point, so that an interrupted run goes on.
    """
    ordered = sorted(chosen, key=lambda point: point.curve != "dense")
    known = _known(path)
    rows: list[dict[str, Any]] = []
    for number, point in enumerate(ordered, 1):
        row = known.get(evaluation.key(point))
        if row is None:
            evaluation.log(f"{number} of {len(ordered)}: {point.label}")
            row = evaluation.measure(point)
        elif point.curve == "dense":
            evaluation.restore(row)
        rows.append(row)
        _write(path, evaluation, rows)
    if reference:
        rows += evaluation.reference()
        _write(path, evaluation, rows)
    return rows


def _known(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None or not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {row["key"]: row for row in rows if "key" in row}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} is not a file that `moyu eval` wrote ({error}); name another, or delete it"
        ) from error


def _write(path: Path | None, evaluation: Evaluation, rows: list[dict[str, Any]]) -> None:
    if path is None:
        return
    config = getattr(evaluation.model, "config", None)
    content = {
        "command": "eval",
        "model": Path(getattr(config, "_name_or_path", "") or "model").name,
        "fingerprint": fingerprint(evaluation.model),
        "seed": evaluation.seed,
        "context": evaluation.context,
        "versions": versions(),
        "rows": rows,
    }
    write_atomically(path, (json.dumps(clean(content), indent=1) + "\n").encode())
