"""The figures of a family run as rows of text, for the terminal, Markdown and the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rwkvq.report.data import QualityRow
from rwkvq.report.family.data import CellData, FamilyData, float_row
from rwkvq.report.family.figures import clear_best, estimate_in
from rwkvq.report.tables import Table
from rwkvq.report.text import NONE, bits_text, estimate_text, seconds_text, shared_decimals, size_text

COLUMNS = (
    "policy",
    "file size",
    "KL, nats",
    "perplexity",
    "top-1, %",
    "LAMBADA, %",
    "matrix bits",
    "body bits",
    "file bits",
    "time",
)
ALIGN = "l" + "r" * (len(COLUMNS) - 1)
_MEASURES = ((2, "kl", 1.0), (3, "perplexity", 1.0), (4, "top1", 100.0), (5, "lambada_accuracy", 100.0))
"""Column, attribute of QualityRow, factor."""
_TERMINAL = (0, 1, 2, 3, 4, 5, 6, 9)
"""Columns that fit a terminal."""
BEST = "Bold: the best policy of its model where it leads every other one by more than both standard errors together."


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of the table of models; `cell` None = the float model. `best` names the columns to stress."""

    cell: CellData | None
    texts: tuple[str, ...]
    best: frozenset[int] = frozenset()


def _seconds(seconds: float | None) -> str:
    return NONE if seconds is None or not math.isfinite(seconds) else seconds_text(seconds)


def _bits(bits: float | None) -> str:
    return NONE if bits is None or not math.isfinite(bits) else bits_text(bits)


def _float_texts(row: QualityRow, measures: Sequence[str]) -> tuple[str, ...]:
    bits = (_bits(row.matrix_bits), _bits(row.body_bits), _bits(row.file_bits))
    return ("float", size_text(row.file_bytes), *measures, *bits, NONE)


def _cell_texts(cell: CellData, measures: Sequence[str]) -> tuple[str, ...]:
    if cell.report is None:
        return (cell.policy, cell.state, *[NONE] * 7, _seconds(cell.seconds))
    sizes = cell.report.sizes
    bits = (_bits(sizes.matrix_bits), _bits(sizes.body_bits), _bits(sizes.file_bits))
    return (cell.policy, size_text(sizes.file_bytes), *measures, *bits, _seconds(cell.seconds))


def model_rows(cells: tuple[CellData, ...]) -> list[ModelRow]:
    """The float model, if it was measured, and every policy of one model; a measure has the same decimals in all."""
    reference = float_row(cells)
    quality = [reference, *(cell.quality for cell in cells)]
    columns = []
    for _, key, factor in _MEASURES:
        estimates = [estimate_in(row, key) for row in quality]
        decimals = shared_decimals(estimates, factor=factor)
        columns.append([estimate_text(item, factor=factor, decimals=decimals) for item in estimates])
    lines = list(zip(*columns, strict=True))
    winners = {column: clear_best(cells, key) for column, key, _ in _MEASURES}
    rows = [] if reference is None else [ModelRow(None, _float_texts(reference, lines[0]))]
    for cell, measures in zip(cells, lines[1:], strict=True):
        best = frozenset(column for column, winner in winners.items() if winner is cell)
        rows.append(ModelRow(cell, _cell_texts(cell, measures), best))
    return rows


def family_table(data: FamilyData) -> Table:
    """One row a cell and one a float model, for the terminal. A cell without a result shows its state for a size."""
    rows = tuple(
        (model, *(row.texts[at] for at in _TERMINAL))
        for model in data.models
        for row in model_rows(data.cells_of(model))
    )
    names = ("model", *(COLUMNS[at] for at in _TERMINAL))
    return Table(names, rows, "l" + "".join(ALIGN[at] for at in _TERMINAL))
