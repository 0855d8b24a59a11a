"""One step of the Viterbi search of the trellis format, compiled for vector instructions.

A state is numbered with its bits reversed here (newest bit lowest), so that the minimum over predecessors runs over
contiguous memory, and the successors of one predecessor lie beside each other.

The code is compiled once and kept on disk. That cache goes by the date of the file that a function is in, not of those
it calls: after a change of this file alone remove `__pycache__` (the tests have one cache for each state of the code).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]

compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy")


@compiled
def minima(costs: Floats, best: Floats, choices: Bytes, width: int) -> None:
    """best[i] = min over h of costs[h * n + i] for n = states >> width, choices[i] the h; ties take the lowest h."""
    table = costs.reshape(1 << width, len(costs) >> width)
    lowest, chosen = best[: table.shape[1]], choices[: table.shape[1]]
    if width == 1:
        _least_of_2(table, lowest, chosen)
    elif width == 2:
        _least_of_4(table, lowest, chosen)
    else:
        for i in range(len(lowest)):
            lowest[i], chosen[i] = table[0, i], 0
        for h in range(0, 1 << width, 8):
            _less_of_8(table[h : h + 8], h, lowest, chosen)


# Rows of a table, written out: loops over columns of selections are what a compiler turns into vector instructions.


@compiled
def _least_of_2(table: Floats, lowest: Floats, chosen: Bytes) -> None:
    for i in range(table.shape[1]):
        least, choice = table[0, i], np.float32(0)
        cost = table[1, i]
        choice, least = np.float32(1) if cost < least else choice, cost if cost < least else least
        lowest[i], chosen[i] = least, np.uint8(choice)


@compiled
def _least_of_4(table: Floats, lowest: Floats, chosen: Bytes) -> None:
    for i in range(table.shape[1]):
        least, choice = table[0, i], np.float32(0)
        cost = table[1, i]
        choice, least = np.float32(1) if cost < least else choice, cost if cost < least else least
        cost = table[2, i]
        choice, least = np.float32(2) if cost < least else choice, cost if cost < least else least
        cost = table[3, i]
        choice, least = np.float32(3) if cost < least else choice, cost if cost < least else least
        lowest[i], chosen[i] = least, np.uint8(choice)


@compiled
def _less_of_8(table: Floats, first: int, lowest: Floats, chosen: Bytes) -> None:
    """Rows `first` to first + 7, where they are below what earlier rows left."""
    row = np.float32(first)
    for i in range(table.shape[1]):
        least, choice = lowest[i], np.float32(chosen[i])
        cost = table[0, i]
        choice, least = row if cost < least else choice, cost if cost < least else least
        cost = table[1, i]
        choice, least = row + np.float32(1) if cost < least else choice, cost if cost < least else least
        cost = table[2, i]
        choice, least = row + np.float32(2) if cost < least else choice, cost if cost < least else least
        cost = table[3, i]
        choice, least = row + np.float32(3) if cost < least else choice, cost if cost < least else least
        cost = table[4, i]
        choice, least = row + np.float32(4) if cost < least else choice, cost if cost < least else least
        cost = table[5, i]
        choice, least = row + np.float32(5) if cost < least else choice, cost if cost < least else least
        cost = table[6, i]
        choice, least = row + np.float32(6) if cost < least else choice, cost if cost < least else least
        cost = table[7, i]
        choice, least = row + np.float32(7) if cost < least else choice, cost if cost < least else least
        lowest[i], chosen[i] = least, np.uint8(choice)


def _make_spread(width: int) -> Callable[..., None]:
    """A function that gives every successor its cost, all those of one predecessor in one vector."""
    successors = 1 << width

    @intrinsic
    def step(context: Any, costs: Any, values: Any, place: Any, base: Any, target: Any, weight: Any) -> Any:
        signature = types.void(costs, values, types.intp, types.float32, types.float32, types.float32)
        return signature, partial(_emit_step, successors)

    def spread(best: Floats, costs: Floats, values: Floats, target: float, weight: float) -> None:
        for kept in range(len(values) // successors):
            step(costs, values, kept * successors, best[kept], target, weight)  # type: ignore[call-arg]

    # names are all that tells compiled functions apart when several processes share a cache
    spread.__name__ = spread.__qualname__ = f"spread{width}"
    made: Callable[..., None] = numba.njit(nogil=True, error_model="numpy")(spread)
    return made


def _emit_step(lanes: int, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """costs[place + i] = base + weight * (target - values[place + i])**2 for i below `lanes`, as one vector.

    The loop over i is too short for the compiler's own vectorizer.
    """
    costs, values, place, base, target, weight = arguments
    vector = ir.VectorType(ir.FloatType(), lanes)
    nothing = ir.Constant(vector, ir.Undefined)
    every = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [ir.Constant(ir.IntType(32), 0)] * lanes)

    def splat(value: Any) -> Any:
        single = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(single, nothing, every)

    def pointer(index: int, array: Any) -> Any:
        data = context.make_array(signature.args[index])(context, builder, array).data
        return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())

    difference = builder.fsub(splat(target), builder.load(pointer(1, values), align=4))
    error = builder.fmul(builder.fmul(splat(weight), difference), difference)
    builder.store(builder.fadd(splat(base), error), pointer(0, costs), align=4)
    return context.get_dummy_value()


_spread1, _spread2, _spread3, _spread4, _spread5, _spread6 = (_make_spread(width) for width in range(1, 7))


@compiled
def spread(best: Floats, costs: Floats, values: Floats, target: float, weight: float, width: int) -> None:
    """costs[s] = best[s >> width] + weight * (target - values[s])**2 for every state s."""
    if width == 1:
        _spread1(best, costs, values, target, weight)
    elif width == 2:
        _spread2(best, costs, values, target, weight)
    elif width == 3:
        _spread3(best, costs, values, target, weight)
    elif width == 4:
        _spread4(best, costs, values, target, weight)
    elif width == 5:
        _spread5(best, costs, values, target, weight)
    else:
        _spread6(best, costs, values, target, weight)
