"""The codebook update: entries that minimise tr((W - Q) H (W - Q)^T) while every weight keeps its code.

The loss is quadratic in the entries, so conjugate gradients find its minimum (docs/method.md 6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvq.formats.vector import VectorCodes, VectorLayout, codebooks, decode
from rwkvq.quantize.codebooks import Stored, store, store_factors
from rwkvq.quantize.hessian import FLOAT64_COLUMNS, loss, row_chunks

STEPS = 25
"""Conjugate gradient steps of one update."""

CONVERGED = 1e-6
"""A solve ends when the squared residual has fallen to this fraction."""


@dataclass(frozen=True, slots=True)
class Problem:
    """weight [out, in] float32, second_moment [in, in] float32 undamped, entries int32 [out, in / d]: the row of the
    stacked tables [groups * K, d] that each d weights use. H is second_moment * scale, with a mean diagonal of 1."""

    weight: Tensor
    second_moment: Tensor
    scale: float
    entries: Tensor

    def weights_of(self, tables: Tensor, rows: slice) -> Tensor:
        """Return the rows of Q [out, in] for tables [groups * K, d]."""
        return tables.index_select(0, self.entries[rows].view(-1)).view(-1, self.weight.shape[1])

    def gathered(self, values: Callable[[slice], Tensor], like: Tensor) -> Tensor:
        """Return, for every entry, the sum of values(rows) [rows, in] over the weights that use it, as `like`."""
        result = torch.zeros_like(like)
        for rows in row_chunks(self.weight):
            result.index_add_(0, self.entries[rows].view(-1), values(rows).view(-1, like.shape[1]))
        return result

    def pulled(self, tables: Tensor) -> Tensor:
        """Return, for every entry, the sum of Q H over the weights that use it."""
        return self.gathered(lambda rows: self._times_moment(self.weights_of(tables, rows)), tables)

    def residual(self, tables: Tensor) -> Tensor:
        """Return, for every entry, the sum of (W - Q) H over the weights that use it."""
        return self.gathered(lambda rows: self._times_moment(self.weight[rows] - self.weights_of(tables, rows)), tables)

    def diagonal(self, tables: Tensor) -> Tensor:
        """Return, for every entry, the sum of diag H over the weights that use it."""
        values = self.second_moment.diagonal() * self.scale
        return self.gathered(lambda rows: values.expand_as(self.weight[rows]).contiguous(), tables)

    def _times_moment(self, values: Tensor) -> Tensor:
        product = values @ self.second_moment
        return product if self.scale == 1.0 else product.mul_(self.scale)


def solve(
    start: Tensor, residual: Tensor, apply: Callable[[Tensor], Tensor], preconditioner: Tensor, steps: int
) -> Tensor:
    """Return start + x with apply(x) ~ residual, by preconditioned conjugate gradients.

    apply is symmetric and positive semidefinite; preconditioner >= 0 approximates its diagonal, and where it is 0 the
    start is kept.
    """
    inverse = torch.where(preconditioner > 0, preconditioner.reciprocal(), 0.0)
    solution, direction = start.clone(), inverse * residual
    product = first = float((residual * direction).sum())
    for _ in range(steps):
        if product <= CONVERGED * first:
            break
        image = apply(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        length = product / curvature
        solution = solution + length * direction
        residual = residual - length * image
        scaled = inverse * residual
        following = float((residual * scaled).sum())
        direction = scaled + following / product * direction
        product = following
    return solution


def best_tables(problem: Problem, tables: Tensor) -> Tensor:
    """Return the tables [groups * K, d] of least loss, found from the given ones."""
    return solve(tables, problem.residual(tables), problem.pulled, problem.diagonal(tables), STEPS)


def best_factors(problem: Problem, coefficients: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return coefficients [groups, r] and then basis [r, K], each of least loss with the other fixed, in two rounds."""
    shape = (coefficients.shape[0], basis.shape[1])  # [groups, K]
    diagonal = problem.diagonal(coefficients.new_zeros(shape[0] * shape[1], 1)).view(shape)

    def pulled(coefficients: Tensor, basis: Tensor) -> Tensor:
        return problem.pulled((coefficients @ basis).view(-1, 1)).view(shape)

    def residual(coefficients: Tensor, basis: Tensor) -> Tensor:
        return problem.residual((coefficients @ basis).view(-1, 1)).view(shape)

    def along_coefficients(start: Tensor, fixed: Tensor) -> Tensor:
        def apply(change: Tensor) -> Tensor:
            return pulled(change, fixed) @ fixed.t()

        return solve(start, residual(start, fixed) @ fixed.t(), apply, diagonal @ fixed.square().t(), STEPS // 2)

    def along_basis(start: Tensor, fixed: Tensor) -> Tensor:
        def apply(change: Tensor) -> Tensor:
            return fixed.t() @ pulled(fixed, change)

        return solve(start, fixed.t() @ residual(fixed, start), apply, fixed.square().t() @ diagonal, STEPS // 2)

    for _ in range(2):
        coefficients = along_coefficients(coefficients, basis)
        basis = along_basis(basis, coefficients)
    return coefficients, basis


def _problem(codes: VectorCodes, weight: Tensor, second_moment: Tensor) -> Problem:
    layout = codes.layout
    stripe = torch.arange(layout.columns // layout.dimension) * layout.dimension // layout.group_columns
    group = torch.arange(layout.rows)[:, None] // layout.group_rows * layout.stripes + stripe
    entries = group.int().mul_(layout.entries).add_(codes.codes)
    mean = second_moment.diagonal().mean().clamp_min(1e-30)
    if len(second_moment) > FLOAT64_COLUMNS:  # no room for another matrix
        return Problem(weight, second_moment, float(1 / mean), entries)
    return Problem(weight, second_moment / mean, 1.0, entries)


def _stored(codes: VectorCodes, problem: Problem) -> Stored:
    layout: VectorLayout = codes.layout
    if codes.basis is None:
        tables = best_tables(problem, codebooks(codes).view(-1, layout.dimension))
        return store(tables.view(layout.groups, layout.entries, layout.dimension), layout)
    assert codes.scale is not None
    scaled = codes.codebook.float().view(layout.row_groups, layout.stripes, -1) * codes.scale.float()
    return store_factors(*best_factors(problem, scaled.view(layout.groups, -1), codes.basis.float()), layout)


def refined(codes: VectorCodes, weight: Tensor, second_moment: Tensor) -> VectorCodes:
    """Return the codes with updated codebooks, rounded to what is stored, or as they are if the loss does not fall.

    weight [out, in] float32, the original; second_moment [in, in], undamped.
    """
    problem = _problem(codes, weight, second_moment)
    stored = _stored(codes, problem)
    updated = VectorCodes(codes.layout, codes.codes, stored.codebook, stored.scale, stored.basis)
    losses = [loss(weight, decode(candidate), second_moment) for candidate in (codes, updated)]
    return updated if losses[1] < losses[0] else codes
