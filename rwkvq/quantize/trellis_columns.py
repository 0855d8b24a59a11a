"""Columns of a weight in the trellis format: encoded one after the other with feedback, and encoded again.

Rows are those of a weight [out, in], columns its inputs; a sequence is `length` rows of one column.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from rwkvq.formats.trellis import TrellisLayout, codebook
from rwkvq.quantize import viterbi
from rwkvq.quantize.trellis_step import Bytes, Floats, Integers


@lru_cache(maxsize=16)
def reversed_codebook(state_bits: int) -> Floats:
    """Value of every state by its reversed number, float32 [2**state_bits]."""
    numbers = np.arange(1 << state_bits)
    swapped = np.zeros_like(numbers)
    for bit in range(state_bits):
        swapped |= ((numbers >> bit) & 1) << (state_bits - 1 - bit)
    return np.ascontiguousarray(codebook(state_bits).numpy()[swapped])


def encode_columns(
    targets: Floats, weights: Floats, feedback: Floats, rates: Integers, row_offsets: Integers, layout: TrellisLayout
) -> tuple[Bytes, Floats]:
    """Encode columns one after the other, each error fed into the later ones.

    targets float32 [columns, rows] in units of their rows' scales, overwritten; weights float32 [rows], how much a
    squared error of each row counts; feedback float32 [columns, columns], used above its diagonal; rates [columns] in
    quarters of a bit, to which row_offsets [rows] add.
    Returns the streams uint8 [sequences, bytes], column after column, and the errors float32 [columns, rows].
    """
    ends = (rates * layout.length // 32).cumsum()
    streams = np.zeros((layout.sequences, int(ends[-1])), dtype=np.uint8)
    errors = np.empty_like(targets)
    values = reversed_codebook(layout.state_bits)
    viterbi.encode(targets, weights, feedback, rates, row_offsets, values, ends, streams, errors)
    return streams, errors


def sweep_columns(
    quantized: Floats,
    pull: Floats,
    hessian: Floats,
    weights: Floats,
    rates: Integers,
    row_offsets: Integers,
    layout: TrellisLayout,
    streams: Bytes,
) -> None:
    """Encode every column again, the others as they are; a sequence takes its new code if that costs less.

    quantized float32 [columns, rows] and streams uint8 [sequences, bytes] are updated; pull float32 [columns, rows] =
    hessian [columns, columns] times (targets - quantized), kept up to date; the others as in encode_columns.
    """
    ends = (rates * layout.length // 32).cumsum()
    values = reversed_codebook(layout.state_bits)
    viterbi.sweep(quantized, pull, hessian, weights, rates, row_offsets, values, ends, streams)
