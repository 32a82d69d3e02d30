"""lm-eval tasks on a patched model: the method governs what it would govern in generation.

lm-eval's likelihood tasks run context and answer in one forward, which never decodes, so that a
patch of decoding alone would score exactly like dense. Here the context is the prompt and the
answer's tokens are scored under the method, see `moyu_ext.scoring`. The context's last token counts
as decoded: it is the one that predicts the first token of the answer, and with a dense one answers
of one token (MMLU's letters) would score like dense under every method. Needs lm-eval.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigurationError
from ..patching.patch import is_patched, scoring
from . import task_data as source
from .corpus import Corpus

_ROWS = 8


@dataclass(frozen=True)
class Task:
    """A task by its name here; `kind` is how it is scored, `hub` lm-eval's own task that reads the
    hub's data set where there is no data folder."""

    name: str
    kind: str  # choice, mc2, endings, generate, word
    hub: str
    load: Callable[[Path], list[source.Document]]


def _words(data: Path) -> list[source.Document]:
    return source.last_words(Corpus(data).documents())


QA = "Question: {question}\nAnswer:"
TASKS = {
    task.name: task
    for task in (
        Task("mmlu", "choice", "mmlu", source.mmlu),
        Task("truthfulqa_mc1", "choice", "truthfulqa_mc1",
             partial(source.truthfulqa, multiple=False)),
        Task("truthfulqa_mc2", "mc2", "truthfulqa_mc2", partial(source.truthfulqa, multiple=True)),
        Task("winogrande", "endings", "winogrande", source.winogrande),
        Task("gsm8k", "generate", "gsm8k", source.gsm8k),
        Task("hellaswag", "choice", "hellaswag", source.hellaswag),
        Task("arc_easy", "choice", "arc_easy",
             partial(source.instructed, name="ARC-Easy", form=QA)),
        Task("arc_challenge", "choice", "arc_challenge",
             partial(source.instructed, name="ARC-Challenge", form=QA)),
        Task("piqa", "choice", "piqa", partial(source.instructed, name="piqa", form=QA)),
        Task("openbookqa", "choice", "openbookqa",
             partial(source.instructed, name="openbookqa", form="{question}")),
        Task("social_iqa", "choice", "social_iqa",
             partial(source.instructed, name="social_i_qa", form=QA)),
        Task("boolq", "choice", "boolq", source.boolq),
        Task("last_word", "word", "lambada_openai", _words),
    )
}  # fmt: skip


@dataclass(frozen=True)
class TaskScore:
    """A task's main metric: mean, standard error, documents, and its value per document."""

    task: str
    metric: str
    value: float
    stderr: float
    documents: int
    per_document: list[float]


def find_task(name: str) -> Task:
    """The task of this name. Raises ConfigurationError that lists the known ones."""
    if name not in TASKS:
        raise ConfigurationError(f"task is {name!r}; expected one of {', '.join(TASKS)}")
    return TASKS[name]


def check_tasks(names: Sequence[str], data: Path | None) -> None:
    """Raise ConfigurationError for unknown tasks, files that are not there or hold something else,
    and where tasks are wanted and lm-eval is missing."""
    for task in [find_task(name) for name in names]:
        if data is not None and not task.load(data):
            raise ConfigurationError(f"{task.name}: no documents in {data}")
    if names:
        load_lm_eval()


def load_lm_eval() -> Any:
    """lm-eval. Raises ConfigurationError with the pip command where it is missing."""
    try:
        import lm_eval
    except ImportError as error:
        raise ConfigurationError(
            'tasks need the package lm-eval: pip install "moyu_ext[eval]", or pip install lm-eval'
        ) from error
    return lm_eval


def configuration(task: Task, data: Path) -> dict[str, Any]:
    """lm-eval's configuration of a task on the data folder's documents."""
    documents = task.load(data)
    common: dict[str, Any] = {
        "task": f"moyu_{task.name}",
        "custom_dataset": lambda **_: {"test": _dataset(documents)},
        "test_split": "test",
        "target_delimiter": " ",
        "metadata": {"version": 1.0},
    }
    accuracy = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    if task.kind == "choice":
        return common | {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": accuracy,
        }
    if task.kind == "mc2":
        return common | {
            "output_type": "multiple_choice",
            "doc_to_text": "{{query}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "process_results": true_mass,
            "metric_list": accuracy,
        }
    if task.kind == "endings":
        return common | {
            "output_type": "multiple_choice",
            "doc_to_text": lambda doc: doc["gold"],
            "doc_to_choice": lambda doc: doc["contexts"],
            "doc_to_target": lambda doc: doc["ending"],
            "metric_list": accuracy,
        }
    if task.kind == "word":
        return common | {
            "output_type": "loglikelihood",
            "doc_to_text": "{{query}}",
            "doc_to_target": "{{target}}",
            "metric_list": [
                *accuracy,
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        }
    return common | {
        "output_type": "generate_until",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{target}}",
        "process_results": number_matches,
        "generation_kwargs": {
            "until": ["Question:", "\n\n"], "do_sample": False, "max_gen_toks": 128
        },
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip


def _dataset(documents: list[source.Document]) -> Any:
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable

    # A name of our own: Dataset.from_list pickles all documents to make one up, and fails at that
    # with some versions of its packages.
    name = hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:16]
    return Dataset(InMemoryTable(pyarrow.Table.from_pylist(documents)), fingerprint=name)


def true_mass(doc: source.Document, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """mc2: the share of the answers' probability that lies on true ones."""
    scores = torch.tensor([score for score, _ in results], dtype=torch.float64)
    labels = torch.tensor(doc["gold"], dtype=torch.float64)
    return {"acc": (scores.softmax(0) * labels).sum().item()}


def number_matches(doc: source.Document, results: Sequence[str]) -> dict[str, float]:
    """gsm8k: whether the number behind the first "####" is the right one; without it, wrong."""
    answer = re.search(r"####\s*\$?(-?[\d.,]+)", results[0])
    found = answer[1].rstrip(".,").replace(",", "") if answer else ""
    return {"exact_match": float(found == doc["target"].replace(",", ""))}


def governed_lm(model: Any, tokenizer: Any) -> Any:
    """lm-eval's HFLM around the model, with continuations scored under the model's method."""
    load_lm_eval()
    from lm_eval.models.huggingface import HFLM

    class GovernedLM(HFLM):
        """HFLM whose likelihood requests treat the context as a prompt."""

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            order = sorted(
                range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2])
            )
            found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            for start in range(0, len(order), _ROWS):
                chosen = order[start : start + _ROWS]
                pairs = [(requests[i][1], requests[i][2]) for i in chosen]
                for i, score in zip(
                    chosen, score_pairs(self.model, pairs, self.max_length), strict=True
                ):
                    found[i] = score
            return found

    begins = getattr(tokenizer, "bos_token_id", None) is not None
    return GovernedLM(
        pretrained=model, tokenizer=tokenizer, batch_size=1, add_bos_token=begins or None
    )


def score_pairs(
    model: Any, pairs: Sequence[tuple[list[int], list[int]]], longest: int
) -> list[tuple[float, bool]]:
    """(log likelihood of the continuation, whether it is the greedy one) of each (context,
    continuation) in ids. Where the model is patched, its method governs every token that predicts
    one of the continuation; what is before them is the prompt.

    Contexts lose their beginning where the whole is longer than `longest` tokens.
    """
    rows = [(context + continuation)[-longest:] for context, continuation in pairs]
    counts = [len(continuation) for _, continuation in pairs]
    lengths = [len(row) - count for row, count in zip(rows, counts, strict=True)]
    if min(lengths) < 1:
        raise ConfigurationError(
            f"a continuation of {max(counts)} tokens leaves no context within {longest} tokens"
        )
    place = next(model.parameters()).device
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    real = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows]).unsqueeze(1)
    governed = is_patched(model)
    prompts = [length - 1 for length in lengths]
    with torch.no_grad(), scoring(model, prompts) if governed else nullcontext():
        logits = model(input_ids=ids.to(place), attention_mask=real.long().to(place)).logits
    found = []
    for row, length, count, scores in zip(rows, lengths, counts, logits.float().cpu(), strict=True):
        target = torch.tensor(row[length:])
        steps = scores[length - 1 : length - 1 + count].log_softmax(-1)
        value = steps.gather(1, target.unsqueeze(1)).sum().item()
        found.append((value, bool((steps.argmax(1) == target).all())))
    return found


def run_tasks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    data: Path | None,
    limit: int | None = None,
    seed: int = 0,
) -> list[TaskScore]:
    """Scores of the tasks on the model, patched or not.

    data: the data folder; None: lm-eval's own tasks with the hub's data sets. limit: documents of
    each task (of each subject for lm-eval's mmlu). Raises ConfigurationError for unknown tasks, a
    missing package or a missing file.
    """
    tasks = [find_task(name) for name in names]
    lm_eval = load_lm_eval()
    # Its notes on a model that is passed in, and on data sets that are functions, help nobody here.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    specs = [task.hub if data is None else configuration(task, data) for task in tasks]
    outcome = lm_eval.simple_evaluate(
        model=governed_lm(model, tokenizer),
        tasks=specs,
        limit=limit,
        bootstrap_iters=0,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    found = []
    for task in tasks:
        key = task.hub if data is None else f"moyu_{task.name}"
        samples = [
            sample
            for name, group in outcome["samples"].items()
            if name == key or name.startswith(f"{key}_")
            for sample in group
        ]
        metric = "exact_match" if task.kind == "generate" else "acc"
        # lm-eval's own gsm8k reads each answer in two ways: the first one counts.
        way = samples[0].get("filter") if samples else None
        values = [
            float(sample[metric])
            for sample in samples
            if metric in sample and sample.get("filter") == way
        ]
        found.append(_score(task.name, metric, values))
    return found


def _score(name: str, metric: str, values: list[float]) -> TaskScore:
    if not values:
        raise ConfigurationError(f"task {name}: lm-eval returned no {metric} values")
    t = torch.tensor(values, dtype=torch.float64)
    stderr = t.std().item() / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return TaskScore(name, metric, t.mean().item(), stderr, len(values), values)
