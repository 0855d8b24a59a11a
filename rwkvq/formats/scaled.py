"""The scaled format: the scalar format of a weight whose columns were multiplied by one number each.

Lin et al., AWQ, arXiv 2306.00978. There an earlier operation takes up the inverse numbers; here every weight has
numbers of its own, which are stored (docs/method.md, policy awq).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rwkvq.formats import scalar
from rwkvq.formats.columnwise import ColumnwiseLayout, unpack_inner
from rwkvq.formats.parts import Parts, check_parts, check_scale
from rwkvq.formats.scalar import ScalarCodes


@dataclass(frozen=True, slots=True)
class ScaledLayout(ColumnwiseLayout):
    """A weight [rows, columns] in the scaled format."""

    format: ClassVar[str] = "scaled"

    def column_part(self) -> Parts:
        """column_scale [columns]."""
        return {"column_scale": (torch.float16, (self.columns,))}


@dataclass(frozen=True, slots=True)
class ScaledCodes:
    """A weight in the scaled format; weight ~ decoded `inner` / column_scale.

    column_scale float16 [columns], finite and > 0.
    """

    layout: ScaledLayout
    inner: ScalarCodes
    column_scale: Tensor


def decode(codes: ScaledCodes) -> Tensor:
    """Return the float32 weight [rows, columns] that the codes stand for."""
    return scalar.decode(codes.inner).div_(codes.column_scale.float())


def pack(codes: ScaledCodes) -> dict[str, Tensor]:
    """Return the stored tensors by part name."""
    return scalar.pack(codes.inner) | {"column_scale": codes.column_scale.contiguous()}


def unpack(parts: Mapping[str, Tensor], layout: ScaledLayout) -> ScaledCodes:
    """Return the codes of stored parts.

    Raises ArtifactError if the parts do not fit the layout, a scale is out of range, or padding is not 0.
    """
    check_parts(parts, layout)
    check_scale(parts["column_scale"], name="column_scale")
    return ScaledCodes(layout, unpack_inner(parts, layout), parts["column_scale"])
