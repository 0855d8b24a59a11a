"""Properties of the proxies: bounds, invariances, agreement of counted and sorted gaps."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rwkvq.proxies.coarse import coarse
from rwkvq.proxies.fine import fine
from rwkvq.proxies.gaps import GAP_MODES, Gaps, gaps_of, spectrum

SEEDS = st.integers(0, 2**31 - 1)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


def sample(seed: int, size: int, dtype: torch.dtype) -> Tensor:
    """Heavy-tailed values, some of them equal."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator, dtype=torch.float64).pow(3)
    return (values * 64).round().div(64).to(dtype) if seed % 2 else values.to(dtype)


def naive(gaps: list[float], order: int) -> tuple[float, float]:
    """P_c and P_f by the definitions, term by term."""
    n, total = len(gaps), math.fsum(gaps)
    normalised = [gap / total for gap in gaps]
    entropy = -math.fsum(g * math.log(g) for g in normalised if g > 0)
    moments = [math.fsum((g - 1 / n) ** k for g in normalised) / n for k in range(2, order + 1)]
    p_f = math.fsum(n**k / (k * (k - 1)) * abs(moment) for k, moment in enumerate(moments, 2))
    return math.log(n) - entropy, p_f


@given(SEEDS, st.integers(2, 400), DTYPES, st.sampled_from(GAP_MODES), st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_proxies_equal_their_definitions(seed: int, size: int, dtype: torch.dtype, mode: str, order: int) -> None:
    weight = sample(seed, size, dtype)
    gaps = gaps_of(spectrum(weight), mode)  # type: ignore[arg-type]
    ordered = sorted(float(value) for value in weight)
    if mode == "raw":
        assert sorted(gaps.positive.tolist() + [0.0] * gaps.zeros) == sorted(
            high - low for low, high in pairwise(ordered)
        )
    if gaps.is_degenerate:
        assert coarse(gaps) == fine(gaps, order=order) == 0.0
        return
    p_c, p_f = naive(gaps.positive.tolist() + [0.0] * gaps.zeros, order)
    assert coarse(gaps) == pytest.approx(p_c, rel=1e-9, abs=1e-9)
    assert fine(gaps, order=order) == pytest.approx(p_f, rel=1e-9, abs=1e-9)


@given(SEEDS, st.integers(2, 300), DTYPES, st.sampled_from(GAP_MODES))
@settings(max_examples=60, deadline=None)
def test_coarse_proxy_is_within_its_bounds(seed: int, size: int, dtype: torch.dtype, mode: str) -> None:
    gaps = gaps_of(spectrum(sample(seed, size, dtype)), mode)  # type: ignore[arg-type]
    assert 0.0 <= coarse(gaps) <= math.log(max(gaps.count, 1)) + 1e-9
    assert fine(gaps) >= 0.0


@given(SEEDS, st.integers(2, 200), st.sampled_from(["raw", "distinct", "quantile"]), st.integers(-8, 8), st.booleans())
@settings(max_examples=40, deadline=None)
def test_scale_sign_and_order_do_not_matter(seed: int, size: int, mode: str, exponent: int, flip: bool) -> None:
    # powers of two scale without rounding; unique casts to fp16 and is left out on purpose
    weight = sample(seed, size, torch.float32)
    shuffled = weight[torch.randperm(size, generator=torch.Generator().manual_seed(seed))]
    other = shuffled * (2.0**exponent) * (-1.0 if flip and mode != "quantile" else 1.0)
    first, second = (gaps_of(spectrum(item), mode) for item in (weight, other))  # type: ignore[arg-type]
    assert coarse(second) == pytest.approx(coarse(first), rel=1e-9, abs=1e-12)
    assert fine(second) == pytest.approx(fine(first), rel=1e-9, abs=1e-12)


@given(st.integers(2, 500), st.floats(1e-6, 1e6))
@settings(max_examples=30, deadline=None)
def test_equal_gaps_give_zero(count: int, gap: float) -> None:
    gaps = Gaps(torch.full((count,), gap, dtype=torch.float64), 0)
    assert coarse(gaps) == pytest.approx(0.0, abs=1e-12)
    assert fine(gaps) == pytest.approx(0.0, abs=1e-12)


@given(SEEDS, st.integers(1, 200), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_zero_gaps_in_closed_form_equal_explicit_ones(seed: int, count: int, zeros: int) -> None:
    positive = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1e-3
    total = count + zeros
    x = torch.cat([positive, torch.zeros(zeros, dtype=torch.float64)]) * (total / positive.sum())
    if total < 2:
        return
    u = x - 1
    expected = float((u**2).mean() / 2 + (u**3).mean().abs() / 6 + (u**4).mean() / 12)
    assert fine(Gaps(positive, zeros)) == pytest.approx(expected, rel=1e-9, abs=1e-12)
