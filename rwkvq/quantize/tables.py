"""The table quantizer: tables fitted to the weight by expectation maximisation, then rounding with error feedback.

A group's table is chosen when all earlier errors have reached the group, by the errors of its weights, each counted by
its column's share in the loss, 1 / U_jj^2. Rows may leave errors to later rows too. Sweeps afterwards choose tables and
codes anew, group by group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rwkvq.errors import ShapeError
from rwkvq.formats.table import GROUP, UNIT, TableCodes, TableLayout
from rwkvq.formats.trellis import scales_of
from rwkvq.quantize import table_search
from rwkvq.quantize.factor import permuted
from rwkvq.quantize.gptq import unit_rows
from rwkvq.quantize.hessian import check_statistics, inverse_factor_of, row_chunks, with_damping
from rwkvq.quantize.options import GuidedOptions
from rwkvq.quantize.output_feedback import OutputFeedback
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

    sweeps: int = 0
    """Rounds of coordinate descent over the groups after the first rounding."""
    output_feedback: bool = False
    """Feed errors from row to row as well, by the second moment of the gradient at the outputs."""


def quantize(
    weight: Tensor,
    second_moment: Tensor,
    layout: TableLayout,
    options: TableOptions,
    fisher: Tensor,
    output_moment: Tensor | None = None,
) -> TableCodes:
    """Return weight [out, in] in the table format with small sum_i f_i dW_i H dW_i^T, or tr(G dW H dW^T) with G.

    second_moment: H [in, in]; fisher: f [out]; output_moment: blocks [blocks, size, size] of G along its diagonal, with
    option output_feedback. Groups are rounded by falling diagonal of H and stored in their own order. Raises ShapeError
    for shapes that do not fit, QuantizationError for what is not finite or a failing H or G.
    """
    if tuple(weight.shape) != (layout.rows, layout.columns):
        raise ShapeError(f"weight {list(weight.shape)} does not fit the layout [{layout.rows}, {layout.columns}]")
    check_statistics(weight, second_moment)
    weight = weight.float()
    scale, base = find_row_scales(weight)
    scales = scales_of(scale, base)
    outputs = None
    if options.output_feedback:
        if output_moment is None:
            raise ShapeError("output_feedback needs the moment of the outputs; run the gradients stage again")
        outputs = OutputFeedback.of(output_moment, scales)
    rows = search_weights(scales, fisher if options.row_weights else None) if outputs is None else outputs.weights
    groups = second_moment.diagonal().view(-1, GROUP).sum(1).argsort(descending=True, stable=True)
    order = (groups[:, None] * GROUP + torch.arange(GROUP, device=weight.device)).flatten()
    targets = weight[:, order] / scales[:, None]
    with permuted(second_moment.float(), order) as moment:
        codes, selector, table = _round_all(targets, moment, rows, outputs, layout, options)
    return TableCodes(layout, codes[:, order.argsort()], selector[:, groups.argsort()], table, scale, base)


def _round_all(
    targets: Tensor,
    second_moment: Tensor,
    rows: Tensor,
    outputs: OutputFeedback | None,
    layout: TableLayout,
    options: TableOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [out, in], selector uint8 [out, in / 16] and tables int8 [16, entries] of targets [out, in] in units
    of row scales; rows [out]: how much errors count."""
    codes = torch.empty_like(targets, dtype=torch.uint8)
    selector = codes.new_empty(layout.rows, layout.groups)
    moved = targets.clone()
    with inverse_factor_of(second_moment, options.damping) as upper:
        importance = upper.diagonal().square().reciprocal()
        importance = importance / importance.mean()
        table = fit_tables(targets, rows, importance, layout.bits)
        feedback = unit_rows(upper)
        for start in range(0, layout.columns, BLOCK):
            stop = min(start + BLOCK, layout.columns)
            square = feedback[start:stop, start:stop]
            found = _round_block(moved[:, start:stop], importance[start:stop], square, table, outputs)
            codes[:, start:stop], selector[:, start // GROUP : stop // GROUP], errors = found
            moved[:, stop:].addmm_(errors, feedback[start:stop, stop:], alpha=-1)
    if options.sweeps:
        with with_damping(second_moment, options.damping) as hessian:
            for _ in range(options.sweeps):
                if outputs is not None:
                    _sweep_by_rows(targets, hessian, table, codes, selector, outputs.metric)
                    continue
                for some in [slice(None)] if targets.is_cuda else row_chunks(targets):  # a GPU is to have many rows
                    quantized = _values(table, codes[some], selector[some])
                    pull = (targets[some] - quantized) @ hessian
                    _sweep(quantized, pull, hessian, table, codes[some], selector[some])
    return codes, selector, table


def _round_block(
    targets: Tensor, importance: Tensor, feedback: Tensor, table: Tensor, outputs: OutputFeedback | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As round_to_tables, with errors fed from row to row if there are `outputs`."""
    if outputs is None:
        return round_to_tables(targets, importance, feedback, table)
    columns = targets.shape[1]
    codes, errors = torch.empty_like(targets, dtype=torch.uint8), torch.empty_like(targets)
    selector = codes.new_empty(len(targets), columns // GROUP)
    ahead = feedback.triu(1)
    ahead.diagonal().fill_(1)

    def round_rows(rows: Tensor, shift: Tensor) -> Tensor:
        # columns hand on what is missing of their own targets, not of the shifted ones: as if no column handed on the
        # shift, each takes those of the columns before it beforehand
        shifted = targets[rows] + shift @ ahead
        codes[rows], selector[rows], missing = round_to_tables(shifted, importance, feedback, table)
        errors[rows] = missing - shift
        return missing

    outputs.row_by_row(columns, round_rows)
    return codes, selector, errors


def _values(table: Tensor, codes: Tensor, selector: Tensor) -> Tensor:
    """What codes [out, in] with selector [out, in / 16] stand for, in units of row scales."""
    return (table.float() * UNIT)[selector.long().repeat_interleave(GROUP, 1), codes.long()]


def _sweep_by_rows(
    targets: Tensor, hessian: Tensor, table: Tensor, codes: Tensor, selector: Tensor, metric: Tensor
) -> None:
    """Choose codes and selector anew, one row of every block of `metric` after the other, by tr(G dW H dW^T)."""
    blocks, size = metric.shape[:2]
    missing = torch.empty_like(targets)
    for some in row_chunks(targets):
        torch.sub(targets[some], _values(table, codes[some], selector[some]), out=missing[some])
    missing = missing.view(blocks, size, -1)
    for row in range(size):
        weights = metric[:, row, row]
        pull = torch.bmm(metric[:, row, None], missing)[:, 0] / weights[:, None] @ hessian
        own_codes, own_selector = codes[row::size].contiguous(), selector[row::size].contiguous()
        quantized = _values(table, own_codes, own_selector)
        _sweep(quantized, pull, hessian, table, own_codes, own_selector)
        codes[row::size], selector[row::size] = own_codes, own_selector
        missing[:, row] = targets[row::size] - quantized


def _sweep(quantized: Tensor, pull: Tensor, hessian: Tensor, table: Tensor, codes: Tensor, selector: Tensor) -> None:
    """table_search.sweep_rows where the tensors are: on the processor or on CUDA."""
    tensors = quantized, pull, hessian, table.float() * UNIT, codes, selector
    if quantized.is_cuda:
        from rwkvq.quantize.table_cuda import sweep_rows_cuda  # compiles for a GPU when it is imported

        sweep_rows_cuda(*tensors)
    else:
        table_search.sweep_rows(*(tensor.numpy() for tensor in tensors))


def round_to_tables(
    targets: Tensor, importance: Tensor, feedback: Tensor, table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [out, n], selector uint8 [out, n / 16] and errors [out, n] of n columns, in units of row scales.

    importance [n]: how much an error of each column counts for the choice of a table; table int8 [16, entries];
    feedback [n, n]: how errors go into later columns.
    """
    rows, columns = targets.shape
    if targets.is_cuda:
        from rwkvq.quantize.table_cuda import round_columns_cuda

        return round_columns_cuda(targets, importance, feedback, table.float() * UNIT)
    codes, errors = np.empty((rows, columns), np.uint8), np.empty((rows, columns), np.float32)
    selector = np.empty((rows, columns // GROUP), np.uint8)
    inputs = [tensor.contiguous().numpy() for tensor in (targets.clone(), importance, feedback, table.float() * UNIT)]
    table_search.round_columns(*inputs, codes, selector, errors)
    return torch.from_numpy(codes), torch.from_numpy(selector), torch.from_numpy(errors)


def fit_tables(targets: Tensor, rows: Tensor, importance: Tensor, bits: int) -> Tensor:
    """Tables int8 [16, 2**bits], each rising, for weights [out, in] in units of their rows' scales.

    rows [out], importance [in]: how much errors count. Groups are sorted by mean and spread at first, then each goes to
    its best table and each entry to the weighted mean of what it stands for, in turn.
    """
    outputs, inputs = targets.shape
    count = outputs * inputs // GROUP
    picked = torch.linspace(0, count - 1, min(count, SAMPLE_GROUPS), dtype=torch.float64).round().long()
    row, group = (picked % outputs).to(targets.device), (picked // outputs).to(targets.device)
    places = group[:, None] * GROUP + torch.arange(GROUP, device=targets.device)
    samples = targets[row[:, None], places]  # [n, 16]
    weights = importance[places] * rows[row][:, None]
    values = _first_tables(samples, bits)
    if targets.is_cuda:
        from rwkvq.quantize.table_cuda import fit_cuda

        fit_cuda(samples, weights, values, ROUNDS)
    else:
        table_search.fit(samples.numpy(), weights.numpy(), values.numpy(), ROUNDS)
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
            values.append(flat[(ranks * (len(flat) - 1)).round().long().to(flat.device)])
    return torch.stack(values)
