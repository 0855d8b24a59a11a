"""The inverse factor of a wide second moment, in the moment's own memory.

At 16,384 columns one float32 matrix takes 1 GiB, so there is room for one. U takes its upper triangle and diagonal, H
stays in the strict lower triangle, and is whole again afterwards, bit by bit. Products are float32, the diagonal
blocks are factorised and inverted in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK = 1024
"""Rows and columns of a diagonal block."""


def spans(size: int) -> list[slice]:
    """Consecutive blocks of rows, the last may be smaller."""
    return [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]


def set_upper(block: Tensor, values: Tensor) -> None:
    """Overwrite the upper triangle and diagonal of a square block, and leave what lies below."""
    block.copy_(values.to(block.dtype).triu_() + block.tril(-1))


def factor_in_place(matrix: Tensor) -> bool:
    """Replace the upper triangle and diagonal of a symmetric matrix A, float32, by U upper with U^T U = A^-1.

    Only the upper triangle is read, and the strict lower one is left as it is. False, with a ruined upper triangle, if
    A is not positive definite. A = V V^T with V upper, block by block from the last; then U = V^-1 in place.
    """
    blocks = spans(len(matrix))
    for here in reversed(blocks):
        upper = matrix[here, here].double().triu_()
        symmetric = upper + upper.triu(1).t()
        lower, failed = torch.linalg.cholesky_ex(symmetric.flip(0, 1))
        if int(failed):
            return False
        factor = lower.flip(0, 1)
        set_upper(matrix[here, here], factor)
        panel = matrix[: here.start, here]  # [rows above, block]
        for rows in spans(here.start):
            panel[rows] = panel[rows] @ _inverse(factor).float().t()
        for columns in spans(here.start):
            other = panel[columns]
            matrix[: columns.start, columns].addmm_(panel[: columns.start], other.t(), alpha=-1)
            block = matrix[columns, columns]
            set_upper(block, block - other @ other.t())
    return _invert(matrix, blocks)


def _inverse(upper: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True)
    return inverse


def _invert(matrix: Tensor, blocks: list[slice]) -> bool:
    """Replace V, the upper triangle of the matrix, by its inverse; False if a value is not finite."""
    for here in blocks:
        inverse = _inverse(matrix[here, here].double().triu_())
        panel = matrix[: here.start, here]
        for rows in spans(here.start):  # from the top: a row of blocks reads only those at and below itself
            product = matrix[rows, rows].triu() @ panel[rows]
            product.addmm_(matrix[rows, rows.stop : here.start], panel[rows.stop :])
            panel[rows] = product @ inverse.float().neg_()
        set_upper(matrix[here, here], inverse)
        if not bool(torch.isfinite(panel).all() and torch.isfinite(inverse).all()):
            return False
    return True


def restore(matrix: Tensor, diagonal: Tensor) -> None:
    """Make the matrix symmetric again from its strict lower triangle and its diagonal."""
    for here in spans(len(matrix)):
        matrix[here, here.stop :] = matrix[here.stop :, here].t()
        below = matrix[here, here].tril(-1)
        matrix[here, here] = below + below.t()
    matrix.diagonal().copy_(diagonal)


@contextmanager
def permuted(matrix: Tensor, order: Tensor) -> Iterator[Tensor]:
    """Yield the matrix with rows and columns in another order, in place; the old order comes back at the end."""
    _permute(matrix, order)
    try:
        yield matrix
    finally:
        _permute(matrix, order.argsort())


def _permute(matrix: Tensor, order: Tensor) -> None:
    for here in spans(len(matrix)):
        matrix[:, here] = matrix[:, here].index_select(0, order)
    for here in spans(len(matrix)):
        matrix[here] = matrix[here].index_select(1, order)
