"""The live display of a family run: a row a cell, a line for the whole; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rwkvq.cli.display import console as shared_console
from rwkvq.cli.terminal import StderrLines, without_controls
from rwkvq.family.events import CellEvent
from rwkvq.family.work import CellWork, Counted, Steady, cell_seconds_left, seconds_left
from rwkvq.redaction import without_secrets

_STYLES = {"waiting": "dim", "running": "cyan", "done": "green", "kept": "green", "failed": "bold red"}
_OTHER_LINES = 4
"""Lines of the display that are no cells: header, rest, total, and one for the cursor."""
_FIXED_COLUMNS = 50
"""Characters of a row but for name and bar, gaps included."""
_LEAST_BAR = 8


class Board:
    """What a family run shows while it is a context manager; `update` may be called from any thread.

    On a terminal a table that repaints itself, with everything that this process and its children write to stderr
    printed above it; begin it before worker processes start, so that they inherit its stderr. Elsewhere (a file, a
    pipe, TERM=dumb) one plain line an end or a failure; the log has the stages. Colours follow NO_COLOR.
    """

    def __init__(
        self,
        cells: Sequence[str],
        estimates: Mapping[str, float],
        *,
        workers: int = 1,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        known = [estimates[cell] for cell in cells if cell in estimates]
        usual = sum(known) / len(known) if known else 1.0
        self._cells = {cell: CellWork(cell, max(estimates.get(cell, usual), 0.1)) for cell in cells}
        self._shared: dict[str, CellWork] = {}
        self._workers, self._clock, self._began = workers, clock, clock()
        self._lock = threading.Lock()
        self._left: dict[str, Steady] = {}
        self._interrupted = False
        self._console = console or shared_console
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._captures = self._is_live and console is None
        self._stderr: StderrLines | None = None
        self._live: Live | None = None

    def __enter__(self) -> Board:
        self._began = self._clock()
        if self._captures:
            self._stderr = StderrLines()
            self._console = Console(file=self._stderr.terminal)
        if self._is_live:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=4,
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=not self._captures,
            )
            self._live.start(refresh=True)
        if self._stderr:
            self._stderr.begin(lambda line: self._print(Text.from_ansi(without_secrets(line))))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupted = True
        if self._stderr:
            self._stderr.end()
        if self._live:
            self._live.stop()

    def update(self, event: CellEvent) -> None:
        """Show what happened. What is none of the cells is work that they share: a row while one of its stages runs."""
        with self._lock:
            now = self._clock()
            work = self._cells.get(event.cell) or self._shared.setdefault(event.cell, CellWork(event.cell, 0.1))
            work.apply(event, now)
            if event.cell in self._shared and event.kind in ("stage", "kept"):
                has_ended = event.kind == "kept" or event.seconds is not None
                work.state, work.ended = ("done", now) if has_ended else ("running", None)
            line = self._line(event, work, now)
        # printing repaints the table, which takes the lock again
        if line is not None and (event.kind == "failed" or not self._is_live):
            self._print(Text(f"{time.strftime('%H:%M:%S')} {without_controls(without_secrets(line))}"))

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True, highlight=False)

    def _line(self, event: CellEvent, work: CellWork, now: float) -> str | None:
        """The plain line for `event`, or None if it is not worth one; the log has a line for each stage anyway."""
        if event.kind == "failed":
            return f"{event.cell}: failed: {event.message}"
        if event.kind == "done":
            counts = f"{self._count('done', 'kept')} of {len(self._cells)} cells done"
            if failed := self._count("failed"):
                counts += f", {failed} failed"
            left = duration(seconds_left(self._cells.values(), self._workers, self._began, now))
            waits = "" if self._all_ended() else f", about {left} left"
            return f"{event.cell}: done in {work.elapsed(now):.1f} s ({counts}{waits})"
        return f"{event.cell}: up to date" if event.kind == "kept" and not event.stage else None

    def _count(self, *states: str) -> int:
        return sum(cell.state in states for cell in self._cells.values())

    def _all_ended(self) -> bool:
        return all(cell.ended is not None for cell in self._cells.values())

    def _render(self) -> RenderableType:
        """The table at this moment, at most as high as the terminal."""
        with self._lock:
            now = self._clock()
            active = [work for work in self._shared.values() if work.state in ("running", "failed")]
            cells = [*active, *self._cells.values()]
            shown = _chosen(cells, max(self._console.size.height - _OTHER_LINES, 1))
            room = self._console.width - _FIXED_COLUMNS
            names = max(min(max((len(without_controls(cell.name)) for cell in shown), default=0), room - _LEAST_BAR), 8)
            bar = min(max(room - names, _LEAST_BAR), 4 * _LEAST_BAR)
            table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
            table.add_column("cell", width=names, no_wrap=True, overflow="ellipsis")
            table.add_column("state", width=11, no_wrap=True, overflow="ellipsis")
            table.add_column("", width=bar)
            for name, width in (("blocks", 6), ("tensors", 7), ("left", 6), ("error", 6), ("time", 6)):
                table.add_column(name, justify="right", width=width, no_wrap=True)
            for cell in shown:
                table.add_row(*self._row(cell, bar, now))
            names_shown = {cell.name for cell in shown}
            hidden = [cell for cell in cells if cell.name not in names_shown]
            return Group(table, *_rest(hidden), self._total(now))

    def _row(self, cell: CellWork, bar: int, now: float) -> list[RenderableType]:
        state = cell.stage or cell.state if cell.state == "running" else cell.state
        stopped = self._interrupted and cell.state == "running"
        blocks = cell.blocks.get(cell.stage) or cell.blocks.get("quantize")
        left = ""
        if cell.state == "running" and not stopped and cell.name in self._cells:
            left = self._steady(cell.name, cell_seconds_left(cell, self._cells.values(), now), now)
        return [
            escape(without_controls(cell.name)),
            Text("stopped" if stopped else state, style=_STYLES[cell.state]),
            ProgressBar(total=1.0, completed=cell.share, width=bar),
            _of(blocks),
            _of(cell.tensors),
            left,
            "" if cell.error is None else f"{100 * cell.error:.2f}%",
            duration(cell.elapsed(now)) if cell.began is not None else "",
        ]

    def _total(self, now: float) -> RenderableType:
        counts = [f"{self._count('done', 'kept')} of {len(self._cells)} cells done"]
        counts += [f"{count} {state}" for state in ("failed", "running") if (count := self._count(state))]
        if not self._all_ended() and not self._interrupted:
            left = seconds_left(self._cells.values(), self._workers, self._began, now)
            counts.append(f"about {self._steady('', left, now)} left")
        counts.append(f"{duration(now - self._began)} so far")
        return Text(", ".join(counts), style="bold", overflow="ellipsis", no_wrap=True)

    def _steady(self, key: str, estimate: float, now: float) -> str:
        return duration(self._left.setdefault(key, Steady()).show(estimate, now))


def _of(counted: Counted | None) -> str:
    """`3/12`, or `3` while the total is unknown."""
    if counted is None or not (counted.done or counted.total):
        return ""
    return f"{counted.done}/{counted.total}" if counted.total else str(counted.done)


def duration(seconds: float) -> str:
    """A time in at most six characters: 42s, 3m05s, 1h02m, 2d03h."""
    whole = round(seconds)
    for unit, small, large in (("h", 3600, 86400), ("m", 60, 3600)):
        if whole >= large:
            names = {"h": "dh", "m": "hm"}[unit]
            return f"{whole // large}{names[0]}{whole % large // small:02d}{names[1]}"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def _chosen(cells: list[CellWork], rows: int) -> list[CellWork]:
    """The cells worth a row, in the order of the grid: running, failed, the last finished, then the next to begin."""
    if len(cells) <= rows:
        return cells
    finished = [cell for cell in cells if cell.state in ("done", "kept")]
    last = sorted(finished, key=lambda cell: cell.ended or 0.0, reverse=True)
    by_interest = [cell for state in ("running", "failed") for cell in cells if cell.state == state]
    waiting = [cell for cell in cells if cell.state == "waiting"]
    by_interest += [*last[:3], *waiting, *last[3:]]
    chosen = {cell.name for cell in by_interest[:rows]}
    return [cell for cell in cells if cell.name in chosen]


def _rest(hidden: Sequence[CellWork]) -> list[RenderableType]:
    """One line that counts the cells without a row."""
    states = [cell.state for cell in hidden]
    counts = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return [Text(f"and {', '.join(counts)}", style="dim", no_wrap=True, overflow="ellipsis")] if hidden else []
