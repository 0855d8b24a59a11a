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
from rwkvq.formats.trellis import SCALE_BITS, SCALE_STEPS, TrellisCodes, TrellisLayout, scales_of
from rwkvq.quantize.gptq import unit_rows
from rwkvq.quantize.hessian import check_statistics, inverse_factor_of
from rwkvq.quantize.options import GuidedOptions
from rwkvq.quantize.viterbi import encode_columns

AMPLITUDE = 1.12
"""Row scales in root mean squares of their rows: feedback widens what is rounded (docs/evidence.md, policy budget)."""
BLOCK = 128
"""Columns, at most, between two updates of all later columns."""


@dataclass(frozen=True, slots=True)
class TrellisOptions(GuidedOptions):
    """How the trellis quantizer rounds; row weights enter its search."""

    method: ClassVar[str] = "trellis"


def quantize(
    weight: Tensor, second_moment: Tensor, layout: TrellisLayout, options: TrellisOptions, fisher: Tensor
) -> TrellisCodes:
    """Return weight [out, in] in the trellis format with small sum_i f_i dW_i H dW_i^T.

    second_moment: H [in, in]; fisher: f [out]. Raises ShapeError for shapes that do not fit,
    QuantizationError for values that are not finite or a failing H.
    """
    if tuple(weight.shape) != (layout.rows, layout.columns):
        raise ShapeError(f"weight {list(weight.shape)} does not fit the layout [{layout.rows}, {layout.columns}]")
    check_statistics(weight, second_moment)
    weight = weight.float()
    scale, base = find_row_scales(AMPLITUDE * weight)
    scales = scales_of(scale, base)
    columns = (weight / scales[:, None]).t().contiguous()  # [in, out]
    importance = search_weights(scales, fisher if options.row_weights else None)
    streams = torch.empty(layout.parts()["codes"][1], dtype=torch.uint8, device=weight.device)
    with inverse_factor_of(second_moment.float(), options.damping) as upper:
        feedback = unit_rows(upper)
        for start in range(0, layout.columns, BLOCK):
            stop = min(start + BLOCK, layout.columns)
            square = feedback[start:stop, start:stop].contiguous()
            codes, errors = encode(columns[start:stop], importance, square, layout)
            streams[:, start:stop] = codes
            columns[stop:].addmm_(feedback[start:stop, stop:].t(), errors, alpha=-1)
    return TrellisCodes(layout, streams, scale, base)


def encode(targets: Tensor, weights: Tensor, feedback: Tensor, layout: TrellisLayout) -> tuple[Tensor, Tensor]:
    """viterbi.encode_columns where the tensors are: on the processor or on CUDA."""
    if targets.is_cuda:
        from rwkvq.quantize.viterbi_cuda import encode_columns_cuda  # compiles for a GPU when it is imported

        return encode_columns_cuda(targets, weights, feedback, layout)
    codes, errors = encode_columns(targets.numpy(), weights.numpy(), feedback.numpy(), layout)
    return torch.from_numpy(codes), torch.from_numpy(errors)


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
