"""The Viterbi search of the trellis format, compiled: the cheapest tail-biting path for each sequence of weights.

Here a state is numbered with its bits reversed (newest bit lowest), so that the minimum over predecessors and the
spreading to successors both run over contiguous memory. All compiled code of the trellis quantizer is in this file:
a compiled function is cached by the date of its own file, whatever becomes of those that it calls.
rwkvq/quantize/trellis_columns.py has the functions to call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]

WRAP = 40
"""Weights on either side of the seam that decide where a sequence is closed (five times the memory of a path)."""
_FAR = np.float32(1e30)
"""Cost of a state that no path may start in."""

compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy")


@compiled
def encode(
    targets: Floats,
    weights: Floats,
    feedback: Floats,
    rates: Integers,
    row_offsets: Integers,
    values: Floats,
    state_bits: int,
    ends: Integers,
    streams: Bytes,
    errors: Floats,
) -> None:
    columns, rows = targets.shape
    length = rows // len(streams)
    best = np.empty(len(values) >> ((rates.min() + row_offsets.min()) // 4), dtype=np.float32)
    scratch = np.empty((5, len(values)), dtype=np.float32)
    choices = np.empty(len(values), dtype=np.int32)
    back = np.empty((length, len(best)), dtype=np.uint8)
    states = np.empty(length, dtype=np.int64)
    widths = np.empty(length, dtype=np.int64)
    for sequence in range(len(streams)):
        first = sequence * length
        counts = weights[first : first + length]
        for column in range(columns):
            target = targets[column, first : first + length]
            _fill_widths(rates[column], row_offsets[first : first + length], widths)
            _search(target, counts, widths, values, state_bits, scratch, choices, back, states)
            begin = ends[column - 1] if column else 0
            _write(states, widths, streams[sequence, begin : ends[column]])
            error = errors[column, first : first + length]
            for t in range(length):
                error[t] = target[t] - values[states[t]]
            for later in range(column + 1, columns):
                factor = feedback[column, later]
                ahead = targets[later, first : first + length]
                for t in range(length):
                    ahead[t] -= factor * error[t]


@compiled
def sweep(
    quantized: Floats,
    pull: Floats,
    hessian: Floats,
    weights: Floats,
    rates: Integers,
    row_offsets: Integers,
    values: Floats,
    state_bits: int,
    ends: Integers,
    streams: Bytes,
) -> None:
    columns, rows = quantized.shape
    length = rows // len(streams)
    best = np.empty(len(values) >> ((rates.min() + row_offsets.min()) // 4), dtype=np.float32)
    scratch = np.empty((5, len(values)), dtype=np.float32)
    choices = np.empty(len(values), dtype=np.int32)
    back = np.empty((length, len(best)), dtype=np.uint8)
    states = np.empty(length, dtype=np.int64)
    widths = np.empty(length, dtype=np.int64)
    target = np.empty(length, dtype=np.float32)
    for sequence in range(len(streams)):
        first = sequence * length
        counts = weights[first : first + length]
        for column in range(columns):
            now, force = quantized[column, first : first + length], pull[column, first : first + length]
            before = np.float32(0)
            for t in range(length):
                step = force[t] / hessian[column, column]
                target[t] = now[t] + step  # where this column's error would cost least
                before += counts[t] * step * step
            _fill_widths(rates[column], row_offsets[first : first + length], widths)
            _search(target, counts, widths, values, state_bits, scratch, choices, back, states)
            after = np.float32(0)
            for t in range(length):
                difference = target[t] - values[states[t]]
                after += counts[t] * difference * difference
            if after >= before:
                continue
            stream = streams[sequence, (ends[column - 1] if column else 0) : ends[column]]
            stream[:] = 0
            _write(states, widths, stream)
            for t in range(length):
                target[t] = values[states[t]] - now[t]
                now[t] = values[states[t]]
            for other in range(columns):
                factor = hessian[column, other]
                row = pull[other, first : first + length]
                for t in range(length):
                    row[t] -= factor * target[t]


@compiled
def _fill_widths(rate: int, offsets: Integers, widths: Integers) -> None:
    """Bits of each weight's symbol: what the sum of the rates, quarters of a bit, gains in whole bits."""
    total, end = 0, 0
    for t in range(len(offsets)):
        total += rate + offsets[t]
        widths[t] = total // 4 - end
        end = total // 4


@compiled
def _search(
    target: Floats,
    weights: Floats,
    widths: Integers,
    values: Floats,
    state_bits: int,
    scratch: Floats,
    choices: NDArray[np.int32],
    back: Bytes,
    states: Integers,
) -> None:
    """Fill in the states [length] of the best closed path: first where to close it, then the path."""
    length = len(widths)
    wrap = min(WRAP, length // 2)
    free = np.int64(-1)
    state = _walk(target, weights, widths, values, state_bits, scratch, choices, back, length - wrap, 2 * wrap, free)
    for step in range(2 * wrap - 1, wrap - 1, -1):
        state = _before(state, back[step], widths[(length - wrap + step) % length], state_bits)
    seam = state & ((1 << (state_bits - widths[0])) - 1)  # what the last state hands on to the first
    state = _walk(target, weights, widths, values, state_bits, scratch, choices, back, 0, length, seam)
    for step in range(length - 1, 0, -1):
        states[step] = state
        state = _before(state, back[step], widths[step], state_bits)
    states[0] = state


@compiled
def _before(state: int, back: Bytes, width: int, state_bits: int) -> int:
    """The state before `state`, which `width` bits were shifted into."""
    kept = state >> width
    before: int = (np.int64(back[kept]) << (state_bits - width)) | kept  # type: ignore[assignment]
    return before


@compiled
def _walk(
    target: Floats,
    weights: Floats,
    widths: Integers,
    values: Floats,
    state_bits: int,
    scratch: Floats,
    choices: NDArray[np.int32],
    back: Bytes,
    first: int,
    steps: int,
    seam: int,
) -> int:
    """Go `steps` steps from weight `first`, fill in `back`, return the last state of the best path.

    seam: the bits that the state before the first step and the last state must share with the first; -1 = any.
    """
    length, count = len(widths), len(values)
    costs, others, best = scratch[0], scratch[1], scratch[2]
    costs[:] = 0
    for step in range(steps):
        t = (first + step) % length
        width = widths[t]
        if step == 0 and seam >= 0:
            best[: count >> width] = _FAR
            best[seam] = 0
        else:
            _minima(costs, best, choices, width)
        row = back[step]
        for kept in range(count >> width):
            row[kept] = choices[kept]
        if width == 1:
            _spread1(best, others, values, target[t], weights[t])
        elif width == 2:
            _spread2(best, others, values, target[t], weights[t])
        elif width == 3:
            _spread3(best, others, values, target[t], weights[t])
        elif width == 4:
            _spread4(best, others, values, target[t], weights[t])
        elif width == 5:
            _spread5(best, others, values, target[t], weights[t])
        else:
            _spread6(best, others, values, target[t], weights[t])
        costs, others = others, costs
    last: int = np.int64(0)  # type: ignore[assignment]
    lowest = np.float32(3e38)
    stride = 1 if seam < 0 else 1 << (state_bits - widths[first])
    for state in range(max(seam, 0), count, stride):
        if costs[state] < lowest:
            last, lowest = np.int64(state), costs[state]  # type: ignore[assignment]
    return last


@compiled
def _minima(costs: Floats, best: Floats, choices: NDArray[np.int32], width: int) -> None:
    """best[i] = min over h of costs[h * n + i] for n = states >> width, choices[i] the h; ties take the lowest h.

    A tournament of halves: every loop compiles to vector instructions.
    """
    half = len(costs) >> 1
    low, high = costs[:half], costs[half:]
    bit = np.int32(1 << (width - 1))
    for i in range(half):
        a, b = low[i], high[i]
        is_less = b < a
        choices[i] = bit if is_less else np.int32(0)
        best[i] = b if is_less else a
    for round_ in range(1, width):
        half >>= 1
        bit = np.int32(1 << (width - 1 - round_))
        low, high, low_choice, high_choice = best[:half], best[half:], choices[:half], choices[half:]
        for i in range(half):
            a, b = low[i], high[i]
            kept, other = low_choice[i], high_choice[i] + bit
            is_less = b < a
            low_choice[i] = other if is_less else kept
            low[i] = b if is_less else a


def _make_spread(width: int) -> Callable[..., None]:
    """A function that gives every successor its cost; the number of successors is a constant of the compiled code."""
    successors = 1 << width

    def spread(best: Floats, costs: Floats, values: Floats, target: float, weight: float) -> None:
        kept = len(values) // successors
        rows, levels = costs.reshape(kept, successors), values.reshape(kept, successors)
        for i in range(kept):
            base = best[i]
            for new in range(successors):
                difference = target - levels[i, new]
                rows[i, new] = base + weight * difference * difference

    # names are all that tells compiled functions apart when several processes share a cache
    spread.__name__ = spread.__qualname__ = f"spread{width}"
    made: Callable[..., None] = numba.njit(nogil=True, error_model="numpy")(spread)
    return made


_spread1, _spread2, _spread3, _spread4, _spread5, _spread6 = (_make_spread(width) for width in range(1, 7))


@compiled
def _write(states: Integers, widths: Integers, stream: Bytes) -> None:
    """Set the bits of the symbols of a path in its stream of zeros, lowest bit first."""
    place = 0
    for t in range(len(states)):
        for bit in range(widths[t]):
            value = (states[t] >> (widths[t] - 1 - bit)) & 1
            stream[place >> 3] |= np.uint8(value << (place & 7))
            place += 1
