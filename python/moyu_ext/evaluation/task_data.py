"""The paper's benchmarks and a few more, read from the data folder into one form.

Each loader gives documents: {"query", "choices", "gold"} for multiple choice, {"query", "choices",
"gold": labels} for TruthfulQA's mc2, {"contexts", "ending", "gold"} where the contexts differ and
the ending is scored (WinoGrande), {"query", "target"} for the others.
"""

from __future__ import annotations

import bz2
import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError

Document = dict[str, Any]
LETTERS = "ABCD"


def read(path: Path, reader: Callable[[Path], Any]) -> Any:
    """The file's content. Raises ConfigurationError where it is not there or is something else."""
    try:
        return reader(path)
    except OSError as error:
        raise ConfigurationError(
            f"cannot read {path} ({error.strerror}); pass --data with a folder that has bench/"
        ) from error
    except (ValueError, KeyError, csv.Error) as error:
        raise ConfigurationError(f"{path} is not the file that was expected ({error})") from error


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def mmlu(data: Path) -> list[Document]:
    """57 subjects, in the letter form, each with five examples of its subject in front."""
    documents = []
    folder = data / "bench" / "mmlu"
    tests = sorted((folder / "test").glob("*_test.csv"))
    if not tests:
        raise ConfigurationError(
            f"mmlu: no *_test.csv in {folder / 'test'}; pass --data with bench/mmlu"
        )
    for file in tests:
        subject = file.name.removesuffix("_test.csv")
        examples = read(folder / "dev" / f"{subject}_dev.csv", _csv)[:5]
        name = subject.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {name}.\n\n"
        head += "".join(f"{_lettered(row)} {LETTERS[int(row['answer'])]}\n\n" for row in examples)
        documents += [
            {
                "query": head + _lettered(row),
                "choices": list(LETTERS),
                "gold": int(row["answer"]),
                "group": subject,
            }
            for row in read(file, _csv)
        ]
    return _spread(documents)


def _lettered(row: dict[str, str]) -> str:
    choices = "".join(f"\n{letter}. {row[f'choice{i}']}" for i, letter in enumerate(LETTERS))
    return f"{row['question'].strip()}{choices}\nAnswer:"


def _spread(documents: list[Document]) -> list[Document]:
    """One of each group in turn, so that a limit still sees every subject."""
    places: dict[str, int] = {}
    keyed = []
    for number, document in enumerate(documents):
        group = document["group"]
        places[group] = places.get(group, 0) + 1
        keyed.append((places[group], number, document))
    return [document for _, _, document in sorted(keyed, key=lambda item: item[:2])]


def truthfulqa(data: Path, multiple: bool) -> list[Document]:
    """mc1 (the best answer among the wrong ones) or, with `multiple`, mc2 (all true answers)."""
    documents = []
    for row in read(data / "bench" / "truthfulqa" / "TruthfulQA.csv", _csv):
        wrong = _split(row["Incorrect Answers"])
        true = _split(row["Correct Answers"]) if multiple else [row["Best Answer"].strip()]
        documents.append(
            {
                "query": f"Q: {row['Question'].strip()}\nA:",
                "choices": true + wrong,
                "gold": [1] * len(true) + [0] * len(wrong) if multiple else 0,
            }
        )
    return documents


def _split(answers: str) -> list[str]:
    return [answer.strip() for answer in answers.split(";") if answer.strip()]


def _commonsense(data: Path, name: str) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = read(data / "bench" / "commonsense" / f"{name}.test.json", _json)
    return rows


_NUMBERED = re.compile(r"(?:Answer|Solution|Option|Ending)(\d):\s*")


def numbered_choices(text: str) -> tuple[str, list[str]]:
    """ "question: Why? Answer1: a Answer2: b Answer format: ..." -> ("Why?", ["a", "b"])."""
    text = re.split(r"\s*Answer format:", text)[0]
    parts = _NUMBERED.split(text)
    question = re.sub(r"^.*?(?:question|sentence):\s*", "", parts[0], count=1, flags=re.S).strip()
    choices = [part.strip() for part in parts[2::2]]
    if len(choices) < 2:
        raise ValueError(f"no choices in {text[:60]!r}")
    return question, choices


def instructed(data: Path, name: str, form: str) -> list[Document]:
    """ARC, OpenBookQA, SIQA and PIQA from their instruction form; `form` has a {question}."""
    documents = []
    for row in _commonsense(data, name):
        question, choices = numbered_choices(row["instruction"])
        gold = int(re.sub(r"\D", "", row["answer"])) - 1
        query = form.format(question=question)
        documents.append({"query": query, "choices": choices, "gold": gold})
    return documents


def boolq(data: Path) -> list[Document]:
    """Yes-or-no questions, without the passage (the file has none)."""
    documents = []
    for row in _commonsense(data, "boolq"):
        question = row["instruction"].split("question: ", 1)[1].split("\n\nAnswer format")[0]
        gold = int(row["answer"] == "true")
        query = f"Question: {question.strip().capitalize()}\nAnswer:"
        documents.append({"query": query, "choices": ["no", "yes"], "gold": gold})
    return documents


def winogrande(data: Path) -> list[Document]:
    """The sentence up to and with each option is a context; what follows it is scored."""
    documents = []
    for row in _commonsense(data, "winogrande"):
        sentence, options = numbered_choices(row["instruction"])
        before, ending = sentence.split("_", 1)
        gold = int(re.sub(r"\D", "", row["answer"])) - 1
        contexts = [before + option for option in options]
        documents.append({"contexts": contexts, "ending": ending.strip(), "gold": gold})
    return documents


def hellaswag(data: Path) -> list[Document]:
    """Six lines an item: the context, the number of the right ending, four endings."""
    path = data / "bench" / "hellaswag" / "hellaswag_val_full.txt.bz2"
    text = read(path, lambda p: bz2.decompress(p.read_bytes()).decode("utf-8"))
    lines = text.splitlines()
    return [
        {"query": lines[i], "choices": lines[i + 2 : i + 6], "gold": int(lines[i + 1])}
        for i in range(0, len(lines) - 5, 6)
    ]


def gsm8k(data: Path, examples: int = 3) -> list[Document]:
    """School mathematics, answered in words that end in "#### number"."""
    folder = data / "bench" / "gsm8k"
    form = "Question: {question}\nAnswer:"

    def lines(path: Path) -> list[dict[str, str]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    shown = read(folder / "train.jsonl", lines)[:examples]
    head = "".join(f"{form.format(**row)} {row['answer']}\n\n" for row in shown)
    return [
        {"query": head + form.format(**row), "target": row["answer"].split("####")[-1].strip()}
        for row in read(folder / "test.jsonl", lines)
    ]


def last_words(texts: list[str], words: int = 60) -> list[Document]:
    """LAMBADA's form on other text: the last word of a sentence, from the passage before it."""
    documents = []
    for text in texts:
        found = text.split()
        ends = [
            i for i, word in enumerate(found) if i >= words // 2 and re.fullmatch(r"\w+\.", word)
        ]
        if ends:
            end = min(ends, key=lambda i: abs(i - words))
            word = found[end].rstrip(".")
            documents.append({"query": " ".join(found[max(0, end - words) : end]), "target": word})
    return documents
