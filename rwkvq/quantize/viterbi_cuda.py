"""The Viterbi search of the trellis format on CUDA: one program a sequence, all its columns one after the other.

The same search as rwkvq/quantize/viterbi.py, with the same numbering of states; sums are rounded otherwise, so that a
few codes differ from the processor's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvq.formats.trellis import MAX_RATE, TrellisLayout, column_bytes, symbol_ends
from rwkvq.quantize.trellis_columns import reversed_codebook
from rwkvq.quantize.viterbi import WRAP

WARPS, WARPS_OF_MANY_STATES, MANY_STATES = 4, 8, 1 << 14
"""Microseconds a column, H100, with 4 / 8 / 16 warps: 250 / 436 / 1315 at 2**12 states, 540 / 390 / 640 at 2**14."""
BLOCK = 128
"""Columns that a program is compiled for, at least; a sweep changes as many between two updates of its pull."""


@triton.jit
def _step(costs, values, target, weight, back, WIDTH: tl.constexpr, STATE_BITS: tl.constexpr):
    """Costs of all states after one more weight; the best predecessors go to `back`."""
    KEPT: tl.constexpr = 1 << (STATE_BITS - WIDTH)
    table = tl.reshape(costs, [1 << WIDTH, KEPT])
    best, choice = tl.min(table, axis=0, return_indices=True)
    tl.store(back + tl.arange(0, KEPT), choice.to(tl.uint8))
    return _spread(best, values, target, weight, WIDTH, STATE_BITS)


@triton.jit
def _spread(best, values, target, weight, WIDTH: tl.constexpr, STATE_BITS: tl.constexpr):
    KEPT: tl.constexpr = 1 << (STATE_BITS - WIDTH)
    spread = tl.reshape(tl.broadcast_to(best[:, None], [KEPT, 1 << WIDTH]), [1 << STATE_BITS])
    difference = target - values
    return spread + weight * difference * difference


@triton.jit
def _walk(
    costs,
    values,
    here,
    own,
    widths,
    back,
    first,
    begin,
    steps,
    stride,
    LENGTH: tl.constexpr,
    STATE_BITS: tl.constexpr,
):
    """Go on from step `begin` to step `steps`; step s is weight (first + s) % LENGTH, whose predecessors go to back."""
    for step in range(begin, steps):
        t = (first + step) % LENGTH
        target, weight, width = tl.load(here + t), tl.load(own + t), tl.load(widths + t)
        place = back + step * stride
        if width == 1:
            costs = _step(costs, values, target, weight, place, 1, STATE_BITS)
        elif width == 2:
            costs = _step(costs, values, target, weight, place, 2, STATE_BITS)
        elif width == 3:
            costs = _step(costs, values, target, weight, place, 3, STATE_BITS)
        elif width == 4:
            costs = _step(costs, values, target, weight, place, 4, STATE_BITS)
        elif width == 5:
            costs = _step(costs, values, target, weight, place, 5, STATE_BITS)
        else:
            costs = _step(costs, values, target, weight, place, 6, STATE_BITS)
    return costs


@triton.jit
def _trace(
    back,
    states,
    widths,
    state,
    first,
    steps,
    stop,
    stride,
    LENGTH: tl.constexpr,
    STATE_BITS: tl.constexpr,
):
    """Follow the best path back from `state` at step steps - 1 to step `stop`; return the state there."""
    step = steps - 1
    while step > stop:
        tl.store(states + step, state)
        width = tl.load(widths + (first + step) % LENGTH)
        kept = state >> width
        choice = tl.load(back + step * stride + kept).to(tl.int32)
        state = (choice << (STATE_BITS - width)) | kept
        step -= 1
    tl.store(states + step, state)
    return state


@triton.jit
def _encode(
    targets,
    weights,
    feedback,
    kinds,
    widths_of_kinds,
    values_pointer,
    current,
    errors,
    taken,
    states_out,
    back,
    trail,
    columns,
    rows,
    stride,
    LENGTH: tl.constexpr,
    TURN: tl.constexpr,
    STATE_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SWEEP: tl.constexpr,
):
    """One sequence. SWEEP: `current` holds its values, `errors` takes their changes, `taken` which are better."""
    COUNT: tl.constexpr = 1 << STATE_BITS
    sequence = tl.program_id(0)
    first_row = sequence * LENGTH
    back += sequence.to(tl.int64) * LENGTH * stride
    trail += sequence * LENGTH
    values = tl.load(values_pointer + tl.arange(0, COUNT))
    numbers = tl.arange(0, COUNT)
    lane = tl.arange(0, LENGTH)
    earlier = tl.arange(0, BLOCK)
    own = weights + first_row
    for column in range(columns):
        here = targets + column.to(tl.int64) * rows + first_row
        widths = widths_of_kinds + tl.load(kinds + column) * rows + first_row
        before = tl.load(
            errors + earlier[:, None].to(tl.int64) * rows + first_row + lane[None, :],
            mask=(earlier < column)[:, None],
            other=0.0,
        )
        factors = tl.load(feedback + earlier * columns + column, mask=earlier < column, other=0.0)
        moved = tl.load(here + lane) - tl.sum(factors[:, None] * before, axis=0)
        tl.store(here + lane, moved)
        tl.debug_barrier()
        # where to close the circle
        costs = tl.zeros([COUNT], tl.float32)
        costs = _walk(costs, values, here, own, widths, back, LENGTH - TURN, 0, 2 * TURN, stride, LENGTH, STATE_BITS)
        state = tl.argmin(costs, axis=0)
        tl.debug_barrier()
        state = _trace(back, trail, widths, state, LENGTH - TURN, 2 * TURN, TURN - 1, stride, LENGTH, STATE_BITS)
        shared = STATE_BITS - tl.load(widths)  # bits of the last state that the first one sees
        mask = (1 << shared) - 1
        seam = state & mask
        tl.debug_barrier()
        # the path: before the first weight only states that end in the seam are near; their other bits drop out
        opening = (numbers & mask) == seam
        costs = tl.where(opening, 0.0, 1e30)
        costs = _walk(costs, values, here, own, widths, back, 0, 0, LENGTH, stride, LENGTH, STATE_BITS)
        state = tl.argmin(tl.where(opening, costs, float("inf")), axis=0)
        tl.debug_barrier()
        _trace(back, trail, widths, state, 0, LENGTH, 0, stride, LENGTH, STATE_BITS)
        tl.debug_barrier()
        path = tl.load(trail + lane)
        place = column.to(tl.int64) * rows + first_row + lane
        tl.store(states_out + place, path.to(tl.int16))
        error = moved - tl.load(values_pointer + path)
        if SWEEP:
            step = moved - tl.load(current + place)
            counts = tl.load(own + lane)
            better = tl.sum(counts * error * error, axis=0) < tl.sum(counts * step * step, axis=0)
            tl.store(taken + sequence * columns + column, better.to(tl.uint8))
            error = tl.where(better, step - error, 0.0)
        tl.store(errors + place, error)
        tl.debug_barrier()


def encode_columns_cuda(
    targets: Tensor, weights: Tensor, feedback: Tensor, rates: Tensor, row_offsets: Tensor, layout: TrellisLayout
) -> tuple[Tensor, Tensor]:
    """As trellis_columns.encode_columns, with CUDA tensors: streams [sequences, bytes] and errors [columns, rows]."""
    streams, errors, _ = _run(targets, None, weights, feedback, rates, row_offsets, layout)
    return streams, errors


def sweep_columns_cuda(
    quantized: Tensor,
    pull: Tensor,
    hessian: Tensor,
    weights: Tensor,
    rates: Tensor,
    row_offsets: Tensor,
    layout: TrellisLayout,
    streams: Tensor,
) -> None:
    """As trellis_columns.sweep_columns, with CUDA tensors."""
    sizes = column_bytes(rates.long(), layout.length)
    ends = [0, *sizes.cumsum(0).tolist()]
    diagonal = hessian.diagonal()
    for start in range(0, layout.columns, BLOCK):
        here = slice(start, min(start + BLOCK, layout.columns))
        targets = quantized[here] + pull[here] / diagonal[here, None]  # where each column's error would cost least
        feedback = hessian[here, here] / diagonal[here]  # a change of one column moves the least of the later ones
        found, changes, taken = _run(targets, quantized[here], weights, feedback, rates[here], row_offsets, layout)
        quantized[here] += changes
        pull.addmm_(hessian[:, here], changes, alpha=-1)
        own = streams[:, ends[here.start] : ends[here.stop]]
        own.copy_(torch.where(taken.bool().repeat_interleave(sizes[here], 1), found, own))


@lru_cache(maxsize=16)
def _values_on(device: torch.device, state_bits: int) -> Tensor:
    return torch.from_numpy(reversed_codebook(state_bits)).to(device)


def _run(
    targets: Tensor,
    current: Tensor | None,
    weights: Tensor,
    feedback: Tensor,
    rates: Tensor,
    row_offsets: Tensor,
    layout: TrellisLayout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams, errors and an empty tensor; for a sweep (current [columns, rows], else None) streams, changes and which
    of them are taken, uint8 [sequences, columns]."""
    columns, rows = targets.shape
    device = targets.device
    distinct, kinds = rates.long().unique(return_inverse=True)
    offsets = row_offsets.long().view(layout.sequences, layout.length)
    ends = symbol_ends(distinct[:, None, None] + offsets)  # [kinds, sequences, length]
    widths = ends.diff(dim=-1, prepend=torch.zeros_like(ends[..., :1])).int().reshape(len(distinct), rows)
    stride = 1 << (layout.state_bits - int(widths.min()))
    errors = torch.empty_like(targets)
    states = torch.empty(columns, rows, dtype=torch.int16, device=device)
    taken = torch.empty(0 if current is None else layout.sequences, columns, dtype=torch.uint8, device=device)
    block: Any = max(BLOCK, triton.next_power_of_2(columns))
    _encode[(layout.sequences,)](
        targets,
        weights,
        feedback.contiguous(),
        kinds.int(),
        widths,
        _values_on(device, layout.state_bits),
        targets if current is None else current,
        errors,
        taken,
        states,
        torch.empty(layout.sequences * layout.length * stride, dtype=torch.uint8, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
        columns,
        rows,
        stride,
        layout.length,
        min(WRAP, layout.length // 2),
        layout.state_bits,
        block,
        current is not None,
        num_warps=WARPS if 1 << layout.state_bits < MANY_STATES else WARPS_OF_MANY_STATES,
    )
    own_ends = ends.reshape(len(distinct), rows)[kinds]
    return _streams(states, widths[kinds], own_ends, rates.long(), layout), errors, taken


def _streams(states: Tensor, widths: Tensor, ends: Tensor, rates: Tensor, layout: TrellisLayout) -> Tensor:
    """The streams uint8 [sequences, bytes] of paths of reversed states int16 [columns, rows].

    widths, ends [columns, rows]: of the symbols in the stream of their column; rates [columns].
    """
    sizes = 8 * column_bytes(rates, layout.length)
    total = int(sizes.sum())
    sequence = torch.arange(layout.rows, device=states.device) // layout.length
    begins = (sizes.cumsum(0) - sizes)[:, None] + total * sequence + ends - widths  # [columns, rows]
    bits = torch.zeros(layout.sequences * total + 1, dtype=torch.uint8, device=states.device)
    place = torch.arange(MAX_RATE // 4, device=states.device)[:, None, None]  # of a bit in its symbol
    values = states >> (widths - 1 - place).clamp_min_(0) & 1  # [places, columns, rows]
    bits[torch.where(place < widths, begins + place, -1)] = values.to(torch.uint8)  # what is no bit goes to the end
    octets = bits[:-1].view(layout.sequences, total // 8, 8) << torch.arange(8, dtype=torch.uint8, device=states.device)
    return octets.sum(-1, dtype=torch.uint8)
