"""Rates of rows and columns in the trellis format: more bits where an error costs more.

Distortion falls by 4 with every bit, so the least weighted sum gives a weight half the binary logarithm of what its
error costs (reverse water-filling; Cover and Thomas, Elements of Information Theory, 10.3.3), in quarters of a bit.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rwkvq.formats.trellis import MAX_RATE, MIN_RATE, OFFSET_BITS, TrellisLayout
from rwkvq.quantize.trellis_step import compiled

ROW_YIELD, COLUMN_YIELD = 0.5, 0.9
"""Share of the predicted saving that rounding shows (docs/evidence.md): rows share states with their neighbours, and
the search already moves error between them."""


def rate_offsets(layout: TrellisLayout, row_costs: Tensor, column_costs: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets int8 [rows] and [columns] of a layout, in quarters of a bit, for costs >= 0 of errors there."""
    rate = layout.quarter_bits
    rows = torch.zeros(layout.rows, dtype=torch.int8, device=row_costs.device)
    if layout.row_offset_bits:
        low, high = _span(layout.row_offset_bits, MIN_RATE - rate, MAX_RATE - rate)
        rows = offsets_of(row_costs.view(-1, layout.length), low, high).flatten()
    columns = torch.zeros(layout.columns, dtype=torch.int8, device=column_costs.device)
    if layout.column_offset_bits:
        low, high = _span(
            layout.column_offset_bits, MIN_RATE - rate - int(rows.min()), MAX_RATE - rate - int(rows.max())
        )
        columns = offsets_of(column_costs, low, high)
    return rows, columns


def chosen_offset_bits(row_costs: Tensor, column_costs: Tensor, length: int) -> tuple[int, int]:
    """The widths of stored offsets of rows and columns that are worth their bits; costs [rows] and [columns].

    length: rows of a sequence, over which the offsets of rows add up to 0.
    """
    rows = _worth(row_costs.view(-1, length), ROW_YIELD, len(column_costs))
    return rows, _worth(column_costs[None], COLUMN_YIELD, len(row_costs)) if length % 32 == 0 else 0


def offsets_of(costs: Tensor, low: int, high: int) -> Tensor:
    """Whole numbers int8 [..., n] from low <= 0 to high >= 0, near 2 log2(costs) plus a constant, of sum 0 along n."""
    wanted = 2 * torch.log2(costs.double().clamp_min(1e-300)).cpu()
    offsets = torch.empty(wanted.shape, dtype=torch.int8)
    lines = wanted.reshape(-1, wanted.shape[-1]).numpy(), offsets.view(-1, wanted.shape[-1]).numpy()
    _fill_offsets(*lines, low, high)
    return offsets.to(costs.device)


@compiled
def _fill_offsets(wanted: NDArray[np.float64], offsets: NDArray[np.int8], low: int, high: int) -> None:
    """offsets [lines, n] as offsets_of promises, for wanted [lines, n], which are overwritten.

    Compiled: it runs for every candidate of every weight, many of them side by side on a GPU's line.
    """
    for own, exact in zip(offsets, wanted):  # noqa: B905 - numba knows no strict
        below, above = low - exact.max(), high - exact.min()
        for _ in range(60):
            middle = 0.5 * (below + above)
            total = 0.0
            for value in exact:
                total += min(max(value + middle, low), high)
            below, above = (middle, above) if total < 0 else (below, middle)
        left = 0
        for i in range(len(own)):
            exact[i] = min(max(exact[i] + above, low), high)
            own[i] = round(exact[i])
            left -= own[i]
        while left:  # those nearest to the other side of their rounding make up for the rest
            step = 1 if left > 0 else -1
            ease = (exact - own) * step
            ease[(own + step < low) | (own + step > high)] = -np.inf
            for i in np.argsort(-ease, kind="mergesort")[: min(abs(left), np.isfinite(ease).sum())]:
                own[i] += step
                left -= step


def _span(bits: int, low: int, high: int) -> tuple[int, int]:
    """What an offset of this width can be within these limits, both at most 0 and at least 0."""
    half = 1 << (bits - 1)
    return max(-half, low), min(half - 1, high)


def _worth(costs: Tensor, share: float, served: int) -> int:
    """The width of offsets that saves most for costs [sequences, n], when each is stored for `served` weights."""
    saved = {bits: share * _saved(costs, bits) - bits / served for bits in OFFSET_BITS if bits}
    best = max(saved, key=lambda bits: saved[bits])
    return best if saved[best] > 0 else 0


def _saved(costs: Tensor, bits: int) -> float:
    """Bits a weight that offsets of this width save at equal loss."""
    costs = costs.double().cpu()
    low, high = _span(bits, -100, 100)
    offsets = offsets_of(costs, low, high).double()
    total = float(costs.sum())
    return -0.5 * float(torch.log2((costs * torch.exp2(-offsets / 2)).sum() / total)) if total > 0 else 0.0
