"""The table format: sizes, decoding by hand, what a reader refuses."""

from __future__ import annotations

import pytest
import torch

from rwkvq.errors import ArtifactError, PlanError, ShapeError
from rwkvq.formats import TableCodes, TableLayout, decode_parts, layout_from_json, pack_codes
from rwkvq.formats.table import decode


def made_up(layout: TableLayout, seed: int = 0) -> TableCodes:
    generator = torch.Generator().manual_seed(seed)

    def numbers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=dtype)

    return TableCodes(
        layout,
        numbers(0, layout.entries, layout.rows, layout.columns),
        numbers(0, 16, layout.rows, layout.groups),
        numbers(-127, 128, 16, layout.entries, dtype=torch.int8),
        numbers(0, 64, layout.rows),
        torch.tensor([0.25], dtype=torch.float16),
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_weight_is_what_its_codes_say(bits: int) -> None:
    codes = made_up(TableLayout(6, 48, bits))
    weight = decode(codes)
    for row in range(6):
        for column in range(48):
            entry = codes.table[codes.selector[row, column // 16].item(), codes.codes[row, column].item()]
            expected = float(entry) / 32 * 0.25 * 2 ** (-int(codes.scale[row]) / 8)
            assert weight[row, column].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("bits", "expected"), [(2, 2.25), (3, 3.25), (4, 4.25)])
def test_stored_bits(bits: int, expected: float) -> None:
    layout = TableLayout(1024, 512, bits)
    assert layout.nominal_bits() == expected
    assert layout.stored_bits() == expected * 1024 * 512 + 6 * 1024 + 16 * 2**bits * 8 + 16


@pytest.mark.parametrize("change", [{"bits": 1}, {"bits": 5}, {"columns": 40}, {"rows": 0}])
def test_layouts_that_cannot_be(change: dict[str, int]) -> None:
    values = {"rows": 8, "columns": 32, "bits": 3} | change
    with pytest.raises(ShapeError):
        TableLayout(**values)
    with pytest.raises(PlanError):
        layout_from_json("table", values)


def test_packing_is_undone_by_unpacking() -> None:
    codes = made_up(TableLayout(5, 32, 3))
    parts = pack_codes(codes)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == codes.layout.parts()
    assert torch.equal(decode_parts(codes.layout, parts), decode(codes))


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("base", torch.zeros(1, dtype=torch.float16), "base"),
        ("table", torch.zeros(16, 4, dtype=torch.int8), "table"),
        ("selector", torch.full((8,), 255, dtype=torch.uint8), "padding"),
        ("scale", torch.full((4,), 255, dtype=torch.uint8), "padding"),
    ],
)
def test_damaged_parts_are_refused(name: str, part: torch.Tensor, said: str) -> None:
    codes = made_up(TableLayout(5, 32, 3))
    with pytest.raises(ArtifactError, match=said):
        decode_parts(codes.layout, pack_codes(codes) | {name: part})
