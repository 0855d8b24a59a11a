"""The randomised Hadamard transform of the columns of a matrix, and its inverse.

R = H S: S turns the sign of some columns over, H is block-diagonal with Sylvester's Hadamard matrices, each divided by
the square root of its size, so R is orthogonal. Sums are made in one fixed order: every machine gets the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 20
"""Numbers transformed at once: few enough to stay in a cache."""


def block_size(columns: int) -> int:
    """Return the largest power of two that divides `columns`: the size of the blocks of H."""
    return columns & -columns


def rotate(values: Tensor, flips: Tensor) -> Tensor:
    """Return R x for every row x of values [rows, columns], float32 [rows, columns].

    flips uint8 [columns]: 1 where S is -1, else 0. Takes rows * columns * log2(block_size) additions.
    """
    result = values.float() * _signs(flips)
    _transform_(result)
    return result


def unrotate(values: Tensor, flips: Tensor) -> Tensor:
    """Return R^-1 x for every row x of values [rows, columns], float32 [rows, columns]."""
    result = values.to(torch.float32, copy=True)
    _transform_(result)
    return result.mul_(_signs(flips))


def rotate_moment(second_moment: Tensor, flips: Tensor) -> Tensor:
    """Return R H R^T, the second moment of rotated inputs, for a symmetric H [columns, columns]."""
    return rotate(rotate(second_moment, flips).t().contiguous(), flips)


def _signs(flips: Tensor) -> Tensor:
    return 1.0 - 2.0 * flips.float()


def _transform_(values: Tensor) -> None:
    """Multiply every row of contiguous float32 values [rows, columns] by H, which is its own inverse, in place."""
    columns = values.shape[1]
    block = block_size(columns)
    for rows in torch.split(values, max(1, _CHUNK // columns)):
        half = 1
        while half < block:
            pairs = rows.view(-1, 2, half)
            first, second = pairs[:, 0], pairs[:, 1]
            difference = first - second
            first.add_(second)
            second.copy_(difference)
            half *= 2
        rows.mul_(block**-0.5)
