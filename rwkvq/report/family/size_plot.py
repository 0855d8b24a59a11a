"""Quality against size: one panel a model, all panels to the same scale, policies named at their points.

Panels and not one crowded plot: the loss of a policy is measured against its own float model, so policies are compared
within a model. The file's size in bytes and in bits per weight are the same axis twice, at the bottom and at the top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from rwkvq.report.family.data import CellData, FamilyData
from rwkvq.report.family.labels import Place, Point, leader_end, place_labels, shortened
from rwkvq.report.plots import Axis, axis_around, tick_text
from rwkvq.report.text import bits_text, count_text, estimate_text, size_text

HEIGHT = 250
"""Pixels of a panel's picture."""
_MAX_TICKS = 5
_LEAST_RATIO = 1.04
"""Largest over smallest file that a panel spans at least: equal sizes shall not look different."""
_LEAST_LOSS_RATIO = 1.3
"""The same for the loss."""
_MARGIN = 0.14
"""Share of the width left free at either side."""


@dataclass(frozen=True, slots=True)
class _Spot:
    """A cell with a place in the plot; `is_front` = no other policy is both smaller and closer to the float model."""

    cell: CellData
    size: int
    kl: float
    low: float
    high: float
    is_front: bool


def _drawable(cells: Sequence[CellData]) -> list[tuple[CellData, int, float]]:
    found = []
    for cell in cells:
        kl = math.nan if cell.kl is None else cell.kl.value
        if cell.report is not None and cell.report.sizes.file_bytes > 0 and 0 < kl < math.inf:
            found.append((cell, cell.report.sizes.file_bytes, kl))
    return found


def _spots(cells: Sequence[CellData]) -> list[_Spot]:
    """The cells that can be drawn: a KL of 0, none, or one that is not finite has no place on a logarithmic axis."""
    drawable = _drawable(cells)
    spots = []
    for cell, size, kl in drawable:
        error = (cell.kl and cell.kl.error) or 0.0
        error = error if math.isfinite(error) and 0 < error < kl else 0.0
        is_beaten = any(s <= size and k <= kl and (s, k) != (size, kl) for _, s, k in drawable)
        spots.append(_Spot(cell, size, kl, kl - error, kl + error, not is_beaten))
    # those on the front are named first, so that they have the best places
    return sorted(spots, key=lambda spot: (not spot.is_front, spot.size, spot.kl))


def _size_axes(panels: Sequence[Sequence[_Spot]]) -> list[Axis]:
    """One axis a panel, around its own files; equal distances are equal ratios in all panels."""
    sizes = [[spot.size for spot in spots] for spots in panels]
    ratio = max([_LEAST_RATIO, *(max(found) / min(found) for found in sizes)])
    reach = math.sqrt(ratio) * ratio ** (_MARGIN / (1 - 2 * _MARGIN))
    middles = [math.sqrt(max(found) * min(found)) for found in sizes]
    return [Axis(middle / reach, middle * reach) for middle in middles]


def _loss_axis(panels: Sequence[Sequence[_Spot]]) -> Axis:
    """The axis of KL, the same for all panels."""
    values = [value for spots in panels for spot in spots for value in (spot.low, spot.kl, spot.high)]
    # losses that hardly differ shall not look different
    middle = math.sqrt(min(values) * max(values)) if values else 1.0
    return axis_around([*values, middle / math.sqrt(_LEAST_LOSS_RATIO), middle * math.sqrt(_LEAST_LOSS_RATIO)])


def few_ticks(axis: Axis) -> list[float]:
    """Ticks of the axis, thinned evenly until they fit a narrow picture."""
    ticks = axis.ticks()
    return ticks[:: math.ceil(len(ticks) / _MAX_TICKS)]


def _unit(axis: Axis) -> tuple[str, float]:
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next(((name, factor) for name, factor in units if axis.high >= factor), ("B", 1.0))


def _scales(x: Axis, y: Axis, bits_per_byte: float) -> str:
    """Grid and figures: sizes below, bits per weight above, KL at the left."""
    _, factor = _unit(x)
    parts = []
    for tick in few_ticks(Axis(x.low / factor, x.high / factor)):
        at = f"{x.at(tick * factor):.2f}%"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="0" y2="100%"/>')
        parts.append(f'<text class="tick" x="{at}" y="100%" dy="17" text-anchor="middle">{tick_text(tick)}</text>')
    bits = Axis(x.low * bits_per_byte, x.high * bits_per_byte)
    for tick in few_ticks(bits):
        at = f"{bits.at(tick):.2f}%"
        parts.append(f'<line class="notch" x1="{at}" x2="{at}" y1="-4" y2="0"/>')
        parts.append(f'<text class="tick" x="{at}" y="-9" text-anchor="middle">{tick_text(tick)}</text>')
    for tick in y.ticks():
        height = f"{_height(y, tick):.1f}"
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{height}" y2="{height}"/>')
        parts.append(f'<text class="tick" x="0" dx="-7" y="{height}" dy="4" text-anchor="end">{tick_text(tick)}</text>')
    return "".join(parts)


def _height(y: Axis, value: float) -> float:
    """Pixels from the top."""
    return HEIGHT * (1 - y.at(value) / 100)


def _title(spot: _Spot) -> str:
    assert spot.cell.report is not None
    sizes = spot.cell.report.sizes
    return (
        f"{spot.cell.name}: KL {estimate_text(spot.cell.kl)}, {size_text(spot.size)}, "
        f"{bits_text(sizes.file_bits)} file bits, {bits_text(sizes.matrix_bits)} matrix bits"
    )


def _label(spot: _Spot, place: Place | None) -> str:
    if place is None:
        return ""
    line = ""
    if place.has_leader:
        x, y = leader_end(place)
        line = f'<path class="leader" d="M0 0L{x:g} {y:g}"/>'
    anchor = "" if place.anchor == "start" else f' text-anchor="{place.anchor}"'
    name = escape(shortened(spot.cell.policy))
    return f'{line}<text x="{place.dx:g}" y="{place.dy:g}"{anchor}>{name}</text>'


def _mark(spot: _Spot, place: Place | None, x: Axis, y: Axis) -> str:
    at, height = f"{x.at(spot.size):.2f}%", _height(y, spot.kl)
    low, high = _height(y, spot.low) - height, _height(y, spot.high) - height
    bar = f'<path class="whisker" d="M0 {high:.1f}V{low:.1f}"/>' if low > high else ""
    kind = "spot front" if spot.is_front else "spot"
    return (
        f'<svg x="{at}" y="{height:.1f}" class="{kind}"><title>{escape(_title(spot))}</title>'
        f'{_label(spot, place)}{bar}<circle r="4.5"/></svg>'
    )


def _picture(spots: Sequence[_Spot], places: Sequence[Place | None], x: Axis, y: Axis) -> str:
    report = spots[0].cell.report
    assert report is not None
    scales = _scales(x, y, report.sizes.file_bits / report.sizes.file_bytes)
    marks = "".join(_mark(spot, place, x, y) for spot, place in zip(spots, places, strict=True))
    unit, _ = _unit(x)
    return (
        f'<div class="panel"><svg role="img" aria-label="KL against file size" width="100%" height="{HEIGHT}">'
        f'{scales}<rect class="frame" width="100%" height="100%"/>{marks}'
        '<text class="axis" x="0" y="-9" dx="-40">KL</text>'
        '<text class="axis" x="100%" y="-26" text-anchor="end">file bits per weight</text>'
        f'<text class="axis" x="100%" y="100%" dy="35" text-anchor="end">file size, {unit}</text></svg></div>'
    )


def _places(spots: Sequence[_Spot], x: Axis, y: Axis) -> list[Place | None]:
    points = [
        Point(x.at(spot.size) / 100, _height(y, spot.kl), spot.cell.policy, _height(y, spot.high), _height(y, spot.low))
        for spot in spots
    ]
    return place_labels(points, HEIGHT)


def _panel(spots: Sequence[_Spot], x: Axis, y: Axis) -> str:
    """The picture, and in words the names that found no room in it."""
    places = _places(spots, x, y)
    nameless = [spot.cell.policy for spot, place in zip(spots, places, strict=True) if place is None]
    note = f'<p class="note">Without a name: {escape(", ".join(nameless))}.</p>' if nameless else ""
    return _picture(spots, places, x, y) + note


def _missing(cells: Sequence[CellData], spots: Sequence[_Spot]) -> str:
    drawn = {id(spot.cell) for spot in spots}
    absent = [cell for cell in cells if id(cell) not in drawn]
    names = [f"{escape(cell.policy)} ({'no KL' if cell.state == 'done' else cell.state})" for cell in absent]
    return f'<p class="note">Not shown: {", ".join(names)}.</p>' if names else ""


def _heading(model: str, cells: Sequence[CellData]) -> str:
    weights = next((cell.report.sizes.weights for cell in cells if cell.report is not None), None)
    count = "" if weights is None else f" <span>{count_text(weights)} weights</span>"
    return f"<h3>{escape(model)}{count}</h3>"


def size_panels(data: FamilyData) -> str:
    """The panels of all models; a model without a point to draw says so in words."""
    groups = [(model, data.cells_of(model)) for model in data.models]
    found = [(model, cells, _spots(cells)) for model, cells in groups]
    drawn = [spots for _, _, spots in found if spots]
    y = _loss_axis(drawn)
    axes = iter(_size_axes(drawn))
    panels = []
    for model, cells, spots in found:
        picture = _panel(spots, next(axes), y) if spots else ""
        panels.append(f"<div>{_heading(model, cells)}{picture}{_missing(cells, spots)}</div>")
    return f'<div class="panels">{"".join(panels)}</div>'
