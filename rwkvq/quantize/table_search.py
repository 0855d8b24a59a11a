"""The inner loops of the table quantizer, compiled: fitting tables to groups, rounding groups row by row, and again.

A group is 16 weights of one row in units of its scale; a table is a row of levels in rising order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from rwkvq.formats.table import GROUP

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy")


@compiled
def nearest(value: float, levels: Floats) -> int:
    """The number of the level nearest to a value; a tie takes the lower one."""
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if value > np.float32(0.5) * (levels[middle] + levels[middle + 1]):
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def group_error(group: Floats, weights: Floats, levels: Floats) -> float:
    """Weighted squared error of a group rounded to levels."""
    total = np.float32(0)
    for i in range(GROUP):
        difference = group[i] - levels[nearest(group[i], levels)]
        total += weights[i] * difference * difference
    return total  # type: ignore[return-value]


@compiled
def choose_table(group: Floats, weights: Floats, tables: Floats) -> tuple[int, float]:
    """The table of least error, and that error; a tie takes the first."""
    best, least = 0, group_error(group, weights, tables[0])
    for table in range(1, len(tables)):
        error = group_error(group, weights, tables[table])
        if error < least:
            best, least = table, error
    return best, least


@compiled
def fit(groups: Floats, weights: Floats, tables: Floats, rounds: int) -> None:
    """Move tables [16, levels] to where they serve groups [n, 16] best: each group to its best table, each level to the
    weighted mean of what it stands for, in turn.

    A table that no group chooses takes over the 64th of the groups that fare worst; a level of no weights stays.
    """
    count, levels = len(groups), tables.shape[1]
    chosen = np.empty(count, dtype=np.int64)
    errors = np.empty(count, dtype=np.float32)
    for _ in range(rounds):
        for n in range(count):
            chosen[n], errors[n] = choose_table(groups[n], weights[n], tables)
        sums = np.zeros(tables.shape, dtype=np.float64)
        totals = np.zeros(tables.shape, dtype=np.float64)
        used = np.zeros(len(tables), dtype=np.bool_)
        for n in range(count):
            _add(groups[n], weights[n], chosen[n], tables, sums, totals)
            used[chosen[n]] = True
        if not used.all():
            worst = np.argsort(-errors, kind="mergesort")[: max(1, count // 64)]
            for table in np.nonzero(~used)[0]:
                for n in worst:
                    _add(groups[n], weights[n], table, tables, sums, totals)
        for index in range(len(tables)):
            for level in range(levels):
                if totals[index, level] > 0:
                    tables[index, level] = sums[index, level] / totals[index, level]
            tables[index].sort()


@compiled
def _add(
    group: Floats, weights: Floats, table: int, tables: Floats, sums: NDArray[np.float64], totals: NDArray[np.float64]
) -> None:
    """Count a group's weights for the levels of a table that are nearest to them."""
    for i in range(GROUP):
        level = nearest(group[i], tables[table])
        weight = np.float64(weights[i])
        sums[table, level] += weight * group[i]
        totals[table, level] += weight


@compiled
def round_columns(
    targets: Floats, weights: Floats, feedback: Floats, tables: Floats, codes: Bytes, selector: Bytes, errors: Floats
) -> None:
    """Round columns one after the other, each error fed into the later ones.

    targets float32 [rows, columns], overwritten; weights float32 [columns], how much a squared error of each column
    counts for the choice of a table; feedback float32 [columns, columns], used above its diagonal. Fills in codes
    [rows, columns], selector [rows, columns / 16] and errors [rows, columns].
    """
    rows, columns = targets.shape
    for row in range(rows):
        target = targets[row]
        for column in range(columns):
            part = column // GROUP
            if column % GROUP == 0:
                table, _ = choose_table(target[column : column + GROUP], weights[column : column + GROUP], tables)
                selector[row, part] = table
            levels = tables[selector[row, part]]
            code = nearest(target[column], levels)
            codes[row, column] = code
            error = target[column] - levels[code]
            errors[row, column] = error
            for later in range(column + 1, columns):
                target[later] -= error * feedback[column, later]


@compiled
def sweep_rows(quantized: Floats, pull: Floats, hessian: Floats, tables: Floats, codes: Bytes, selector: Bytes) -> None:
    """Round every group again, the others as they are, by each table in turn; it takes what lowers the loss most.

    quantized float32 [rows, columns], codes and selector as round_columns left them are updated; pull float32
    [rows, columns] = (weight - quantized) hessian is kept up to date.
    """
    rows, columns = quantized.shape
    found, best = np.empty(GROUP, dtype=np.uint8), np.empty(GROUP, dtype=np.uint8)
    for row in range(rows):
        for first in range(0, columns, GROUP):
            here = slice(first, first + GROUP)
            square, force, now = hessian[here, here], pull[row, here], quantized[row, here]
            table, least = -1, np.float32(0)
            for index in range(len(tables)):
                change = _round_again(now, force, square, tables[index], found)
                if change < least:
                    table, least = index, change
                    best[:] = found
            if table < 0:
                continue
            selector[row, first // GROUP] = table
            codes[row, here] = best
            for i in range(GROUP):
                step = tables[table, best[i]] - now[i]
                if step != 0:
                    now[i] += step
                    for other in range(columns):
                        pull[row, other] -= step * hessian[first + i, other]


@compiled
def _round_again(now: Floats, force: Floats, square: Floats, levels: Floats, found: Bytes) -> float:
    """Round a group's weights one after the other by a table; fill in their codes, return what the loss gains."""
    change = np.float32(0)
    left = force.copy()
    for i in range(GROUP):
        code = nearest(now[i] + left[i] / square[i, i], levels)
        found[i] = code
        step = levels[code] - now[i]
        change += step * (step * square[i, i] - np.float32(2) * left[i])
        for other in range(i + 1, GROUP):
            left[other] -= step * square[i, other]
    return change  # type: ignore[return-value]
