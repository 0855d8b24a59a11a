"""Half-quadratic quantization: zero points that minimise the l_p norm of the weight error; no data is needed.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (mobiusml.github.io/hqq_blog),
github.com/mobiusml/hqq, hqq/core/optimize.py at 0dbf39a.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvq.errors import QuantizationError
from rwkvq.formats.affine import AffineCodes, AffineLayout
from rwkvq.formats.parts import MAX_SCALE, half_scale
from rwkvq.quantize.hessian import row_chunks
from rwkvq.quantize.rtn import check_shape
from rwkvq.tensors import is_finite

POWER = 0.7
BETA = 10.0
KAPPA = 1.01
ITERATIONS = 20
"""Norm p, first penalty beta, its growth at every step, and steps at most: the defaults of the reference code."""

LARGEST_ZERO = 1 << 15
"""A scale is at least max|w| over this, so that zero points of a group far from 0 fit float16."""


def shrunk(error: Tensor, beta: float) -> Tensor:
    """Return the l_p shrinkage sign(e) * max(0, |e| - |e|**(p - 1) / beta) of errors in units of the weights."""
    size = error.abs()
    # |e|**(p - 1) is infinite at 0, where the result is 0
    return error.sign() * (size - size.pow(POWER - 1) / beta).clamp_min_(0)


def _rounded(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the nearest codes, float32, of values [groups, g] for scale and zero [groups, 1]."""
    return (values / scale).add_(zero).round_().clamp_(0, 2**bits - 1)


def fit_zero(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the zero points [groups, 1], in code units, of smallest sum |w - Q|**p that the alternation passes.

    values [groups, g]; scale and the first zero [groups, 1]; all float32. Each step shrinks the errors to those W_e
    that stay, and sets zero to mean(q - (w - W_e) / scale). Unlike in the reference code, which stops for a whole
    weight, a group stops by itself when its error no longer falls, and keeps the best zero and not the last.
    """
    best, least, beta = zero.clone(), torch.full_like(zero, torch.inf), BETA
    rows = torch.arange(len(values))
    for _ in range(ITERATIONS):
        part, step = values[rows], scale[rows]
        codes = _rounded(part, step, zero, bits)
        error = part - (codes - zero) * step
        size = error.abs().pow_(POWER).sum(1, keepdim=True)
        falls = (size < least[rows])[:, 0]
        rows, zero = rows[falls], zero[falls]
        if not len(rows):
            break
        best[rows], least[rows] = zero, size[falls]
        zero = (codes[falls] - (part[falls] - shrunk(error[falls], beta)) / step[falls]).mean(1, keepdim=True)
        beta *= KAPPA
    return best


def quantize(weight: Tensor, layout: AffineLayout) -> AffineCodes:
    """Return weight [out, in], any float dtype, in the affine format with small ||W - Q||_p, p = 0.7.

    The scale spans each group's minimum to maximum and stays; only the zero point is fitted.
    Raises ShapeError if the layout is for another shape, QuantizationError for NaN or Inf.
    """
    check_shape(weight, layout)
    if not is_finite(weight):
        raise QuantizationError("weight: found NaN or Inf, expected finite values; check the checkpoint")
    pieces = [_encoded(weight[rows].float(), layout) for rows in row_chunks(weight)]
    return AffineCodes(layout, *(torch.cat(parts) for parts in zip(*pieces, strict=True)))


def _encoded(weight: Tensor, layout: AffineLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 [rows, in], scale and zero float16 [rows, groups] of some rows."""
    values = weight.reshape(-1, layout.group_size)
    low, high = (end[:, None] for end in torch.aminmax(values, dim=1))
    smallest = torch.maximum(-low, high) / LARGEST_ZERO
    stored = half_scale(torch.maximum((high - low) / (2**layout.bits - 1), smallest))
    scale = stored.float()
    zero = fit_zero(values, scale, -low / scale, layout.bits).clamp(-MAX_SCALE, MAX_SCALE).half()
    codes = _rounded(values, scale, zero.float(), layout.bits).to(torch.uint8).view(-1, layout.columns)
    return codes, stored.view(-1, layout.groups), zero.view(-1, layout.groups)
