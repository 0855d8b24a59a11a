"""Names beside points: none overlaps another at any width of the picture."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from rwkvq.report.family.labels import (
    NARROWEST,
    WIDEST,
    Box,
    Point,
    label_box,
    place_labels,
    shortened,
    text_width,
)

HEIGHT = 250.0


def pixels(box: Box, width: float) -> tuple[float, float, float, float]:
    return box.x * width + box.left, box.x * width + box.right, box.top, box.bottom


def overlap(one: Box, other: Box, width: float) -> bool:
    left, right, top, bottom = pixels(one, width)
    left_2, right_2, top_2, bottom_2 = pixels(other, width)
    return left < right_2 and left_2 < right and top < bottom_2 and top_2 < bottom


def cloud(count: int, seed: int, spread: float = 0.7) -> list[Point]:
    noise = random.Random(seed)
    points = []
    for at in range(count):
        x, y = 0.5 + spread * (noise.random() - 0.5), 125 + 230 * spread * (noise.random() - 0.5)
        points.append(Point(x, y, f"policy-{at}", y - 3, y + 3))
    return points


@pytest.mark.parametrize(("seed", "spread"), [*((seed, 0.7) for seed in range(6)), (6, 0.25)])
def test_names_overlap_neither_names_nor_points_at_any_width(seed: int, spread: float) -> None:
    points = cloud(12, seed, spread)
    places = place_labels(points, HEIGHT)
    boxes = [label_box(point, place) for point, place in zip(points, places, strict=True) if place is not None]
    marks = [Box(point.x, -4.5, 4.5, point.y - 4.5, point.y + 4.5) for point in points]
    for width in (NARROWEST, 260, 331.5, 400, WIDEST):
        assert not any(overlap(one, other, width) for one, other in combinations(boxes, 2))
        assert not any(overlap(box, mark, width) for box in boxes for mark in marks)
        for left, right, top, bottom in (pixels(box, width) for box in boxes):
            assert left >= 0 and right <= width and top >= 0 and bottom <= HEIGHT


@pytest.mark.parametrize("seed", range(12))
def test_twelve_points_all_get_their_names(seed: int) -> None:
    assert None not in place_labels(cloud(12, seed), HEIGHT)


def test_a_lone_name_stands_beside_its_point_without_a_line() -> None:
    (place,) = place_labels([Point(0.5, 100, "sq", 98, 102)], HEIGHT)
    assert place is not None and not place.has_leader
    assert (place.dx, place.anchor) == (10, "start")


def test_a_name_at_the_right_edge_turns_left() -> None:
    (place,) = place_labels([Point(0.98, 100, "rwkvquant", 98, 102)], HEIGHT)
    assert place is not None and place.anchor == "end"


def test_close_neighbours_get_lines() -> None:
    points = [Point(0.5 + 0.002 * at, 120.0, f"policy-{at}", 119, 121) for at in range(8)]
    places = place_labels(points, HEIGHT)
    assert None not in places
    assert any(place is not None and place.has_leader for place in places)


def test_what_has_no_room_stays_without_a_name() -> None:
    places = place_labels([Point(0.5, 10, f"policy-{at}", 10, 10) for at in range(8)], 20.0)
    assert None in places


def test_error_bars_are_kept_free() -> None:
    below = Point(0.5, 200, "a", 60, 240)
    beside = Point(0.45, 120, "policy", 118, 122)
    _, place = place_labels([below, beside], HEIGHT)
    assert place is not None
    assert label_box(beside, place).is_apart_from(Box(0.5, -2, 2, 60, 240))


def test_boxes_are_apart_only_if_they_are_so_at_every_width() -> None:
    left, right = Box(0.2, 0, 50, 0, 10), Box(0.5, 0, 50, 0, 10)
    assert left.is_apart_from(right) and right.is_apart_from(left)
    # side by side in the widest picture only
    assert not Box(0.2, 0, 100, 0, 10).is_apart_from(right)
    assert Box(0.2, 0, 100, 10, 20).is_apart_from(right)
    # side by side in the narrowest picture only
    assert not Box(0.5, -150, -100, 0, 10).is_apart_from(Box(0.2, 0, 30, 0, 10))


def test_long_names_are_cut_and_wide_letters_count_more() -> None:
    assert shortened("rwkvquant-paper") == "rwkvquant-paper"
    assert shortened("a" * 60) == "a" * 24 + "…"
    assert len(shortened("模" * 60)) < len(shortened("W" * 60)) < len(shortened("a" * 60))
    assert text_width("WWWW") > text_width("aaaa")
