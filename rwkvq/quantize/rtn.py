"""Round to nearest: every weight to the nearest level of its group's grid."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvq.errors import QuantizationError, ShapeError
from rwkvq.formats.affine import AffineLayout
from rwkvq.formats.residual import ResidualLayout
from rwkvq.formats.scalar import ScalarCodes, ScalarLayout
from rwkvq.quantize.grid import find_grid, round_to
from rwkvq.quantize.hessian import row_chunks
from rwkvq.tensors import is_finite


def check_shape(weight: Tensor, layout: ScalarLayout | AffineLayout | ResidualLayout) -> None:
    """Raise ShapeError unless weight is [layout.rows, layout.columns]."""
    if tuple(weight.shape) != (layout.rows, layout.columns):
        found, expected = list(weight.shape), [layout.rows, layout.columns]
        raise ShapeError(f"weight: found shape {found}, expected {expected} as the layout says; plan again")


def quantize(weight: Tensor, layout: ScalarLayout, *, clip_search: bool = False) -> ScalarCodes:
    """Return weight [out, in], any float dtype, on the nearest levels (docs/method.md 5).

    Raises ShapeError if the layout is for another shape, QuantizationError for NaN or Inf.
    """
    check_shape(weight, layout)
    if not is_finite(weight):
        raise QuantizationError("weight: found NaN or Inf, expected finite values; check the checkpoint")
    pieces = [_encoded(weight[rows], layout, clip_search=clip_search) for rows in row_chunks(weight)]
    codes, scale, zero = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return ScalarCodes(layout, codes, scale, None if layout.symmetric else zero)


def _encoded(weight: Tensor, layout: ScalarLayout, *, clip_search: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 [rows, in], scale and zero uint8 [rows, groups] of some rows."""
    values = weight.float().reshape(-1, layout.group_size).t().contiguous()  # [g, rows * groups]
    grid = find_grid(values, layout.bits, symmetric=layout.symmetric, clip_search=clip_search, weights=None)
    codes = round_to(values, grid, layout.bits).t().to(torch.uint8).reshape(-1, layout.columns)
    return codes, grid.scale.view(-1, layout.groups), grid.zero.to(torch.uint8).view(-1, layout.groups)
