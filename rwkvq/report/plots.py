"""Pictures of the report as markup: SVG and HTML that scale with the page, equal input giving equal bytes.

Colours come from the classes of `style.py`, so that light and dark pages use the same markup. Positions inside the
SVG are percentages and text sizes are pixels: a phone gets a narrower picture, not smaller letters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from rwkvq.report.data import ProxyPlane, ProxyRow, ReportData, StageTime, TensorRow
from rwkvq.report.tables import Part
from rwkvq.report.text import bits_text, count_text, error_percent_text, percent_text, seconds_text, size_text

SHADES = 9
"""Colour steps of a heat map."""
MAX_BLOCKS_SIDE_BY_SIDE = 24
"""Two heat maps of deeper models do not fit beside each other."""
MAX_BLOCKS_WITH_TEXT = 14
"""Heat maps of deeper models show colours only; the figures are in the tooltips and the table."""
Measure = Literal["bits", "error"]


@dataclass(frozen=True, slots=True)
class Axis:
    """A logarithmic axis; 0 < low < high."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Position of `value` in percent, 0 at `low` and 100 at `high`."""
        return 100 * math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Round values inside the axis, 2 to 8 of them."""
        if self.high / self.low < 8:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 3))
            step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 7)
            return [step * count for count in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        stride = math.ceil(len(exponents) / 7)
        powers = [10.0**exponent for exponent in exponents if exponent % stride == 0]
        dense = [power * factor for power in powers for factor in (1, 2, 5)] if stride == 1 else powers
        inside = [value for value in dense if self.low <= value <= self.high]
        return inside if len(inside) <= 8 else [value for value in powers if self.low <= value <= self.high]


def axis_around(values: Iterable[float]) -> Axis:
    """The axis that holds all positive finite `values` with a margin of 6 %; 0.1 .. 10 around nothing."""
    inside = [value for value in values if value > 0 and math.isfinite(value)] or [0.1, 10.0]
    low, high = min(inside), max(inside)
    margin = max((high / low) ** 0.06, 1.05)
    return Axis(low / margin, high * margin)


def tick_text(value: float) -> str:
    """`0.5`, `20`, `10k`, `3M`; powers of ten beyond that."""
    if value >= 1e9 or value < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if value >= factor * 0.9999:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


def _symbol(letter: str, index: str) -> str:
    """A letter with a subscript; the empty last span brings the line back up."""
    return f'{letter}<tspan dy="3" font-size="9">{index}</tspan><tspan dy="-3">&#8203;</tspan>'


def _frame(x: Axis, y: Axis) -> str:
    lines = [
        f'<line class="grid" x1="{x.at(tick):.2f}%" x2="{x.at(tick):.2f}%" y1="0" y2="100%"/>'
        f'<text class="tick" x="{x.at(tick):.2f}%" y="100%" dy="18" text-anchor="middle">{tick_text(tick)}</text>'
        for tick in x.ticks()
    ]
    lines += [
        f'<line class="grid" x1="0" x2="100%" y1="{100 - y.at(tick):.2f}%" y2="{100 - y.at(tick):.2f}%"/>'
        f'<text class="tick" x="0" dx="-8" y="{100 - y.at(tick):.2f}%" dy="4" text-anchor="end">'
        f"{tick_text(tick)}</text>"
        for tick in y.ticks()
    ]
    return "".join(lines) + '<rect class="frame" width="100%" height="100%"/>'


def _thresholds(plane: ProxyPlane, x: Axis, y: Axis) -> tuple[str, str]:
    """The shaded region of SQ, to lie under the marks, and the labelled threshold lines."""
    region, lines = "", ""
    if plane.tau_c is not None and plane.tau_f is not None and plane.tau_c > 0 and plane.tau_f > 0:
        width, height = x.at(plane.tau_c), y.at(plane.tau_f)
        region = f'<rect class="region" x="0" y="{100 - height:.2f}%" width="{width:.2f}%" height="{height:.2f}%"/>'
    if plane.tau_c is not None and plane.tau_c > 0:
        at = x.at(plane.tau_c)
        # the label stays inside the picture whichever side the line is on
        side = 'dx="5"' if at < 60 else 'dx="-5" text-anchor="end"'
        lines += f'<line class="tau" x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="100%"/>'
        lines += f'<text class="tau-name" x="{at:.2f}%" y="14" {side}>{_symbol("τ", "c")} = {plane.tau_c:.4g}</text>'
    if plane.tau_f is not None and plane.tau_f > 0:
        at = 100 - y.at(plane.tau_f)
        lines += f'<line class="tau" x1="0" x2="100%" y1="{at:.2f}%" y2="{at:.2f}%"/>'
        lines += (
            f'<text class="tau-name" x="100%" dx="-5" y="{at:.2f}%" dy="{-6 if at > 10 else 14}" text-anchor="end">'
        )
        lines += f"{_symbol('τ', 'f')} = {plane.tau_f:.4g}</text>"
    return region, lines


def _mark(row: ProxyRow, x: Axis, y: Axis, has_title: bool) -> str:
    arm = row.arm or "none"
    choice = row.arm.upper() if row.arm else "not decided"
    title = f"{row.name}: P_c {row.p_c:.4g}, P_f {row.p_f:.4g}, {count_text(row.numel)} weights, {choice}"
    kind = f"mark {arm}" + ("" if row.weight_class == "matrix" else " hollow")
    place = f'<use href="#mark-{arm}" x="{x.at(row.p_c):.2f}%" y="{100 - y.at(row.p_f):.2f}%" class="{kind}"'
    return f"{place}><title>{escape(title)}</title></use>" if has_title else f"{place}/>"


def _is_on_plane(row: ProxyRow) -> bool:
    return 0 < row.p_c < math.inf and 0 < row.p_f < math.inf


MARK_SHAPES = (
    '<defs><circle id="mark-sq" r="4.5"/><path id="mark-vq" d="M0-5.2 4.9 3.6H-4.9z"/>'
    '<circle id="mark-none" r="2.5"/></defs>'
)
"""The shapes that the marks of a plane refer to; a page needs them once."""


def proxy_plane(plane: ProxyPlane, *, shapes: str = MARK_SHAPES, has_titles: bool = True) -> str:
    """The (P_c, P_f) plane on logarithmic axes: thresholds, and every weight with its arm.

    Weights with a proxy of 0 (all gaps equal, or a constant vector) have no place on a logarithmic axis: left out.
    `shapes` is empty for all but the first plane of a page; without titles a plane of thousands of weights stays small.
    """
    shown = [row for row in plane.rows if _is_on_plane(row)]
    x = axis_around([row.p_c for row in shown] + [plane.tau_c or 0.0])
    y = axis_around([row.p_f for row in shown] + [plane.tau_f or 0.0])
    region, lines = _thresholds(plane, x, y)
    # undecided weights lie below, the rare SQ marks on top
    order = {None: 0, "vq": 1, "sq": 2}
    marks = "".join(_mark(row, x, y, has_titles) for row in sorted(shown, key=lambda row: order[row.arm]))
    return (
        '<div class="plane"><svg role="img" aria-label="Coarse proxy against fine proxy of every weight"'
        ' width="100%" height="100%">'
        f"{shapes}{region}{_frame(x, y)}{marks}{lines}"
        f'<text class="axis" x="0" y="-12" dx="-36">{_symbol("P", "f")}, fine</text>'
        f'<text class="axis" x="100%" y="100%" dy="38" text-anchor="end">{_symbol("P", "c")}, coarse</text></svg></div>'
    )


def plane_key(plane: ProxyPlane) -> str:
    """The legend of `proxy_plane`: each arm with its share by count and by weights."""
    decided = [row for row in plane.rows if row.arm is not None]
    everything = sum(row.numel for row in decided)
    items = []
    for arm, shape, name in (
        ("sq", '<circle cx="7" cy="7" r="4.5"/>', "scalar (SQ)"),
        ("vq", '<path d="M7 2 12 11H2z"/>', "vector (VQ)"),
    ):
        rows = [row for row in decided if row.arm == arm]
        weights = sum(row.numel for row in rows)
        part = percent_text(weights / everything if everything else None)
        share = f"{len(rows)} of {len(decided)} matrices, {part} of their weights"
        items.append(f'<li><svg width="14" height="14" class="mark {arm}">{shape}</svg><b>{name}</b> {share}</li>')
    if len(decided) < len(plane.rows):
        dot = '<svg width="14" height="14" class="mark none hollow"><circle cx="7" cy="7" r="2.5"/></svg>'
        items.append(f"<li>{dot}element-wise weights, logged only</li>")
    if hidden := sum(not _is_on_plane(row) for row in plane.rows):
        items.append(f'<li class="quiet">{hidden} with a proxy of 0 not shown</li>')
    return f'<ul class="key">{"".join(items)}<li class="quiet">filled = matrix, outline = LoRA factor</li></ul>'


def heat_rows(tensors: Iterable[TensorRow]) -> list[str]:
    """Short names of the quantized tensors, in the order of the fullest block, matrices first."""
    quantized = [row for row in tensors if row.block is not None and row.method != "keep"]
    blocks: dict[int, list[TensorRow]] = {}
    for row in quantized:
        blocks.setdefault(row.block or 0, []).append(row)
    rank = {"matrix": 0, "lora": 1, "elementwise": 2, "keep": 3}
    # a later block may have tensors that block 0 lacks; the fullest block knows their place
    fullest_first = sorted(blocks.values(), key=len, reverse=True)
    names = {row.short: rank[row.weight_class] for rows in fullest_first for row in rows}
    return sorted(names, key=lambda name: names[name])


def value_of(row: TensorRow, measure: Measure) -> float | None:
    """Stored bits per weight or relative error; None if there is none or it is not finite."""
    value = row.bits if measure == "bits" else row.relative_error
    return value if value is not None and math.isfinite(value) else None


def shade_of(value: float, low: float, high: float, measure: Measure) -> int:
    """Colour step 0 .. SHADES - 1; errors are compared by ratio, bits by difference."""
    if high <= low:
        return SHADES // 2
    if measure == "error" and low > 0:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return min(SHADES - 1, int(SHADES * (value - low) / (high - low)))


def is_mixed(tensors: Iterable[TensorRow]) -> bool:
    """True if some quantized tensors in blocks are scalar and some are not: only then is the arm worth showing."""
    formats = {row.format == "scalar" for row in tensors if row.block is not None and row.method != "keep"}
    return len(formats) == 2


@dataclass(frozen=True, slots=True)
class _Look:
    """How the cells of one heat map are drawn; low and high are the ends of its colours."""

    measure: Measure
    low: float
    high: float
    has_text: bool
    has_edges: bool


def _cell(row: TensorRow | None, look: _Look) -> str:
    value = None if row is None else value_of(row, look.measure)
    if row is None or value is None:
        return '<td class="no">'
    text = f"{value:.2f}" if look.measure == "bits" else error_percent_text(value)
    edge = " edge" if look.has_edges and row.format == "scalar" else ""
    kind = f"h{shade_of(value, look.low, look.high, look.measure)}{edge}"
    return f'<td class="{kind}">{text}' if look.has_text else f'<td class="{kind}" title="{escape(row.name)} {text}">'


def heat_ends(tensors: Iterable[TensorRow], measure: Measure) -> tuple[float, float] | None:
    """The smallest and largest figure of the quantized tensors in blocks; None if there is none."""
    shown = (row for row in tensors if row.block is not None and row.method != "keep")
    values = [value for row in shown if (value := value_of(row, measure)) is not None]
    return (min(values), max(values)) if values else None


def heat_map(report: ReportData, measure: Measure, ends: tuple[float, float] | None = None) -> str:
    """A table, tensors down and blocks across, coloured by stored bits or by relative error (in percent).

    `ends` are the figures of the first and last colour, by default the smallest and largest of this report.
    """
    names = heat_rows(report.tensors)
    cells = {(row.short, row.block): row for row in report.tensors if row.block is not None and row.method != "keep"}
    own = heat_ends(report.tensors, measure)
    if own is None:
        return '<p class="quiet">No quantized tensor has this figure.</p>'
    blocks = sorted({block for _, block in cells if block is not None})
    has_text = len(blocks) <= MAX_BLOCKS_WITH_TEXT
    has_edges = measure == "bits" and is_mixed(report.tensors)
    look = _Look(measure, *(ends or own), has_text, has_edges)
    head = "".join(f'<th scope="col">{block}' if has_text or block % 4 == 0 else "<th>" for block in blocks)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}' + "".join(_cell(cells.get((name, block)), look) for block in blocks)
        for name in names
    )
    return (
        f'<div class="{measure}"><div class="scroll"><table class="{"heat" if has_text else "heat small"}">'
        f"<thead><tr><td>block{head}</thead><tbody>{body}</tbody></table></div>"
        f"{heat_scale(measure, look.low, look.high)}</div>"
    )


def heat_scale(measure: Measure, low: float, high: float) -> str:
    """The legend of a heat map."""
    ends = [bits_text(value) if measure == "bits" else f"{error_percent_text(value)} %" for value in (low, high)]
    if low == high:
        return f'<div class="scale"><span>all {ends[0]}</span></div>'
    swatches = "".join(f'<i class="h{shade}"></i>' for shade in range(SHADES))
    return f'<div class="scale"><span>{ends[0]}</span>{swatches}<span>{ends[1]}</span></div>'


def stage_bars(stages: Sequence[StageTime]) -> str:
    """One bar a stage, as long as its share of the slowest one."""
    longest = max((stage.seconds for stage in stages), default=0.0) or 1.0
    rows = []
    for stage in stages:
        kind = ' class="reused"' if stage.reused else ""
        bar = f'<i{kind} style="width:{100 * stage.seconds / longest:.1f}%"></i>'
        text = "reused" if stage.reused else seconds_text(stage.seconds)
        rows.append(f"<li><span>{escape(stage.name)}</span>{bar}<b>{text}</b></li>")
    return f'<ul class="bars">{"".join(rows)}</ul>'


def part_bar(parts: Sequence[Part]) -> str:
    """One stacked bar of the bytes in the weight files."""
    everything = sum(part.stored_bits for part in parts) or 1
    pieces = "".join(
        f'<i class="part-{part.key}" style="flex-grow:{1000 * part.stored_bits / everything:.1f}" '
        f'title="{escape(part.name)}: {size_text(round(part.stored_bits / 8))}"></i>'
        for part in parts
    )
    return f'<div class="stack" role="img" aria-label="Shares of the weight files">{pieces}</div>'
