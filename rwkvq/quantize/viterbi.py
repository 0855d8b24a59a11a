"""The Viterbi search of the trellis format, compiled: the cheapest tail-biting path for each sequence of weights.

States are numbered as in rwkvq/quantize/trellis_step.py; rwkvq/quantize/trellis_columns.py has the functions to call.
"""

from __future__ import annotations

import numpy as np

from rwkvq.quantize.trellis_step import Bytes, Floats, Integers, compiled, minima, spread

WRAP = 40
"""Weights on either side of the seam that decide where a sequence is closed (five times the memory of a path)."""
_FAR = np.float32(1e30)
"""Cost of a state that no path may start in."""


@compiled
def encode(
    targets: Floats,
    weights: Floats,
    feedback: Floats,
    rates: Integers,
    row_offsets: Integers,
    values: Floats,
    ends: Integers,
    streams: Bytes,
    errors: Floats,
) -> None:
    columns, rows = targets.shape
    length = rows // len(streams)
    scratch, back = _workspace(values, length, (rates.min() + row_offsets.min()) // 4)
    states, widths = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
    for sequence in range(len(streams)):
        first = sequence * length
        counts = weights[first : first + length]
        for column in range(columns):
            target = targets[column, first : first + length]
            _fill_widths(rates[column], row_offsets[first : first + length], widths)
            _search(target, counts, widths, values, scratch, back, states)
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
    ends: Integers,
    streams: Bytes,
) -> None:
    columns, rows = quantized.shape
    length = rows // len(streams)
    scratch, back = _workspace(values, length, (rates.min() + row_offsets.min()) // 4)
    states, widths = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
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
            _search(target, counts, widths, values, scratch, back, states)
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
def _workspace(values: Floats, length: int, narrowest: int) -> tuple[Floats, Bytes]:
    """Costs of three steps [3, states], and the best predecessors at every step [length, states >> narrowest]."""
    scratch = np.empty((3, len(values)), dtype=np.float32)
    return scratch, np.empty((length, len(values) >> narrowest), dtype=np.uint8)


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
    scratch: Floats,
    back: Bytes,
    states: Integers,
) -> None:
    """Fill in the states [length] of the best closed path: first where to close it, then the path."""
    length = len(widths)
    wrap = min(WRAP, length // 2)
    free = np.int64(-1)
    state = _walk(target, weights, widths, values, scratch, back, length - wrap, 2 * wrap, free)
    for step in range(2 * wrap - 1, wrap - 1, -1):
        state = _before(state, back[step], widths[(length - wrap + step) % length], len(values))
    seam = state & ((len(values) >> widths[0]) - 1)  # what the last state hands on to the first
    state = _walk(target, weights, widths, values, scratch, back, 0, length, seam)
    for step in range(length - 1, 0, -1):
        states[step] = state
        state = _before(state, back[step], widths[step], len(values))
    states[0] = state


@compiled
def _before(state: int, back: Bytes, width: int, states: int) -> int:
    """The one of `states` states before `state`, which `width` bits were shifted into."""
    kept = state >> width
    return back[kept] * (states >> width) + kept  # type: ignore[no-any-return]


@compiled
def _walk(
    target: Floats,
    weights: Floats,
    widths: Integers,
    values: Floats,
    scratch: Floats,
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
            minima(costs, best, back[step], width)
        spread(best, others, values, target[t], weights[t], width)
        costs, others = others, costs
    last: int = np.int64(0)  # type: ignore[assignment]
    lowest = np.float32(3e38)
    stride = 1 if seam < 0 else count >> widths[first]
    for state in range(max(seam, 0), count, stride):
        if costs[state] < lowest:
            last, lowest = np.int64(state), costs[state]  # type: ignore[assignment]
    return last


@compiled
def _write(states: Integers, widths: Integers, stream: Bytes) -> None:
    """Set the bits of the symbols of a path in its stream of zeros, lowest bit first."""
    place = 0
    for t in range(len(states)):
        for bit in range(widths[t]):
            value = (states[t] >> (widths[t] - 1 - bit)) & 1
            stream[place >> 3] |= np.uint8(value << (place & 7))
            place += 1
