"""What every format shares: the Layout protocol, and the checks of what comes from outside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from rwkvq.errors import ArtifactError, PlanError
from rwkvq.formats.bitpack import padding_is_zero, unpack_bits
from rwkvq.tensors import is_finite

Parts = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> dtype and shape of every stored tensor of one encoded weight."""

MAX_SIDE = 1 << 31
"""Largest accepted number in a layout: far above any model, far below an overflow of sizes."""

MIN_SCALE = 6e-8
"""Scales are at least this: the smallest positive float16, so that no stored scale is 0."""

MAX_SCALE = 65504.0
"""The largest float16."""


class Layout(Protocol):
    """Everything that is known about an encoded weight before it is encoded."""

    format: ClassVar[str]

    def parts(self) -> Parts:
        """Dtype and shape of every stored tensor."""

    def stored_bits(self) -> int:
        """Bits of all stored tensors, padding included."""

    def nominal_bits(self) -> float:
        """Bits per weight by the formula that publications use (docs/method.md 5 to 8)."""

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values; `layout_from_json` is the inverse."""


def bits_of(parts: Parts) -> int:
    """Return the bits that stored tensors of these dtypes and shapes take."""
    return sum(8 * dtype.itemsize * math.prod(shape) for dtype, shape in parts.values())


def half_scale(scale: Tensor) -> Tensor:
    """Return positive scales rounded to float16, kept within its positive range.

    Quantizers use the result, not the argument, so that what is stored is what was optimised.
    """
    return scale.clamp(MIN_SCALE, MAX_SCALE).to(torch.float16)


def check_parts(parts: Mapping[str, Tensor], layout: Layout) -> None:
    """Raise ArtifactError unless the parts are exactly the tensors that the layout names, by dtype and shape."""
    expected = layout.parts()
    if set(parts) != set(expected):
        raise ArtifactError(
            f"{layout.format} weight: found parts {sorted(parts)}, expected {sorted(expected)}; pack again"
        )
    for name, (dtype, shape) in expected.items():
        found = parts[name]
        if found.dtype != dtype or tuple(found.shape) != shape:
            raise ArtifactError(
                f"part {name!r}: found {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}; pack again"
            )


def check_finite(name: str, part: Tensor) -> None:
    """Raise ArtifactError if a float part holds NaN or Inf."""
    if not is_finite(part):
        raise ArtifactError(f"part {name!r}: found NaN or Inf, expected finite values; pack again")


def check_scale(part: Tensor, *, signed: bool = False, name: str = "scale") -> None:
    """Raise ArtifactError unless the part `name` is finite and above 0, or with `signed` not 0."""
    check_finite(name, part)
    if not bool((part != 0).all() if signed else (part > 0).all()):
        expected = "no zeros" if signed else "values above 0"
        raise ArtifactError(f"part {name!r}: found values down to {float(part.min())}, expected {expected}; pack again")


def unpack_stream(parts: Mapping[str, Tensor], name: str, bits: int, count: int) -> Tensor:
    """Return the codes [count] of the bit stream `name`; raise ArtifactError if its padding is not 0."""
    if not padding_is_zero(parts[name], bits, count):
        raise ArtifactError(f"part {name!r}: found non-zero padding after {count} codes, expected zeros; pack again")
    return unpack_bits(parts[name], bits, count)


def check_keys(kind: str, json: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Raise PlanError unless the plain values hold exactly these keys."""
    if set(json) != set(keys):
        raise PlanError(f"{kind} layout: found keys {sorted(map(str, json))}, expected {sorted(keys)}")


def integer(kind: str, json: Mapping[str, Any], key: str, low: int = 1, high: int = MAX_SIDE) -> int:
    """Return json[key] as an int in low .. high; raise PlanError otherwise."""
    value = json[key]
    if type(value) is not int or not low <= value <= high:
        raise PlanError(f"{kind} layout: {key} is {value!r}, expected an integer in {low} .. {high}")
    return value


def boolean(kind: str, json: Mapping[str, Any], key: str) -> bool:
    """Return json[key] as a bool; raise PlanError otherwise."""
    value = json[key]
    if type(value) is not bool:
        raise PlanError(f"{kind} layout: {key} is {value!r}, expected true or false")
    return value
