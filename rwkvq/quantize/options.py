"""Reading quantizer options from plain values, which come from an editable plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self, TypeVar

from rwkvq.errors import PlanError

Options = TypeVar("Options")


def read_options(options: type[Options], method: str, json: Mapping[str, Any]) -> Options:
    """Build a dataclass of bool, int and float fields from plain values; missing ones take their defaults.

    A bool must be true or false, an int at least 0, a float above 0 (or 0, with `may_be_zero` in its metadata) and at
    most 1. Raises PlanError otherwise, and for
    unknown keys.
    """
    known = {field.name: type(field.default) for field in fields(options)}  # type: ignore[arg-type]
    may_be_zero = {field.name for field in fields(options) if field.metadata.get("may_be_zero")}  # type: ignore[arg-type]
    values = {}
    for key, value in json.items():
        if key not in known:
            raise PlanError(f"{method} options: {key} is unknown; known: {', '.join(known)}")
        fits, expected = {
            bool: (type(value) is bool, "true or false"),
            int: (type(value) is int and value >= 0, "an integer from 0"),
            float: _fraction(value, key in may_be_zero),
        }[known[key]]
        if not fits:
            raise PlanError(f"{method} options: {key} is {value!r}, expected {expected}")
        values[key] = float(value) if known[key] is float else value
    return options(**values)


def _fraction(value: Any, may_be_zero: bool) -> tuple[bool, str]:
    """Whether the value fits, and what is expected."""
    fits = type(value) in (int, float) and 0 <= value <= 1 and (value > 0 or may_be_zero)
    return fits, "a number from 0 to 1" if may_be_zero else "a number above 0 and at most 1"


@dataclass(frozen=True, slots=True)
class GuidedOptions:
    """What the quantizers have in common that gradients guide."""

    method: ClassVar[str]

    damping: float = 0.01
    guide: float = field(default=0.5, metadata={"may_be_zero": True})
    """Share of the loss-weighted second moment in H (rwkvq.quantize.inputs)."""
    row_weights: bool = True
    """Count each row's error by how much the loss depends on that output."""

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> Self:
        """Read plain values, defaults where they are missing; raise PlanError for unknown or unusable ones."""
        return read_options(cls, cls.method, json)
