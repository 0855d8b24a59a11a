"""The scalar format: b-bit integers with one scale, and one zero point, for every group of g input columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rwkvq.errors import PlanError, ShapeError
from rwkvq.formats.bitpack import pack_bits, packed_size
from rwkvq.formats.parts import Parts, bits_of, boolean, check_keys, check_parts, check_scale, integer, unpack_stream

MAX_BITS = 8


@dataclass(frozen=True, slots=True)
class ScalarLayout:
    """A weight [rows, columns] in the scalar format; group_size divides columns, bits is 1 .. 8.

    Symmetric means that every zero point is 2**(bits - 1) and none is stored.
    """

    format: ClassVar[str] = "scalar"
    rows: int
    columns: int
    bits: int
    group_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        """Raise ShapeError unless the groups tile the columns."""
        if min(self.rows, self.columns, self.group_size) < 1 or not 1 <= self.bits <= MAX_BITS:
            raise ShapeError(f"scalar layout: {asdict(self)} needs positive sides and 1 .. {MAX_BITS} bits")
        if self.columns % self.group_size:
            raise ShapeError(
                f"scalar layout: group_size {self.group_size} does not divide {self.columns} columns; "
                "choose a divisor of the columns"
            )

    @property
    def groups(self) -> int:
        """Groups of one row."""
        return self.columns // self.group_size

    def parts(self) -> Parts:
        """codes: bit stream of [rows, columns]; scale [rows, groups]; zero: bit stream of [rows, groups]."""
        scales = self.rows * self.groups
        result: Parts = {
            "codes": (torch.uint8, (packed_size(self.rows * self.columns, self.bits),)),
            "scale": (torch.float16, (self.rows, self.groups)),
        }
        if not self.symmetric:
            result["zero"] = (torch.uint8, (packed_size(scales, self.bits),))
        return result

    def stored_bits(self) -> int:
        """Bits of codes, scales and zero points, padding included."""
        return bits_of(self.parts())

    def nominal_bits(self) -> float:
        """b + 16 / g: published figures count no zero points (docs/method.md 5)."""
        return self.bits + 16 / self.group_size

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> ScalarLayout:
        """Read plain values; raise PlanError if one is missing, unknown or out of range."""
        check_keys("scalar", json, ("rows", "columns", "bits", "group_size", "symmetric"))
        rows, columns, group_size = (integer("scalar", json, key) for key in ("rows", "columns", "group_size"))
        bits = integer("scalar", json, "bits", high=MAX_BITS)
        try:
            return cls(rows, columns, bits, group_size, boolean("scalar", json, "symmetric"))
        except ShapeError as error:
            raise PlanError(str(error)) from error


@dataclass(frozen=True, slots=True)
class ScalarCodes:
    """A weight in the scalar format; weight ~ (codes - zero) * scale, group by group.

    codes uint8 [rows, columns] in 0 .. 2**bits - 1; scale float16 [rows, groups], finite and > 0, or
    in a symmetric layout of either sign, which turns the grid -2**(bits - 1) .. 2**(bits - 1) - 1 over;
    zero uint8 [rows, groups] in code units, None if and only if the layout is symmetric.
    """

    layout: ScalarLayout
    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def decode(codes: ScalarCodes) -> Tensor:
    """Return the float32 weight [rows, columns] that the codes stand for."""
    layout = codes.layout
    grouped = codes.codes.reshape(layout.rows, layout.groups, layout.group_size).float()
    zero = 2.0 ** (layout.bits - 1) if codes.zero is None else codes.zero.float()[..., None]
    return grouped.sub_(zero).mul_(codes.scale.float()[..., None]).reshape(layout.rows, layout.columns)


def pack(codes: ScalarCodes) -> dict[str, Tensor]:
    """Return the stored tensors by part name."""
    bits = codes.layout.bits
    result = {"codes": pack_bits(codes.codes, bits), "scale": codes.scale.contiguous()}
    if codes.zero is not None:
        result["zero"] = pack_bits(codes.zero, bits)
    return result


def unpack(parts: Mapping[str, Tensor], layout: ScalarLayout) -> ScalarCodes:
    """Return the codes of stored parts.

    Raises ArtifactError if the parts do not fit the layout, a scale is out of range, or padding is not 0.
    """
    check_parts(parts, layout)
    check_scale(parts["scale"], signed=layout.symmetric)
    codes = unpack_stream(parts, "codes", layout.bits, layout.rows * layout.columns)
    zero = None
    if not layout.symmetric:
        zero = unpack_stream(parts, "zero", layout.bits, layout.rows * layout.groups).view(layout.rows, layout.groups)
    return ScalarCodes(layout, codes.view(layout.rows, layout.columns), parts["scale"], zero)
