"""Activation-aware scaling: columns with large inputs are enlarged before they are rounded to nearest.

Lin et al., AWQ, arXiv 2306.00978; released code mit-han-lab/llm-awq, awq/quantize/auto_scale.py and auto_clip.py.
Differences are listed in docs/method.md, policy awq.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvq.formats import scaled
from rwkvq.formats.parts import half_scale
from rwkvq.formats.scalar import ScalarCodes, ScalarLayout
from rwkvq.formats.scaled import ScaledCodes, ScaledLayout
from rwkvq.quantize import rtn
from rwkvq.quantize.grid import Grid, range_grid, round_to
from rwkvq.quantize.hessian import check_statistics, damped_diagonal, loss
from rwkvq.quantize.rtn import check_shape

EXPONENTS = tuple(step / 20 for step in range(20))
"""0, which scales nothing, to 0.95."""

CLIPS = tuple(1 - step / 20 for step in range(10))
"""Limits of a group's weights, as shares of its largest magnitude: 1.0 to 0.55."""


def quantize(weight: Tensor, second_moment: Tensor, layout: ScaledLayout, *, clip_search: bool = False) -> ScaledCodes:
    """Return weight [out, in] in the scaled format with small tr(dW H dW^T), H the second moment [in, in].

    Exponent 0 is among those tried, so without clip_search the loss is at most that of round to nearest.
    Raises ShapeError for shapes that do not fit, QuantizationError for values that are not finite.
    """
    check_shape(weight, layout.inner)
    check_statistics(weight, second_moment)
    weight = weight.float()
    best, least = None, float("inf")
    for exponent in EXPONENTS:
        column_scale = column_scales(second_moment, exponent)
        inner = rtn.quantize(weight * column_scale.float(), layout.inner)
        codes = ScaledCodes(layout, inner, column_scale)
        found = loss(weight, scaled.decode(codes), second_moment)
        if best is None or found < least:
            best, least = codes, found
    assert best is not None
    return _clipped(weight, second_moment, best) if clip_search else best


def column_scales(second_moment: Tensor, exponent: float) -> Tensor:
    """Return float16 [in]: the root mean square of each input to the power `exponent`, centred around 1.

    The largest is the inverse of the smallest. Inputs that never fired count as average ones.
    """
    magnitude = damped_diagonal(second_moment.diagonal(), 0.0).sqrt() ** exponent
    return half_scale(magnitude / (magnitude.max() * magnitude.min()).sqrt())


def _clipped(weight: Tensor, second_moment: Tensor, codes: ScaledCodes) -> ScaledCodes:
    """Return the weight on the grids of smallest error, group by group, among those of clipped groups."""
    scale = codes.column_scale.float()
    size = codes.layout.inner.group_size
    levels, grids = [], []
    for start in range(0, codes.layout.columns, size):
        span = slice(start, start + size)
        values = (weight[:, span] * scale[span]).t().contiguous()  # [g, out]
        moment = second_moment[span, span].float() / torch.outer(scale[span], scale[span])
        grids.append(_clipped_grid(values, moment, codes.layout.inner))
        levels.append(round_to(values, grids[-1], codes.layout.inner.bits).to(torch.uint8))
    zero = torch.stack([grid.zero for grid in grids], 1).to(torch.uint8)  # [out, groups]
    inner = ScalarCodes(
        codes.layout.inner,
        torch.cat(levels).t().contiguous(),
        torch.stack([grid.scale for grid in grids], 1),
        None if codes.layout.inner.symmetric else zero,
    )
    return ScaledCodes(codes.layout, inner, codes.column_scale)


def _clipped_grid(values: Tensor, moment: Tensor, layout: ScalarLayout) -> Grid:
    """Return one grid a row for the weights of one group, values [g, out], with inputs of the second moment [g, g]."""
    limit = values.abs().amax(0)
    scale, zero, least = torch.empty_like(limit).half(), torch.empty_like(limit), torch.full_like(limit, torch.inf)
    for clip in CLIPS:
        grid = range_grid(values.clamp(-clip * limit, clip * limit), layout.bits, symmetric=layout.symmetric)
        error = (round_to(values, grid, layout.bits) - grid.zero) * grid.scale.float() - values
        found = (moment @ error).mul_(error).sum(0)
        is_better = found < least
        scale, zero = torch.where(is_better, grid.scale, scale), torch.where(is_better, grid.zero, zero)
        least = torch.where(is_better, found, least)
    return Grid(scale, zero)
