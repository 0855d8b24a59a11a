"""The Viterbi search of the trellis format on CUDA: one program a sequence, all its columns one after the other.

The same search as rwkvq/quantize/viterbi.py, with the same numbering of states; sums are rounded otherwise, so that a
few codes differ from the processor's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvq.formats.trellis import TrellisLayout
from rwkvq.quantize.viterbi import WRAP, reversed_codebook

WARPS = 4


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
def _three(
    costs,
    values,
    here,
    own,
    back,
    STRIDE: tl.constexpr,
    STATE_BITS: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
):
    """The last three of four weights from `here`, whose widths repeat every four."""
    costs = _step(costs, values, tl.load(here + 1), tl.load(own + 1), back + STRIDE, W1, STATE_BITS)
    costs = _step(costs, values, tl.load(here + 2), tl.load(own + 2), back + 2 * STRIDE, W2, STATE_BITS)
    return _step(costs, values, tl.load(here + 3), tl.load(own + 3), back + 3 * STRIDE, W3, STATE_BITS)


@triton.jit
def _trace(
    back,
    states,
    state,
    first,
    steps,
    STRIDE: tl.constexpr,
    STATE_BITS: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
    stop,
):
    """Follow the best path back from `state` at step steps - 1 to step `stop`; return the state there."""
    step = steps - 1
    while step > stop:
        tl.store(states + step, state)
        phase = (first + step) % 4
        width = tl.where(phase == 0, W0, tl.where(phase == 1, W1, tl.where(phase == 2, W2, W3)))
        kept = state >> width
        choice = tl.load(back + step * STRIDE + kept).to(tl.int32)
        state = (choice << (STATE_BITS - width)) | kept
        step -= 1
    tl.store(states + step, state)
    return state


@triton.jit
def _encode(
    targets,
    weights,
    feedback,
    values_pointer,
    errors,
    states_out,
    back,
    trail,
    columns,
    rows,
    LENGTH: tl.constexpr,
    TURN: tl.constexpr,
    STATE_BITS: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    W3: tl.constexpr,
    BLOCK: tl.constexpr,
):
    COUNT: tl.constexpr = 1 << STATE_BITS
    STRIDE: tl.constexpr = 1 << (STATE_BITS - W0)  # the first width is never the larger one
    sequence = tl.program_id(0)
    first_row = sequence * LENGTH
    back += sequence.to(tl.int64) * LENGTH * STRIDE
    trail += sequence * LENGTH
    values = tl.load(values_pointer + tl.arange(0, COUNT))
    numbers = tl.arange(0, COUNT)
    lane = tl.arange(0, LENGTH)
    earlier = tl.arange(0, BLOCK)
    for column in range(columns):
        here = targets + column.to(tl.int64) * rows + first_row
        before = tl.load(
            errors + earlier[:, None].to(tl.int64) * rows + first_row + lane[None, :],
            mask=(earlier < column)[:, None],
            other=0.0,
        )
        factors = tl.load(feedback + earlier * columns + column, mask=earlier < column, other=0.0)
        moved = tl.load(here + lane) - tl.sum(factors[:, None] * before, axis=0)
        tl.store(here + lane, moved)
        tl.debug_barrier()
        own = weights + first_row
        # where to close the circle
        costs = tl.zeros([COUNT], tl.float32)
        for quad in range(0, 2 * TURN, 4):
            t = (LENGTH - TURN + quad) % LENGTH
            place = back + quad * STRIDE
            costs = _step(costs, values, tl.load(here + t), tl.load(own + t), place, W0, STATE_BITS)
            costs = _three(costs, values, here + t, own + t, place, STRIDE, STATE_BITS, W1, W2, W3)
        state = tl.argmin(costs, axis=0)
        tl.debug_barrier()
        state = _trace(back, trail, state, LENGTH - TURN, 2 * TURN, STRIDE, STATE_BITS, W0, W1, W2, W3, TURN - 1)
        seam = state & ((1 << (STATE_BITS - W0)) - 1)
        tl.debug_barrier()
        # the path
        kept = tl.arange(0, STRIDE)
        start = tl.where(kept == seam, 0.0, 1e30)
        costs = _spread(start, values, tl.load(here), tl.load(own), W0, STATE_BITS)
        costs = _three(costs, values, here, own, back, STRIDE, STATE_BITS, W1, W2, W3)
        for t in range(4, LENGTH, 4):
            place = back + t * STRIDE
            costs = _step(costs, values, tl.load(here + t), tl.load(own + t), place, W0, STATE_BITS)
            costs = _three(costs, values, here + t, own + t, place, STRIDE, STATE_BITS, W1, W2, W3)
        closed = (numbers & (STRIDE - 1)) == seam
        state = tl.argmin(tl.where(closed, costs, float("inf")), axis=0)
        tl.debug_barrier()
        _trace(back, trail, state, 0, LENGTH, STRIDE, STATE_BITS, W0, W1, W2, W3, 0)
        tl.debug_barrier()
        path = tl.load(trail + lane)
        tl.store(states_out + column.to(tl.int64) * rows + first_row + lane, path.to(tl.int16))
        tl.store(errors + column.to(tl.int64) * rows + first_row + lane, moved - tl.load(values_pointer + path))
        tl.debug_barrier()


def encode_columns_cuda(
    targets: Tensor, weights: Tensor, feedback: Tensor, layout: TrellisLayout
) -> tuple[Tensor, Tensor]:
    """As viterbi.encode_columns, with CUDA tensors: streams [sequences, columns, bytes] and errors [columns, rows]."""
    columns, rows = targets.shape
    device, turn = targets.device, min(WRAP, layout.length // 2)
    widths = layout.widths()[:4]
    values = torch.from_numpy(reversed_codebook(layout.state_bits)).to(device)
    errors = torch.empty_like(targets)
    states = torch.empty(columns, rows, dtype=torch.int16, device=device)
    stride = 1 << (layout.state_bits - widths[0])
    back = torch.empty(layout.sequences * layout.length * stride, dtype=torch.uint8, device=device)
    trail = torch.empty(rows, dtype=torch.int32, device=device)
    block: Any = triton.next_power_of_2(columns)
    _encode[(layout.sequences,)](
        targets,
        weights,
        feedback.contiguous(),
        values,
        errors,
        states,
        back,
        trail,
        columns,
        rows,
        layout.length,
        turn,
        layout.state_bits,
        *widths,
        block,
        num_warps=WARPS,
    )
    return streams_of(states, layout), errors


def streams_of(states: Tensor, layout: TrellisLayout) -> Tensor:
    """The streams uint8 [sequences, columns, bytes] of paths of reversed states int16 [columns, rows]."""
    columns, device = len(states), states.device
    paths = states.view(columns, layout.sequences, layout.length).int()
    bits = torch.empty(columns, layout.sequences, 8 * layout.sequence_bytes, dtype=torch.uint8, device=device)
    places = torch.tensor(layout.widths()).cumsum(0)
    for width in set(layout.widths()):
        own = [t for t, other in enumerate(layout.widths()) if other == width]
        for bit in range(width):
            bits[..., places[own] - width + bit] = (paths[..., own] >> (width - 1 - bit) & 1).to(torch.uint8)
    octets = bits.view(columns, layout.sequences, layout.sequence_bytes, 8)
    values = (octets << torch.arange(8, dtype=torch.uint8, device=device)).sum(-1, dtype=torch.uint8)
    return values.transpose(0, 1).contiguous()
