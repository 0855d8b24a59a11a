"""GPTQ: scalar rounding, one input column after the other, with the error of each fed into the columns to come.

Frantar et al., arXiv 2210.17323. Weights are held columns-first [in, out], so that a column is contiguous.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rwkvq.errors import PlanError
from rwkvq.formats.scalar import ScalarCodes, ScalarLayout
from rwkvq.quantize.factor import set_upper, spans
from rwkvq.quantize.grid import Grid, find_grid
from rwkvq.quantize.hessian import check_statistics, inverse_factor_of
from rwkvq.quantize.options import read_options
from rwkvq.quantize.rtn import check_shape
from rwkvq.quantize.sweep import sweep_scalar

BLOCK = 128
"""Columns, at most, between two updates of all later columns."""


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """How GPTQ rounds; act_order needs static_groups, so that no column order has to be stored."""

    clip_search: bool = False
    static_groups: bool = False
    act_order: bool = False
    damping: float = 0.01
    sweeps: int = 0
    """Coordinate descent sweeps over all columns after the feedback (`rwkvq.quantize.sweep`)."""

    def __post_init__(self) -> None:
        """Raise PlanError for activation order with groups that change while columns are rounded."""
        if self.act_order and not self.static_groups:
            raise PlanError("gptq options: act_order is true and static_groups false; set static_groups to true")

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> GptqOptions:
        """Read plain values, defaults where they are missing; raise PlanError for unknown or unusable ones."""
        return read_options(cls, "gptq", json)


@dataclass(frozen=True, slots=True)
class Walk:
    """The state of one walk over the columns in processing order.

    columns [in, out] is overwritten by feedback; feedback [in, in] is U with every row divided by its diagonal
    entry, read above its diagonal only; steps [in, out] is filled in with whole steps above the zero point,
    level - zero.
    """

    columns: Tensor
    feedback: Tensor
    steps: Tensor
    bits: int

    def round_block(self, start: int, stop: int, grids: list[Grid]) -> None:
        """Round columns start .. stop - 1, grids[i] for column start + i, and feed their errors into all later ones.

        The error enters later columns as (w - Q) U_j,rest / U_jj.
        """
        block, steps = self.columns[start:stop], self.steps[start:stop]
        errors = torch.empty_like(block)
        feedback = self.feedback[start:stop, start:stop]
        limits = {id(grid): (grid.scale.float(), -grid.zero, 2**self.bits - 1 - grid.zero) for grid in grids}
        for index, grid in enumerate(grids):
            scale, lowest, highest = limits[id(grid)]
            column, step, error = block[index], steps[index], errors[index]
            torch.div(column, scale, out=step).round_().clamp_(lowest, highest)
            torch.addcmul(column, step, scale, value=-1, out=error)
            block[index + 1 :].addr_(feedback[index, index + 1 :], error, alpha=-1)
        self.columns[stop:].addmm_(self.feedback[start:stop, stop:].t(), errors, alpha=-1)


def quantize(weight: Tensor, second_moment: Tensor, layout: ScalarLayout, options: GptqOptions) -> ScalarCodes:
    """Return weight [out, in] in the scalar format with small tr(dW H dW^T), H the second moment [in, in].

    Grids are found on weights that all earlier feedback has reached, or with static_groups on the original ones; the
    clip search weights column j by 1 / U_jj^2 (docs/method.md 5).
    Raises ShapeError for shapes that do not fit, QuantizationError for values that are not finite or a failing H.
    """
    check_shape(weight, layout)
    check_statistics(weight, second_moment)
    weight, second_moment = weight.float(), second_moment.float()
    order = torch.argsort(second_moment.diagonal(), descending=True, stable=True) if options.act_order else None
    with inverse_factor_of(second_moment, options.damping, order) as upper:
        codes = _walked(weight, upper, order, layout, options)
    for _ in range(options.sweeps):
        codes = sweep_scalar(codes, weight, second_moment, options.damping)
    return codes


def _walked(
    weight: Tensor, upper: Tensor, order: Tensor | None, layout: ScalarLayout, options: GptqOptions
) -> ScalarCodes:
    """Return the codes of one walk over all columns with U of the columns in `order`; U is overwritten."""
    importance = upper.diagonal().square().reciprocal()
    columns = weight.t().clone(memory_format=torch.contiguous_format)  # [in, out]
    if not options.static_groups:
        return _with_current_grids(columns, upper, importance, layout, options)
    order = torch.arange(layout.columns, device=weight.device) if order is None else order
    importance = torch.empty_like(importance).index_copy_(0, order, importance)
    return _with_static_grids(columns, upper, order, importance, layout, options)


def _grid(columns: Tensor, importance: Tensor, group: int, layout: ScalarLayout, options: GptqOptions) -> Grid:
    """Return the grids [out] of one group of columns [in, out]."""
    span = slice(group * layout.group_size, (group + 1) * layout.group_size)
    return find_grid(
        columns[span],
        layout.bits,
        symmetric=layout.symmetric,
        clip_search=options.clip_search,
        weights=importance[span] / importance[span].mean(),
    )


def _with_current_grids(
    columns: Tensor, upper: Tensor, importance: Tensor, layout: ScalarLayout, options: GptqOptions
) -> ScalarCodes:
    """Round in the stored order; a block never spans two groups, so a group's grid sees all feedback before it."""
    group_size = layout.group_size
    state = Walk(columns, unit_rows(upper), torch.empty_like(columns), layout.bits)
    grids: list[Grid] = []
    for group in range(layout.groups):
        grids.append(_grid(columns, importance, group, layout, options))
        end = (group + 1) * group_size
        for start in range(end - group_size, end, BLOCK):
            stop = min(start + BLOCK, end)
            state.round_block(start, stop, [grids[-1]] * (stop - start))
    return _codes(state.steps, grids, layout)


def _with_static_grids(
    columns: Tensor, upper: Tensor, order: Tensor, importance: Tensor, layout: ScalarLayout, options: GptqOptions
) -> ScalarCodes:
    """Round in the given order of columns on grids of the original weights."""
    grids = [_grid(columns, importance, group, layout, options) for group in range(layout.groups)]
    state = Walk(columns[order], unit_rows(upper), torch.empty_like(columns), layout.bits)
    group_of = (order // layout.group_size).tolist()
    for start in range(0, layout.columns, BLOCK):
        stop = min(start + BLOCK, layout.columns)
        state.round_block(start, stop, [grids[group] for group in group_of[start:stop]])
    steps = torch.empty_like(columns)
    steps[order] = state.steps
    return _codes(steps, grids, layout)


def unit_rows(upper: Tensor) -> Tensor:
    """Divide every row of U by its diagonal entry, in place and at and above the diagonal only; return U."""
    diagonal = upper.diagonal().clone()[:, None]
    for here in spans(len(upper)):
        upper[here, here.stop :] /= diagonal[here]
        set_upper(upper[here, here], upper[here, here] / diagonal[here])
    return upper


def _codes(steps: Tensor, grids: list[Grid], layout: ScalarLayout) -> ScalarCodes:
    """Return the encoded weight of steps [in, out] above the zero points of one grid a group of columns."""
    zero = torch.stack([grid.zero for grid in grids], 1)  # [out, groups]
    scale = torch.stack([grid.scale for grid in grids], 1)
    codes = torch.empty(layout.rows, layout.columns, dtype=torch.uint8, device=steps.device)
    for group, grid in enumerate(grids):
        span = slice(group * layout.group_size, (group + 1) * layout.group_size)
        codes[:, span] = (steps[span] + grid.zero).t()
    return ScalarCodes(layout, codes, scale, None if layout.symmetric else zero.to(torch.uint8))
