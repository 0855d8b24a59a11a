"""Rate offsets: sums, limits, the gain they promise, and when they are worth their bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvq.formats import TrellisLayout
from rwkvq.quantize.rates import chosen_offset_bits, offsets_of, rate_offsets


@settings(deadline=None)  # the first call compiles
@given(
    st.lists(st.floats(0, 1e30), min_size=1, max_size=40),
    st.integers(-8, 0),
    st.integers(0, 7),
)
def test_offsets_keep_their_sum_and_limits(costs: list[float], low: int, high: int) -> None:
    offsets = offsets_of(torch.tensor(costs, dtype=torch.float64), low, high)
    assert offsets.dtype == torch.int8 and int(offsets.sum()) == 0
    assert low <= int(offsets.min()) and int(offsets.max()) <= high


def test_offsets_are_half_the_logarithm_of_the_costs() -> None:
    costs = 4.0 ** torch.tensor([-1.0, -0.5, 0.0, 0.25, 0.5, 0.75])
    assert offsets_of(costs, -8, 7).tolist() == [-4, -2, 0, 1, 2, 3]
    assert offsets_of(1e-12 * costs, -8, 7).tolist() == [-4, -2, 0, 1, 2, 3]
    assert offsets_of(costs, -2, 7).tolist() == [-2, -2, 0, 0, 2, 2]
    assert offsets_of(torch.zeros(5), -4, 3).tolist() == [0] * 5


def test_every_sequence_keeps_its_rate_and_no_weight_leaves_the_limits() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.exp(2 * torch.randn(512, generator=generator))
    columns = torch.exp(2 * torch.randn(40, generator=generator))
    for rate in (6, 9, 13, 20):
        layout = TrellisLayout(512, 40, rate, 12, 256, 4, 4)
        row_offsets, column_offsets = rate_offsets(layout, rows, columns)
        assert not row_offsets.view(2, 256).sum(1).any() and int(column_offsets.sum()) == 0
        sums = rate + row_offsets[:, None] + column_offsets
        assert int(sums.min()) >= 4 and int(sums.max()) <= 24
    plain = rate_offsets(TrellisLayout(512, 40, 13, 12, 256), rows, columns)
    assert not any(offsets.any() for offsets in plain)


@pytest.mark.parametrize(
    ("spread", "columns", "expected"), [(0.0, 256, 0), (0.1, 256, 0), (0.5, 256, 3), (3.0, 256, 4), (0.5, 8, 0)]
)
def test_offsets_must_be_worth_their_bits(spread: float, columns: int, expected: int) -> None:
    costs = torch.exp(spread * torch.linspace(-1.7, 1.7, 256))
    assert chosen_offset_bits(costs, torch.ones(columns), 256) == (expected, 0)
    assert chosen_offset_bits(torch.ones(columns), costs, columns) == (0, expected)
    assert chosen_offset_bits(torch.ones(48), costs, 16) == (0, 0)
