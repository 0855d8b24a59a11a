"""The table quantizer: tables fitted to the weight by expectation maximisation, then rounding with error feedback.

A group's table is chosen when all earlier errors have reached the group, by the errors of its weights, each counted by
its column's share in the loss, 1 / U_jj^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rwkvq.errors import ShapeError
from rwkvq.formats.table import GROUP, TABLES, UNIT, TableCodes, TableLayout
from rwkvq.formats.trellis import scales_of
from rwkvq.quantize.gptq import unit_rows
from rwkvq.quantize.hessian import check_statistics, inverse_factor_of
from rwkvq.quantize.options import GuidedOptions
from rwkvq.quantize.trellis import find_row_scales, search_weights

SAMPLE_GROUPS = 1 << 14
"""Groups that the tables are fitted to, at most: evenly spaced ones of the whole weight."""
ROUNDS = 20
BLOCK = 128
"""Columns, at most, between two updates of all later columns."""


@dataclass(frozen=True, slots=True)
class TableOptions(GuidedOptions):
    """How the table quantizer rounds; row weights enter the fit of its tables."""

    method: ClassVar[str] = "table"


def quantize(
    weight: Tensor, second_moment: Tensor, layout: TableLayout, options: TableOptions, fisher: Tensor
) -> TableCodes:
    """Return weight [out, in] in the table format with small sum_i f_i dW_i H dW_i^T.

    second_moment: H [in, in]; fisher: f [out]. Raises ShapeError for shapes that do not fit, QuantizationError for
    values that are not finite or a failing H.
    """
    if tuple(weight.shape) != (layout.rows, layout.columns):
        raise ShapeError(f"weight {list(weight.shape)} does not fit the layout [{layout.rows}, {layout.columns}]")
    check_statistics(weight, second_moment)
    weight = weight.float()
    scale, base = find_row_scales(weight)
    scales = scales_of(scale, base)
    columns = (weight / scales[:, None]).t().contiguous()  # [in, out]
    rows = search_weights(scales, fisher if options.row_weights else None)
    with inverse_factor_of(second_moment.float(), options.damping) as upper:
        importance = upper.diagonal().square().reciprocal()
        importance = importance / importance.mean()
        table = fit_tables(columns, rows, importance, layout.bits)
        values = table.float() * UNIT
        feedback = unit_rows(upper)
        codes = torch.empty(layout.columns, layout.rows, dtype=torch.uint8)
        selector = torch.empty(layout.groups, layout.rows, dtype=torch.uint8)
        for start in range(0, layout.columns, BLOCK):
            stop = min(start + BLOCK, layout.columns)
            errors = torch.empty(stop - start, layout.rows)
            for group in range(start, stop, GROUP):
                here = slice(group, group + GROUP)
                chosen = choose_tables(columns[here].t(), importance[here], values)
                selector[group // GROUP] = chosen
                levels = values[chosen]  # [out, entries]
                for column in range(group, group + GROUP):
                    code, error = round_column(columns[column], levels)
                    codes[column], errors[column - start] = code, error
                    later = feedback[column, column + 1 : stop]
                    columns[column + 1 : stop].addr_(later, error, alpha=-1)
            columns[stop:].addmm_(feedback[start:stop, stop:].t(), errors, alpha=-1)
    return TableCodes(layout, codes.t().contiguous(), selector.t().contiguous(), table, scale, base)


def round_column(column: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest of each row's levels, rising, [out, entries] for a column [out]: codes uint8 and errors w - q."""
    middles = 0.5 * (levels[:, 1:] + levels[:, :-1])
    codes = (column[:, None] > middles).sum(1)
    return codes.to(torch.uint8), column - levels.gather(1, codes[:, None])[:, 0]


def choose_tables(groups: Tensor, importance: Tensor, values: Tensor) -> Tensor:
    """The table [n] of least error for groups [n, 16] of columns with importance [16]; values [16, entries], rising."""
    errors = torch.stack([table_errors(groups, importance, levels) for levels in values])
    return errors.argmin(0)


def table_errors(groups: Tensor, importance: Tensor, levels: Tensor) -> Tensor:
    """Weighted squared error [n] of groups [n, 16] rounded to levels [entries]; importance [16] or [n, 16]."""
    nearest = levels[torch.bucketize(groups.contiguous(), 0.5 * (levels[1:] + levels[:-1]))]
    return ((groups - nearest).square_() * importance).sum(1)


def fit_tables(columns: Tensor, rows: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Tables int8 [16, 2**bits], each rising, for weights [in, out] in units of their rows' scales.

    rows [out], importance [in]: how much errors count. Groups are sorted by mean and spread at first, then each goes to
    its best table and each entry to the weighted mean of what it stands for, in turn.
    """
    inputs, outputs = columns.shape
    count = inputs // GROUP * outputs
    picked = torch.linspace(0, count - 1, min(count, SAMPLE_GROUPS), dtype=torch.float64).round().long()
    group, row = picked // outputs, picked % outputs
    places = group[:, None] * GROUP + torch.arange(GROUP)
    samples = columns[places, row[:, None]]  # [n, 16]
    weights = importance[places] * rows[row][:, None]
    values = _first_tables(samples, bits)
    for _ in range(ROUNDS):
        errors = torch.stack([table_errors(samples, weights, levels) for levels in values])
        chosen, worst = errors.argmin(0), errors.amin(0)
        for index in range(TABLES):
            own = chosen == index
            if not own.any():  # an idle table takes over the groups that fare worst
                own = torch.zeros_like(own).index_fill_(0, worst.topk(max(1, len(samples) // 64)).indices, True)
            values[index] = _means(samples[own], weights[own], values[index])
    return (values / UNIT).round_().clamp_(-127, 127).to(torch.int8).sort(1).values


def _first_tables(samples: Tensor, bits: int) -> Tensor:
    """Levels [16, 2**bits] from quantiles of groups with similar mean and spread: four kinds of each."""
    means, spreads = samples.mean(1), samples.std(1)
    ranks = torch.linspace(0, 1, (1 << bits) * 2 + 1, dtype=torch.float64)[1::2].float()
    values = []
    by_spread = spreads.argsort(stable=True)
    for part in by_spread.tensor_split(4):
        by_mean = part[means[part].argsort(stable=True)]
        for own in by_mean.tensor_split(4):
            flat = samples[own].flatten().sort().values if len(own) else samples.flatten().sort().values
            values.append(flat[(ranks * (len(flat) - 1)).round().long()])
    return torch.stack(values)


def _means(samples: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Each level moved to the weighted mean of the samples that are nearest to it; idle ones stay. Rising."""
    places = torch.bucketize(samples.contiguous(), 0.5 * (levels[1:] + levels[:-1])).flatten()
    sums = torch.zeros(len(levels), dtype=torch.float64)
    totals = torch.zeros(len(levels), dtype=torch.float64)
    sums.index_add_(0, places, (samples * weights).flatten().double())
    totals.index_add_(0, places, weights.flatten().double())
    moved = torch.where(totals > 0, sums / totals.clamp_min(1e-300), levels.double()).float()
    return moved.sort().values
