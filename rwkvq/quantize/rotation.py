"""GPTQ of a weight whose inputs are rotated by a randomised Hadamard transform.

The rotation spreads outlier columns and outlier inputs over all columns of a block (QuaRot, arXiv 2404.00456; QuIP#,
arXiv 2402.04396).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvq.formats.hadamard import rotate, rotate_moment
from rwkvq.formats.rotated import RotatedCodes, RotatedLayout
from rwkvq.quantize import gptq
from rwkvq.quantize.gptq import GptqOptions
from rwkvq.quantize.hessian import check_statistics
from rwkvq.quantize.rtn import check_shape

SEED = 0
"""Of the signs, which are the same for all weights of one width and in every run."""


def draw_flips(columns: int) -> Tensor:
    """Return which columns change their sign before the transform: uint8 [columns], 0 or 1."""
    return torch.randint(0, 2, (columns,), generator=torch.Generator().manual_seed(SEED), dtype=torch.uint8)


def quantize(weight: Tensor, second_moment: Tensor, layout: RotatedLayout, options: GptqOptions) -> RotatedCodes:
    """Return weight [out, in] in the rotated format with small tr(dW H dW^T), H the second moment [in, in].

    With V = W R^T and G = R H R^T the loss is tr(dV G dV^T), which GPTQ lowers. Holds G beside H, [in, in] float32, and
    one more of this size while it rotates.
    Raises ShapeError for shapes that do not fit, QuantizationError for values that are not finite or a failing H.
    """
    check_shape(weight, layout.inner)
    check_statistics(weight, second_moment)
    flips = draw_flips(layout.columns)
    rotated = rotate(weight, flips), rotate_moment(second_moment, flips)
    return RotatedCodes(layout, gptq.quantize(*rotated, layout.inner, options), flips)
