"""Measures that ablations use in place of the proxies: those of arXiv 2505.03803 Table 6, and max/rms."""

from __future__ import annotations

from rwkvq.proxies.gaps import Gaps, Spectrum


def max_over_rms(distribution: Spectrum) -> float:
    """Largest absolute weight over the root mean square of all weights, >= 1; 0 for an all-zero weight."""
    values = distribution.values
    largest = float(values.abs().max())
    if largest == 0.0:
        return 0.0
    # relative to the largest, so that squares neither overflow nor vanish
    mean_square = float((values / largest).square_().mul_(distribution.counts).sum()) / distribution.numel
    return float(mean_square**-0.5)


def variance(gaps: Gaps) -> float:
    """Mean squared deviation of the normalised gaps G' = gap / sum of gaps from their mean 1 / n."""
    return 0.0 if gaps.is_degenerate else (coefficient_of_variation(gaps) / gaps.count) ** 2


def coefficient_of_variation(gaps: Gaps) -> float:
    """Standard deviation of G' over its mean."""
    if gaps.is_degenerate:
        return 0.0
    total = float(gaps.relative().sub_(1.0).square_().sum()) + gaps.zeros
    return float((total / gaps.count) ** 0.5)


def value_range(gaps: Gaps) -> float:
    """Largest minus smallest G'."""
    if gaps.is_degenerate:
        return 0.0
    x = gaps.relative()
    smallest = 0.0 if gaps.zeros else float(x.min())
    return (float(x.max()) - smallest) / gaps.count


def mean_absolute_deviation(gaps: Gaps) -> float:
    """Mean of |G' - 1 / n|."""
    if gaps.is_degenerate:
        return 0.0
    total = float(gaps.relative().sub_(1.0).abs_().sum()) + gaps.zeros
    return total / gaps.count**2
