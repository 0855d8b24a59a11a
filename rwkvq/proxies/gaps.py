"""Gaps between the sorted values of a weight, in four modes (docs/method.md 2.1).

Everything the proxies need follows from the distinct values of a weight and how often each occurs. A 16-bit tensor
has at most 65,536 of them, so it is counted instead of sorted: cost O(numel) without a float64 copy of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvq.errors import CheckpointError
from rwkvq.settings import GapMode

GAP_MODES: tuple[GapMode, ...] = ("raw", "distinct", "unique", "quantile")

_BINS = 1 << 16
_CHUNK = 1 << 22
_HALF_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The distinct values of a weight.

    values [k] float64, finite, strictly ascending; counts [k] int64, all > 0, summing to the number of weights.
    """

    values: Tensor
    counts: Tensor

    @property
    def numel(self) -> int:
        """Number of weights."""
        return int(self.counts.sum())


@dataclass(frozen=True, slots=True)
class Gaps:
    """A set of n gaps: `positive` [k] float64, all > 0, and `zeros` gaps of size 0, with n = k + zeros."""

    positive: Tensor
    zeros: int

    @property
    def count(self) -> int:
        """n, the number of gaps."""
        return self.positive.numel() + self.zeros

    @property
    def is_degenerate(self) -> bool:
        """True if the gaps carry no shape: at most one gap, or all of them zero."""
        return self.count <= 1 or self.positive.numel() == 0

    def relative(self) -> Tensor:
        """The positive gaps over the mean of all n gaps, [k] float64; they sum to n."""
        return self.positive * (self.count / self.positive.sum())


def _count_bits(flat: Tensor) -> Tensor:
    """How often each of the 65,536 bit patterns occurs in a 16-bit float tensor: [65536] int64."""
    counts = torch.zeros(_BINS, dtype=torch.int64)
    # in chunks, because bincount needs the patterns as 32-bit integers
    for chunk in torch.split(flat.view(torch.int16), _CHUNK):
        counts += torch.bincount(chunk.to(torch.int32) & (_BINS - 1), minlength=_BINS)
    return counts


def _count_sorted(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending distinct values, float64, and their counts, by a sort that allocates nothing; NaN come last, each by
    itself."""
    ordered = flat.clone()
    ordered.numpy().sort()
    edges = (ordered[1:] != ordered[:-1]).nonzero().flatten()
    values = ordered[torch.cat([edges.new_zeros(1), edges + 1])].double()
    counts = edges.diff(prepend=edges.new_full((1,), -1), append=edges.new_full((1,), len(ordered) - 1))
    return values, counts


def _merged(values: Tensor, counts: Tensor) -> Spectrum:
    """Join equal neighbours of ascending `values`, +0 and -0 included."""
    distinct, inverse = torch.unique_consecutive(values, return_inverse=True)
    return Spectrum(distinct, torch.zeros(distinct.numel(), dtype=torch.int64).index_add_(0, inverse, counts))


def spectrum(weight: Tensor) -> Spectrum:
    """Distinct values of `weight` (any shape, any float dtype) and their counts.

    Raises CheckpointError if a value is NaN or infinite, or if there are none.
    """
    flat = weight.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        raise CheckpointError(f"weight of shape {tuple(weight.shape)}: it holds no values; expected at least one")
    if flat.dtype in (torch.float16, torch.bfloat16):
        counts = _count_bits(flat)
        present = counts.nonzero().flatten()
        values = present.to(torch.int32).to(torch.int16).view(flat.dtype).double()
        counts = counts[present]
    else:
        values, counts = _count_sorted(flat)
    finite = values.isfinite()
    if not bool(finite.all()):
        bad = int(counts[~finite].sum())
        raise CheckpointError(
            f"weight of shape {tuple(weight.shape)}: {bad} values are NaN or infinite; expected finite numbers, "
            "get an undamaged checkpoint"
        )
    if not bool((values[1:] >= values[:-1]).all()):
        values, order = values.sort()
        counts = counts[order]
    if not bool((values[1:] == values[:-1]).any()):
        return Spectrum(values, counts)
    return _merged(values, counts)


def _unique(values: Tensor) -> Tensor:
    """The set of distinct positive gaps after a cast to fp16; values beyond its range saturate."""
    halves = values.clamp(-_HALF_MAX, _HALF_MAX).half().double()
    found: Tensor = torch.unique(torch.unique_consecutive(halves).diff())
    return found


def _quantile(distribution: Spectrum, quantiles: int) -> Gaps:
    """Gaps between order statistics at `quantiles` + 1 evenly spaced ranks (fewer if there are fewer weights)."""
    last = distribution.numel - 1
    steps = min(quantiles, last)
    if steps == 0:
        return Gaps(distribution.values.new_zeros(0), 0)
    # rank i = last * i / steps, rounded half up, in integers so that no platform rounds differently
    ranks = (2 * last * torch.arange(steps + 1) + steps) // (2 * steps)
    index = torch.searchsorted(distribution.counts.cumsum(0), ranks, right=True)
    gaps = distribution.values[index].diff()
    positive = gaps[gaps > 0]
    return Gaps(positive, steps - positive.numel())


def gaps_of(distribution: Spectrum, mode: GapMode, *, quantiles: int = 64) -> Gaps:
    """The gaps of a weight in one mode.

    raw: between all neighbours, equal ones included; distinct: between neighbouring distinct values; unique: the set of
    distinct gap sizes of the fp16 weight (what the released code does); quantile: between `quantiles` + 1 order
    statistics.
    """
    if mode == "unique":
        return Gaps(_unique(distribution.values), 0)
    if mode == "quantile":
        return _quantile(distribution, quantiles)
    positive = distribution.values.diff()
    zeros = distribution.numel - 1 - positive.numel() if mode == "raw" else 0
    return Gaps(positive, zeros)
