"""Figures of the page as SVG files that stand alone, in the colours of the report; equal rows give equal bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import mean

from rwkvq.ablations.results import ResultRow
from rwkvq.report.plots import Axis, axis_around, tick_text

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 200, 14, 46
INNER_WIDTH, INNER_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
COLOURS = ("#0b63ce", "#c2500a", "#12a594", "#8b5cf6", "#6b7684", "#d6336c", "#a16207", "#16191d")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#5d6672}.name{fill:#16191d}"
    ".grid{stroke:#dfe3e8}.line{fill:none;stroke-width:1.8}.frame{fill:none;stroke:#dfe3e8}"
)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear axis; low < high."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Position of `value` in percent, 0 at `low` and 100 at `high`."""
        return 100 * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values inside the axis."""
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 6)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * count for count in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over a common pair of axes; y is logarithmic."""

    x_name: str
    y_name: str
    series: Mapping[str, Points]
    has_log_x: bool = False


def svg(chart: Chart) -> str:
    """The chart as an SVG document; series beyond the colours repeat them dashed."""
    points = [point for series in chart.series.values() for point in series]
    y = axis_around(value for _, value in points)
    xs = [value for value, _ in points] or [0.0, 1.0]
    margin = 0.03 * (max(xs) - min(xs)) or 0.5
    x: Axis | Linear = axis_around(xs) if chart.has_log_x else Linear(min(xs) - margin, max(xs) + margin)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f'<style>{_STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        *_frame(x, y),
    ]
    for index, (name, series) in enumerate(chart.series.items()):
        parts += _line(index, name, [(_across(x, one), _down(y, other)) for one, other in sorted(series)])
    parts.append(f'<text class="name" x="{LEFT + INNER_WIDTH}" y="{HEIGHT - 8}" text-anchor="end">')
    parts.append(f'{escape(chart.x_name)}</text><text class="name" x="{LEFT + 6}" y="{TOP + 14}">')
    return "".join(parts) + f"{escape(chart.y_name)}</text></svg>\n"


def _across(x: Axis | Linear, value: float) -> float:
    return LEFT + x.at(value) / 100 * INNER_WIDTH


def _down(y: Axis, value: float) -> float:
    return TOP + (1 - y.at(value) / 100) * INNER_HEIGHT


def _frame(x: Axis | Linear, y: Axis) -> list[str]:
    """Grid lines with their values, and the frame around them."""
    low, right = TOP + INNER_HEIGHT, LEFT + INNER_WIDTH
    parts = []
    for tick in x.ticks():
        at = _across(x, tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{low}"/>')
        parts.append(f'<text x="{at:.1f}" y="{low + 17}" text-anchor="middle">{_tick(tick)}</text>')
    for tick in y.ticks():
        at = _down(y, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{_tick(tick)}</text>')
    frame = f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{INNER_WIDTH}" height="{INNER_HEIGHT}"/>'
    return [*parts, frame]


def _line(index: int, name: str, places: Points) -> list[str]:
    """One series in the picture and in the key."""
    colour = COLOURS[index % len(COLOURS)]
    dash = ' stroke-dasharray="5 4"' if index >= len(COLOURS) else ""
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
    marks = [f'<circle cx="{across:.1f}" cy="{down:.1f}" r="2.6" fill="{colour}"/>' for across, down in places]
    left, down = WIDTH - RIGHT + 12, TOP + 8 + 17 * index
    return [
        f'<polyline class="line" stroke="{colour}"{dash} points="{path}"/>',
        *marks,
        f'<line x1="{left}" x2="{left + 20}" y1="{down}" y2="{down}" stroke="{colour}" stroke-width="2"{dash}/>',
        f'<text class="name" x="{left + 26}" y="{down + 4}">{escape(name)}</text>',
    ]


def _tick(value: float) -> str:
    return "0" if value == 0 else tick_text(value)


KL = "KL, nats a token"


def _means(
    rows: Sequence[ResultRow], name: Callable[[ResultRow], str], x: Callable[[ResultRow], float]
) -> dict[str, Points]:
    """Mean KL over seeds at every x, by name of the series."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row.kl is not None:
            found.setdefault(name(row), {}).setdefault(x(row), []).append(row.kl)
    return {key: [(at, mean(values)) for at, values in by.items()] for key, by in found.items()}


def share_chart(rows: Sequence[ResultRow]) -> Chart:
    """E2: KL over the share of SQ by weights."""
    series = _means(rows, lambda row: f"{row.model}, by {row.parameters['by']}", lambda row: row.sq_share or 0.0)
    return Chart("share of SQ by weights", KL, series)


def budget_chart(rows: Sequence[ResultRow]) -> Chart:
    """E11: KL over matrix bits."""
    series = _means(rows, lambda row: f"{row.model}, {row.parameters['method']}", lambda row: row.matrix_bits or 0.0)
    return Chart("stored bits a matrix weight", KL, series)


def samples_chart(rows: Sequence[ResultRow]) -> Chart:
    """E13: KL over the number of calibration windows, on other text and on these windows."""
    names = {"text": "other text", "calibration": "own windows"}
    shown = [row for row in rows if row.text in names]
    series = _means(shown, lambda row: f"{row.model}, {names[row.text]}", lambda row: float(row.parameters["samples"]))
    return Chart("calibration windows of 512 tokens", KL, series, has_log_x=True)


def position_chart(rows: Sequence[ResultRow]) -> Chart:
    """E20: KL by position in long windows."""
    series: dict[str, Points] = {}
    for row in rows:
        if row.text == "long" and row.seed == min(other.seed for other in rows):
            count = len(row.kl_by_position)
            series[f"{row.model}, {row.parameters['line']}"] = [
                ((index + 0.5) / count, value) for index, value in enumerate(row.kl_by_position)
            ]
    return Chart("place in the window, 0 to 1", KL, series)


def order_chart(rows: Sequence[ResultRow]) -> Chart:
    """E5: mean KL by order over the share of SQ, draws by chance together."""
    shown = [row for row in rows if isinstance(row.parameters.get("share"), float)]
    models = list(dict.fromkeys(row.model for row in shown))[:1]  # one model; the table has all

    def name(row: ResultRow) -> str:
        order = str(row.parameters["order"])
        return "random" if order.startswith("random") else order

    kept = ("proxies, quantile", "proxies, unique", "proxies, reversed", "random", "mse", "hessian", "maxrms")
    shown = [row for row in shown if row.model in models and name(row) in kept]
    series = _means(shown, name, lambda row: float(row.parameters["share"]))
    return Chart(f"target share of SQ by weights, {', '.join(models)}; random: mean of draws", KL, series)


CHARTS: Mapping[str, Callable[[Sequence[ResultRow]], Chart]] = {
    "E2": share_chart,
    "E5": order_chart,
    "E11": budget_chart,
    "E13": samples_chart,
    "E20": position_chart,
}
"""Figures by experiment."""
