"""The trellis quantizer: GPTQ's error feedback from column to column, a Viterbi search down each column.

Rows are independent in GPTQ, so a code that joins the weights of one column below each other sees every error of the
columns before it, exactly as scalar GPTQ does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rwkvq.errors import ShapeError
from rwkvq.formats.parts import half_scale
from rwkvq.formats.trellis import SCALE_BITS, SCALE_STEPS, TrellisCodes, TrellisLayout, column_bytes, scales_of
from rwkvq.quantize.factor import permuted
from rwkvq.quantize.gptq import unit_rows
from rwkvq.quantize.hessian import check_statistics, inverse_factor_of, with_damping
from rwkvq.quantize.options import GuidedOptions
from rwkvq.quantize.rates import rate_offsets
from rwkvq.quantize.trellis_columns import encode_columns, sweep_columns

AMPLITUDE = 1.12
"""Row scales in root mean squares of their rows: feedback widens what is rounded (docs/evidence.md, policy budget)."""
BLOCK = 128
"""Columns, at most, between two updates of all later columns."""


@dataclass(frozen=True, slots=True)
class TrellisOptions(GuidedOptions):
    """How the trellis quantizer rounds; row weights enter its search."""

    method: ClassVar[str] = "trellis"

    sweeps: int = 0
    """Rounds of coordinate descent over the columns after the first encoding."""


def quantize(
    weight: Tensor, second_moment: Tensor, layout: TrellisLayout, options: TrellisOptions, fisher: Tensor
) -> TrellisCodes:
    """Return weight [out, in] in the trellis format with small sum_i f_i dW_i H dW_i^T.

    second_moment: H [in, in]; fisher: f [out]. Columns are encoded by falling diagonal of H and stored in their own
    order. Raises ShapeError for shapes that do not fit, QuantizationError for what is not finite or a failing H.
    """
    if tuple(weight.shape) != (layout.rows, layout.columns):
        raise ShapeError(f"weight {list(weight.shape)} does not fit the layout [{layout.rows}, {layout.columns}]")
    check_statistics(weight, second_moment)
    weight = weight.float()
    scale, base = find_row_scales(AMPLITUDE * weight)
    scales = scales_of(scale, base)
    order = second_moment.diagonal().argsort(descending=True, stable=True)
    columns = (weight / scales[:, None]).t()[order].contiguous()  # [in, out]
    importance = search_weights(scales, fisher if options.row_weights else None)
    with permuted(second_moment.float(), order) as moment:
        codes, rates, row_offsets, column_offsets = _encode_all(columns, moment, importance, layout, options)
    back = order.argsort()
    pieces = torch.split(codes, column_bytes(rates, layout.length).tolist(), 1)
    codes = torch.cat([pieces[place] for place in back.tolist()], 1)
    return TrellisCodes(layout, codes, row_offsets, column_offsets[back], scale, base)


def _encode_all(
    columns: Tensor, second_moment: Tensor, importance: Tensor, layout: TrellisLayout, options: TrellisOptions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [sequences, bytes], rates [in], offsets of rows and columns, for columns [in, out] in units of row scales.

    columns are overwritten with what the codes stand for; importance [out]: how much a squared error counts.
    """
    streams, start = [], 0
    targets = columns.clone() if options.sweeps else columns
    with inverse_factor_of(second_moment, options.damping) as upper:
        row_offsets, column_offsets = rate_offsets(layout, importance, column_costs(upper, columns, importance))
        rates = layout.quarter_bits + column_offsets.long()
        feedback = unit_rows(upper)
        for moved, own in zip(torch.split(columns, BLOCK), torch.split(rates, BLOCK), strict=True):
            stop = start + len(moved)
            square = feedback[start:stop, start:stop].contiguous()
            codes, errors = encode(moved, importance, square, own, row_offsets, layout)
            streams.append(codes)
            columns[stop:].addmm_(feedback[start:stop, stop:].t(), errors, alpha=-1)
            moved.sub_(errors)  # what the codes stand for
            start = stop
    codes = torch.cat(streams, 1)
    if options.sweeps:
        with with_damping(second_moment, options.damping) as hessian:
            pull = hessian @ targets.sub_(columns)
            for _ in range(options.sweeps):
                sweep(columns, pull, hessian, importance, rates, row_offsets, layout, codes)
    return codes, rates, row_offsets, column_offsets


def column_costs(upper: Tensor, columns: Tensor, importance: Tensor) -> Tensor:
    """What the squared error of each column costs relative to its weights, float64 [in].

    upper: factor of the inverse of H; columns [in, out] in units of their rows' scales, importance [out].
    """
    return upper.diagonal().double().square().reciprocal() * (columns.square() @ importance).double()


def encode(
    targets: Tensor, weights: Tensor, feedback: Tensor, rates: Tensor, row_offsets: Tensor, layout: TrellisLayout
) -> tuple[Tensor, Tensor]:
    """trellis_columns.encode_columns where the tensors are: on the processor or on CUDA."""
    if targets.is_cuda:
        from rwkvq.quantize.viterbi_cuda import encode_columns_cuda  # compiles for a GPU when it is imported

        return encode_columns_cuda(targets, weights, feedback, rates, row_offsets, layout)
    found = encode_columns(
        targets.numpy(), weights.numpy(), feedback.numpy(), rates.long().numpy(), row_offsets.long().numpy(), layout
    )
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def sweep(
    quantized: Tensor,
    pull: Tensor,
    hessian: Tensor,
    weights: Tensor,
    rates: Tensor,
    row_offsets: Tensor,
    layout: TrellisLayout,
    codes: Tensor,
) -> None:
    """trellis_columns.sweep_columns where the tensors are: on the processor or on CUDA."""
    if quantized.is_cuda:
        from rwkvq.quantize.viterbi_cuda import sweep_columns_cuda

        sweep_columns_cuda(quantized, pull, hessian, weights, rates, row_offsets, layout, codes)
        return
    numbers = rates.long().numpy(), row_offsets.long().numpy()
    arrays = quantized.numpy(), pull.numpy(), hessian.numpy(), weights.numpy()
    sweep_columns(*arrays, *numbers, layout, codes.numpy())


def find_row_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's root mean square as steps uint8 [out] below base float16 [1], the largest of them.

    A row of zeros takes the smallest scale.
    """
    rms = weight.double().square().mean(1).sqrt()
    base = half_scale(rms.max().reshape(1).float())
    octaves = torch.log2(base.double() / rms.clamp_min(1e-30))
    steps = (octaves * SCALE_STEPS).round().clamp(0, (1 << SCALE_BITS) - 1)
    return steps.to(torch.uint8), base


def search_weights(scales: Tensor, fisher: Tensor | None) -> Tensor:
    """How much a squared error in units of the row's scale counts, float32 [out], of mean 1."""
    weights = scales.double().square()
    if fisher is not None:
        weights = weights * fisher.double()
    mean = float(weights.mean())
    return (weights / mean if mean > 0 else torch.ones_like(weights)).float()
