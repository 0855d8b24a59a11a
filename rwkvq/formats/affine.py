"""The affine format: b-bit integers with a float16 scale and zero point for every group of g input columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rwkvq.errors import PlanError, ShapeError
from rwkvq.formats.bitpack import pack_bits, packed_size
from rwkvq.formats.parts import (
    Parts,
    bits_of,
    check_finite,
    check_keys,
    check_parts,
    check_scale,
    integer,
    unpack_stream,
)

FIELDS = ("rows", "columns", "bits", "group_size")
MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True, slots=True)
class AffineLayout:
    """A weight [rows, columns] in the affine format; group_size divides columns, bits is 2 .. 8."""

    format: ClassVar[str] = "affine"
    rows: int
    columns: int
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        """Raise ShapeError unless the groups tile the columns."""
        if min(self.rows, self.columns, self.group_size) < 1 or not MIN_BITS <= self.bits <= MAX_BITS:
            raise ShapeError(f"affine layout: {asdict(self)} needs positive sides and {MIN_BITS} .. {MAX_BITS} bits")
        if self.columns % self.group_size:
            raise ShapeError(
                f"affine layout: group_size {self.group_size} does not divide {self.columns} columns; "
                "choose a divisor of the columns"
            )

    @property
    def groups(self) -> int:
        """Groups of one row."""
        return self.columns // self.group_size

    def parts(self) -> Parts:
        """codes: bit stream of [rows, columns]; scale and zero [rows, groups]."""
        return {
            "codes": (torch.uint8, (packed_size(self.rows * self.columns, self.bits),)),
            "scale": (torch.float16, (self.rows, self.groups)),
            "zero": (torch.float16, (self.rows, self.groups)),
        }

    def stored_bits(self) -> int:
        """Bits of codes, scales and zero points, padding included."""
        return bits_of(self.parts())

    def nominal_bits(self) -> float:
        """b + 32 / g: all that is stored but the padding."""
        return self.bits + 32 / self.group_size

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> AffineLayout:
        """Read plain values; raise PlanError if one is missing, unknown or out of range."""
        check_keys("affine", json, FIELDS)
        try:
            return cls(*(integer("affine", json, key) for key in FIELDS))
        except ShapeError as error:
            raise PlanError(str(error)) from error


@dataclass(frozen=True, slots=True)
class AffineCodes:
    """A weight in the affine format; weight ~ (codes - zero) * scale, group by group.

    codes uint8 [rows, columns] in 0 .. 2**bits - 1; scale float16 [rows, groups], finite and > 0; zero float16
    [rows, groups], finite, in code units and not rounded to them.
    """

    layout: AffineLayout
    codes: Tensor
    scale: Tensor
    zero: Tensor


def decode(codes: AffineCodes) -> Tensor:
    """Return the float32 weight [rows, columns] that the codes stand for."""
    layout = codes.layout
    grouped = codes.codes.reshape(layout.rows, layout.groups, layout.group_size).float()
    grouped.sub_(codes.zero.float()[..., None]).mul_(codes.scale.float()[..., None])
    return grouped.reshape(layout.rows, layout.columns)


def pack(codes: AffineCodes) -> dict[str, Tensor]:
    """Return the stored tensors by part name."""
    return {
        "codes": pack_bits(codes.codes, codes.layout.bits),
        "scale": codes.scale.contiguous(),
        "zero": codes.zero.contiguous(),
    }


def unpack(parts: Mapping[str, Tensor], layout: AffineLayout) -> AffineCodes:
    """Return the codes of stored parts.

    Raises ArtifactError if the parts do not fit the layout, a scale is not above 0, a zero point is not finite, or
    padding is not 0.
    """
    check_parts(parts, layout)
    check_scale(parts["scale"])
    check_finite("zero", parts["zero"])
    codes = unpack_stream(parts, "codes", layout.bits, layout.rows * layout.columns)
    return AffineCodes(layout, codes.view(layout.rows, layout.columns), parts["scale"], parts["zero"])
