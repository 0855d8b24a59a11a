"""The Viterbi search of the trellis format, compiled: the cheapest tail-biting path for each sequence of weights.

Inside this module a state is numbered with its bits reversed (newest bit lowest), so that the minimum over
predecessors and the spreading to successors both run over contiguous memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from rwkvq.formats.trellis import TrellisLayout, codebook

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]

WRAP = 40
"""Weights on either side of the seam that decide where a sequence is closed (five times the memory of a path)."""
_FAR = np.float32(1e30)
"""Cost of a state that no path may start in."""

compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy")


@lru_cache(maxsize=16)
def reversed_codebook(state_bits: int) -> Floats:
    """Value of every state by its reversed number, float32 [2**state_bits]."""
    numbers = np.arange(1 << state_bits)
    swapped = np.zeros_like(numbers)
    for bit in range(state_bits):
        swapped |= ((numbers >> bit) & 1) << (state_bits - 1 - bit)
    return np.ascontiguousarray(codebook(state_bits).numpy()[swapped])


def encode_columns(targets: Floats, weights: Floats, feedback: Floats, layout: TrellisLayout) -> tuple[Bytes, Floats]:
    """Encode columns one after the other, each error fed into the later ones.

    targets float32 [columns, rows] in units of their rows' scales, overwritten; weights float32 [rows], how much a
    squared error of each row counts; feedback float32 [columns, columns], used above its diagonal.
    Returns the streams uint8 [sequences, columns, bytes] and the errors float32 [columns, rows].
    """
    widths = np.array(layout.widths(), dtype=np.int64)
    values = reversed_codebook(layout.state_bits)
    streams = np.zeros((layout.sequences, len(targets), layout.sequence_bytes), dtype=np.uint8)
    errors = np.empty_like(targets)
    _encode_columns(targets, weights, feedback, widths, values, layout.state_bits, streams, errors)
    return streams, errors


@compiled
def _encode_columns(
    targets: Floats,
    weights: Floats,
    feedback: Floats,
    widths: Integers,
    values: Floats,
    state_bits: int,
    streams: Bytes,
    errors: Floats,
) -> None:
    columns, length = len(targets), len(widths)
    best = np.empty(len(values) >> widths.min(), dtype=np.float32)
    scratch = np.empty((5, len(values)), dtype=np.float32)
    choices = np.empty(len(values), dtype=np.int32)
    back = np.empty((length, len(best)), dtype=np.uint8)
    states = np.empty(length, dtype=np.int64)
    for sequence in range(len(streams)):
        first = sequence * length
        rows = weights[first : first + length]
        for column in range(columns):
            target = targets[column, first : first + length]
            _search(target, rows, widths, values, state_bits, scratch, choices, back, states)
            _write(states, widths, streams[sequence, column])
            error = errors[column, first : first + length]
            for t in range(length):
                error[t] = target[t] - values[states[t]]
            for later in range(column + 1, columns):
                factor = feedback[column, later]
                ahead = targets[later, first : first + length]
                for t in range(length):
                    ahead[t] -= factor * error[t]


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
        if width == 2:
            _spread2(best, others, values, target[t], weights[t])
        elif width == 3:
            _spread3(best, others, values, target[t], weights[t])
        elif width == 4:
            _spread4(best, others, values, target[t], weights[t])
        else:
            _spread5(best, others, values, target[t], weights[t])
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

    @numba.njit(nogil=True, error_model="numpy")
    def spread(best: Floats, costs: Floats, values: Floats, target: float, weight: float) -> None:
        kept = len(values) // successors
        rows, levels = costs.reshape(kept, successors), values.reshape(kept, successors)
        for i in range(kept):
            base = best[i]
            for new in range(successors):
                difference = target - levels[i, new]
                rows[i, new] = base + weight * difference * difference

    return spread


_spread2, _spread3, _spread4, _spread5 = (_make_spread(width) for width in (2, 3, 4, 5))


@compiled
def _write(states: Integers, widths: Integers, stream: Bytes) -> None:
    """Set the bits of the symbols of a path in its stream of zeros, lowest bit first."""
    place = 0
    for t in range(len(states)):
        for bit in range(widths[t]):
            value = (states[t] >> (widths[t] - 1 - bit)) & 1
            stream[place >> 3] |= np.uint8(value << (place & 7))
            place += 1
