"""Tables 1-5 of the paper with its own figures beside what is measured here.

Every cell is measured, a committed benchmark row, quoted from the paper (in parentheses), or empty
with the reason. TDA and sTDA at CETT 0.2, sRIDA at the sparsity that the paper gives for
LLaMA-2-7B. Answers are scored under the method, their context dense, as generation would have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch

from ..errors import MoyuError
from ..evaluation.statistics import sign_at, sign_flip_p
from ..methods.base import Method
from ..methods.dense import Dense
from ..methods.srida import SRIDA
from ..methods.stda import STDA
from ..methods.tda import TDA
from ..models.text import longest_window
from . import tables_paper as paper
from .report import Report
from .setting import Setting, Subject
from .tables_measure import (
    BUDGET,
    Cell,
    Latency,
    accuracy,
    committed_rows,
    latencies,
    mean_cell,
    summaries,
)

METHODS = ("dense", "TDA", "sTDA", "sRIDA")
TASKS = ("mmlu", "truthfulqa_mc1", "winogrande", "gsm8k")
MEASURES = ("rouge1", "rouge2", "rougeL")
NEW_TOKENS = 64
Values = dict[tuple[str, str], list[float]]  # (method, column) -> per document
LABELS = {"unpatched": "dense", "srida": "sRIDA", "stda": "sTDA", "tda": "TDA", "qrida": "qRIDA"}
GEOMETRIES = {"LLaMA-2-7B": "llama-2-7b", "LLaMA-3-8B": "llama-3-8b"}


def run(setting: Setting, report: Report) -> None:
    """Write the study into `report`."""
    measured: dict[str, dict[str, dict[str, dict[str, Cell]]]] = {}
    values: dict[str, dict[str, Values]] = {}
    for subject in setting.subjects():
        report.models[subject.name] = subject.describe()
        measured[subject.name], values[subject.name] = _of_model(setting, subject)
    _write(report, measured)
    paper.consistency(report)
    _latency(setting, report)
    _claims(setting, report, values)


def methods(setting: Setting, subject: Subject) -> dict[str, Callable[[], Method]]:
    """The paper's rows, made when asked for: calibration takes a moment."""
    density = 1 - paper.SPARSITY["LLaMA-2-7B"]["sRIDA"] / 100
    return {
        "dense": Dense,
        "TDA": lambda: TDA(setting.thresholds(subject)),
        "sTDA": lambda: STDA(setting.thresholds(subject)),
        "sRIDA": lambda: SRIDA(density),
    }


def _of_model(
    setting: Setting, subject: Subject
) -> tuple[dict[str, dict[str, dict[str, Cell]]], dict[str, Values]]:
    """Cells by table, method and column, and the values per document behind them."""
    cells: dict[str, dict[str, dict[str, Cell]]] = {}
    values: dict[str, Values] = {"1": {}, "5": {}}
    made = methods(setting, subject)
    long = longest_window(subject.model) - NEW_TOKENS
    sizes = {"2": min(384, long), "4": min(192, long // 2)}
    for name in METHODS:
        for table, without in (("1", False), ("5", True)):
            row = cells.setdefault(table, {}).setdefault(name, {})
            densities = []
            for task, column in zip(TASKS, paper.TASKS, strict=True):
                setting.log(f"{subject.name}, table {table}: {name}, {task}")
                if without and task == "gsm8k":
                    reason = "heavy hitters are masked in scoring, not in token-by-token generation"
                    row[column] = Cell("empty", reason=reason)
                    continue
                limit = setting.size(40 if task != "gsm8k" else 10, 2)
                try:
                    data = setting.need_data("bench/ with the tasks")
                    found, density = accuracy(subject, made[name](), task, data, limit, without)
                except (MoyuError, OSError) as error:
                    row[column] = Cell("empty", reason=str(error))
                    continue
                row[column] = mean_cell(found)
                values[table][name, column] = found
                densities.append(density)
            row["sparsity"] = (
                Cell("measured", 100 * (1 - sum(densities) / len(densities)))
                if densities
                else Cell("empty", reason="nothing was scored")
            )
        for table, prompt in sizes.items():
            row = cells.setdefault(table, {}).setdefault(name, {})
            for kind, columns in (("xsum", paper.ROUGE[:3]), ("xsum-1shot", paper.ROUGE[3:])):
                setting.log(f"{subject.name}, table {table}: {name}, {kind}")
                try:
                    data = setting.need_data("summ/ with XSum")
                    scores = summaries(
                        subject, made[name](), data, kind, setting.size(8, 1), prompt,
                        setting.size(NEW_TOKENS, 4),
                    )  # fmt: skip
                except (MoyuError, OSError) as error:
                    row |= {column: Cell("empty", reason=str(error)) for column in columns}
                    continue
                for column, measure in zip(columns, MEASURES, strict=False):
                    row[column] = mean_cell(scores[measure])
    return cells, values


def _quoted(value: float | None) -> Cell:
    if value is None:
        return Cell("empty", reason="the paper prints no figure")
    return Cell("quoted", value)


class _Reasons:
    """Numbers the reasons of empty cells, so that a table can carry them as notes."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def text(self, cell: Cell) -> str:
        if cell.kind == "empty":
            if cell.reason not in self.known:
                self.known.append(cell.reason)
            return f"- [{self.known.index(cell.reason) + 1}]"
        assert cell.value is not None
        if cell.kind == "quoted":
            return f"({cell.value:.2f})"
        error = f" ± {cell.error:.1f}" if cell.error is not None else ""
        return f"{cell.value:.1f}{error}"

    def note(self) -> str:
        return " ".join(f"[{i}] {reason}." for i, reason in enumerate(self.known, 1))


def _write(report: Report, measured: dict[str, dict[str, dict[str, dict[str, Cell]]]]) -> None:
    sources: dict[str, list[tuple[str, dict[str, dict[str, Cell]]]]] = {
        "1": [
            (
                f"{model}, paper",
                {
                    m: dict(zip(paper.TASKS, map(_quoted, row), strict=True))
                    | {"sparsity": Cell("quoted", paper.SPARSITY[model][m])}
                    for m, row in rows.items()
                },
            )
            for model, rows in paper.TABLE_1.items()
        ],
        "2": [
            (
                "LLaMA-2-7B, paper",
                {m: dict(zip(paper.ROUGE, map(_quoted, row), strict=True))
                 for m, row in paper.TABLE_2.items()},
            )
        ],
        "4": [
            (
                f"LLaMA-2-7B {setup}, paper",
                {m: dict(zip(("ROUGE-1", "1-shot R-1"), map(_quoted, row), strict=True))
                 for (m, at), row in paper.TABLE_4.items() if at == setup},
            )
            for setup in ("512+128", "512+512")
        ],
        "5": [
            (
                "LLaMA-2-7B, paper",
                {m: dict(zip(paper.TASKS, map(_quoted, row), strict=True))
                 for m, row in paper.TABLE_5.items()},
            )
        ],
    }  # fmt: skip
    columns: dict[str, tuple[str, ...]] = {
        "1": (*paper.TASKS, "sparsity"),
        "2": paper.ROUGE,
        "4": ("ROUGE-1", "1-shot R-1"),
        "5": (*paper.TASKS, "sparsity"),
    }
    titles = {
        "1": "Table 1: accuracy (%)",
        "2": "Table 2: ROUGE on XSum (%), prompts of up to 384 tokens",
        "4": "Table 4: ROUGE on XSum with half the prompt (%)",
        "5": f"Table 5: accuracy (%) without heavy hitters ({BUDGET:.0%} of the context removed)",
    }
    report.note(
        "In parentheses: quoted from the paper, not measured here. Without: measured here, with "
        "standard error. A dash: empty, for the reason noted. TruthfulQA is mc1 here; the paper "
        "does not say which score it prints."
    )
    for table, title in titles.items():
        reasons = _Reasons()
        blocks = sources[table] + [(model, cells[table]) for model, cells in measured.items()]
        rows = []
        for model, cells in blocks:
            for method in METHODS:
                if method not in cells:
                    continue
                missing = Cell("empty", reason="the paper prints no figure")
                row = [cells[method].get(c, missing) for c in columns[table]]
                rows.append([model, method, *map(reasons.text, row)])
                report.numbers.setdefault(f"table {table}", []).append(
                    {"model": model, "method": method}
                    | {c: asdict(x) for c, x in zip(columns[table], row, strict=True)}
                )
        report.table(title, ["model", "method", *columns[table]], rows, reasons.note())


def _latency(setting: Setting, report: Report) -> None:
    ask = "measure it with `moyu bench decode -g {} --json FILE` and pass --bench FILE"
    ratios = paper.speedups()
    rows: list[Sequence[Any]] = [
        [
            "LLaMA-2-7B, paper (A100, fp16)",
            method,
            setup,
            f"({sparsity})",
            f"({seconds} s in all)",
            f"({ratios[method]:.3f})" if method != "dense" else "(1)",
            "quoted",
        ]
        for method, setup, sparsity, seconds in paper.TABLE_3
    ]
    files = [setting.bench] if setting.bench is not None else committed_rows()
    found = [row for file in files for row in latencies(file)]
    for name, geometry in GEOMETRIES.items():
        mine = [row for row in found if row.geometry == geometry]
        for row in mine:
            label, _, more = row.method.partition("+")
            label = LABELS.get(label, label) + (f" + {more}" if more else "")
            rows.append(
                [
                    f"{name} geometry, random weights ({row.device})",
                    label,
                    row.setup,
                    f"{100 * (1 - row.density):.1f}",
                    f"{row.milliseconds:.1f} ms"
                    if row.setup == "per token"
                    else f"{row.milliseconds / 1e3:.2f} s in all",
                    f"{row.speedup:.3f}",
                    row.where,
                ]
            )
        missing = [m for m in ("tda", "stda", "srida") if not any(r.method == m for r in mine)]
        if missing:
            shown = ", ".join(missing)
            where = ", ".join(file.name for file in files) or "the installed package"
            reason = f"no rows of {shown} in {where}; {ask.format(geometry)}"
            rows.append([f"{name} geometry, random weights", shown, "-", "-", "-", "-", reason])
    report.table(
        "Table 3: latency",
        ["model", "method", "prompt + new tokens", "sparsity %", "latency", "times dense", "from"],
        rows,
        "The paper gives seconds for a whole generation; the rows here the median of a generated "
        "token behind a prompt, or of a whole generation. Dense is the unpatched model of the same "
        "run. Only ratios compare across machines.",
    )
    report.numbers["table 3"] = {
        "quoted": [list(row) for row in paper.TABLE_3],
        "rows": [asdict(row) for row in found],
    }
    report.claim(
        "section 4.3, Table 3",
        "sRIDA has the lowest latency, though its sparsity is lower",
        f"by the paper's own rows: {ratios['sRIDA']:.2f} times dense at 1024+128, sTDA "
        f"{ratios['sTDA']:.2f} times at 1024+1024; the seconds compared belong to different "
        "numbers of new tokens (and 8 times the tokens take 32 times the seconds)",
        "fails",
    )
    _faster(report, found, ratios, ask.format("llama-2-7b"))


def _faster(
    report: Report, found: Sequence[Latency], ratios: dict[str, float], needed: str
) -> None:
    """The abstract's claim, by method and kind of device."""
    speeds: dict[str, list[float]] = {}
    for row in found:
        if row.geometry == "llama-2-7b" and row.method in ("tda", "stda", "srida"):
            device = row.device if "NVIDIA" in row.device else "the CPU"
            where = f"{LABELS[row.method]} on {device}"
            speeds.setdefault(where, []).append(row.speedup)
    text = "; ".join(
        f"{where} {median(values):.2f}" + (f" (median of {len(values)})" if values[1:] else "")
        for where, values in speeds.items()
    )
    report.judged(
        "abstract",
        "generation is 20-25 % faster (1.2 times dense asked)",
        f"the paper's rows: {1 - 1 / ratios['sRIDA']:.0%} less time with sRIDA, "
        f"{1 - 1 / ratios['sTDA']:.0%} with sTDA, {1 - 1 / ratios['TDA']:.0%} with TDA. "
        f"Here, times dense: {text or 'no row'}",
        {where: 1 if median(values) >= 1.2 else -1 for where, values in speeds.items()} or {"": 0},
        needed,
        where="it is ",
    )


def _claims(setting: Setting, report: Report, values: dict[str, dict[str, Values]]) -> None:
    needed = (
        "a model whose accuracy is above chance, so that methods can differ: `moyu study tables "
        "--model meta-llama/Llama-2-7b-hf --data DIR`"
    )
    for source, claim, pairs, of in (
        (
            "section 4.2, Table 1",
            "TDA keeps more of the accuracy than sTDA, and sTDA than sRIDA (here at the sparsities "
            "of the table, which differ)",
            (("TDA", "sTDA"), ("sTDA", "sRIDA")),
            lambda tables, key: tables["1"].get(key),
        ),
        (
            "section 4.4, Table 5",
            "without heavy hitters TDA's accuracy falls more than sTDA's, and that more than "
            "sRIDA's, as measured here",
            (("TDA", "sTDA"), ("sTDA", "sRIDA")),
            _fall,
        ),
    ):
        parts: list[str] = []
        signs: dict[str, int] = {}
        for model, tables in values.items():
            found = []
            for first, second in pairs:
                gaps = [
                    a - b
                    for column in paper.TASKS
                    for a, b in zip(
                        of(tables, (first, column)) or [],
                        of(tables, (second, column)) or [],
                        strict=True,
                    )
                ]
                if not gaps:
                    continue
                p, mean = sign_flip_p(torch.tensor(gaps), setting.seed), sum(gaps) / len(gaps)
                found.append(sign_at(mean, p))
                parts.append(
                    f"{model} {first} less {second} {100 * mean:+.1f} points (p = {p:.2g})"
                )
            if found:  # an order holds where each of its steps does
                signs[model] = -1 if -1 in found else min(found)
        report.judged(
            source,
            claim,
            "; ".join(parts) or "nothing could be scored, see the table's notes",
            signs or {"": 0},
            needed,
        )


def _fall(tables: dict[str, Values], key: tuple[str, str]) -> list[float]:
    """What a document's score loses without heavy hitters; empty where either was not scored."""
    with_, without = (tables[table].get(key) for table in ("1", "5"))
    if not with_ or not without:
        return []
    return [a - b for a, b in zip(with_, without, strict=True)]
