"""Bits and error of every cell by block and tensor, and one proxy plane a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from statistics import median

from rwkvq.report.data import ProxyPlane, ReportData, TensorRow
from rwkvq.report.family.data import CellData
from rwkvq.report.plots import (
    MAX_BLOCKS_WITH_TEXT,
    Measure,
    heat_ends,
    heat_map,
    heat_rows,
    heat_scale,
    is_mixed,
    shade_of,
    value_of,
)
from rwkvq.report.text import NONE, bits_text, error_percent_text

_STEP = 13
"""Pixels a block in a deep map."""
_NAMED = 5
"""Every how many blocks a deep map writes the number."""


def is_quantized(row: TensorRow) -> bool:
    """True for the tensors that the maps show."""
    return row.block is not None and row.method != "keep"


def common_ends(cells: Iterable[CellData], measure: Measure) -> tuple[float, float] | None:
    """The smallest and largest figure in all cells of one model: equal colours mean equal figures in all its maps."""
    ends = [heat_ends(cell.report.tensors, measure) for cell in cells if cell.report is not None]
    known = [pair for pair in ends if pair is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def _runs(kinds: Sequence[int | None]) -> list[tuple[int, int, int]]:
    """Neighbours of one kind as (kind, first, count); None is left out."""
    runs, at = [], 0
    for kind, group in groupby(kinds):
        count = len(list(group))
        if kind is not None:
            runs.append((kind, at, count))
        at += count
    return runs


def _strip(kinds: Sequence[int | None], y: float, name: str) -> str:
    """One path a kind, all its blocks in it; `name` completes the class."""
    paths: dict[int, str] = {}
    for kind, first, count in _runs(kinds):
        paths[kind] = paths.get(kind, "") + f"M{first * _STEP} {y:g}h{count * _STEP}"
    return "".join(f'<path class="{name}{kind}" d="{path}"/>' for kind, path in sorted(paths.items()))


@dataclass(frozen=True, slots=True)
class _Look:
    """How one deep map is drawn; low and high are the figures of the first and last colour."""

    measure: Measure
    low: float
    high: float
    has_edges: bool

    def text(self, value: float) -> str:
        return bits_text(value) if self.measure == "bits" else f"{error_percent_text(value)} %"


def _row(name: str, rows: dict[int, TensorRow], blocks: Sequence[int], look: _Look) -> str:
    values = {block: value for block, row in rows.items() if (value := value_of(row, look.measure)) is not None}
    shades = [shade_of(values[at], look.low, look.high, look.measure) if at in values else None for at in blocks]
    strip = _strip(shades, 8, "s") + _strip([0 if shade is None else None for shade in shades], 8, "m")
    if look.has_edges:
        strip += _strip([0 if at in rows and rows[at].format == "scalar" else None for at in blocks], 14.5, "x")
    ends = f"{look.text(min(values.values()))} to {look.text(max(values.values()))}" if values else NONE
    return (
        f'<tr><th scope="row">{escape(name)}<td><svg width="{len(blocks) * _STEP}" height="16">'
        f"<title>{escape(name)}: {ends}</title>{strip}</svg>"
    )


def deep_map(report: ReportData, measure: Measure, ends: tuple[float, float]) -> str:
    """The heat map of a deep model: strips of colour, no figures, a few bytes a tensor."""
    cells: dict[str, dict[int, TensorRow]] = {}
    for row in report.tensors:
        if is_quantized(row) and row.block is not None:
            cells.setdefault(row.short, {})[row.block] = row
    blocks = sorted({block for rows in cells.values() for block in rows})
    look = _Look(measure, *ends, has_edges=measure == "bits" and is_mixed(report.tensors))
    body = "".join(_row(name, cells[name], blocks, look) for name in heat_rows(report.tensors))
    numbers = "".join(
        f'<text class="tick" x="{at * _STEP}" y="12">{block}</text>'
        for at, block in enumerate(blocks)
        if at % _NAMED == 0
    )
    head = f'<tr><th scope="col">block<td><svg width="{len(blocks) * _STEP}" height="16">{numbers}</svg>'
    return (
        f'<div class="{measure}"><div class="scroll"><table class="strips"><thead>{head}</thead><tbody>{body}</tbody>'
        f"</table></div>{heat_scale(measure, *ends)}</div>"
    )


def cell_map(report: ReportData, measure: Measure, ends: tuple[float, float] | None) -> str:
    """The map of one measure, with figures where they are legible."""
    is_deep = report.spec.layers > MAX_BLOCKS_WITH_TEXT
    if ends is None or heat_ends(report.tensors, measure) is None or not is_deep:
        return heat_map(report, measure, ends)
    return deep_map(report, measure, ends)


def median_error(report: ReportData) -> float | None:
    """The median relative error of the quantized tensors in blocks."""
    errors = [row.relative_error for row in report.tensors if is_quantized(row) and row.relative_error is not None]
    known = [error for error in errors if math.isfinite(error)]
    return median(known) if known else None


def _decides(cell: CellData) -> bool:
    """True if the policy chose between scalar and vector by the proxies."""
    plane = None if cell.report is None else cell.report.proxies
    if plane is None or cell.report is None:
        return False
    arms = {row.arm for row in plane.rows}
    return plane.tau_c is not None or plane.tau_f is not None or {"sq", "vq"} <= arms


def plane_of(cells: Sequence[CellData]) -> tuple[ProxyPlane, list[CellData]] | None:
    """The proxies of one model and the cells that decide by them; arms and thresholds are those of the first.

    If no policy decides by the proxies, the plane shows the proxies alone. None if no cell has any.
    """
    deciding = [cell for cell in cells if _decides(cell)]
    for cell in deciding or cells:
        plane = None if cell.report is None else cell.report.proxies
        if plane is not None and plane.rows:
            bare = tuple(replace(row, arm=None) for row in plane.rows)
            return (plane if deciding else replace(plane, rows=bare, tau_c=None, tau_f=None)), deciding
    return None
