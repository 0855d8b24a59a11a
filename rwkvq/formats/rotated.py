"""The rotated format: the scalar format of a weight that was multiplied by a randomised Hadamard transform.

The transform is on the input side (QuaRot, arXiv 2404.00456; QuIP#, arXiv 2402.04396): W = V R with V in the scalar
format, so that W x = V (R x) (docs/method.md, policy rotation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rwkvq.formats import scalar
from rwkvq.formats.bitpack import pack_bits, packed_size
from rwkvq.formats.columnwise import ColumnwiseLayout, unpack_inner
from rwkvq.formats.hadamard import unrotate
from rwkvq.formats.parts import Parts, check_parts, unpack_stream
from rwkvq.formats.scalar import ScalarCodes


@dataclass(frozen=True, slots=True)
class RotatedLayout(ColumnwiseLayout):
    """A weight [rows, columns] in the rotated format; blocks are of the largest power of two that divides columns."""

    format: ClassVar[str] = "rotated"

    def column_part(self) -> Parts:
        """flips: bit stream of [columns]."""
        return {"flips": (torch.uint8, (packed_size(self.columns, 1),))}


@dataclass(frozen=True, slots=True)
class RotatedCodes:
    """A weight in the rotated format; weight ~ decoded `inner` times R (rwkvq.formats.hadamard).

    flips uint8 [columns]: 1 where R turns the sign of a column over, else 0.
    """

    layout: RotatedLayout
    inner: ScalarCodes
    flips: Tensor


def decode(codes: RotatedCodes) -> Tensor:
    """Return the float32 weight [rows, columns] that the codes stand for."""
    return unrotate(scalar.decode(codes.inner), codes.flips)


def pack(codes: RotatedCodes) -> dict[str, Tensor]:
    """Return the stored tensors by part name."""
    return scalar.pack(codes.inner) | {"flips": pack_bits(codes.flips, 1)}


def unpack(parts: Mapping[str, Tensor], layout: RotatedLayout) -> RotatedCodes:
    """Return the codes of stored parts.

    Raises ArtifactError if the parts do not fit the layout, a scale is out of range, or padding is not 0.
    """
    check_parts(parts, layout)
    flips = unpack_stream(parts, "flips", 1, layout.columns).to(torch.uint8)
    return RotatedCodes(layout, unpack_inner(parts, layout), flips)
