"""Results of parts of a long study, kept beside its files: an interrupted study goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._files import write_atomically
from ..evaluation.record import clean

FOLDER = ".parts"


def once(directory: Path, key: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> Any:
    """What `measure` returned when it was last run with this key, as JSON holds it.

    key: all that the result depends on. The folder may be deleted at any time.
    """
    text = json.dumps(clean(key), sort_keys=True)
    folder = directory / FOLDER
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == json.loads(text):
            return found["result"]
    except (OSError, ValueError, KeyError):
        pass  # not there, or half written by another program: measure
    result = clean(measure())
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"key": json.loads(text), "result": result})
    write_atomically(path, content.encode())
    return json.loads(content)["result"]
