"""GPTVQ: vector rounding, d input columns after the others, with the error of each step fed into the columns to come.

van Baalen et al., arXiv 2402.15319. Weights are held columns-first [in, out], rows padded to whole row groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rwkvq.formats.vector import VectorCodes, VectorLayout
from rwkvq.quantize.codebooks import Stored, Vectors, factors, fit, store, store_factors
from rwkvq.quantize.hessian import check_statistics, inverse_factor_of
from rwkvq.quantize.kmeans import check_shape
from rwkvq.quantize.options import read_options
from rwkvq.quantize.refine import refined
from rwkvq.quantize.sweep import nearest_entries, sweep_vector

BLOCK = 128
"""Columns, at most, between two updates of all later columns."""

_STEPS = 128
"""Steps whose feedback is computed at once."""


@dataclass(frozen=True, slots=True)
class GptvqOptions:
    """How GPTVQ rounds (docs/method.md 6).

    iterations: of expectation maximisation, at most. exact_assignment: entries are chosen by the full metric inside the
    vector, not its diagonal. m_step: codebooks are updated on the quadratic loss. sweeps: of coordinate descent over
    all columns afterwards (`rwkvq.quantize.sweep`), each followed by another codebook update with m_step.
    """

    iterations: int = 100
    exact_assignment: bool = True
    m_step: bool = True
    damping: float = 0.01
    sweeps: int = 0

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> GptvqOptions:
        """Read plain values, defaults where they are missing; raise PlanError for unknown or unusable ones."""
        return read_options(cls, "gptvq", json)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What U says about each step of d columns S.

    metric [in / d, d, d]: the loss that an error E [d] of the step adds, E metric E^T, is ||E U_SS^-1||^2;
    feedback [in, in]: rows S hold U_SS^-1 U_S,: to the right of S, so that later columns lose E U_SS^-1 U_S,rest.
    """

    metric: Tensor
    feedback: Tensor

    @classmethod
    def of(cls, upper: Tensor, dimension: int, *, exact: bool) -> Geometry:
        """Return the geometry of U [in, in]; without `exact` the metric is its diagonal approximation 1 / U_jj^2.

        The feedback is written into U, to the right of each step; nothing else of U is changed.
        """
        steps = len(upper) // dimension
        index = torch.arange(steps)
        diagonal = upper.diagonal().double()
        inside = upper.view(steps, dimension, steps, dimension)[index, :, index].triu()  # [steps, d, d]
        inverse = torch.linalg.inv(inside.double())
        for start in range(0, steps, _STEPS):
            here = inverse[start : start + _STEPS]
            rows = upper[start * dimension : (start + len(here)) * dimension, start * dimension :]
            pushed = torch.bmm(here, rows.double().view(len(here), dimension, -1)).view_as(rows)
            step = torch.arange(rows.shape[1]) // dimension
            rows.copy_(torch.where(step > step[: len(rows), None], pushed.float(), rows))
        metric = inverse @ inverse.transpose(1, 2)
        if not exact:
            metric = torch.diag_embed(diagonal.square().reciprocal().view(steps, dimension))
        return cls(metric.float(), upper)


def _stripe_vectors(columns: Tensor, layout: VectorLayout, importance: Tensor) -> Vectors:
    """Return the vectors of one stripe [group_columns, padded rows], weighted by importance [group_columns]."""
    shape = (layout.row_groups, -1, layout.dimension)
    values = columns.t().reshape(shape)
    real = torch.arange(columns.shape[1]) < layout.rows
    weights = (real[:, None] * importance).reshape(shape)
    return Vectors(values, weights)


def _round_stripe(columns: Tensor, start: int, tables: Tensor, layout: VectorLayout, geometry: Geometry) -> Tensor:
    """Return codes [group_columns / d, padded rows] of the stripe at `start`; feed errors into later columns in place.

    columns [in, padded rows]; tables [row_groups, K, d].
    """
    dimension, end = layout.dimension, start + layout.group_columns
    codes = torch.empty(layout.group_columns // dimension, columns.shape[1], dtype=layout.code_dtype)
    block = BLOCK // dimension * dimension
    for first in range(start, end, block):
        last = min(first + block, end)
        errors = torch.empty(last - first, columns.shape[1])
        for step in range(first, last, dimension):
            span, here = slice(step, step + dimension), slice(step - first, step - first + dimension)
            found, values = nearest_entries(columns[span], tables, geometry.metric[step // dimension])
            codes[(step - start) // dimension] = found
            torch.sub(columns[span], values, out=errors[here])
            rest = slice(step + dimension, last)
            columns[rest].addmm_(geometry.feedback[span, rest].t(), errors[here], alpha=-1)
        columns[last:].addmm_(geometry.feedback[first:last, last:].t(), errors, alpha=-1)
    return codes


def _walk(
    weight: Tensor, layout: VectorLayout, geometry: Geometry, tables_of: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return (codes [rows, columns / d], tables [groups, K, d]) after all stripes from left to right.

    tables_of(stripe, columns [group_columns, padded rows]) gives the stripe's tables [row_groups, K, d].
    """
    padded = torch.zeros(layout.columns, layout.row_groups * layout.group_rows)
    padded[:, : layout.rows] = weight.t()
    codes, tables = [], []
    for stripe in range(layout.stripes):
        start = stripe * layout.group_columns
        tables.append(tables_of(stripe, padded[start : start + layout.group_columns]))
        codes.append(_round_stripe(padded, start, tables[-1], layout, geometry))
    stacked = torch.stack(tables, 1).view(layout.groups, layout.entries, layout.dimension)
    return torch.cat(codes)[:, : layout.rows].t().contiguous(), stacked


def _first_walk(weight: Tensor, layout: VectorLayout, upper: Tensor, options: GptvqOptions) -> VectorCodes:
    """Return the codes of a walk that fits each stripe's codebooks to weights that all earlier feedback has reached.

    U is overwritten.
    """
    importance = upper.diagonal().square().reciprocal()
    importance = importance / importance.mean()
    geometry = Geometry.of(upper, layout.dimension, exact=options.exact_assignment)

    def fitted(stripe: int, columns: Tensor) -> Tensor:
        span = slice(stripe * layout.group_columns, (stripe + 1) * layout.group_columns)
        tables = fit(_stripe_vectors(columns, layout, importance[span]), layout.entries, options.iterations)
        if layout.svd_rank is not None:
            return tables.sort(1).values  # alike entries must share a rank in the common basis
        stored = store(tables, layout)
        return stored.codebook.float() * (1.0 if stored.scale is None else stored.scale.float()[:, None, None])

    codes, tables = _walk(weight, layout, geometry, fitted)
    if layout.svd_rank is None:
        return _encoded(codes, store(tables, layout), layout)
    return _encoded(codes, store_factors(*factors(tables, layout.svd_rank), layout), layout)


def _encoded(codes: Tensor, stored: Stored, layout: VectorLayout) -> VectorCodes:
    return VectorCodes(layout, codes.to(layout.code_dtype), stored.codebook, stored.scale, stored.basis)


def quantize(weight: Tensor, second_moment: Tensor, layout: VectorLayout, options: GptvqOptions) -> VectorCodes:
    """Return weight [out, in] in the vector format with small tr(dW H dW^T), H the second moment [in, in].

    Raises ShapeError for shapes that do not fit, QuantizationError for values that are not finite or a failing H.
    """
    check_shape(weight, layout)
    check_statistics(weight, second_moment)
    weight, second_moment = weight.float(), second_moment.float()
    with inverse_factor_of(second_moment, options.damping) as upper:
        result = _first_walk(weight, layout, upper, options)
    if options.m_step:
        result = refined(result, weight, second_moment)
    for _ in range(options.sweeps):
        result = sweep_vector(result, weight, second_moment, options.damping)
        if options.m_step:
            result = refined(result, weight, second_moment)
    return result
