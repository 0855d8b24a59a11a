"""The table of formats by name. A new format is one module and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rwkvq.errors import PlanError
from rwkvq.formats import affine, dense, elementwise, residual, rotated, scalar, scaled, table, trellis, vector
from rwkvq.formats.affine import AffineCodes, AffineLayout
from rwkvq.formats.columnwise import ColumnwiseLayout
from rwkvq.formats.dense import DenseCodes, DenseLayout
from rwkvq.formats.elementwise import ElementwiseCodes, ElementwiseLayout
from rwkvq.formats.parts import Layout, Parts
from rwkvq.formats.residual import ResidualCodes, ResidualLayout
from rwkvq.formats.rotated import RotatedCodes, RotatedLayout
from rwkvq.formats.scalar import ScalarCodes, ScalarLayout
from rwkvq.formats.scaled import ScaledCodes, ScaledLayout
from rwkvq.formats.table import TableCodes, TableLayout
from rwkvq.formats.trellis import TrellisCodes, TrellisLayout
from rwkvq.formats.vector import VectorCodes, VectorLayout

__all__ = [
    "FORMATS",
    "AffineCodes",
    "AffineLayout",
    "Codes",
    "ColumnwiseLayout",
    "DenseCodes",
    "DenseLayout",
    "ElementwiseCodes",
    "ElementwiseLayout",
    "Format",
    "Layout",
    "Parts",
    "ResidualCodes",
    "ResidualLayout",
    "RotatedCodes",
    "RotatedLayout",
    "ScalarCodes",
    "ScalarLayout",
    "ScaledCodes",
    "ScaledLayout",
    "TableCodes",
    "TableLayout",
    "TrellisCodes",
    "TrellisLayout",
    "VectorCodes",
    "VectorLayout",
    "decode_parts",
    "layout_from_json",
    "pack_codes",
]

Codes = (
    DenseCodes
    | ScalarCodes
    | VectorCodes
    | ElementwiseCodes
    | TrellisCodes
    | TableCodes
    | ScaledCodes
    | RotatedCodes
    | AffineCodes
    | ResidualCodes
)
"""An encoded weight in any format."""


@dataclass(frozen=True, slots=True)
class Format:
    """One format: its layout type and the functions on it.

    pack(codes) -> parts; unpack(parts, layout) -> codes; decode(codes) -> Tensor; read_layout(json) -> layout. The
    arguments are of this format's own types, which only the table mixes.
    """

    name: str
    layout: type[Any]
    pack: Callable[[Any], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Any], Any]
    decode: Callable[[Any], Tensor]
    read_layout: Callable[[Mapping[str, Any]], Layout]


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("dense", DenseLayout, dense.pack, dense.unpack, dense.decode, DenseLayout.from_json),
        Format("scalar", ScalarLayout, scalar.pack, scalar.unpack, scalar.decode, ScalarLayout.from_json),
        Format("vector", VectorLayout, vector.pack, vector.unpack, vector.decode, VectorLayout.from_json),
        Format(
            "elementwise",
            ElementwiseLayout,
            elementwise.pack,
            elementwise.unpack,
            elementwise.decode,
            ElementwiseLayout.from_json,
        ),
        Format("trellis", TrellisLayout, trellis.pack, trellis.unpack, trellis.decode, TrellisLayout.from_json),
        Format("table", TableLayout, table.pack, table.unpack, table.decode, TableLayout.from_json),
        Format("scaled", ScaledLayout, scaled.pack, scaled.unpack, scaled.decode, ScaledLayout.from_json),
        Format("rotated", RotatedLayout, rotated.pack, rotated.unpack, rotated.decode, RotatedLayout.from_json),
        Format("affine", AffineLayout, affine.pack, affine.unpack, affine.decode, AffineLayout.from_json),
        Format("residual", ResidualLayout, residual.pack, residual.unpack, residual.decode, ResidualLayout.from_json),
    )
}


def layout_from_json(format_name: str, json: Mapping[str, Any]) -> Layout:
    """Return the layout that `Layout.to_json` wrote.

    Raises PlanError for an unknown format, a missing or unknown key, a value of the wrong type or out of range.
    """
    if format_name not in FORMATS:
        raise PlanError(f"format {format_name!r} is unknown; known: {', '.join(FORMATS)}")
    if not isinstance(json, Mapping):
        raise PlanError(f"{format_name} layout: found {type(json).__name__}, expected a mapping of its fields")
    return FORMATS[format_name].read_layout(json)


def pack_codes(codes: Codes) -> dict[str, Tensor]:
    """Return the stored tensors of an encoded weight by part name."""
    return FORMATS[codes.layout.format].pack(codes)


def decode_parts(layout: Layout, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the weight that stored parts stand for: float32, or its own dtype if dense. Raises ArtifactError."""
    form = FORMATS[layout.format]
    return form.decode(form.unpack(parts, layout))
