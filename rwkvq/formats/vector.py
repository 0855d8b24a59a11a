"""The vector format: indices into codebooks of d-vectors, one codebook for each block of rows x columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rwkvq.errors import PlanError, ShapeError
from rwkvq.formats.bitpack import MAX_BITS, pack_bits, packed_size
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

FIELDS = ("rows", "columns", "dimension", "entries", "group_rows", "group_columns", "codebook_bits", "svd_rank")
MAX_ENTRIES = 1 << (MAX_BITS - 1)
"""Codes fit int16."""
_CHUNK = 1 << 22
"""Weights decoded at once: their indices take several times the memory of the weights."""


@dataclass(frozen=True, slots=True)
class VectorLayout:
    """A weight [rows, columns] in the vector format.

    A stripe is group_columns consecutive columns, which divide columns; a group is up to group_rows consecutive rows
    of one stripe (the last may have fewer, and a weight with fewer rows has one group a stripe). Group (i, s) has index
    i * stripes + s. `dimension` consecutive weights of a row share a code; it divides group_columns. entries is a power
    of two. Codebooks are int8 with a scale each (codebook_bits 8) or float16 (16). With svd_rank r (dimension 1, 8
    bits) a codebook is r int8 coefficients, scaled by stripe and coefficient, times one float16 basis [r, entries].
    """

    format: ClassVar[str] = "vector"
    rows: int
    columns: int
    dimension: int
    entries: int
    group_rows: int
    group_columns: int
    codebook_bits: int
    svd_rank: int | None

    def __post_init__(self) -> None:
        """Raise ShapeError naming the first rule that does not hold."""
        sides = (self.rows, self.columns, self.dimension, self.group_rows, self.group_columns)
        rank = self.svd_rank
        rules = (
            (min(sides) >= 1, "sides must be positive"),
            (self.entries in [1 << bits for bits in range(1, MAX_BITS)], f"entries: a power of two to {MAX_ENTRIES}"),
            (self.columns % max(self.group_columns, 1) == 0, "group_columns must divide columns"),
            (self.group_columns % max(self.dimension, 1) == 0, "dimension must divide group_columns"),
            (self.codebook_bits in (8, 16), "codebook_bits must be 8 or 16"),
            (rank is None or (self.dimension == 1 and self.codebook_bits == 8), "svd_rank: dimension 1 and 8 bits"),
            (rank is None or 1 <= rank <= self.entries, "svd_rank must be in 1 .. entries"),
        )
        for holds, rule in rules:
            if not holds:
                raise ShapeError(f"vector layout: {rule}; found {asdict(self)}")

    @property
    def stripes(self) -> int:
        """Groups side by side."""
        return self.columns // self.group_columns

    @property
    def row_groups(self) -> int:
        """Groups one below the other."""
        return -(-self.rows // self.group_rows)

    @property
    def groups(self) -> int:
        """Number of codebooks."""
        return self.row_groups * self.stripes

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return (self.entries - 1).bit_length()

    @property
    def code_dtype(self) -> torch.dtype:
        """Dtype of unpacked codes: uint8 where it is enough, else int16."""
        return torch.uint8 if self.entries <= 256 else torch.int16

    def parts(self) -> Parts:
        """codes: bit stream of [rows, columns / d]; codebook; scale (8 bits); basis (svd_rank)."""
        result: Parts = {
            "codes": (torch.uint8, (packed_size(self.rows * self.columns // self.dimension, self.code_bits),))
        }
        if self.svd_rank is not None:
            result["codebook"] = (torch.int8, (self.groups, self.svd_rank))
            result["scale"] = (torch.float16, (self.stripes, self.svd_rank))
            result["basis"] = (torch.float16, (self.svd_rank, self.entries))
        elif self.codebook_bits == 8:
            result["codebook"] = (torch.int8, (self.groups, self.entries, self.dimension))
            result["scale"] = (torch.float16, (self.groups,))
        else:
            result["codebook"] = (torch.float16, (self.groups, self.entries, self.dimension))
        return result

    def stored_bits(self) -> int:
        """Bits of codes, codebooks, scales and basis, padding included."""
        return bits_of(self.parts())

    def nominal_bits(self) -> float:
        """log2(K) / d + K d c_b rho / l: published figures count no codebook scale (docs/method.md 6)."""
        kept = 1.0 if self.svd_rank is None else self.svd_rank / self.entries
        group = min(self.group_rows, self.rows) * self.group_columns
        codebook = self.entries * self.dimension * self.codebook_bits * kept
        return self.code_bits / self.dimension + codebook / group

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> VectorLayout:
        """Read plain values; raise PlanError if one is missing, unknown or out of range."""
        check_keys("vector", json, FIELDS)
        values = {key: integer("vector", json, key) for key in FIELDS[:-1]}
        rank = None if json["svd_rank"] is None else integer("vector", json, "svd_rank")
        try:
            return cls(**values, svd_rank=rank)
        except ShapeError as error:
            raise PlanError(str(error)) from error


@dataclass(frozen=True, slots=True)
class VectorCodes:
    """A weight in the vector format: `dimension` weights ~ codebook of their group at their code.

    codes uint8 or int16 [rows, columns / d] below entries; codebook, scale, basis as `VectorLayout.parts`, None where
    the layout has no such part; scales are finite and > 0.
    """

    layout: VectorLayout
    codes: Tensor
    codebook: Tensor
    scale: Tensor | None
    basis: Tensor | None


def codebooks(codes: VectorCodes) -> Tensor:
    """Return the float32 codebooks [row_groups, stripes, entries, d] that the stored parts stand for."""
    layout = codes.layout
    shape = (layout.row_groups, layout.stripes, layout.entries, layout.dimension)
    stored = codes.codebook.float()
    if codes.basis is not None:
        assert codes.scale is not None
        coefficients = stored.view(layout.row_groups, layout.stripes, -1) * codes.scale.float()
        return (coefficients @ codes.basis.float()).view(shape)
    if codes.scale is not None:
        stored = stored * codes.scale.float()[:, None, None]
    return stored.view(shape)


def decode(codes: VectorCodes) -> Tensor:
    """Return the float32 weight [rows, columns] that the codes stand for."""
    layout = codes.layout
    flat = codebooks(codes).view(-1, layout.dimension)  # [groups * entries, d]
    stripe = (
        torch.arange(layout.columns // layout.dimension) * layout.dimension // layout.group_columns
    )  # [columns / d]
    result = torch.empty(layout.rows, layout.columns)
    rows = max(1, _CHUNK // layout.columns)
    for start in range(0, layout.rows, rows):
        stop = min(start + rows, layout.rows)
        row_group = torch.arange(start, stop) // layout.group_rows
        group = row_group[:, None] * layout.stripes + stripe
        index = group.mul_(layout.entries).add_(codes.codes[start:stop])
        result[start:stop] = flat[index].view(stop - start, layout.columns)
    return result


def pack(codes: VectorCodes) -> dict[str, Tensor]:
    """Return the stored tensors by part name."""
    result = {"codes": pack_bits(codes.codes, codes.layout.code_bits), "codebook": codes.codebook.contiguous()}
    if codes.scale is not None:
        result["scale"] = codes.scale.contiguous()
    if codes.basis is not None:
        result["basis"] = codes.basis.contiguous()
    return result


def unpack(parts: Mapping[str, Tensor], layout: VectorLayout) -> VectorCodes:
    """Return the codes of stored parts.

    Raises ArtifactError if the parts do not fit the layout, a float is not finite, or a scale is not above 0.
    """
    check_parts(parts, layout)
    scale, basis = parts.get("scale"), parts.get("basis")
    if scale is not None:
        check_scale(scale)
    if basis is not None:
        check_finite("basis", basis)
    if layout.codebook_bits == 16:
        check_finite("codebook", parts["codebook"])
    columns = layout.columns // layout.dimension
    codes = unpack_stream(parts, "codes", layout.code_bits, layout.rows * columns)
    codes = codes.to(layout.code_dtype).view(layout.rows, columns)
    return VectorCodes(layout, codes, parts["codebook"], scale, basis)
