"""The trellis format: tail-biting trellis codes of weights one below the other, and one logarithmic scale a row.

A sequence is `length` consecutive rows of one column. Its weights share one circular bit stream; the value of weight t
is computed from the `state_bits` bits of the stream that end with its own symbol, so neighbours share bits and the
code gets close to the rate-distortion bound (arXiv 2406.11235; the byte sum of a product as codebook: exllamav3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from rwkvq.errors import PlanError, ShapeError
from rwkvq.formats.bitpack import pack_bits, packed_size
from rwkvq.formats.parts import Parts, bits_of, check_keys, check_parts, check_scale, integer, unpack_stream

FIELDS = ("rows", "columns", "quarter_bits", "state_bits", "length")
RATES = (8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20)
"""Bits per weight in quarters: 2 to 5."""
MIN_STATE_BITS, MAX_STATE_BITS = 8, 16
MAX_LENGTH = 256
"""Weights of a sequence, at most."""

SCALE_BITS = 6
SCALE_STEPS = 8
"""Steps of the logarithmic scales to a factor of two; 64 of them reach 8 octaves below the largest."""

MULTIPLIER = 0x83DCD12D
"""A state times this, modulo 2**32, has four bytes whose sum is nearly Gaussian over the states."""
BYTE_SUM_MEAN = 510
BYTE_SUM_DEVIATION = 147.8
"""Mean and standard deviation of the sum of four independent bytes."""

_CHUNK = 1 << 20
"""Weights decoded at once: their bit windows take several times the memory of the weights."""


@lru_cache(maxsize=16)
def codebook(state_bits: int) -> Tensor:
    """The value of every state, float32 [2**state_bits], nearly standard normal. Not to be written to."""
    products = (torch.arange(1 << state_bits, dtype=torch.int64) * MULTIPLIER) & 0xFFFFFFFF
    sums = sum((products >> shift) & 255 for shift in (0, 8, 16, 24))
    assert isinstance(sums, Tensor)
    return ((sums - BYTE_SUM_MEAN).double() / BYTE_SUM_DEVIATION).float()


@dataclass(frozen=True, slots=True)
class TrellisLayout:
    """A weight [rows, columns] in the trellis format.

    `length` (up to 256) divides rows and times quarter_bits / 4 gives whole bytes, at least `state_bits` bits.
    quarter_bits / 4 bits a weight: weight t of a sequence has floor(q (t + 1) / 4) - floor(q t / 4) bits of its own.
    """

    format: ClassVar[str] = "trellis"
    rows: int
    columns: int
    quarter_bits: int
    state_bits: int
    length: int

    def __post_init__(self) -> None:
        """Raise ShapeError naming the first rule that does not hold."""
        rules = (
            (min(self.rows, self.columns, self.length) >= 1, "sides must be positive"),
            (self.quarter_bits in RATES, f"quarter_bits must be one of {', '.join(map(str, RATES))}"),
            (
                MIN_STATE_BITS <= self.state_bits <= MAX_STATE_BITS,
                f"state_bits must be {MIN_STATE_BITS} .. {MAX_STATE_BITS}",
            ),
            (1 <= self.length <= MAX_LENGTH, f"length must be 1 .. {MAX_LENGTH}"),
            (self.rows % max(self.length, 1) == 0, "length must divide rows"),
            (self.length * self.quarter_bits % 32 == 0, "a sequence must fill whole bytes"),
            (self.length * self.quarter_bits >= 4 * self.state_bits, "a sequence must have state_bits bits"),
        )
        for holds, rule in rules:
            if not holds:
                raise ShapeError(f"trellis layout: {rule}; found {asdict(self)}")

    @property
    def sequences(self) -> int:
        """Sequences of one column."""
        return self.rows // self.length

    @property
    def sequence_bytes(self) -> int:
        """Bytes of one sequence."""
        return self.length * self.quarter_bits // 32

    def widths(self) -> list[int]:
        """Bits of each weight's own symbol, [length]."""
        q = self.quarter_bits
        return [q * (t + 1) // 4 - q * t // 4 for t in range(self.length)]

    def parts(self) -> Parts:
        """codes [sequences, columns, bytes]; scale: bit stream of [rows]; base [1]."""
        return {
            "codes": (torch.uint8, (self.sequences, self.columns, self.sequence_bytes)),
            "scale": (torch.uint8, (packed_size(self.rows, SCALE_BITS),)),
            "base": (torch.float16, (1,)),
        }

    def stored_bits(self) -> int:
        """Bits of codes, scales and base, padding included."""
        return bits_of(self.parts())

    def nominal_bits(self) -> float:
        """Bits of the codes alone."""
        return self.quarter_bits / 4

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> TrellisLayout:
        """Read plain values; raise PlanError if one is missing, unknown or out of range."""
        check_keys("trellis", json, FIELDS)
        try:
            return cls(*(integer("trellis", json, key) for key in FIELDS))
        except ShapeError as error:
            raise PlanError(str(error)) from error


@dataclass(frozen=True, slots=True)
class TrellisCodes:
    """A weight in the trellis format: codebook value of each weight's state, times its row's scale.

    codes uint8 [sequences, columns, bytes], sequence s of a column covering rows s * length ...; scale uint8 [rows],
    below 64: eighths of octaves below base; base float16 [1], finite and > 0.
    """

    layout: TrellisLayout
    codes: Tensor
    scale: Tensor
    base: Tensor


def row_scales(codes: TrellisCodes) -> Tensor:
    """The float32 scale of every row, [rows]."""
    return scales_of(codes.scale, codes.base)


def scales_of(scale: Tensor, base: Tensor) -> Tensor:
    """base * 2**(-scale / 8), float32 [rows], for scale uint8 [rows] and base float16 [1]."""
    steps = torch.arange(1 << SCALE_BITS, dtype=torch.float64, device=base.device)
    factors = torch.exp2(-steps / SCALE_STEPS) * base.double()
    return factors.float()[scale.long()]


def decode(codes: TrellisCodes) -> Tensor:
    """Return the float32 weight [rows, columns] that the codes stand for."""
    layout = codes.layout
    bits = 8 * layout.sequence_bytes
    device = codes.codes.device
    values = codebook(layout.state_bits).to(device)
    ends = torch.tensor(layout.widths(), device=device).cumsum(0)
    starts = (ends - layout.state_bits) % bits
    places = (starts // 8 + torch.arange(3, device=device)[:, None]) % layout.sequence_bytes  # [3, length]
    result = torch.empty(layout.rows, layout.columns, device=device)
    columns = max(1, _CHUNK // layout.length)
    for sequence, rows in enumerate(torch.split(result, layout.length)):
        for start in range(0, layout.columns, columns):
            stream = codes.codes[sequence, start : start + columns].int()
            window = stream[:, places[0]] | stream[:, places[1]] << 8 | stream[:, places[2]] << 16
            states = window.bitwise_right_shift_(starts.int() % 8).bitwise_and_((1 << layout.state_bits) - 1)
            rows[:, start : start + columns] = values[states].t()
    return result.mul_(row_scales(codes)[:, None])


def pack(codes: TrellisCodes) -> dict[str, Tensor]:
    """Return the stored tensors by part name."""
    return {"codes": codes.codes.contiguous(), "scale": pack_bits(codes.scale, SCALE_BITS), "base": codes.base}


def unpack(parts: Mapping[str, Tensor], layout: TrellisLayout) -> TrellisCodes:
    """Return the codes of stored parts.

    Raises ArtifactError if the parts do not fit the layout, base is not a number above 0, or padding is not 0.
    """
    check_parts(parts, layout)
    check_scale(parts["base"], name="base")
    scale = unpack_stream(parts, "scale", SCALE_BITS, layout.rows)
    return TrellisCodes(layout, parts["codes"], scale, parts["base"])
