"""Choosing one option for every item so that the losses add up to the least within a budget of bits.

The multiple-choice knapsack: a Lagrangian price of a bit gives the best choice for *some* budget; bisection finds the
price of the given one, and what is left of the budget is spent on the best exchanges of single items and of pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rwkvq.errors import PlanError

BISECTIONS = 200
MOVES = 3000
"""Exchanges of which all pairs are tried; with more items the rest of a budget is too small to matter."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store an item: its bits and its loss."""

    label: str
    bits: int
    loss: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """The label chosen for each item, and the sums of bits and losses."""

    labels: dict[str, str]
    bits: int
    loss: float


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> Allocation:
    """The choice of least total loss with at most `budget` bits, to within exchanges of three items of the optimum.

    Ties go to fewer bits, then to the order given. Raises PlanError, naming the least possible, for a budget that
    nothing meets.
    """
    floor = sum(min(option.bits for option in choices) for choices in options.values())
    if floor > budget:
        raise PlanError(f"a budget of {budget} bits cannot be met: the smallest formats take {floor} bits")
    hulls = {name: _lower_hull(choices) for name, choices in options.items()}
    low, high = 0.0, 1.0
    while _bits(_at_price(hulls, high)) > budget:
        high *= 4.0
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if _bits(_at_price(hulls, middle)) <= budget else (middle, high)
    chosen = _at_price(hulls, high)
    _spend(chosen, options, budget)
    while _exchange_pair(chosen, options, budget):
        _spend(chosen, options, budget)
    labels = {name: option.label for name, option in chosen.items()}
    return Allocation(labels, _bits(chosen), sum(option.loss for option in chosen.values()))


def _bits(chosen: Mapping[str, Option]) -> int:
    return sum(option.bits for option in chosen.values())


def _lower_hull(choices: Sequence[Option]) -> list[Option]:
    """The options that some price of a bit prefers: by rising bits, convex and falling in loss."""
    hull: list[Option] = []
    for option in sorted(choices, key=lambda item: (item.bits, item.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(cheap: Option, dear: Option) -> float:
    """Loss saved by every bit more, > 0."""
    return (cheap.loss - dear.loss) / (dear.bits - cheap.bits)


def _at_price(hulls: Mapping[str, Sequence[Option]], price: float) -> dict[str, Option]:
    """The option of least loss + price * bits for every item; ties take fewer bits."""
    return {
        name: min(hull, key=lambda item: (item.loss + price * item.bits, item.bits)) for name, hull in hulls.items()
    }


def _spend(chosen: dict[str, Option], options: Mapping[str, Sequence[Option]], budget: int) -> None:
    """Exchange single items as long as one saves loss and fits what is left: first what saves most for each bit."""
    left = budget - _bits(chosen)
    while True:
        best: tuple[float, float, str, Option] | None = None
        for name, now in chosen.items():
            for option in options[name]:
                saved, added = now.loss - option.loss, option.bits - now.bits
                if saved <= 0 or added > left:
                    continue
                rate = saved / max(added, 1)
                if best is None or (rate, saved) > best[:2]:
                    best = (rate, saved, name, option)
        if best is None:
            return
        _, _, name, option = best
        left -= option.bits - chosen[name].bits
        chosen[name] = option


def _exchange_pair(chosen: dict[str, Option], options: Mapping[str, Sequence[Option]], budget: int) -> bool:
    """Make the best exchange of two items that saves loss within the budget; False if there is none."""
    moves = [(name, option) for name, now in chosen.items() for option in options[name] if option != now]
    if len(moves) > MOVES:
        return False
    items = {name: index for index, name in enumerate(chosen)}
    owner = np.array([items[name] for name, _ in moves])
    bits = np.array([option.bits - chosen[name].bits for name, option in moves])
    saved = np.array([chosen[name].loss - option.loss for name, option in moves])
    fits = (bits[:, None] + bits <= budget - _bits(chosen)) & (owner[:, None] != owner)
    gain = np.where(fits, saved[:, None] + saved, 0.0)
    first, second = np.unravel_index(int(gain.argmax()), gain.shape) if gain.size else (0, 0)
    total = sum(option.loss for option in chosen.values())
    if not gain.size or gain[first, second] <= 1e-12 * total:
        return False
    for place in (first, second):
        name, option = moves[place]
        chosen[name] = option
    return True
