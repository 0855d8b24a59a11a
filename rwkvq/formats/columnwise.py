"""What the scaled and the rotated format share: a weight in the scalar format, and one part that undoes a transform.

The transform acts on the columns before the weight is rounded; what undoes it takes a number a column.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from rwkvq.errors import PlanError
from rwkvq.formats.parts import Parts, bits_of
from rwkvq.formats.scalar import ScalarCodes, ScalarLayout
from rwkvq.formats.scalar import unpack as unpack_scalar


@dataclass(frozen=True, slots=True)
class ColumnwiseLayout(ABC):
    """A weight [rows, columns] whose transformed columns have the layout `inner`."""

    format: ClassVar[str]
    inner: ScalarLayout

    @abstractmethod
    def column_part(self) -> Parts:
        """Name, dtype and shape of the one part beside those of `inner`."""

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.inner.rows

    @property
    def columns(self) -> int:
        """Inputs."""
        return self.inner.columns

    def parts(self) -> Parts:
        """The parts of the scalar format, and the one of the columns."""
        return self.inner.parts() | self.column_part()

    def stored_bits(self) -> int:
        """Bits of all parts, padding included."""
        return bits_of(self.parts())

    def nominal_bits(self) -> float:
        """b + 16 / g: published figures do not count the columns' part."""
        return self.inner.nominal_bits()

    def to_json(self) -> dict[str, Any]:
        """The fields of `inner` as plain values."""
        return self.inner.to_json()

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> Self:
        """Read plain values; raise PlanError if one is missing, unknown or out of range."""
        try:
            return cls(ScalarLayout.from_json(json))
        except PlanError as error:
            raise PlanError(f"{cls.format} format: {error}") from error


def unpack_inner(parts: Mapping[str, Tensor], layout: ColumnwiseLayout) -> ScalarCodes:
    """Return the scalar codes among checked parts. Raises ArtifactError for values that the scalar format excludes."""
    return unpack_scalar({name: parts[name] for name in layout.inner.parts()}, layout.inner)
