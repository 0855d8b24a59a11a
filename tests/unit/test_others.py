"""Ablation measures, by hand on small gaps."""

from __future__ import annotations

import math

import pytest
import torch

from rwkvq.proxies import others
from rwkvq.proxies.gaps import Gaps, spectrum

# G' = 0, 0, 1/4, 1/4, 0, 1/2 with mean 1/6
GAPS = Gaps(torch.tensor([1, 1, 2], dtype=torch.float64), 3)
NORMALISED = torch.tensor([0, 0, 0.25, 0.25, 0, 0.5], dtype=torch.float64)


def test_measures_of_normalised_gaps() -> None:
    deviation = NORMALISED - 1 / 6
    assert others.variance(GAPS) == pytest.approx(float(deviation.square().mean()), rel=1e-12)
    assert others.coefficient_of_variation(GAPS) == pytest.approx(
        6 * float(deviation.square().mean().sqrt()), rel=1e-12
    )
    assert others.value_range(GAPS) == pytest.approx(0.5, rel=1e-12)
    assert others.mean_absolute_deviation(GAPS) == pytest.approx(float(deviation.abs().mean()), rel=1e-12)


def test_range_without_zero_gaps_subtracts_the_smallest() -> None:
    assert others.value_range(Gaps(torch.tensor([1.0, 3.0], dtype=torch.float64), 0)) == pytest.approx(0.5, rel=1e-12)


def test_max_over_rms() -> None:
    assert others.max_over_rms(spectrum(torch.tensor([3.0, -4, 0, 0]))) == pytest.approx(4 / 2.5, rel=1e-12)
    assert others.max_over_rms(spectrum(torch.full((5,), -1e-30, dtype=torch.float64))) == pytest.approx(1.0, rel=1e-12)
    assert others.max_over_rms(spectrum(torch.zeros(3))) == 0.0
    assert others.max_over_rms(spectrum(torch.tensor([1.0, 1, 1, 1, 2]))) == pytest.approx(
        2 / math.sqrt(8 / 5), rel=1e-12
    )


def test_degenerate_gaps_give_zero() -> None:
    single = Gaps(torch.ones(1, dtype=torch.float64), 0)
    for measure in (
        others.variance,
        others.coefficient_of_variation,
        others.value_range,
        others.mean_absolute_deviation,
    ):
        assert measure(single) == 0.0
