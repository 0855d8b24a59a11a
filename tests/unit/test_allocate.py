"""Allocation against the exact solution of scipy's integer programming (HiGHS)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from rwkvq.errors import PlanError
from rwkvq.plan.allocate import Option, allocate


def instance(seed: int, items: int) -> dict[str, list[Option]]:
    generator = np.random.default_rng(seed)
    made = {}
    for item in range(items):
        numel, scale = int(generator.integers(50, 2000)), float(generator.lognormal(0, 1.5))
        made[f"w{item}"] = [
            Option(f"k{bits}", int(numel * bits), scale * 4.0**-bits * float(generator.uniform(0.8, 1.25)))
            for bits in (2, 2.5, 3, 3.25, 3.5, 4, 5)
        ]
    return made


def exact(options: dict[str, list[Option]], budget: int) -> float:
    flat = [(name, option) for name, choices in options.items() for option in choices]
    one_each = np.array([[float(name == other) for other, _ in flat] for name in options])
    bits = np.array([[option.bits for _, option in flat]], float)
    result = milp(
        np.array([option.loss for _, option in flat]),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(bits, 0, budget)],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
    )
    assert result.success
    return float(result.fun)


@pytest.mark.parametrize("seed", range(12))
def test_the_loss_is_that_of_integer_programming(seed: int) -> None:
    options = instance(seed, 30)
    weights = sum(choices[2].bits for choices in options.values()) / 3
    # just above the floor few items can move, and thirty are few
    for bits, tolerance in ((2.1, 0.03), (2.75, 0.01), (3.275, 0.01), (4.4, 0.01)):
        budget = int(bits * weights)
        made = allocate(options, budget)
        assert made.bits <= budget
        by_label = {name: {option.label: option for option in choices} for name, choices in options.items()}
        assert made.loss == pytest.approx(sum(by_label[name][label].loss for name, label in made.labels.items()))
        assert made.loss <= (1 + tolerance) * exact(options, budget)


def test_a_larger_budget_never_costs_more() -> None:
    options = instance(3, 20)
    floor = sum(choices[0].bits for choices in options.values())
    losses = [allocate(options, int(floor * factor)).loss for factor in np.linspace(1, 3, 40)]
    assert all(later <= earlier * (1 + 1e-3) for earlier, later in itertools.pairwise(losses))
    assert losses[-1] == pytest.approx(sum(min(item.loss for item in choices) for choices in options.values()))


def test_the_floor_is_met_and_named() -> None:
    options = instance(4, 5)
    floor = sum(choices[0].bits for choices in options.values())
    assert allocate(options, floor).bits == floor
    with pytest.raises(PlanError, match=str(floor)):
        allocate(options, floor - 1)


def test_a_dearer_format_that_loses_more_is_never_taken() -> None:
    options = {"w": [Option("good", 10, 1.0), Option("bad", 20, 2.0), Option("best", 30, 0.5)]}
    assert [allocate(options, budget).labels["w"] for budget in (10, 29, 30)] == ["good", "good", "best"]


def test_equal_losses_take_fewer_bits() -> None:
    options = {"w": [Option("more", 12, 1.0), Option("less", 10, 1.0)], "v": [Option("only", 1, 0.0)]}
    assert allocate(options, 100).labels == {"w": "less", "v": "only"}
