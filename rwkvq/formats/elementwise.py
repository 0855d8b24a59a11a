"""The element-wise format: vectors whose blocks of consecutive channels have a small codebook of values each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rwkvq.errors import ArtifactError, PlanError, ShapeError
from rwkvq.formats.bitpack import pack_bits, packed_size
from rwkvq.formats.parts import Parts, bits_of, check_keys, check_parts, check_scale, integer, unpack_stream

MAX_ENTRIES = 256
MAX_BLOCK = 2048
"""The exact codebooks of a block take memory that grows with its square."""


@dataclass(frozen=True, slots=True)
class ElementwiseLayout:
    """A vector [size]; every `block` channels (the last block may be shorter) share `entries` int8 values."""

    format: ClassVar[str] = "elementwise"
    size: int
    entries: int
    block: int

    def __post_init__(self) -> None:
        """Raise ShapeError for sizes that no vector can have."""
        if self.size < 1 or not 1 <= self.block <= MAX_BLOCK or not 2 <= self.entries <= MAX_ENTRIES:
            raise ShapeError(
                f"elementwise layout: {asdict(self)} needs a positive size, a block of 1 .. {MAX_BLOCK} "
                f"and 2 .. {MAX_ENTRIES} entries"
            )

    @property
    def blocks(self) -> int:
        """Number of codebooks."""
        return -(-self.size // self.block)

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return (self.entries - 1).bit_length()

    def parts(self) -> Parts:
        """codes: bit stream of [size]; codebook int8 [blocks, entries]; scale float16 [blocks]."""
        return {
            "codes": (torch.uint8, (packed_size(self.size, self.code_bits),)),
            "codebook": (torch.int8, (self.blocks, self.entries)),
            "scale": (torch.float16, (self.blocks,)),
        }

    def stored_bits(self) -> int:
        """Bits of codes, codebooks and scales, padding included."""
        return bits_of(self.parts())

    def nominal_bits(self) -> float:
        """Code bits and codebooks; published figures count no codebook scale (docs/method.md 7)."""
        return self.code_bits + 8 * self.entries / min(self.block, self.size)

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> ElementwiseLayout:
        """Read plain values; raise PlanError if one is missing, unknown or out of range."""
        check_keys("elementwise", json, ("size", "entries", "block"))
        size, block = (integer("elementwise", json, key) for key in ("size", "block"))
        try:
            return cls(size, integer("elementwise", json, "entries", 2, MAX_ENTRIES), block)
        except ShapeError as error:
            raise PlanError(str(error)) from error


@dataclass(frozen=True, slots=True)
class ElementwiseCodes:
    """A vector in the element-wise format; value j ~ codebook[block of j, codes[j]] * scale[block of j].

    codes uint8 [size] below entries; codebook int8 [blocks, entries]; scale float16 [blocks], finite and > 0.
    """

    layout: ElementwiseLayout
    codes: Tensor
    codebook: Tensor
    scale: Tensor


def decode(codes: ElementwiseCodes) -> Tensor:
    """Return the float32 vector [size] that the codes stand for."""
    layout = codes.layout
    values = codes.codebook.float() * codes.scale.float()[:, None]  # [blocks, entries]
    block_of = torch.arange(layout.size) // layout.block
    return values[block_of, codes.codes.long()]


def pack(codes: ElementwiseCodes) -> dict[str, Tensor]:
    """Return the stored tensors by part name."""
    return {
        "codes": pack_bits(codes.codes, codes.layout.code_bits),
        "codebook": codes.codebook.contiguous(),
        "scale": codes.scale.contiguous(),
    }


def unpack(parts: Mapping[str, Tensor], layout: ElementwiseLayout) -> ElementwiseCodes:
    """Return the codes of stored parts.

    Raises ArtifactError if the parts do not fit the layout, a code names no entry, or a scale is not above 0.
    """
    check_parts(parts, layout)
    check_scale(parts["scale"])
    codes = unpack_stream(parts, "codes", layout.code_bits, layout.size)
    if int(codes.max()) >= layout.entries:
        raise ArtifactError(f"part 'codes': found code {int(codes.max())}, expected below {layout.entries}; pack again")
    return ElementwiseCodes(layout, codes, parts["codebook"], parts["scale"])
