"""What a family run would do: which cells and why, with time, memory, disk and the size of every result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from rwkvq.artifact.manifest import read_manifest
from rwkvq.calibration.activations import estimate_cache_bytes
from rwkvq.dry_run import Preview, dry_run, preview_rows, stand_in_rows
from rwkvq.family.costs import Cost, combined, longest_first, measured_seconds
from rwkvq.family.family import Cell, Family
from rwkvq.proxies import table
from rwkvq.report.text import bits_text, size_text
from rwkvq.run import SHARED, Run
from rwkvq.stages import STAGES, reason_for

UP_TO_DATE = "up to date"
_PLAIN = ("why", "seconds", "peak_bytes", "file_bytes", "matrix_bits", "exact")
MAX_MEASURED_WEIGHTS = 300_000_000
"""Larger models are previewed without measuring their proxies, which takes minutes to hours."""


@dataclass(frozen=True, slots=True)
class CellPreview:
    """One cell of a dry run. Bytes are those of the weight files; `exact` = planned with the model's own proxies."""

    cell: Cell
    why: str
    """Why it runs, or `up to date`."""
    seconds: float
    peak_bytes: float
    file_bytes: int
    matrix_bits: float | None
    exact: bool


@dataclass(frozen=True, slots=True)
class SharedPreview:
    """The work that cells of one model share."""

    folder: str
    why: str
    seconds: float
    cache_bytes: float


@dataclass(frozen=True, slots=True)
class FamilyPreview:
    """The result of a dry run, cells in the order in which they would start."""

    shared: tuple[SharedPreview, ...]
    cells: tuple[CellPreview, ...]
    workers: int

    HEADER: ClassVar[tuple[str, ...]] = ("cell", "seconds", "memory", "file", "bits/weight", "why")

    def shared_rows(self) -> list[tuple[str, ...]]:
        """Rows (folder, seconds, disk, why)."""
        return [
            (
                item.folder,
                f"{item.seconds:.0f}" if item.why != UP_TO_DATE else "",
                size_text(round(item.cache_bytes)),
                item.why,
            )
            for item in self.shared
        ]

    def cell_rows(self) -> list[tuple[str, ...]]:
        """Rows of HEADER; a size without the model's own proxies is marked as about right."""
        return [
            (
                item.cell.name,
                f"{item.seconds:.0f}" if item.why != UP_TO_DATE else "",
                size_text(round(item.peak_bytes)),
                ("" if item.exact else "~ ") + size_text(item.file_bytes),
                bits_text(item.matrix_bits),
                item.why,
            )
            for item in self.cells
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        cells = [{"cell": item.cell.name} | {key: getattr(item, key) for key in _PLAIN} for item in self.cells]
        totals = {"seconds": self.seconds, "peak_bytes": self.peak_bytes, "disk_bytes": self.disk_bytes}
        return {"shared": [asdict(item) for item in self.shared], "cells": cells, "workers": self.workers} | totals

    @property
    def seconds(self) -> float:
        """Estimated wall seconds: the work of all cells, side by side on all workers."""
        return sum(item.seconds for item in self.shared) + sum(item.seconds for item in self.cells)

    @property
    def disk_bytes(self) -> float:
        """Activations of every model, and every cell's codes twice."""
        return sum(item.cache_bytes for item in self.shared) + 2 * sum(item.file_bytes for item in self.cells)

    @property
    def peak_bytes(self) -> float:
        """Memory of all processes together at most: every worker on a block of the largest model."""
        return max(item.peak_bytes for item in self.cells)


def preview_family(family: Family) -> FamilyPreview:
    """Plan every cell without writing anything. Raises CheckpointError, PlanError."""
    rows = {folder: _rows(cells[0].run) for folder, cells in family.groups().items()}
    previews = {cell.name: dry_run(cell.run, rows[str(cell.settings.shared_dir)][0]) for cell in family.cells}
    costs = combined({cell.name: measured_seconds(cell.run) for cell in family.cells}, previews)
    shared = tuple(_shared(folder, cells, previews) for folder, cells in family.groups().items())
    cells = tuple(
        _cell(cell, previews[cell.name], costs[cell.name], rows[str(cell.settings.shared_dir)][1])
        for cell in longest_first(family.cells, costs)
    )
    return FamilyPreview(shared, cells, family.cells[0].run.workers)


def _rows(run: Run) -> tuple[Sequence[table.Row], bool]:
    """Proxies to plan with, and whether they are the model's own."""
    source = run.checkpoint
    weights = sum(math.prod(source.shape(name)) for name in source.names())
    has_own = weights <= MAX_MEASURED_WEIGHTS or reason_for(run, STAGES["proxies"]) is None
    return (preview_rows(run), True) if has_own else (stand_in_rows(run), False)


def _shared(folder: str, cells: Sequence[Cell], previews: Mapping[str, Preview]) -> SharedPreview:
    """The shared stages that any of the cells needs."""
    found = [item for cell in cells for item in previews[cell.name].stages if item[0] in SHARED]
    wanted = {stage: (seconds, reason) for stage, seconds, reason in found}
    why = "; ".join(f"{stage}: {reason}" for stage, (_, reason) in wanted.items() if reason != UP_TO_DATE)
    settings = cells[0].settings.windows
    has_cache = "activations" in wanted
    count, spec = settings.samples + settings.held_out, cells[0].run.checkpoint.spec
    cache = estimate_cache_bytes(spec, count, settings.length) if has_cache else 0.0
    return SharedPreview(folder, why or UP_TO_DATE, sum(seconds for seconds, _ in wanted.values()), cache)


def _cell(cell: Cell, preview: Preview, cost: Cost, exact: bool) -> CellPreview:
    own = [(stage, seconds, why) for stage, seconds, why in preview.stages if stage not in SHARED]
    first = next(((stage, why) for stage, _, why in own if why != UP_TO_DATE), None)
    full = preview.full_seconds(set(SHARED))
    share = sum(seconds for _, seconds, _ in own) / full if full else 0.0
    return CellPreview(
        cell=cell,
        why=UP_TO_DATE if first is None else _first_why(cell.run, *first),
        seconds=cost.seconds * share,
        peak_bytes=preview.peak_bytes,
        file_bytes=sum(entry.stored_bits for entry in preview.plan.tensors) // 8,
        matrix_bits=preview.totals.matrix_bits,
        exact=exact,
    )


def _first_why(run: Run, stage: str, why: str) -> str:
    """Why the first stage that runs does so; a cell that never ran does not wait for anything else."""
    has_run = read_manifest(run.folder_of(stage), stage) is not None
    return f"{stage}: {why}" if has_run else f"{stage}: not run yet"
