"""Coordinate descent on tr(dW H dW^T): columns choose their codes anew while all others stay as they are.

Feedback quantizers decide early columns before later ones exist; a sweep from left to right afterwards corrects that,
with codebooks and grids fixed. With R = (W - Q) H, the best real value of the columns S is Q_S + R_S H_SS^-1, and an
error E from it costs E H_SS E^T. Weights are held columns-first [in, out].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvq.formats import scalar, vector
from rwkvq.formats.scalar import ScalarCodes
from rwkvq.formats.vector import VectorCodes, codebooks
from rwkvq.quantize.hessian import loss, with_damping

BLOCK = 128
"""Columns, at most, between two updates of the pull on all later columns."""


@dataclass(frozen=True, slots=True)
class _Descent:
    """quantized [in, out] is Q and pull [in, out] is R, each kept current for the columns still to come."""

    hessian: Tensor
    quantized: Tensor
    pull: Tensor

    @classmethod
    def start(cls, weight: Tensor, quantized: Tensor, hessian: Tensor) -> _Descent:
        """Return the state before the first column; weight and quantized [out, in], hessian damped."""
        pull = hessian @ (weight - quantized).t()
        return cls(hessian, quantized.t().clone(memory_format=torch.contiguous_format), pull)

    def blocks(self, width: int) -> list[tuple[int, int]]:
        """Return (first, last) of blocks of whole steps of `width` columns."""
        size, columns = max(BLOCK // width, 1) * width, len(self.quantized)
        return [(first, min(first + size, columns)) for first in range(0, columns, size)]

    def replace(self, columns: slice, values: Tensor, last: int) -> None:
        """Set Q at `columns` to values [d, out] and correct the pull on columns up to `last`."""
        change = values - self.quantized[columns]
        self.quantized[columns] = values
        self.pull[columns.stop : last].addmm_(self.hessian[columns.stop : last, columns], change, alpha=-1)

    def flush(self, first: int, last: int, before: Tensor) -> None:
        """Correct the pull on all columns from `last` for the changes of columns first .. last - 1 since `before`."""
        change = self.quantized[first:last] - before
        self.pull[last:].addmm_(self.hessian[last:, first:last], change, alpha=-1)


def sweep_scalar(codes: ScalarCodes, weight: Tensor, second_moment: Tensor, damping: float) -> ScalarCodes:
    """Return the codes after one sweep on their grids, or as they are if the undamped loss does not fall.

    weight [out, in] float32, the original; second_moment [in, in].
    """
    with with_damping(second_moment, damping) as hessian:
        levels = _descend_scalar(codes, weight, hessian)
    swept = ScalarCodes(codes.layout, levels.t().contiguous(), codes.scale, codes.zero)
    fell = loss(weight, scalar.decode(swept), second_moment) < loss(weight, scalar.decode(codes), second_moment)
    return swept if fell else codes


def _descend_scalar(codes: ScalarCodes, weight: Tensor, hessian: Tensor) -> Tensor:
    """Return the levels uint8 [in, out] after one sweep."""
    layout = codes.layout
    state = _Descent.start(weight, scalar.decode(codes), hessian)
    diagonal = hessian.diagonal().tolist()
    scales = codes.scale.float().t().contiguous()  # [groups, out]
    zeros = torch.full_like(scales, 2.0 ** (layout.bits - 1)) if codes.zero is None else codes.zero.float().t()
    levels = torch.empty_like(state.quantized, dtype=torch.uint8)
    for first, last in state.blocks(1):
        before = state.quantized[first:last].clone()
        for column in range(first, last):
            scale, zero = scales[column // layout.group_size], zeros[column // layout.group_size]
            target = state.quantized[column] + state.pull[column] / diagonal[column]
            level = target.div_(scale).round_().add_(zero).clamp_(0, 2**layout.bits - 1)
            levels[column] = level
            state.replace(slice(column, column + 1), ((level - zero) * scale)[None], last)
        state.flush(first, last, before)
    return levels


def sweep_vector(codes: VectorCodes, weight: Tensor, second_moment: Tensor, damping: float) -> VectorCodes:
    """Return the codes after one sweep on their codebooks, or as they are if the undamped loss does not fall.

    weight [out, in] float32, the original; second_moment [in, in].
    """
    with with_damping(second_moment, damping) as hessian:
        chosen = _descend_vector(codes, weight, hessian)
    found = chosen[:, : codes.layout.rows].t().contiguous()
    swept = VectorCodes(codes.layout, found, codes.codebook, codes.scale, codes.basis)
    fell = loss(weight, vector.decode(swept), second_moment) < loss(weight, vector.decode(codes), second_moment)
    return swept if fell else codes


def _descend_vector(codes: VectorCodes, weight: Tensor, hessian: Tensor) -> Tensor:
    """Return the codes [in / d, padded rows] after one sweep."""
    layout = codes.layout
    rows = layout.row_groups * layout.group_rows
    state = _Descent.start(_padded(weight, rows), _padded(vector.decode(codes), rows), hessian)
    tables = codebooks(codes)
    chosen = torch.empty(layout.columns // layout.dimension, rows, dtype=layout.code_dtype)
    for first, last in state.blocks(layout.dimension):
        before = state.quantized[first:last].clone()
        for start in range(first, last, layout.dimension):
            columns = slice(start, start + layout.dimension)
            metric = hessian[columns, columns]
            target = state.quantized[columns] + torch.linalg.solve(metric, state.pull[columns])
            step, values = nearest_entries(target, tables[:, start // layout.group_columns], metric)
            chosen[start // layout.dimension] = step
            state.replace(columns, values, last)
        state.flush(first, last, before)
    return chosen


def _padded(weight: Tensor, rows: int) -> Tensor:
    """Return weight [out, in] with rows of zeros below, or itself if it has as many rows."""
    if len(weight) == rows:
        return weight
    return torch.cat([weight, weight.new_zeros(rows - len(weight), weight.shape[1])])


def nearest_entries(target: Tensor, tables: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes int64 [rows], values [d, rows]): entries of least (v - c) metric (v - c)^T.

    target [d, rows], rows = row_groups * group_rows; tables [row_groups, K, d]; metric [d, d] symmetric.
    """
    row_groups, entries, dimension = tables.shape
    pulled = tables @ metric  # [row_groups, K, d]
    constant = (pulled * tables).sum(-1)[:, None]  # [row_groups, 1, K]
    points = target.t().reshape(row_groups, -1, dimension)
    codes = torch.baddbmm(constant, points, pulled.transpose(1, 2), alpha=-2).argmin(-1)
    flat = (codes + torch.arange(row_groups)[:, None] * entries).view(-1)
    return codes.view(-1), tables.reshape(-1, dimension).index_select(0, flat).t()
