"""What a study leaves behind: figures (PNG), numbers (JSON) and verdicts (Markdown)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_atomically
from ..errors import ConfigurationError
from ..evaluation.record import clean, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERDICTS = ("holds", "fails", "holds only if", "open")
LEGEND = (
    "**holds**: for every model the 95 % interval (or p < 0.05) is on the claim's side, or the "
    "value is past the bar that is named; **holds only if**: where it says; **fails**: for no "
    "model, and for one at least it is on the other side; **open**: no interval decides."
)


@dataclass(frozen=True)
class Claim:
    """One claim, where it stands in the paper, what was measured, and the verdict.

    verdict: "holds", "fails", "holds only if" (then `condition` completes the sentence), or "open"
    (then `condition` says what it would take).
    """

    source: str
    claim: str
    measured: str
    verdict: str
    condition: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ConfigurationError(
                f"verdict is {self.verdict!r}; expected one of {', '.join(VERDICTS)}"
            )
        if self.verdict in ("holds only if", "open") and not self.condition:
            raise ConfigurationError(f"the verdict {self.verdict!r} needs a condition")


@dataclass(frozen=True)
class Table:
    """A titled table of cells (text or numbers)."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


class Report:
    """Collects what a study finds; `write` puts `<name>.json` and `<name>.md` beside the figures.

    Nothing that changes from run to run (times, paths) enters the files, so that results can be
    compared byte by byte on one machine.
    """

    def __init__(self, name: str, title: str, source: str, directory: Path) -> None:
        self.name = name
        self.title = title
        self.source = source
        self.directory = directory
        self.claims: list[Claim] = []
        self.tables: list[Table] = []
        self.figures: list[tuple[str, str]] = []
        self.numbers: dict[str, Any] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        directory.mkdir(parents=True, exist_ok=True)

    def claim(
        self, source: str, claim: str, measured: str, verdict: str, condition: str = ""
    ) -> None:
        """Add a claim, see `Claim`."""
        self.claims.append(Claim(source, claim, measured, verdict, condition))

    def judged(
        self,
        source: str,
        claim: str,
        measured: str,
        signs: Mapping[str, int],
        needed: str = "more text or seeds: no interval decides",
        where: str = "the model is ",
    ) -> None:
        """Add a claim by what it came to for each model, or model and text, see `LEGEND`.

        signs: +1 where the measurement supports the claim, -1 where it contradicts it, 0 where it
        decides nothing. needed: the condition of an open claim. where: what stands before the names
        under which it holds.
        """
        held = [name for name, sign in signs.items() if sign > 0]
        verdict, condition = "fails", ""
        if len(held) == len(signs):
            verdict = "holds"
        elif held:
            verdict, condition = "holds only if", f"{where}{' or '.join(held)}"
        elif not any(signs.values()):
            verdict, condition = "open", needed
        self.claim(source, claim, measured, verdict, condition)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = ""
    ) -> None:
        """Add a table."""
        self.tables.append(Table(title, columns, rows, note))

    def note(self, text: str) -> None:
        """Add a sentence on how to read the results."""
        self.notes.append(text)

    @contextmanager
    def figure(
        self, name: str, caption: str, width: float = 8.0, height: float = 4.5
    ) -> Iterator[Figure]:
        """A matplotlib figure (inches) to draw on; saved as `<study>_<name>.png` afterwards."""
        from matplotlib.figure import Figure

        drawn = Figure(figsize=(width, height), layout="constrained")
        yield drawn
        file = f"{self.name}_{name}.png".replace("-", "_")
        drawn.savefig(self.directory / file, dpi=110, metadata={"Software": None})
        self.figures.append((file, caption))

    def as_dict(self, setting: dict[str, Any]) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            "study": self.name,
            "title": self.title,
            "source": self.source,
            "setting": setting,
            "versions": versions(),
            "models": self.models,
            "claims": [asdict(claim) for claim in self.claims],
            "numbers": self.numbers,
            "tables": [asdict(table) for table in self.tables],
            "figures": [{"file": file, "caption": caption} for file, caption in self.figures],
            "notes": self.notes,
        }

    def markdown(self) -> str:
        """The verdict: claims, tables, figures."""
        lines = [f"# {self.title} (`moyu study {self.name}`; paper: {self.source})", ""]
        if self.models:
            names = ", ".join(f"{name} ({m['activation']})" for name, m in self.models.items())
            lines += [f"Models: {names}.", ""]
        if self.claims:
            lines += ["| claim | measured | verdict |", "|---|---|---|"]
            for c in self.claims:
                verdict = f"**{c.verdict}** {c.condition}".strip()
                cells = (f"{c.claim} ({c.source})", c.measured, verdict)
                lines.append("| " + " | ".join(map(_cell, cells)) + " |")
            lines += ["", LEGEND, ""]
        lines += [line for note in self.notes for line in (note, "")]
        for table in self.tables:
            lines += [f"**{table.title}**", "", *_table(table), ""]
            if table.note:
                lines += [table.note, ""]
        for file, caption in self.figures:
            lines += [f"![{caption}]({file})", "", f"*{caption}*", ""]
        return "\n".join(lines)

    def write(self, setting: dict[str, Any]) -> None:
        """Write the JSON and Markdown files."""
        stem = self.name.replace("-", "_")
        text = json.dumps(clean(self.as_dict(setting)), indent=1, sort_keys=False)
        write_atomically(self.directory / f"{stem}.md", self.markdown().encode())
        # Last: the JSON says that the study is finished.
        write_atomically(self.directory / f"{stem}.json", (text + "\n").encode())


def _table(table: Table) -> list[str]:
    columns = map(_cell, table.columns)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in table.rows]
    return lines


def _cell(cell: Any) -> str:
    if isinstance(cell, float):
        return "-" if math.isnan(cell) else f"{cell:.4g}"
    return str(cell).replace("|", "\\|")  # a bare bar would end the cell
