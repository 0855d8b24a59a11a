"""Round to nearest: every weight to the nearest level of its group's grid."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvq.errors import QuantizationError, ShapeError
from rwkvq.formats.scalar import ScalarCodes, ScalarLayout
from rwkvq.quantize.grid import find_grid, round_to


def check_shape(weight: Tensor, layout: ScalarLayout) -> None:
    """Raise ShapeError unless weight is [layout.rows, layout.columns]."""
    if tuple(weight.shape) != (layout.rows, layout.columns):
        found, expected = list(weight.shape), [layout.rows, layout.columns]
        raise ShapeError(f"weight: found shape {found}, expected {expected} as the layout says; plan again")


def quantize(weight: Tensor, layout: ScalarLayout, *, clip_search: bool = False) -> ScalarCodes:
    """Return weight [out, in], any float dtype, on the nearest levels (docs/method.md 5).

    Raises ShapeError if the layout is for another shape, QuantizationError for NaN or Inf.
    """
    check_shape(weight, layout)
    if not bool(torch.isfinite(weight).all()):
        raise QuantizationError("weight: found NaN or Inf, expected finite values; check the checkpoint")
    values = weight.float().reshape(-1, layout.group_size).t().contiguous()  # [g, rows * groups]
    grid = find_grid(values, layout.bits, symmetric=layout.symmetric, clip_search=clip_search, weights=None)
    codes = round_to(values, grid, layout.bits).t().to(torch.uint8).reshape(layout.rows, layout.columns)
    shape = (layout.rows, layout.groups)
    zero = None if layout.symmetric else grid.zero.to(torch.uint8).view(shape)
    return ScalarCodes(layout, codes, grid.scale.view(shape), zero)
