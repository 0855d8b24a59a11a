"""The dense format: a tensor left in 16 or 32 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rwkvq.errors import PlanError, QuantizationError, ShapeError
from rwkvq.formats.parts import MAX_SIDE, Parts, bits_of, check_finite, check_keys, check_parts
from rwkvq.tensors import is_finite

DenseDtype = Literal["float16", "bfloat16", "float32"]
DTYPES: dict[DenseDtype, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
MAX_AXES = 8


@dataclass(frozen=True, slots=True)
class DenseLayout:
    """A tensor of `shape`, every value in `dtype`; one part, `values`."""

    format: ClassVar[str] = "dense"
    shape: tuple[int, ...]
    dtype: DenseDtype

    def parts(self) -> Parts:
        """values [shape]."""
        return {"values": (DTYPES[self.dtype], self.shape)}

    def stored_bits(self) -> int:
        """16 or 32 bits a value."""
        return bits_of(self.parts())

    def nominal_bits(self) -> float:
        """16 or 32."""
        return 8.0 * DTYPES[self.dtype].itemsize

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {"shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> DenseLayout:
        """Read plain values; raise PlanError if one is missing, unknown or out of range."""
        check_keys("dense", json, ("shape", "dtype"))
        shape, dtype = json["shape"], json["dtype"]
        if dtype not in tuple(DTYPES):
            raise PlanError(f"dense layout: dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        sides_fit = isinstance(shape, list) and all(type(side) is int and 0 < side <= MAX_SIDE for side in shape)
        if not sides_fit or len(shape) > MAX_AXES:
            raise PlanError(
                f"dense layout: shape is {shape!r}, expected a list of at most {MAX_AXES} positive integers"
            )
        return cls(tuple(shape), dtype)


@dataclass(frozen=True, slots=True)
class DenseCodes:
    """A tensor in the dense format: `values` has the shape and dtype of `layout` and is finite."""

    layout: DenseLayout
    values: Tensor


def encode(tensor: Tensor, layout: DenseLayout) -> DenseCodes:
    """Return the tensor in the layout's dtype.

    Raises ShapeError for another shape, QuantizationError if a value is not finite in that dtype.
    """
    if tuple(tensor.shape) != layout.shape:
        raise ShapeError(f"dense tensor: found shape {list(tensor.shape)}, expected {list(layout.shape)}; plan again")
    values = tensor.to(DTYPES[layout.dtype]).contiguous()
    if not is_finite(values):
        raise QuantizationError(f"dense tensor: values do not fit {layout.dtype}; keep it in float32")
    return DenseCodes(layout, values)


def decode(codes: DenseCodes) -> Tensor:
    """Return the values in their own dtype."""
    return codes.values


def pack(codes: DenseCodes) -> dict[str, Tensor]:
    """Return the stored tensors by part name."""
    return {"values": codes.values.contiguous()}


def unpack(parts: Mapping[str, Tensor], layout: DenseLayout) -> DenseCodes:
    """Return the codes of stored parts. Raises ArtifactError if the parts do not fit the layout or are not finite."""
    check_parts(parts, layout)
    check_finite("values", parts["values"])
    return DenseCodes(layout, parts["values"])
