"""Places for the names beside the points of a scatter plot that is as wide as its page allows.

Across, a point lies at a share of the picture's width, while its name keeps its size and its distance from the point in
pixels. Two boxes that hang on points this way move linearly with the width, so if one is left of the other in the
narrowest and in the widest picture, it is so in every picture between.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

NARROWEST, WIDEST = 240.0, 520.0
"""Widths in pixels between which the names must not overlap."""
MAX_UNITS = 24
"""Longer names are cut; about this many letters remain."""
_LETTER, _WIDE_LETTER = 6.9, 12.5
"""Widths in pixels of 12 px letters, rather too large."""
_ASCENT, _DESCENT = 10.0, 3.5
_RADIUS = 7.0
_LINK = 6.0
"""Pixels of a line that one box covers."""
_ATTEMPTS = 6
_FAN = 3.0
"""How much a name on the inner side of its point is put off."""
Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True, slots=True)
class Point:
    """A point at `x` (share of the width, 0 .. 1) and `y` (pixels from the top) and its name.

    `top` and `bottom` are the ends of its error bar, pixels from the top.
    """

    x: float
    y: float
    name: str
    top: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Place:
    """Where a name starts, ends or has its middle, in pixels from its point; `has_leader` = too far to be obvious."""

    dx: float
    dy: float
    anchor: Anchor
    has_leader: bool


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle that hangs on the share `x` of the width: pixels from there, and from the top of the picture."""

    x: float
    left: float
    right: float
    top: float
    bottom: float

    def is_left_of(self, other: Box) -> bool:
        """True if it ends before the other begins, at every width."""
        gap, shift = other.left - self.right, other.x - self.x
        return gap + shift * NARROWEST >= 0 and gap + shift * WIDEST >= 0

    def is_apart_from(self, other: Box) -> bool:
        """True if the two do not overlap at any width."""
        is_above_or_below = self.bottom <= other.top or other.bottom <= self.top
        return is_above_or_below or self.is_left_of(other) or other.is_left_of(self)

    def is_inside(self, height: float) -> bool:
        """True if it stays inside a picture of that height at every width."""
        ends = [(self.x * width + self.left, width - self.x * width - self.right) for width in (NARROWEST, WIDEST)]
        return self.top >= 0 and self.bottom <= height and all(min(pair) >= 0 for pair in ends)


def _units(letter: str) -> float:
    if unicodedata.east_asian_width(letter) in "WF":
        return _WIDE_LETTER / _LETTER
    return 1.45 if letter in "mwMW@%" else 1.2 if letter.isupper() else 1.0


def shortened(name: str) -> str:
    """The name, or its beginning and an ellipsis if it is too long for a label."""
    total, kept = 0.0, ""
    for letter in name:
        total += _units(letter)
        if total > MAX_UNITS:
            return kept.rstrip() + "…"
        kept += letter
    return kept


def text_width(name: str) -> float:
    """Pixels that a label needs at most, in a usual sans serif font of 12 px."""
    return _LETTER * sum(map(_units, name))


def label_box(point: Point, place: Place) -> Box:
    """The rectangle of the label of `point` at `place`."""
    width = text_width(shortened(point.name))
    left = {"start": place.dx, "middle": place.dx - width / 2, "end": place.dx - width}[place.anchor]
    baseline = point.y + place.dy
    return Box(point.x, left, left + width, baseline - _ASCENT, baseline + _DESCENT)


def _mark_boxes(point: Point) -> tuple[Box, Box]:
    """The point itself and its error bar."""
    return (
        Box(point.x, -_RADIUS, _RADIUS, point.y - _RADIUS, point.y + _RADIUS),
        Box(point.x, -2, 2, point.top, point.bottom),
    )


def leader_end(place: Place) -> tuple[float, float]:
    """Where the line from a point to its distant name ends, in pixels from the point."""
    side = {"start": -3.0, "middle": 0.0, "end": 3.0}[place.anchor]
    below = _DESCENT if place.dy < 0 else -_ASCENT
    return place.dx + side, place.dy + (below if place.anchor == "middle" else -4.0)


def _leader_boxes(point: Point, place: Place) -> list[Box]:
    """The line from the point to its name, as a chain of small boxes; its beginning may lie among close neighbours."""
    if not place.has_leader:
        return []
    x, y = leader_end(place)
    count = math.ceil(math.hypot(x, y) / _LINK)
    links = []
    for at in range(round(1.5 * _RADIUS / _LINK), count):
        left, right = sorted((x * at / count, x * (at + 1) / count))
        top, bottom = sorted((y * at / count, y * (at + 1) / count))
        links.append(Box(point.x, left - 1, right + 1, point.y + top - 1, point.y + bottom + 1))
    return links


def _distant() -> list[Place]:
    """Places that need a line, the nearest first."""
    steps = [step * side for step in range(2, 25) for side in (-1, 1)]
    beside = [Place(dx, 4 + 8.0 * step, "start", True) for dx in (12.0, 28.0, 48.0, 72.0) for step in steps]
    places = [*beside, *(replace(place, dx=-place.dx, anchor="end") for place in beside)]
    aside = (0.0, 20.0, -20.0, 40.0, -40.0, 70.0, -70.0)
    places += [Place(dx, 4 + 8.0 * step, "middle", True) for dx in aside for step in steps if abs(step) > 2]
    return sorted(places, key=lambda place: (math.hypot(*leader_end(place)), place.dy, place.dx))


_NEAR = (
    Place(10, 4, "start", False),
    Place(-10, 4, "end", False),
    Place(0, -11, "middle", False),
    Place(0, 19, "middle", False),
    *(Place(7.0 * x, 4 + 11.0 * y, "start" if x > 0 else "end", False) for y in (-1, 1) for x in (1, -1)),
)
_CANDIDATES = (*_NEAR, *_distant())
"""Places to try, the plainest first: beside the point, above, below, then ever further away with a line."""


def _fits(point: Point, place: Place, taken: Sequence[Box]) -> bool:
    """True if the label overlaps nothing; its line may touch the point that it comes from and no other."""
    label = label_box(point, place)
    if not all(label.is_apart_from(box) for box in taken):
        return False
    own = _mark_boxes(point)
    others = [box for box in taken if box not in own]
    return all(link.is_apart_from(box) for link in _leader_boxes(point, place) for box in others)


def _outward(points: Sequence[Point], at: int) -> list[Place]:
    """The places for one name, outside the crowd first, so that it unfolds like a fan."""
    width = (NARROWEST + WIDEST) / 2
    out_x = (points[at].x - fmean(point.x for point in points)) * width
    out_y = points[at].y - fmean(point.y for point in points)
    reach, half = math.hypot(out_x, out_y) or 1.0, text_width(shortened(points[at].name)) / 2
    sides = {"start": half, "middle": 0.0, "end": -half}

    def detour(place: Place) -> float:
        x, y = place.dx + sides[place.anchor], place.dy - 4
        distance = math.hypot(x, y) or 1.0
        return distance * (1 + _FAN * (1 - (x * out_x + y * out_y) / (distance * reach)))

    return sorted(_CANDIDATES, key=detour)


def _attempt(
    points: Sequence[Point], candidates: Sequence[Sequence[Place]], order: Sequence[int], height: float
) -> dict[int, Place]:
    """The places found when the names are placed one by one in that order, each at its first free candidate."""
    taken = [box for point in points for box in _mark_boxes(point)]
    places = {}
    for at in order:
        point = points[at]
        inside = (place for place in candidates[at] if label_box(point, place).is_inside(height))
        found = next((place for place in inside if _fits(point, place, taken)), None)
        if found is not None:
            places[at] = found
            taken += [label_box(point, found), *_leader_boxes(point, found)]
    return places


def place_labels(points: Sequence[Point], height: float) -> list[Place | None]:
    """A place for every name that overlaps no other name, point, line or error bar; None where no room is left.

    Names are placed in the order of the points. If that leaves some without a place, they go first in another attempt.
    """
    order = list(range(len(points)))
    best = _attempt(points, [_CANDIDATES] * len(points), order, height)
    if len(best) < len(points):
        fans = [_outward(points, at) for at in order]
        for _ in range(_ATTEMPTS):
            places = _attempt(points, fans, order, height)
            best = max(best, places, key=len)
            if len(best) == len(points):
                break
            order = [at for at in order if at not in places] + [at for at in order if at in places]
    return [best.get(at) for at in range(len(points))]
