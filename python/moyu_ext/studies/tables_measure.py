"""What `tables` measures: accuracy with and without heavy hitters, ROUGE, rows of latency."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError
from ..evaluation.agreement import patched
from ..evaluation.rouge import load_items, rouge, summarise
from ..evaluation.tasks import find_task, number_matches
from ..methods.base import Method
from ..models.text import encode, longest_window
from ..patching.patch import report, scoring
from .activity import mask_arguments
from .attention import chosen_tokens, mask_without, received_attention
from .setting import Subject

BUDGET = 0.2  # share of the context's tokens removed in Table 5


@dataclass(frozen=True)
class Cell:
    """One cell: a value with how it came about, or a reason why there is none.

    kind: "measured" (error: standard error, count: documents), "quoted" (the paper's own), "row"
    (from a file of benchmark rows), or "empty".
    """

    kind: str
    value: float | None = None
    error: float | None = None
    count: int = 0
    reason: str = ""


def mean_cell(values: Sequence[float], scale: float = 100.0) -> Cell:
    """Mean and standard error of values per document, in percent."""
    t = torch.tensor(values, dtype=torch.float64) * scale
    error = t.std().item() / len(t) ** 0.5 if len(t) > 1 else float("nan")
    return Cell("measured", t.mean().item(), error, len(t))


def options(tokenizer: Any, document: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(context, answer) in ids for every choice of a document of `task_data`."""
    contexts = document.get("contexts") or [document["query"]] * len(document["choices"])
    answers = document.get("choices") or [document["ending"]] * len(contexts)
    pairs = []
    for context, answer in zip(contexts, answers, strict=True):
        head = encode(tokenizer, context)
        whole = encode(tokenizer, f"{context} {answer.strip()}")
        pairs.append((head, whole[len(head) :] or whole[-1:]))
    return pairs


def likelihoods(
    subject: Subject, pairs: Sequence[tuple[list[int], list[int]]], without_heavy: bool
) -> Tensor:
    """log p(answer | context) of each pair, [pairs]; the model may be patched, its method then
    governs the answer. without_heavy: the context's heavy hitters are masked from attention."""
    longest = longest_window(subject.model)
    rows = [(head + tail)[-longest:] for head, tail in pairs]
    lengths = [len(row) - len(tail) for row, (_, tail) in zip(rows, pairs, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    extra: dict[str, Any] = {}
    if without_heavy:
        generator = torch.Generator()
        masks = []
        for row, length in zip(ids, lengths, strict=True):
            scores = received_attention(subject.model, row[:length].unsqueeze(0))
            removed = chosen_tokens(scores, BUDGET, "heavy", generator)
            masks.append(mask_without(removed, ids.shape[1]))
        extra = mask_arguments(torch.cat(masks), slice(None))
    with torch.no_grad(), scoring(subject.model, lengths):
        logits = subject.model(input_ids=ids, **extra).logits.float()
    found = []
    for row, length, scores in zip(rows, lengths, logits, strict=True):
        target = torch.tensor(row[length:])
        steps = F.log_softmax(scores[length - 1 : len(row) - 1], -1)
        found.append(steps.gather(1, target.unsqueeze(1)).sum())
    return torch.stack(found)


def accuracy(
    subject: Subject, method: Method, task: str, data: Path, limit: int, without_heavy: bool
) -> tuple[list[float], float]:
    """1 or 0 for each of the first `limit` documents, and the realised density of the answers."""
    documents = find_task(task).load(data)[:limit]
    if find_task(task).kind == "generate":
        return _generated(subject, method, documents)
    found = []
    with patched(subject.model, method):
        for document in documents:
            scores = likelihoods(subject, options(subject.tokenizer, document), without_heavy)
            found.append(float(scores.argmax().item() == document["gold"]))
        return found, report(subject.model).density


def _generated(
    subject: Subject, method: Method, documents: Sequence[dict[str, Any]]
) -> tuple[list[float], float]:
    new, found = 48, []
    longest = longest_window(subject.model) - new
    with patched(subject.model, method):
        for document in documents:
            ids = torch.tensor([encode(subject.tokenizer, document["query"])[-longest:]])
            with torch.no_grad():
                out = subject.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=0,
                )
            text = subject.tokenizer.decode(out[0, ids.shape[1] :].tolist())
            answer = text.split("Question:")[0].split("\n\n")[0]
            found.append(number_matches(document, [answer])["exact_match"])
        return found, report(subject.model).density


def summaries(
    subject: Subject, method: Method, data: Path, name: str, limit: int, prompt: int, new: int
) -> dict[str, list[float]]:
    """ROUGE F1 per item and measure. Raises ConfigurationError for missing data or package."""
    items = load_items(data, name, limit)
    rouge([""], [""])  # a missing package is told before the work
    with patched(subject.model, method):
        texts = summarise(subject.model, subject.tokenizer, items, prompt, new)
    return rouge(texts, [item.reference for item in items])


@dataclass(frozen=True)
class Latency:
    """A row of `moyu bench decode` or `benchmarks/decode_cuda.py`, and where it was found.

    setup: "per token", or "1024+128" where `milliseconds` is of a whole generation, of so many
    tokens of prompt and new ones.
    """

    method: str
    setup: str
    geometry: str
    density: float
    milliseconds: float
    speedup: float
    device: str
    where: str


def committed_rows() -> list[Path]:
    """The repository's files of decode rows, where they are: they are not part of the package."""
    results = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
    return [file for name in ("cpu", "cuda_decode") if (file := results / f"{name}.csv").is_file()]


def latencies(path: Path) -> list[Latency]:
    """The rows of whole models in a CSV or JSON file of benchmark rows.

    Raises ConfigurationError where the file cannot be read as one.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rows = json.loads(text)["rows"]
        else:
            rows = list(csv.DictReader(text.splitlines()))
        return [
            Latency(
                method=row["method"],
                setup=_setup(row["name"]),
                geometry=row["geometry"],
                density=float(row["density"]),
                milliseconds=float(row["median_us"]) / 1e3,
                speedup=float(row["speedup_vs_dense"]),
                device=row["device"],
                where=f"{path.name} row {number}, commit {row['commit']}",
            )
            for number, row in enumerate(rows, 1)
            if row["name"] == "decode" or row["name"].startswith("generate-")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} holds no rows of `moyu bench decode` ({error!r}); expected its --json or "
            "--csv file"
        ) from error


def _setup(name: str) -> str:
    """Of "decode", or of "generate-1024+128-static"."""
    return "per token" if name == "decode" else name.split("-")[1]
