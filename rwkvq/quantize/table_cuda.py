"""The inner loops of the table quantizer on CUDA: the same searches as rwkvq/quantize/table_search.py.

Rows are independent, so a program takes a few of them and the groups of 16 columns follow one after the other; between
groups a product carries errors on. Sums are rounded otherwise than on the processor, so that a few codes differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvq.formats.table import GROUP, TABLES

ROWS, WARPS = 32, 1
"""Rows of a program: one a thread, whose 16 weights are its own."""
SLICES = 16
"""Parts of the groups whose sums are taken side by side and added up in order, so that equal groups give equal bits."""
BLOCK = 128
"""Columns between two updates of the pull on all columns."""


@triton.jit
def _nearest(values, middles, table, LEVELS: tl.constexpr):
    """Numbers of the levels nearest to values, by the middles between neighbours [16, LEVELS - 1]; ties go down."""
    codes = tl.zeros(values.shape, tl.int32)
    for level in tl.static_range(LEVELS - 1):
        codes += (values > tl.load(middles + table * (LEVELS - 1) + level)).to(tl.int32)
    return codes


@triton.jit
def _best_table(group, weights, levels, middles, TABLES: tl.constexpr, LEVELS: tl.constexpr):
    """The table of least error and that error for each row of groups [rows, 16]; weights can be [1, 16]."""
    best = tl.zeros([group.shape[0]], tl.int32)
    least = tl.full([group.shape[0]], float("inf"), tl.float32)
    for table in range(TABLES):
        difference = group - tl.load(levels + table * LEVELS + _nearest(group, middles, table, LEVELS))
        error = tl.sum(weights * difference * difference, axis=1)
        best = tl.where(error < least, table, best)
        least = tl.minimum(error, least)
    return best, least


@triton.jit
def _choose(
    groups,
    weights,
    levels,
    middles,
    chosen,
    errors,
    count,
    GROUP: tl.constexpr,
    TABLES: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Table and error of groups [count, 16]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    place, mask = row[:, None] * GROUP + tl.arange(0, GROUP)[None, :], inside[:, None]
    group, weight = tl.load(groups + place, mask=mask, other=0.0), tl.load(weights + place, mask=mask, other=0.0)
    best, least = _best_table(group, weight, levels, middles, TABLES, LEVELS)
    tl.store(chosen + row, best, mask=inside)
    tl.store(errors + row, least, mask=inside)


@triton.jit
def _add(
    groups,
    weights,
    chosen,
    middles,
    sums,
    totals,
    count,
    share,
    ALL: tl.constexpr,
    GROUP: tl.constexpr,
    TABLES: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums of weights * values and of weights of one level of one table, over one slice of groups [count, 16]."""
    table, level, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, GROUP)[None, :]
    total, moment = tl.zeros([ROWS, GROUP], tl.float64), tl.zeros([ROWS, GROUP], tl.float64)
    for first in range(part * share, tl.minimum((part + 1) * share, count), ROWS):
        row = first + tl.arange(0, ROWS)
        mine = row < count
        if not ALL:
            mine = tl.load(chosen + row, mask=mine, other=-1) == table
        mask = mine[:, None]
        value = tl.load(groups + row[:, None] * GROUP + column, mask=mask, other=0.0)
        weight = tl.load(weights + row[:, None] * GROUP + column, mask=mask, other=0.0).to(tl.float64)
        weight = tl.where(mask & (_nearest(value, middles, table, LEVELS) == level), weight, 0.0)
        total += weight
        moment += weight * value
    place = (part * TABLES + table) * LEVELS + level
    tl.store(totals + place, tl.sum(tl.sum(total, axis=1), axis=0))
    tl.store(sums + place, tl.sum(tl.sum(moment, axis=1), axis=0))


@triton.jit
def _at(tile, column, number):
    """Column `number` of a tile [rows, 16], whose columns are numbered by column [1, 16]."""
    return tl.sum(tl.where(column == number, tile, 0.0), axis=1)


@triton.jit
def _round_group(
    targets,
    importance,
    feedback,
    levels,
    middles,
    codes,
    selector,
    errors,
    rows,
    stride,
    feedback_stride,
    groups,
    GROUP: tl.constexpr,
    TABLES: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Round a group of every row; pointers are to its first column, strides are columns of a row, groups its groups."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    lane = tl.arange(0, GROUP)
    column, mask = lane[None, :], inside[:, None]
    place = row[:, None] * stride + column
    group = tl.load(targets + place, mask=mask, other=0.0)
    table, _ = _best_table(group, tl.load(importance + lane)[None, :], levels, middles, TABLES, LEVELS)
    found, wrong = tl.zeros([ROWS, GROUP], tl.int32), tl.zeros([ROWS, GROUP], tl.float32)
    for i in range(GROUP):
        target = _at(group, column, i)
        code = _nearest(target, middles, table, LEVELS)
        error = target - tl.load(levels + table * LEVELS + code)
        later = tl.load(feedback + i * feedback_stride + lane, mask=lane > i, other=0.0)
        group -= error[:, None] * later[None, :]
        found = tl.where(column == i, code[:, None], found)
        wrong = tl.where(column == i, error[:, None], wrong)
    tl.store(codes + place, found.to(tl.uint8), mask=mask)
    tl.store(errors + place, wrong, mask=mask)
    tl.store(selector + row * groups, table.to(tl.uint8), mask=inside)


@triton.jit
def _sweep_group(
    quantized,
    pull,
    square,
    levels,
    middles,
    codes,
    selector,
    changes,
    rows,
    stride,
    pull_stride,
    square_stride,
    groups,
    GROUP: tl.constexpr,
    TABLES: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Round a group of every row again, as table_search.sweep_rows; strides are columns of a row."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    lane = tl.arange(0, GROUP)
    column, mask = lane[None, :], inside[:, None]
    place, pull_place = row[:, None] * stride + column, row[:, None] * pull_stride + column
    now = tl.load(quantized + place, mask=mask, other=0.0)
    force = tl.load(pull + pull_place, mask=mask, other=0.0)
    best, least = tl.full([ROWS], -1, tl.int32), tl.zeros([ROWS], tl.float32)
    codes_of_best = tl.zeros([ROWS, GROUP], tl.int32)
    for table in range(TABLES):
        left, change, found = force, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, GROUP], tl.int32)
        for i in range(GROUP):
            own, own_left = _at(now, column, i), _at(left, column, i)
            diagonal = tl.load(square + i * square_stride + i)
            code = _nearest(own + own_left / diagonal, middles, table, LEVELS)
            step = tl.load(levels + table * LEVELS + code) - own
            change += step * (step * diagonal - 2.0 * own_left)
            later = tl.load(square + i * square_stride + lane, mask=lane > i, other=0.0)
            left -= step[:, None] * later[None, :]
            found = tl.where(column == i, code[:, None], found)
        better = change < least
        best, least = tl.where(better, table, best), tl.where(better, change, least)
        codes_of_best = tl.where(better[:, None], found, codes_of_best)
    moves = (best >= 0) & inside
    mask = moves[:, None]
    level = tl.load(levels + best[:, None] * LEVELS + codes_of_best, mask=mask, other=0.0)
    step = tl.where(mask, level - now, 0.0)
    tl.store(changes + pull_place, step, mask=inside[:, None])
    tl.store(quantized + place, now + step, mask=mask)
    tl.store(codes + place, codes_of_best.to(tl.uint8), mask=mask)
    tl.store(selector + row * groups, best.to(tl.uint8), mask=moves)


def _middles(levels: Tensor) -> Tensor:
    """What lies halfway between neighbouring levels [16, entries]: float32 [16, entries - 1]."""
    return (0.5 * (levels[:, :-1] + levels[:, 1:])).contiguous()


def fit_cuda(groups: Tensor, weights: Tensor, tables: Tensor, rounds: int) -> None:
    """As table_search.fit, with CUDA tensors; the same bits every time."""
    count, entries = len(groups), tables.shape[1]
    groups, weights = groups.contiguous(), weights.contiguous()
    chosen = torch.empty(count, dtype=torch.int32, device=groups.device)
    errors = torch.empty(count, device=groups.device)
    numbers = torch.arange(TABLES, device=groups.device)[:, None]
    programs = (triton.cdiv(count, ROWS),)
    for _ in range(rounds):
        middles = _middles(tables)
        _choose[programs](
            groups, weights, tables, middles, chosen, errors, count, GROUP, TABLES, entries, ROWS, num_warps=WARPS
        )
        worst = errors.argsort(descending=True, stable=True)[: max(1, count // 64)]
        idle = ~(chosen == numbers).any(1, keepdim=True)
        moment, total = _sums(groups, weights, chosen, middles)
        for sums, more in zip((moment, total), _sums(groups[worst], weights[worst], None, middles), strict=True):
            sums.add_(torch.where(idle, more, 0.0))
        tables.copy_(torch.where(total > 0, moment / total, tables).float().sort(1).values)


def _sums(groups: Tensor, weights: Tensor, chosen: Tensor | None, middles: Tensor) -> tuple[Tensor, Tensor]:
    """Sums float64 [16, entries] of weights * values and of weights by level; chosen None: all for every table."""
    count, entries = len(groups), middles.shape[1] + 1
    share = triton.cdiv(triton.cdiv(count, SLICES), ROWS) * ROWS
    found = torch.empty(2, SLICES, TABLES, entries, dtype=torch.float64, device=groups.device)
    _add[(TABLES, entries, SLICES)](
        groups, weights, groups if chosen is None else chosen, middles, found[0], found[1], count, share,
        chosen is None, GROUP, TABLES, entries, ROWS, num_warps=WARPS,
    )  # fmt: skip
    moment, total = found.sum(1)
    return moment, total


def round_columns_cuda(
    targets: Tensor, importance: Tensor, feedback: Tensor, levels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As table_search.round_columns, with CUDA tensors: codes, selector and errors."""
    targets, feedback = targets.clone(memory_format=torch.contiguous_format), feedback.contiguous()
    rows, columns = targets.shape
    codes, errors = torch.empty_like(targets, dtype=torch.uint8), torch.empty_like(targets)
    selector = torch.empty(rows, columns // GROUP, dtype=torch.uint8, device=targets.device)
    middles, entries = _middles(levels), levels.shape[1]
    for first in range(0, columns, GROUP):
        here, later = slice(first, first + GROUP), slice(first + GROUP, columns)
        _round_group[(triton.cdiv(rows, ROWS),)](
            targets[:, here], importance[here], feedback[here, here], levels, middles,
            codes[:, here], selector[:, first // GROUP :], errors[:, here],
            rows, columns, feedback.stride(0), columns // GROUP, GROUP, TABLES, entries, ROWS, num_warps=WARPS,
        )  # fmt: skip
        targets[:, later].addmm_(errors[:, here], feedback[here, later], alpha=-1)
    return codes, selector, errors


def sweep_rows_cuda(
    quantized: Tensor, pull: Tensor, hessian: Tensor, levels: Tensor, codes: Tensor, selector: Tensor
) -> None:
    """As table_search.sweep_rows, with CUDA tensors."""
    hessian = hessian.contiguous()
    rows, columns = quantized.shape
    middles, entries = _middles(levels), levels.shape[1]
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        own = pull[:, block].clone(memory_format=torch.contiguous_format)  # of one block, it would be pull itself
        square = hessian[block, block]
        changes = torch.empty_like(own)
        for first in range(0, own.shape[1], GROUP):
            here, later, place = slice(first, first + GROUP), slice(first + GROUP, own.shape[1]), start + first
            _sweep_group[(triton.cdiv(rows, ROWS),)](
                quantized[:, place:], own[:, here], square[here, here], levels, middles,
                codes[:, place:], selector[:, place // GROUP :], changes[:, here],
                rows, columns, own.shape[1], hessian.stride(0), columns // GROUP,
                GROUP, TABLES, entries, ROWS, num_warps=WARPS,
            )  # fmt: skip
            own[:, later].addmm_(changes[:, here], square[here, later], alpha=-1)
        pull.addmm_(changes, hessian[block], alpha=-1)
