"""The results of `moyu eval` as a table and as the Pareto picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._files import write_atomically
from .rouge import MEASURES


def draw(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """The Pareto picture: rise of loss against realised density, a line per method (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    ax = figure.subplots()
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("density") is not None and row["method"] != "dense":
            curves.setdefault(row["method"], []).append(row)
    for number, (name, found) in enumerate(curves.items()):
        found.sort(key=lambda row: row["density"])
        x = [row["density"] for row in found]
        # A method may be better than dense by chance; a logarithm has no place for that.
        y = [max(row["loss_rise"], 1e-4) for row in found]
        marker = "osv^D*Px+<>"[number % 11]
        ax.plot(x, y, marker=marker, label=name, linewidth=1, markersize=5)
    ax.set_yscale("log")
    ax.set_xlabel("realised density")
    ax.set_ylabel("rise of the continuation's loss (nats per token)")
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    write_atomically(path, content.getvalue())


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells of the results, for print and Markdown."""
    columns = ["method", "setting", "density", "weights read", "perplexity"]
    columns += ["change %", "p", "agreement", "KL"]
    extra = {
        "router_recall": "router's recall",
        "generated_agreement": "agreement on own text",
        "sliding_perplexity": "perplexity, sliding window",
    }
    shown = [key for key in extra if any(row.get(key) is not None for row in rows)]
    tasks = sorted({task for row in rows for task in row.get("tasks", {})})
    sets = sorted({name for row in rows for name in row.get("rouge", {})})
    columns += [extra[key] for key in shown] + tasks
    columns += [f"{name} {measure}" for name in sets for measure in MEASURES]
    cells = []
    for row in rows:
        change = row.get("change")
        cells.append(
            [
                *(row["method"], row["setting"], row.get("density"), row.get("read")),
                row.get("perplexity"),
                *(None if change is None else 100 * change, row.get("p")),
                *(row.get("agreement"), row.get("kl")),
                *(row.get(key) for key in shown),
                *(_task_cell(row.get("tasks", {}).get(task)) for task in tasks),
                *(_rouge_cell(row, name, measure) for name in sets for measure in MEASURES),
            ]
        )
    return columns, cells


def _task_cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    text = f"{100 * score['value']:.1f}"
    if score["stderr"] is not None:  # one document has none
        text += f" +- {100 * score['stderr']:.1f}"
    return text if score.get("p") is None else f"{text} (p {score['p']:.2g})"


def _rouge_cell(row: dict[str, Any], name: str, measure: str) -> str:
    score = row.get("rouge", {}).get(name, {}).get(measure)
    if score is None:
        return ""
    text = f"{score['value']:.1f}"
    return text if score.get("p") is None else f"{text} (p {score['p']:.2g})"


def markdown(columns: Sequence[str], cells: Sequence[Sequence[Any]]) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in cells:
        texts = [
            "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)
            for cell in row
        ]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"
