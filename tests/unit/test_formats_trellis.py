"""The trellis format: sizes, decoding bit by bit, what a reader refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rwkvq.errors import ArtifactError, PlanError, ShapeError
from rwkvq.formats import FORMATS, TrellisCodes, TrellisLayout, decode_parts, layout_from_json, pack_codes
from rwkvq.formats.bitpack import pack_bits
from rwkvq.formats.trellis import MULTIPLIER, RATES, codebook, decode, symbol_ends
from tests.packed import trellis_offsets


def made_up(layout: TrellisLayout, seed: int = 0) -> TrellisCodes:
    generator = torch.Generator().manual_seed(seed)
    shape = layout.parts()["codes"][1]
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    scale = torch.randint(0, 64, (layout.rows,), generator=generator, dtype=torch.uint8)
    return TrellisCodes(layout, codes, *trellis_offsets(layout, str(seed)), scale, torch.tensor([0.5]).half())


def decoded_by_hand(codes: TrellisCodes, row: int, column: int) -> float:
    """Follow docs/format.md with whole numbers."""
    layout = codes.layout
    sequence = row // layout.length
    rates = [layout.quarter_bits + int(offset) for offset in codes.column_offsets]
    sizes = [rate * layout.length // 32 for rate in rates]
    begin = sum(sizes[:column])
    stream = int.from_bytes(bytes(codes.codes[sequence, begin : begin + sizes[column]].tolist()), "little")
    bits = 8 * sizes[column]
    first = sequence * layout.length
    end = sum(rates[column] + int(offset) for offset in codes.row_offsets[first : row + 1]) // 4
    start = (end - layout.state_bits) % bits
    circle = stream | stream << bits
    state = circle >> start & ((1 << layout.state_bits) - 1)
    product = state * 0x83DCD12D % 2**32
    total = sum(product >> shift & 255 for shift in (0, 8, 16, 24))
    return (total - 510) / 147.8 * float(codes.base[0]) * 2 ** (-int(codes.scale[row]) / 8)


@pytest.mark.parametrize(
    ("rows", "quarter_bits", "state_bits", "length", "row_bits", "column_bits"),
    [
        (512, 13, 12, 256, 0, 0),
        (64, 10, 10, 64, 3, 0),
        (32, 8, 16, 32, 0, 3),
        (48, 12, 12, 16, 4, 0),
        (8, 8, 8, 8, 0, 0),
        (96, 18, 9, 32, 4, 3),
        (64, 8, 12, 32, 3, 4),
        (512, 14, 12, 256, 4, 4),
    ],
)
def test_every_weight_is_what_its_bits_say(
    rows: int, quarter_bits: int, state_bits: int, length: int, row_bits: int, column_bits: int
) -> None:
    codes = made_up(TrellisLayout(rows, 5, quarter_bits, state_bits, length, row_bits, column_bits))
    assert (codes.row_offsets.any(), codes.column_offsets.any()) == (row_bits > 0, column_bits > 0)
    weight = decode(codes)
    for row in range(rows):
        for column in range(5):
            assert weight[row, column].item() == pytest.approx(decoded_by_hand(codes, row, column), rel=1e-6, abs=1e-9)


def test_the_multiplier_gives_nearly_normal_values() -> None:
    values = codebook(16).double()
    assert MULTIPLIER == 0x83DCD12D
    assert abs(values.mean().item()) < 0.01 and values.std().item() == pytest.approx(1, abs=0.01)
    assert (values**4).mean().item() == pytest.approx(2.7, abs=0.1)  # a sum of four uniforms


@pytest.mark.parametrize("quarter_bits", RATES)
def test_stored_bits_are_codes_scales_and_base(quarter_bits: int) -> None:
    layout = TrellisLayout(1024, 256, quarter_bits, 12, 256)
    assert layout.nominal_bits() == quarter_bits / 4
    assert layout.stored_bits() == 1024 * 256 * quarter_bits // 4 + 6 * 1024 + 16
    widths = symbol_ends(torch.full((256,), quarter_bits)).diff(prepend=torch.zeros(1))
    assert widths.sum() == 256 * quarter_bits // 4
    assert set(widths.tolist()) <= {quarter_bits // 4, -(-quarter_bits // 4)}
    offset = TrellisLayout(1024, 256, quarter_bits, 12, 256, 3, 4)
    assert offset.stored_bits() == layout.stored_bits() + 3 * 1024 + 4 * 256


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"quarter_bits": 5}, "quarter_bits"),
        ({"state_bits": 7}, "state_bits"),
        ({"state_bits": 17}, "state_bits"),
        ({"length": 512}, "length must be"),
        ({"length": 96}, "length must divide"),
        ({"rows": 4, "length": 4, "quarter_bits": 9}, "whole bytes"),
        ({"rows": 4, "length": 4}, "state_bits bits"),
        ({"columns": 0}, "positive"),
        ({"row_offset_bits": 2}, "row_offset_bits"),
        ({"column_offset_bits": 5}, "column_offset_bits"),
        ({"rows": 16, "length": 16, "column_offset_bits": 3}, "32 divides"),
    ],
)
def test_layouts_that_cannot_be(change: dict[str, int], rule: str) -> None:
    values = {"rows": 256, "columns": 8, "quarter_bits": 8, "state_bits": 12, "length": 256} | change
    with pytest.raises(ShapeError, match=rule):
        TrellisLayout(**values)
    with pytest.raises(PlanError):
        layout_from_json("trellis", values)


def test_packing_is_undone_by_unpacking() -> None:
    codes = made_up(TrellisLayout(96, 7, 13, 12, 32, 3, 4))
    parts = pack_codes(codes)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == codes.layout.parts()
    unpacked = FORMATS["trellis"].unpack(parts, codes.layout)
    for name in ("codes", "row_offsets", "column_offsets", "scale", "base"):
        assert torch.equal(getattr(unpacked, name), getattr(codes, name)), name
    assert torch.equal(decode_parts(codes.layout, parts), decode(codes))


def _damaged(name: str, part: Any) -> tuple[TrellisLayout, dict[str, torch.Tensor]]:
    codes = made_up(TrellisLayout(64, 5, 8, 8, 32, 3, 3))
    return codes.layout, pack_codes(codes) | {name: part}


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("base", torch.zeros(1, dtype=torch.float16), "base"),
        ("base", torch.full((1,), float("nan"), dtype=torch.float16), "base"),
        ("base", torch.ones(2, dtype=torch.float16), "base"),
        ("codes", torch.zeros(3, 3, dtype=torch.uint8), "codes"),
        ("column_offsets", torch.full((4,), 255, dtype=torch.uint8), "padding"),
        ("column_offsets", pack_bits(torch.tensor([4, 4, 4, 4, 5], dtype=torch.uint8), 3), "add up to 0"),
        ("column_offsets", pack_bits(torch.tensor([7, 4, 4, 4, 1], dtype=torch.uint8), 3), "3 .. 13 quarter bits"),
        ("row_offsets", torch.full((24,), 255, dtype=torch.uint8), "add up to 0"),
    ],
)
def test_damaged_parts_are_refused(name: str, part: torch.Tensor, said: str) -> None:
    layout, parts = _damaged(name, part)
    with pytest.raises(ArtifactError, match=said):
        decode_parts(layout, parts)
