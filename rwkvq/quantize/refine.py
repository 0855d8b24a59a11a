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
from rwkvq.quantize.hessian import loss

STEPS = 25
"""Conjugate gradient steps of one update."""

CONVERGED = 1e-6
"""A solve ends when the squared residual has fallen to this fraction."""


@dataclass(frozen=True, slots=True)
class Problem:
    """weight [out, in] float32, second_moment [in, in] float32 undamped, entries int64 [out * in / d]: the row of the
    stacked tables [groups * K, d] that each d weights use."""

    weight: Tensor
    second_moment: Tensor
    entries: Tensor

    def weights_of(self, tables: Tensor) -> Tensor:
        """Return Q [out, in] for tables [groups * K, d]."""
        return tables.index_select(0, self.entries).view_as(self.weight)

    def gathered(self, gradient: Tensor, like: Tensor) -> Tensor:
        """Return, for every entry, the sum of gradient [out, in] over the weights that use it; shaped as `like`."""
        return torch.zeros_like(like).index_add_(0, self.entries, gradient.view(-1, like.shape[1]))


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
    moment = problem.second_moment

    def apply(change: Tensor) -> Tensor:
        return problem.gathered(problem.weights_of(change) @ moment, change)

    residual = problem.gathered((problem.weight - problem.weights_of(tables)) @ moment, tables)
    diagonal = problem.gathered(moment.diagonal().expand_as(problem.weight).contiguous(), tables)
    return solve(tables, residual, apply, diagonal, STEPS)


def best_factors(problem: Problem, coefficients: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return coefficients [groups, r] and then basis [r, K], each of least loss with the other fixed, in two rounds."""
    moment = problem.second_moment
    flat = coefficients.new_zeros(coefficients.shape[0] * basis.shape[1], 1)
    diagonal = problem.gathered(moment.diagonal().expand_as(problem.weight).contiguous(), flat)
    diagonal = diagonal.view(-1, basis.shape[1])  # [groups, K]

    def pulled(error: Tensor) -> Tensor:
        return problem.gathered(error @ moment, flat).view_as(diagonal)

    def weights_of(coefficients: Tensor, basis: Tensor) -> Tensor:
        return problem.weights_of((coefficients @ basis).view(-1, 1))

    def along_coefficients(start: Tensor, fixed: Tensor) -> Tensor:
        def apply(change: Tensor) -> Tensor:
            return pulled(weights_of(change, fixed)) @ fixed.t()

        residual = pulled(problem.weight - weights_of(start, fixed)) @ fixed.t()
        return solve(start, residual, apply, diagonal @ fixed.square().t(), STEPS // 2)

    def along_basis(start: Tensor, fixed: Tensor) -> Tensor:
        def apply(change: Tensor) -> Tensor:
            return fixed.t() @ pulled(weights_of(fixed, change))

        residual = fixed.t() @ pulled(problem.weight - weights_of(fixed, start))
        return solve(start, residual, apply, fixed.square().t() @ diagonal, STEPS // 2)

    for _ in range(2):
        coefficients = along_coefficients(coefficients, basis)
        basis = along_basis(basis, coefficients)
    return coefficients, basis


def _problem(codes: VectorCodes, weight: Tensor, second_moment: Tensor) -> Problem:
    layout = codes.layout
    stripe = torch.arange(layout.columns // layout.dimension) * layout.dimension // layout.group_columns
    group = torch.arange(layout.rows)[:, None] // layout.group_rows * layout.stripes + stripe
    entries = (group * layout.entries + codes.codes.long()).view(-1)
    return Problem(weight, second_moment / second_moment.diagonal().mean().clamp_min(1e-30), entries)


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
