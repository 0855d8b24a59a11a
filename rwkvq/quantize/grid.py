"""Scalar grids: the scale and zero point of groups of weights, from their range or by a search (docs/method.md 5).

Groups are columns-first here, values [g, groups], because quantizers walk column by column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvq.formats.parts import half_scale

COARSE_FACTORS = tuple(step / 100 for step in range(100, 20, -2))
"""Shrink factors of the first round: 1.00, 0.98 ... 0.22."""

FINE_FACTORS = (1.0, 0.99, 1.01)
"""Second round, around the best of the first: together steps of 0.01."""

SHIFT_FACTORS = (0.94, 0.97, 1.0, 1.03, 1.06)
"""Second round with the zero point one level up or down, which clips one side more than the other."""

CHUNK = 1 << 17
"""Weights times candidates measured at once: few enough to stay in a cache."""

UNWEIGHTED_POWER = 2.4
"""Exponent of the error where there are no column weights."""


@dataclass(frozen=True, slots=True)
class Grid:
    """One grid a group; level q stands for scale * (q - zero), q = 0 .. 2**bits - 1.

    scale float16 [groups], not 0, below 0 only in symmetric grids; zero float32 [groups], whole numbers on the grid.
    """

    scale: Tensor
    zero: Tensor


def round_to(values: Tensor, grid: Grid, bits: int) -> Tensor:
    """Return the nearest levels clamp(round(w / s) + z, 0, 2**b - 1), float32 [g, groups], of values [g, groups]."""
    return ((values / grid.scale.float()).round_() + grid.zero).clamp_(0, 2**bits - 1)


def range_grid(values: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """Return the grid from the smallest to the largest of values [g, groups], 0 included.

    Symmetric: zero point 2**(bits - 1), scale 2 max|w| / (2**bits - 1).
    """
    levels = 2**bits - 1
    low, high = values.amin(0).clamp_max(0), values.amax(0).clamp_min(0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = high == low
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    scale = half_scale((high - low) / levels)
    if symmetric:
        return Grid(scale, torch.full_like(low, 2.0 ** (bits - 1)))
    return Grid(scale, (-low / scale.float()).round().clamp(0, levels))


@dataclass(frozen=True, slots=True)
class _Search:
    """Measures grids on values [g, groups] of `bits` bits; weights [g] or None."""

    values: Tensor
    bits: int
    weights: Tensor | None

    def errors(self, candidates: Grid) -> Tensor:
        """Return the error [candidates, groups] of grids whose scale and zero are [candidates, groups]."""
        scale, zero = candidates.scale.float()[:, None], candidates.zero[:, None]
        scaled = self.values * scale.reciprocal()  # [candidates, g, groups]
        levels = scaled.round()
        torch.clamp(levels, -zero, 2**self.bits - 1 - zero, out=levels)
        scaled.sub_(levels)
        if self.weights is None:
            return scaled.abs_().pow_(UNWEIGHTED_POWER).sum(1) * scale[:, 0].abs() ** UNWEIGHTED_POWER
        return torch.matmul(self.weights, scaled.square_()) * scale[:, 0].square()

    def best(self, candidates: Grid) -> Grid:
        """Return, group by group, the candidate of smallest error; the first where errors are equal."""
        share = max(1, CHUNK // self.values.numel())
        scales, zeros = torch.split(candidates.scale, share), torch.split(candidates.zero, share)
        errors = torch.cat([self.errors(Grid(*pair)) for pair in zip(scales, zeros, strict=True)])
        choice = errors.argmin(0, keepdim=True)
        return Grid(candidates.scale.gather(0, choice)[0], candidates.zero.gather(0, choice)[0])


def _candidates(grid: Grid, factors: Sequence[float], shift: int, bits: int) -> Grid:
    """Return grid with its scale times each factor and its zero point moved by shift: scale, zero [factors, groups]."""
    scale = grid.scale.float() * torch.tensor(factors, device=grid.scale.device)[:, None]
    zero = (grid.zero + shift).clamp(0, 2**bits - 1).expand_as(scale)
    return Grid(half_scale(scale.abs()) * scale.sign().half(), zero)


def _joined(grids: Sequence[Grid]) -> Grid:
    """Return all candidates of several sets."""
    return Grid(torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero for grid in grids]))


def find_grid(values: Tensor, bits: int, *, symmetric: bool, clip_search: bool, weights: Tensor | None) -> Grid:
    """Return one grid a group for float32 values [g, groups].

    Without clip_search it is the range grid. With it, the grid of smallest error among the range grid and shrunk
    ones: error sum_j weights_j (w - Q)^2, or sum |w - Q|^2.4 where weights [g] is None. A symmetric grid has one
    level more below zero than above; the search also tries negative scales, which put that level above.
    """
    start = range_grid(values, bits, symmetric=symmetric)
    if not clip_search:
        return start
    search = _Search(values, bits, weights)
    factors = [*COARSE_FACTORS, *(-factor for factor in COARSE_FACTORS)] if symmetric else COARSE_FACTORS
    best = search.best(_candidates(start, factors, 0, bits))
    fine = [_candidates(best, FINE_FACTORS, 0, bits)]
    if not symmetric:
        fine += [_candidates(best, SHIFT_FACTORS, shift, bits) for shift in (-1, 1)]
    return search.best(_joined(fine))
