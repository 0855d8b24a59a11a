"""The table format: b-bit codes, one of 16 small tables of values for every 16 weights of a row, a scale a row.

Decoding is one look-up in registers and one product, so a matrix-vector product runs at the speed of memory; the choice
of table gives the codes the shape and the size of their group for a quarter bit a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rwkvq.errors import PlanError, ShapeError
from rwkvq.formats.bitpack import pack_bits, packed_size
from rwkvq.formats.parts import Parts, bits_of, check_keys, check_parts, check_scale, integer, unpack_stream
from rwkvq.formats.trellis import SCALE_BITS, scales_of

FIELDS = ("rows", "columns", "bits")
TABLES = 16
GROUP = 16
"""Weights of a row that share a table."""
SELECTOR_BITS = 4
UNIT = 1 / 32
"""What an entry of a table counts, in scales of its row: entries reach four scales either way."""
MIN_BITS, MAX_BITS = 2, 4
_CHUNK = 1 << 22
"""Weights decoded at once: their indices take several times the memory of the weights."""


@dataclass(frozen=True, slots=True)
class TableLayout:
    """A weight [rows, columns] in the table format; 16 divides columns, bits is 2 .. 4."""

    format: ClassVar[str] = "table"
    rows: int
    columns: int
    bits: int

    def __post_init__(self) -> None:
        """Raise ShapeError unless groups tile the columns."""
        if min(self.rows, self.columns) < 1 or not MIN_BITS <= self.bits <= MAX_BITS:
            raise ShapeError(f"table layout: {asdict(self)} needs positive sides and {MIN_BITS} .. {MAX_BITS} bits")
        if self.columns % GROUP:
            raise ShapeError(f"table layout: groups of {GROUP} do not tile {self.columns} columns")

    @property
    def groups(self) -> int:
        """Groups of one row."""
        return self.columns // GROUP

    @property
    def entries(self) -> int:
        """Values of one table."""
        return 1 << self.bits

    def parts(self) -> Parts:
        """codes: bit stream of [rows, columns]; selector: of [rows, groups]; table; scale: of [rows]; base [1]."""
        return {
            "codes": (torch.uint8, (packed_size(self.rows * self.columns, self.bits),)),
            "selector": (torch.uint8, (packed_size(self.rows * self.groups, SELECTOR_BITS),)),
            "table": (torch.int8, (TABLES, self.entries)),
            "scale": (torch.uint8, (packed_size(self.rows, SCALE_BITS),)),
            "base": (torch.float16, (1,)),
        }

    def stored_bits(self) -> int:
        """Bits of all stored tensors, padding included."""
        return bits_of(self.parts())

    def nominal_bits(self) -> float:
        """Bits of codes and selectors."""
        return self.bits + SELECTOR_BITS / GROUP

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> TableLayout:
        """Read plain values; raise PlanError if one is missing, unknown or out of range."""
        check_keys("table", json, FIELDS)
        try:
            return cls(*(integer("table", json, key) for key in FIELDS))
        except ShapeError as error:
            raise PlanError(str(error)) from error


@dataclass(frozen=True, slots=True)
class TableCodes:
    """A weight in the table format: entry `codes` of table `selector` of its group, over 32, times its row's scale.

    codes uint8 [rows, columns] below 2**bits; selector uint8 [rows, groups] below 16; table int8 [16, 2**bits]; scale
    uint8 [rows] below 64: eighths of octaves below base; base float16 [1], finite and > 0.
    """

    layout: TableLayout
    codes: Tensor
    selector: Tensor
    table: Tensor
    scale: Tensor
    base: Tensor


def decode(codes: TableCodes) -> Tensor:
    """Return the float32 weight [rows, columns] that the codes stand for."""
    layout = codes.layout
    values = codes.table.float() * UNIT
    scales = scales_of(codes.scale, codes.base)
    result = torch.empty(layout.rows, layout.columns, device=scales.device)
    rows = max(1, _CHUNK // layout.columns)
    for start in range(0, layout.rows, rows):
        some = slice(start, start + rows)
        place = codes.selector[some].int().repeat_interleave(GROUP, 1).mul_(layout.entries).add_(codes.codes[some])
        result[some] = values.view(-1)[place] * scales[some, None]
    return result


def pack(codes: TableCodes) -> dict[str, Tensor]:
    """Return the stored tensors by part name."""
    return {
        "codes": pack_bits(codes.codes, codes.layout.bits),
        "selector": pack_bits(codes.selector, SELECTOR_BITS),
        "table": codes.table.contiguous(),
        "scale": pack_bits(codes.scale, SCALE_BITS),
        "base": codes.base,
    }


def unpack(parts: Mapping[str, Tensor], layout: TableLayout) -> TableCodes:
    """Return the codes of stored parts.

    Raises ArtifactError if the parts do not fit the layout, base is not a number above 0, or padding is not 0.
    """
    check_parts(parts, layout)
    check_scale(parts["base"], name="base")
    rows, columns, groups = layout.rows, layout.columns, layout.groups
    codes = unpack_stream(parts, "codes", layout.bits, rows * columns).view(rows, columns)
    selector = unpack_stream(parts, "selector", SELECTOR_BITS, rows * groups).view(rows, groups)
    scale = unpack_stream(parts, "scale", SCALE_BITS, rows)
    return TableCodes(layout, codes, selector, parts["table"], scale, parts["base"])
