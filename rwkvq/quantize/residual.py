"""Residual codebooks: vectors down a column, rounded one input column after the other with error feedback.

After VPTQ (Liu et al., arXiv 2409.17066; github.com/microsoft/VPTQ, vptq/vptq.py): a main codebook, and a residual one
for what it leaves. docs/method.md 12 lists what is left out. Weights are held columns-first [in, out].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rwkvq.formats.parts import MAX_SCALE
from rwkvq.formats.residual import ResidualCodes, ResidualLayout
from rwkvq.quantize.codebooks import Vectors, fit
from rwkvq.quantize.gptq import BLOCK, unit_rows
from rwkvq.quantize.hessian import check_statistics, damped_diagonal, inverse_factor_of
from rwkvq.quantize.options import read_options
from rwkvq.quantize.rtn import check_shape

FITTED = 1 << 18
"""Vectors, at most, that a codebook is fitted to: 64 for each entry of the largest that plans ask for."""


@dataclass(frozen=True, slots=True)
class ResidualOptions:
    """iterations: of k-means, at most, for each codebook; damping: of the second moment."""

    iterations: int = 100
    damping: float = 0.01

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> ResidualOptions:
        """Read plain values, defaults where they are missing; raise PlanError for unknown or unusable ones."""
        return read_options(cls, "residual", json)


def _fitted(columns: Tensor, importance: Tensor, dimension: int, entries: int, iterations: int) -> Tensor:
    """Return a float32 table [entries, d] of float16 values for the vectors of columns [in, out]; deterministic.

    Weighted k-means; every vector counts as much as its column.
    """
    vectors = columns.reshape(-1, dimension)
    column = torch.arange(len(columns)).repeat_interleave(len(vectors) // len(columns))
    if len(vectors) > FITTED:
        some = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:FITTED]
        vectors, column = vectors[some], column[some]
    weights = importance[column][:, None].expand_as(vectors)
    table = fit(Vectors(vectors[None], weights[None]), entries, iterations)[0]
    return table.clamp(-MAX_SCALE, MAX_SCALE).half().float()


def nearest(vectors: Tensor, table: Tensor) -> Tensor:
    """Return the number [n] of the entry of table [K, d] with the least distance to each of vectors [n, d]."""
    return torch.addmm(table.square().sum(1), vectors, table.t(), alpha=-2).argmin(1)


def _walk(weight: Tensor, order: Tensor, unit: Tensor, tables: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Round all columns in `order` [in]: (codes int16 [out / d, in] of each table, errors [in, out]).

    unit [in, in] is U of the columns in that order, rows divided by their diagonal entry, read above the diagonal only.
    Every table takes the entry nearest to what those before it leave. Errors are those at the time of rounding, after
    the feedback of all earlier columns; both results have their columns in the order of the weight.
    """
    columns = weight.t()[order]  # a copy, [in, out]
    dimension = tables[0].shape[1]
    codes = torch.empty(len(tables), len(columns), columns.shape[1] // dimension, dtype=torch.int16)
    for start in range(0, len(columns), BLOCK):
        block = columns[start : start + BLOCK]
        feedback = unit[start : start + BLOCK, start:]
        for index, column in enumerate(block):
            rest = column.view(-1, dimension)
            for table, found in zip(tables, codes[:, start + index], strict=True):
                chosen = nearest(rest, table)
                found.copy_(chosen)
                rest = rest - table[chosen]
            column.copy_(rest.view(-1))  # from here on the error
            block[index + 1 :].addr_(feedback[index, index + 1 : len(block)], column, alpha=-1)
        columns[start + BLOCK :].addmm_(feedback[:, len(block) :].t(), block, alpha=-1)
    place = order.argsort()
    return [item[place].t().contiguous() for item in codes], columns[place]


def quantize(weight: Tensor, second_moment: Tensor, layout: ResidualLayout, options: ResidualOptions) -> ResidualCodes:
    """Return weight [out, in] in the residual format with small tr(dW H dW^T), H the second moment [in, in].

    The main codebook is fitted to the weight, the residual one to the errors of a walk with the main one alone; a
    second walk chooses the codes of both.
    Raises ShapeError for shapes that do not fit, QuantizationError for values that are not finite or a failing H.
    """
    check_shape(weight, layout)
    check_statistics(weight, second_moment)
    weight, second_moment = weight.float(), second_moment.float()
    importance = damped_diagonal(second_moment.diagonal(), options.damping).float()
    order = torch.argsort(importance, descending=True, stable=True)

    def fitted(columns: Tensor, entries: int) -> Tensor:
        return _fitted(columns, importance, layout.dimension, entries, options.iterations)

    main = fitted(weight.t(), layout.entries)
    with inverse_factor_of(second_moment, options.damping, order) as upper:
        unit = unit_rows(upper)
        _, errors = _walk(weight, order, unit, [main])
        residual = fitted(errors, layout.residual_entries)
        (codes, residual_codes), _ = _walk(weight, order, unit, [main, residual])
    return ResidualCodes(layout, codes, residual_codes, main.half(), residual.half())
