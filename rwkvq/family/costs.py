"""What every cell of a family costs: measured where an earlier run measured it, else estimated and corrected by that.

The longest work starts first: with several workers the run then ends soonest (Graham's list scheduling).
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rwkvq.dry_run import Preview, dry_run, stand_in_rows
from rwkvq.errors import RwkvqError
from rwkvq.family.family import Cell
from rwkvq.run import SHARED, Run
from rwkvq.stages import read_seconds, stages_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cost:
    """Wall seconds of one cell's own stages (shared ones apart), and whether an earlier run measured them."""

    seconds: float
    measured: bool


def estimate_costs(cells: Sequence[Cell]) -> dict[str, Cost]:
    """Cost by name of the cell; no weight is read. A cell that cannot run (a bad checkpoint, say) costs nothing."""
    previews = {}
    for cell in cells:
        try:
            previews[cell.name] = dry_run(cell.run, stand_in_rows(cell.run))
        except RwkvqError as error:
            log.debug("%s: no estimate: %s", cell.name, error)  # the cell will say so when it runs
    costs = combined({cell.name: measured_seconds(cell.run) for cell in cells if cell.name in previews}, previews)
    return {cell.name: costs.get(cell.name, Cost(0.0, False)) for cell in cells}


def combined(measured: Mapping[str, float | None], previews: Mapping[str, Preview]) -> dict[str, Cost]:
    """Measured seconds where there are any; else the estimate times the median of measured over estimated."""
    estimates = {name: preview.full_seconds(set(SHARED)) for name, preview in previews.items()}
    ratios = [seconds / estimates[name] for name, seconds in measured.items() if seconds and estimates[name]]
    factor = statistics.median(ratios) if ratios else 1.0
    costs = {}
    for name, estimate in estimates.items():
        seconds = measured[name]
        costs[name] = Cost(factor * estimate, False) if seconds is None else Cost(seconds, True)
    return costs


def measured_seconds(run: Run) -> float | None:
    """Seconds of the run's own stages when each last ran, or None unless all of them have run."""
    seconds = read_seconds(run)
    own = [name for name in stages_of(run) if name not in SHARED]
    return sum(seconds[name] for name in own) if all(name in seconds for name in own) else None


def longest_first(cells: Sequence[Cell], costs: Mapping[str, Cost]) -> list[Cell]:
    """The cells by falling cost; equal ones in the order of the file."""
    return sorted(cells, key=lambda cell: -costs[cell.name].seconds)
