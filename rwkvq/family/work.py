"""How far the cells of a family are, and the seconds left, from estimates that measured progress corrects."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from rwkvq.family.events import CellEvent

CellState = Literal["waiting", "running", "done", "failed", "kept"]

STAGE_SHARES = {
    "windows": 0.01,
    "activations": 0.10,
    "proxies": 0.04,
    "gradients": 0.04,
    "curves": 0.02,
    "plan": 0.01,
    "quantize": 0.54,
    "distill": 0.0,
    "pack": 0.02,
    "evaluate": 0.20,
    "report": 0.02,
}
"""Share of a cell's work by stage, rounded from measured runs; only the bar between two stages depends on it."""

_PRIOR_SECONDS = 5.0
"""The least time for which an estimate outweighs what was measured."""


@dataclass(slots=True)
class Counted:
    """Units of one kind that are finished: distinct names, since a job that is tried again repeats itself."""

    names: set[str] = field(default_factory=set)
    least: int = 0
    total: int = 0

    def add(self, event: CellEvent) -> None:
        """Count the unit that `event` names."""
        self.names.add(event.what)
        self.least, self.total = max(self.least, event.done), max(self.total, event.total)

    @property
    def done(self) -> int:
        """Units finished, at most the total if that is known."""
        count = max(len(self.names), self.least)
        return min(count, self.total) if self.total else count

    @property
    def share(self) -> float:
        """Finished part in [0, 1]; 0 while the total is unknown."""
        return self.done / self.total if self.total else 0.0


@dataclass(slots=True)
class CellWork:
    """One cell as its events tell it. `estimate` and all work are in core-seconds; times are those of one clock.

    Shares of work only grow: `ran` was computed in this run, `kept` came from an earlier one, their sum is at most 1.
    """

    name: str
    estimate: float
    state: CellState = "waiting"
    stage: str = ""
    message: str = ""
    began: float | None = None
    ended: float | None = None
    tensors: Counted = field(default_factory=Counted)
    blocks: dict[str, Counted] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    _ran: dict[str, float] = field(default_factory=dict)
    _kept: set[str] = field(default_factory=set)

    def apply(self, event: CellEvent, now: float) -> None:
        """Take note of `event`, which happened at `now`."""
        begins = event.kind == "stage" and event.seconds is None
        if self.ended is not None and not begins and event.kind not in ("done", "failed", "kept"):
            return  # a worker that had not heard of the end
        if event.kind in ("done", "failed") or (event.kind == "kept" and not event.stage):
            self._end(event, now)
            return
        if event.kind == "kept":
            self._kept.add(event.stage)
            self._ran.pop(event.stage, None)
            return
        self.state = "running"
        self.began = now if self.began is None else self.began
        stage = event.stage or ("quantize" if event.kind == "tensor" else self.stage)
        self._kept.discard(stage)
        self.ended = None
        if event.kind == "stage":
            self._stage(stage, event)
        elif event.kind == "progress":
            self._advance(stage, event.done / event.total if event.total else 0.0)
        elif event.kind == "block":
            self.blocks.setdefault(stage, Counted()).add(event)
            self._advance(stage, self.blocks[stage].share)
        else:
            self.tensors.add(event)
            if event.error is not None and math.isfinite(event.error):
                self.errors[event.what] = event.error
            self._advance(stage, self.tensors.share)

    def _stage(self, stage: str, event: CellEvent) -> None:
        if event.seconds is not None:
            self._advance(stage, 1.0)
            return
        self.stage = stage
        self._advance(stage, 0.0)
        if stage == "quantize":
            self.tensors.total = max(self.tensors.total, event.total)
        if stage in STAGE_SHARES:  # stages come in order: what was silent before this one is done elsewhere
            earlier = list(STAGE_SHARES)[: list(STAGE_SHARES).index(stage)]
            self._kept |= {name for name in earlier if name not in self._ran}

    def _advance(self, stage: str, share: float) -> None:
        self._ran[stage] = max(self._ran.get(stage, 0.0), min(max(share, 0.0), 1.0))

    def _end(self, event: CellEvent, now: float) -> None:
        self.state = event.kind  # type: ignore[assignment]  # the three kinds that end a cell are states
        self.message = event.message
        self.began = now if self.began is None else self.began
        self.ended = now
        if event.seconds is not None:
            self.began = now - event.seconds

    @property
    def kept(self) -> float:
        """Share of the cell's work that an earlier run did."""
        kept = sum(STAGE_SHARES.get(stage, 0.0) for stage in self._kept)
        return 1.0 - self.ran if self.state == "kept" else kept

    @property
    def ran(self) -> float:
        """Share of the cell's work that this run did."""
        if self.state == "done":
            return 1.0 - sum(STAGE_SHARES.get(stage, 0.0) for stage in self._kept)
        return sum(STAGE_SHARES.get(stage, 0.0) * share for stage, share in self._ran.items())

    @property
    def share(self) -> float:
        """Share of the cell's work that is there, in [0, 1]."""
        return 1.0 if self.state in ("done", "kept") else min(self.ran + self.kept, 1.0)

    @property
    def remaining(self) -> float:
        """Estimated core-seconds still to do; 0 for a cell that has ended."""
        return 0.0 if self.ended is not None else self.estimate * (1.0 - self.share)

    @property
    def error(self) -> float | None:
        """Mean relative output error of the tensors finished so far, or None."""
        return sum(self.errors.values()) / len(self.errors) if self.errors else None

    def elapsed(self, now: float) -> float:
        """Seconds since the cell began, up to its end; 0 before."""
        return 0.0 if self.began is None else max((now if self.ended is None else self.ended) - self.began, 0.0)


def _blended(work: float, seconds: float, prior_rate: float, prior_seconds: float) -> float:
    """Core-seconds a second: the measured rate, as if `prior_seconds` at `prior_rate` had been measured before."""
    return (work + prior_rate * prior_seconds) / (seconds + prior_seconds)


def cell_seconds_left(cell: CellWork, cells: Iterable[CellWork], now: float) -> float:
    """Seconds until `cell` is done once it runs: its remaining work at its own rate.

    The rate starts as that of all cells and becomes the cell's own as it goes on, so neither a wrong estimate nor an
    unlucky first second decides. Never negative.
    """
    begun = [other for other in cells if other.state in ("running", "done")]
    done = sum(other.estimate * other.ran for other in begun)
    common = _blended(done, sum(other.elapsed(now) for other in begun), 1.0, _PRIOR_SECONDS)
    trust = max(_PRIOR_SECONDS, 0.2 * cell.estimate / common)
    return cell.remaining / _blended(cell.estimate * cell.ran, cell.elapsed(now), common, trust)


def seconds_left(cells: Iterable[CellWork], workers: int, began: float, now: float) -> float:
    """Seconds until all of `cells` have ended: remaining work at the rate of this run since `began`, never negative.

    Before anything is measured, `workers` cores are taken to be busy; after a fiftieth of the whole the measured rate
    counts as much. Work kept from earlier runs is no progress of this one. The slowest running cell is a lower bound,
    since at the end of a family fewer cells than workers are left.
    """
    cells = list(cells)
    total = sum(cell.estimate * (1.0 - cell.kept) for cell in cells)
    trust = max(_PRIOR_SECONDS, 0.02 * total / workers)
    rate = _blended(sum(cell.estimate * cell.ran for cell in cells), max(now - began, 0.0), float(workers), trust)
    alone = [cell_seconds_left(cell, cells, now) for cell in cells if cell.state == "running"]
    return max([sum(cell.remaining for cell in cells) / rate, *alone])


class Steady:
    """A countdown that follows a jumping estimate within seconds instead of at once, on a logarithmic scale."""

    def __init__(self, seconds_to_follow: float = 4.0) -> None:
        self._follow = seconds_to_follow
        self._shown: float | None = None
        self._at = 0.0

    def show(self, estimate: float, now: float) -> float:
        """The seconds left to show at `now`, positive."""
        target = max(estimate, 0.5)
        if self._shown is None:
            self._shown = target
        else:
            passed = max(now - self._at, 0.0)
            counted = max(self._shown - passed, 0.5)
            self._shown = counted * (target / counted) ** (1.0 - math.exp(-passed / self._follow))
        self._at = now
        return self._shown
