"""What a person sees in the terminal: progress bars, tables, sizes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from rwkvq.files import Progress as StageProgress

console = Console(stderr=True)
"""Progress and tables for people go to stderr; stdout is for what programs read."""


def print_json(value: Any) -> None:
    """Machine-readable output on stdout."""
    print(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of right-aligned columns, but for the first and for sentences ("why"), which are left-aligned."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(header):
        result.add_column(name, justify="left" if index == 0 or name == "why" else "right", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def size(count: float) -> str:
    """Bytes as kB, MB or GB (powers of ten)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


class StageBars:
    """One bar a stage, made when the stage reports for the first time."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._bars: dict[str, Any] = {}

    def __call__(self, stage: str) -> StageProgress:
        """The Progress of one stage."""

        def show(what: str, done: int, total: int) -> None:
            with self._lock:
                if stage not in self._bars:
                    self._bars[stage] = self._progress.add_task(stage, total=total, what=what)
                self._progress.update(self._bars[stage], completed=done, total=total, what=what)

        return show

    def note(self, stage: str, text: str) -> None:
        """Show a finished line for a stage that had nothing to do."""
        with self._lock:
            if stage not in self._bars:
                self._bars[stage] = self._progress.add_task(stage, total=1, completed=1, what=text)


@contextmanager
def stage_bars() -> Iterator[StageBars]:
    """Live bars on stderr; plain lines where stderr is no terminal."""
    columns = (
        SpinnerColumn(finished_text="[green]✓[/]"),
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[what]}[/]"),
    )
    with Progress(*columns, console=console) as progress:
        yield StageBars(progress)
