"""The bar that long work shows on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Step = Callable[[str, int, int], None]
"""step(text, done, total): what begins now, steps done before it, steps in all."""


@contextmanager
def steps(title: str, wanted: bool = True, lines: bool = False) -> Iterator[Step]:
    """Yields a `Step` that moves a bar, where stderr is a terminal. Elsewhere, or if not wanted,
    it shows nothing, or with `lines` a line per step."""
    if not (wanted and sys.stderr.isatty()):

        def tell(text: str, done: int, total: int) -> None:
            if wanted and lines:
                print(f"{title}: {done}/{total} {text}", file=sys.stderr, flush=True)

        yield tell
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        *(TextColumn(f"{title}: {{task.description}}"), BarColumn(), TimeElapsedColumn()),
        *(TextColumn("left"), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda text, done, total: bar.update(
            task, description=text, completed=done, total=total
        )
