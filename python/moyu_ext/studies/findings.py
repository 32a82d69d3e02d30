"""All verdicts of a directory of results on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .._files import write_atomically
from . import STUDIES


def write_findings(directory: Path) -> Path:
    """Write `findings.md` from the studies' JSON files that are there; its path."""
    lines = ["# What of the paper holds", ""]
    for study in STUDIES.values():
        stem = study.name.replace("-", "_")
        file = directory / f"{stem}.json"
        if not file.is_file():
            continue
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        lines += [f"## [{study.title}]({stem}.md) ({study.source})", ""]
        lines += [f"Models: {', '.join(found['models'])}. Text: {found['setting']['text']}.", ""]
        lines += ["| claim | measured | verdict |", "|---|---|---|"]
        for claim in found["claims"]:
            verdict = f"**{claim['verdict']}** {claim['condition']}".strip()
            cells = (f"{claim['claim']} ({claim['source']})", claim["measured"], verdict)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    path = directory / "findings.md"
    write_atomically(path, "\n".join(lines).encode())
    return path
