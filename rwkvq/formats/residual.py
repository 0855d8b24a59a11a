"""The residual format: d weights of a column share two codes, of a main and of a residual codebook, which add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rwkvq.errors import PlanError, ShapeError
from rwkvq.formats.bitpack import pack_bits, packed_size
from rwkvq.formats.parts import Parts, bits_of, check_finite, check_keys, check_parts, integer, unpack_stream

FIELDS = ("rows", "columns", "dimension", "entries", "residual_entries")
MAX_ENTRIES = 1 << 15
"""Codes fit int16."""
_CHUNK = 1 << 22
"""Weights decoded at once."""


@dataclass(frozen=True, slots=True)
class ResidualLayout:
    """A weight [rows, columns] in the residual format.

    A vector is `dimension` consecutive rows of one column; dimension divides rows. The weight has one codebook of
    `entries` and one of `residual_entries` vectors, both powers of two from 2 to MAX_ENTRIES.
    """

    format: ClassVar[str] = "residual"
    rows: int
    columns: int
    dimension: int
    entries: int
    residual_entries: int

    def __post_init__(self) -> None:
        """Raise ShapeError naming the first rule that does not hold."""
        powers = [2 << bits for bits in range(MAX_ENTRIES.bit_length() - 1)]
        rules = (
            (min(self.rows, self.columns, self.dimension) >= 1, "sides must be positive"),
            (self.rows % max(self.dimension, 1) == 0, "dimension must divide rows"),
            (self.entries in powers, f"entries: a power of two to {MAX_ENTRIES}"),
            (self.residual_entries in powers, f"residual_entries: a power of two to {MAX_ENTRIES}"),
        )
        for holds, rule in rules:
            if not holds:
                raise ShapeError(f"residual layout: {rule}; found {asdict(self)}")

    @property
    def row_groups(self) -> int:
        """Vectors of one column."""
        return self.rows // self.dimension

    def code_bits(self) -> tuple[int, int]:
        """Bits of a main and of a residual code."""
        return self.entries.bit_length() - 1, self.residual_entries.bit_length() - 1

    def parts(self) -> Parts:
        """codes, residual_codes: bit streams of [rows / d, columns]; the codebooks [entries, d]."""
        count = self.row_groups * self.columns
        main, residual = self.code_bits()
        return {
            "codes": (torch.uint8, (packed_size(count, main),)),
            "residual_codes": (torch.uint8, (packed_size(count, residual),)),
            "codebook": (torch.float16, (self.entries, self.dimension)),
            "residual_codebook": (torch.float16, (self.residual_entries, self.dimension)),
        }

    def stored_bits(self) -> int:
        """Bits of codes and codebooks, padding included."""
        return bits_of(self.parts())

    def nominal_bits(self) -> float:
        """Bits of the two codes over d: published figures count no codebooks (arXiv 2409.17066)."""
        return sum(self.code_bits()) / self.dimension

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> ResidualLayout:
        """Read plain values; raise PlanError if one is missing, unknown or out of range."""
        check_keys("residual", json, FIELDS)
        try:
            return cls(*(integer("residual", json, key) for key in FIELDS))
        except ShapeError as error:
            raise PlanError(str(error)) from error


@dataclass(frozen=True, slots=True)
class ResidualCodes:
    """A weight in the residual format; d weights ~ codebook[code] + residual_codebook[residual code].

    codes, residual_codes int16 [rows / d, columns], below the entries of their codebook; codebook float16 [entries, d]
    and residual_codebook float16 [residual_entries, d], finite.
    """

    layout: ResidualLayout
    codes: Tensor
    residual_codes: Tensor
    codebook: Tensor
    residual_codebook: Tensor


def decode(codes: ResidualCodes) -> Tensor:
    """Return the float32 weight [rows, columns] that the codes stand for."""
    layout = codes.layout
    main, residual = codes.codebook.float(), codes.residual_codebook.float()
    result = torch.empty(layout.row_groups, layout.dimension, layout.columns)
    share = max(1, _CHUNK // (layout.columns * layout.dimension))
    pieces = zip(*(torch.split(item, share) for item in (result, codes.codes, codes.residual_codes)), strict=True)
    for some, first, second in pieces:
        some.copy_((main[first.long()] + residual[second.long()]).transpose(1, 2))
    return result.view(layout.rows, layout.columns)


def pack(codes: ResidualCodes) -> dict[str, Tensor]:
    """Return the stored tensors by part name."""
    main, residual = codes.layout.code_bits()
    return {
        "codes": pack_bits(codes.codes, main),
        "residual_codes": pack_bits(codes.residual_codes, residual),
        "codebook": codes.codebook.contiguous(),
        "residual_codebook": codes.residual_codebook.contiguous(),
    }


def unpack(parts: Mapping[str, Tensor], layout: ResidualLayout) -> ResidualCodes:
    """Return the codes of stored parts.

    Raises ArtifactError if the parts do not fit the layout, a codebook is not finite, or padding is not 0.
    """
    check_parts(parts, layout)
    for name in ("codebook", "residual_codebook"):
        check_finite(name, parts[name])
    shape = (layout.row_groups, layout.columns)
    codes, residual_codes = (
        unpack_stream(parts, name, bits, shape[0] * shape[1]).to(torch.int16).view(shape)
        for name, bits in zip(("codes", "residual_codes"), layout.code_bits(), strict=True)
    )
    return ResidualCodes(layout, codes, residual_codes, parts["codebook"], parts["residual_codebook"])
