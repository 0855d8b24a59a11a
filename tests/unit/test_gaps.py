"""Gaps of a weight in the four modes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkvq.errors import CheckpointError
from rwkvq.proxies.gaps import gaps_of, spectrum


def as_list(tensor: Tensor) -> list[float]:
    return [float(value) for value in tensor]


def test_spectrum_counts_equal_values_and_merges_both_zeros() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found = spectrum(torch.tensor([[0.5, -0.0, 0.0], [-2.0, 0.5, 0.5]], dtype=dtype))
        assert as_list(found.values) == [-2.0, 0.0, 0.5]
        assert as_list(found.counts) == [1, 2, 3]
        assert found.numel == 6


def test_counted_16_bit_tensor_equals_the_sorted_one() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        weight = torch.randn(300, 70, generator=torch.Generator().manual_seed(3)).to(dtype)
        counted, as_sorted = spectrum(weight), spectrum(weight.double())
        assert torch.equal(counted.values, as_sorted.values)
        assert torch.equal(counted.counts, as_sorted.counts)


def test_raw_keeps_zero_gaps_and_distinct_drops_them() -> None:
    c = spectrum(torch.tensor([2.0, 0, 1, 0, 4, 2, 0]))
    raw, distinct = gaps_of(c, "raw"), gaps_of(c, "distinct")
    assert (as_list(raw.positive), raw.zeros, raw.count) == ([1, 1, 2], 3, 6)
    assert (as_list(distinct.positive), distinct.zeros, distinct.count) == ([1, 1, 2], 0, 3)


def test_unique_is_the_set_of_gap_sizes() -> None:
    found = gaps_of(spectrum(torch.tensor([2.0, 0, 1, 0, 4, 2, 0])), "unique")
    assert (as_list(found.positive), found.zeros) == ([1, 2], 0)


def test_unique_casts_to_fp16_first() -> None:
    # 1 + 2**-12 is 1 in fp16, so the only gaps left are 1 and 2
    found = gaps_of(spectrum(torch.tensor([0.0, 1.0, 1.0 + 2.0**-12, 3.0])), "unique")
    assert as_list(found.positive) == [1, 2]


def test_unique_saturates_values_beyond_fp16() -> None:
    found = gaps_of(spectrum(torch.tensor([0.0, 1e6, 65504.0])), "unique")
    assert as_list(found.positive) == [65504]


def test_quantile_takes_evenly_spaced_ranks() -> None:
    # 9 weights, 4 gaps: ranks 0 2 4 6 8
    found = gaps_of(spectrum(torch.tensor([0.0, 1, 2, 3, 4, 10, 20, 30, 40])), "quantile", quantiles=4)
    assert as_list(found.positive) == [2, 2, 16, 20]
    ties = gaps_of(spectrum(torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1, 40])), "quantile", quantiles=4)
    assert (as_list(ties.positive), ties.zeros) == ([1, 39], 2)


def test_quantile_ranks_are_rounded_half_up() -> None:
    # 6 weights, 2 gaps: ranks 0, 2.5 -> 3, 5
    found = gaps_of(spectrum(torch.tensor([0.0, 1, 2, 4, 8, 16])), "quantile", quantiles=2)
    assert as_list(found.positive) == [4, 12]


def test_quantile_of_a_short_vector_uses_every_rank() -> None:
    found = gaps_of(spectrum(torch.tensor([0.0, 1, 3])), "quantile", quantiles=64)
    assert (as_list(found.positive), found.zeros) == ([1, 2], 0)


@pytest.mark.parametrize("mode", ["raw", "distinct", "unique", "quantile"])
@pytest.mark.parametrize("weight", [torch.ones(7), torch.zeros(1)])
def test_constant_weights_are_degenerate(mode: str, weight: Tensor) -> None:
    assert gaps_of(spectrum(weight), mode).is_degenerate  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(dtype: torch.dtype, bad: float) -> None:
    weight = torch.ones(4, 4, dtype=dtype)
    weight[1, 2] = weight[0, 0] = bad
    with pytest.raises(CheckpointError, match=r"\(4, 4\): 2 values are NaN or infinite"):
        spectrum(weight)


def test_empty_weight_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no values"):
        spectrum(torch.zeros(0))
