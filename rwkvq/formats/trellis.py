"""The trellis format: tail-biting trellis codes of weights one below the other, and one logarithmic scale a row.

A sequence is `length` consecutive rows of one column. Its weights share one circular bit stream; the value of weight t
is computed from the `state_bits` bits of the stream that end with its own symbol, so neighbours share bits and the
code gets close to the rate-distortion bound (arXiv 2406.11235; the byte sum of a product as codebook: exllamav3).

Weights need not all have the same number of bits: rows and columns may carry offsets of their rate (reverse
water-filling), which add up to nothing, so that the size of the codes does not depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from rwkvq.errors import ArtifactError, PlanError, ShapeError
from rwkvq.formats.bitpack import pack_bits, packed_size
from rwkvq.formats.parts import Parts, bits_of, check_keys, check_parts, check_scale, integer, unpack_stream

FIELDS = ("rows", "columns", "quarter_bits", "state_bits", "length", "row_offset_bits", "column_offset_bits")
RATES = (6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20)
"""Mean bits per weight in quarters: 1.5 to 5."""
MIN_RATE, MAX_RATE = 4, 24
"""Quarters of a bit that a single weight may have, offsets included."""
OFFSET_BITS = (0, 3, 4)
"""Widths of a stored offset: none, or -4 .. 3 or -8 .. 7 quarters of a bit."""
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
    quarter_bits: the rate, mean over all weights; row_offset_bits, column_offset_bits: width of the stored offsets of
    rows and columns from it, 0 if they have none.
    """

    format: ClassVar[str] = "trellis"
    rows: int
    columns: int
    quarter_bits: int
    state_bits: int
    length: int
    row_offset_bits: int = 0
    column_offset_bits: int = 0

    def __post_init__(self) -> None:
        """Raise ShapeError naming the first rule that does not hold."""
        widths = ", ".join(map(str, OFFSET_BITS))
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
            (self.row_offset_bits in OFFSET_BITS, f"row_offset_bits must be one of {widths}"),
            (self.column_offset_bits in OFFSET_BITS, f"column_offset_bits must be one of {widths}"),
            (not self.column_offset_bits or self.length % 32 == 0, "column offsets need a length that 32 divides"),
        )
        for holds, rule in rules:
            if not holds:
                raise ShapeError(f"trellis layout: {rule}; found {asdict(self)}")

    @property
    def sequences(self) -> int:
        """Sequences of one column."""
        return self.rows // self.length

    def parts(self) -> Parts:
        """codes [sequences, bytes], column after column; bit streams of the offsets and of scale [rows]; base [1]."""
        parts: Parts = {"codes": (torch.uint8, (self.sequences, self.columns * self.length * self.quarter_bits // 32))}
        if self.row_offset_bits:
            parts["row_offsets"] = (torch.uint8, (packed_size(self.rows, self.row_offset_bits),))
        if self.column_offset_bits:
            parts["column_offsets"] = (torch.uint8, (packed_size(self.columns, self.column_offset_bits),))
        return parts | {
            "scale": (torch.uint8, (packed_size(self.rows, SCALE_BITS),)),
            "base": (torch.float16, (1,)),
        }

    def stored_bits(self) -> int:
        """Bits of codes, offsets, scales and base, padding included."""
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
            return cls(*(integer("trellis", json, key, low=0) for key in FIELDS))
        except ShapeError as error:
            raise PlanError(str(error)) from error


@dataclass(frozen=True, slots=True)
class TrellisCodes:
    """A weight in the trellis format: codebook value of each weight's state, times its row's scale.

    codes uint8 [sequences, bytes], sequence s covering rows s * length ...; row_offsets int8 [rows] and column_offsets
    int8 [columns]: quarters of a bit above the layout's rate, of sum 0 in each sequence and over the columns; scale
    uint8 [rows], below 64: eighths of octaves below base; base float16 [1], finite and > 0.
    """

    layout: TrellisLayout
    codes: Tensor
    row_offsets: Tensor
    column_offsets: Tensor
    scale: Tensor
    base: Tensor


def symbol_ends(rates: Tensor) -> Tensor:
    """Where the symbols of weights with these rates [..., length], quarters of a bit, end in their stream, bits."""
    return rates.cumsum(-1) // 4


def column_bytes(rates: Tensor, length: int) -> Tensor:
    """Bytes of one sequence in columns of these rates [columns], quarters of a bit."""
    return rates * length // 32


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
    layout, device = codes.layout, codes.codes.device
    values = codebook(layout.state_bits).to(device)
    rates = layout.quarter_bits + codes.column_offsets.long()
    sizes = column_bytes(rates, layout.length)
    begins = sizes.cumsum(0) - sizes
    result = torch.empty(layout.rows, layout.columns, device=device)
    for rate in sorted(set(rates.tolist())):
        size = rate * layout.length // 32
        for sequence, rows in enumerate(torch.split(result, layout.length)):
            offsets = codes.row_offsets[sequence * layout.length :][: layout.length].long()
            starts = (symbol_ends(rate + offsets) - layout.state_bits) % (8 * size)
            places = (starts // 8 + torch.arange(3, device=device)[:, None]) % size  # [3, length]
            for columns in torch.split((rates == rate).nonzero()[:, 0], max(1, _CHUNK // layout.length)):
                stream = codes.codes[sequence, begins[columns][:, None] + torch.arange(size, device=device)].int()
                window = stream[:, places[0]] | stream[:, places[1]] << 8 | stream[:, places[2]] << 16
                states = window.bitwise_right_shift_(starts.int() % 8).bitwise_and_((1 << layout.state_bits) - 1)
                rows[:, columns] = values[states].t()
    return result.mul_(row_scales(codes)[:, None])


def pack(codes: TrellisCodes) -> dict[str, Tensor]:
    """Return the stored tensors by part name."""
    parts = {"codes": codes.codes.contiguous()}
    for name, offsets, bits in _offsets(codes):
        if bits:
            parts[name] = pack_bits((offsets + (1 << bits - 1)).to(torch.uint8), bits)
    return parts | {"scale": pack_bits(codes.scale, SCALE_BITS), "base": codes.base}


def unpack(parts: Mapping[str, Tensor], layout: TrellisLayout) -> TrellisCodes:
    """Return the codes of stored parts.

    Raises ArtifactError if the parts do not fit the layout, base is not a number above 0, offsets do not add up to
    nothing or make a rate that no weight may have, or padding is not 0.
    """
    check_parts(parts, layout)
    check_scale(parts["base"], name="base")
    scale = unpack_stream(parts, "scale", SCALE_BITS, layout.rows)
    row_offsets = _unpack_offsets(parts, "row_offsets", layout.row_offset_bits, layout.rows)
    column_offsets = _unpack_offsets(parts, "column_offsets", layout.column_offset_bits, layout.columns)
    if row_offsets.view(-1, layout.length).sum(1).any() or column_offsets.sum():
        raise ArtifactError("rate offsets do not add up to 0; the file is damaged")
    rates = [layout.quarter_bits + int(end(row_offsets) + end(column_offsets)) for end in (torch.amin, torch.amax)]
    if rates[0] < MIN_RATE or rates[1] > MAX_RATE:
        raise ArtifactError(f"rates of {rates[0]} .. {rates[1]} quarter bits, expected {MIN_RATE} .. {MAX_RATE}")
    return TrellisCodes(layout, parts["codes"], row_offsets, column_offsets, scale, parts["base"])


def _offsets(codes: TrellisCodes) -> tuple[tuple[str, Tensor, int], ...]:
    """Part name, offsets and stored width of those of rows and columns."""
    return (
        ("row_offsets", codes.row_offsets, codes.layout.row_offset_bits),
        ("column_offsets", codes.column_offsets, codes.layout.column_offset_bits),
    )


def _unpack_offsets(parts: Mapping[str, Tensor], name: str, bits: int, count: int) -> Tensor:
    """Offsets int8 [count] of a part; zeros if the layout has none."""
    device = parts["codes"].device
    if not bits:
        return torch.zeros(count, dtype=torch.int8, device=device)
    return (unpack_stream(parts, name, bits, count).to(torch.int8) - (1 << bits - 1)).to(torch.int8)
