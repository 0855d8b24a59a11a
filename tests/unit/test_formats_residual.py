"""The residual format: sizes, decoding by hand, what a reader refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rwkvq.errors import ArtifactError, PlanError, ShapeError
from rwkvq.formats import ResidualCodes, ResidualLayout, decode_parts, layout_from_json, pack_codes
from rwkvq.formats import residual as residual_format
from rwkvq.formats.residual import decode


def by_hand() -> ResidualCodes:
    """Two vectors of two rows in each of three columns."""
    return ResidualCodes(
        ResidualLayout(4, 3, 2, 4, 2),
        torch.tensor([[0, 1, 2], [3, 0, 1]], dtype=torch.int16),
        torch.tensor([[0, 1, 0], [1, 1, 0]], dtype=torch.int16),
        torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]], dtype=torch.float16),
        torch.tensor([[0, 0], [0.5, -0.25]], dtype=torch.float16),
    )


def test_vectors_go_down_a_column_and_their_entries_add_up() -> None:
    assert decode(by_hand()).tolist() == [[0, 2.5, 4], [1, 2.75, 5], [6.5, 0.5, 2], [6.75, 0.75, 3]]


def test_decoding_in_pieces_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decode(by_hand())
    monkeypatch.setattr(residual_format, "_CHUNK", 6)
    assert torch.equal(decode(by_hand()), whole)


def test_codes_and_codebooks_are_counted() -> None:
    layout = ResidualLayout(256, 256, 4, 256, 16)
    assert layout.nominal_bits() == 3.0
    assert layout.stored_bits() == 3 * 256 * 256 + (256 + 16) * 4 * 16
    # 6 codes of 2 bits and 6 of 1 bit fill 4 bytes each
    assert by_hand().layout.stored_bits() == 8 * (4 + 4) + (4 + 2) * 2 * 16


@pytest.mark.parametrize(
    "change",
    [
        {"entries": 48},
        {"entries": 1},
        {"entries": 1 << 16},
        {"residual_entries": 0},
        {"residual_entries": 3},
        {"dimension": 3},
        {"dimension": 0},
        {"columns": 0},
    ],
)
def test_layouts_that_cannot_be(change: dict[str, Any]) -> None:
    values = {"rows": 8, "columns": 5, "dimension": 4, "entries": 64, "residual_entries": 8} | change
    with pytest.raises(ShapeError):
        ResidualLayout(**values)
    with pytest.raises(PlanError):
        layout_from_json("residual", values)


def test_packing_is_undone_by_unpacking() -> None:
    codes = by_hand()
    parts = pack_codes(codes)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == codes.layout.parts()
    assert torch.equal(decode_parts(codes.layout, parts), decode(codes))
    again = residual_format.unpack(parts, codes.layout)
    assert torch.equal(again.codes, codes.codes) and torch.equal(again.residual_codes, codes.residual_codes)


def test_codes_of_the_largest_codebook_fit() -> None:
    layout = ResidualLayout(2, 2, 1, residual_format.MAX_ENTRIES, 2)
    top = torch.full((2, 2), residual_format.MAX_ENTRIES - 1, dtype=torch.int16)
    table = torch.arange(layout.entries).half()[:, None]
    codes = ResidualCodes(layout, top, torch.zeros(2, 2, dtype=torch.int16), table, torch.zeros(2, 1).half())
    assert torch.equal(decode_parts(layout, pack_codes(codes)), torch.full((2, 2), 32768.0))


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("codes", torch.full((4,), 255, dtype=torch.uint8), "'codes'.*padding"),
        ("residual_codes", torch.full((4,), 255, dtype=torch.uint8), "'residual_codes'.*padding"),
        ("codebook", torch.full((4, 2), torch.nan, dtype=torch.float16), "'codebook'.*NaN or Inf"),
        ("residual_codebook", torch.full((2, 2), torch.inf, dtype=torch.float16), "'residual_codebook'.*NaN or Inf"),
        ("codebook", torch.zeros(4, 2), "'codebook'.*float32"),
        ("residual_codebook", torch.zeros(4, 2, dtype=torch.float16), r"'residual_codebook'.*\[4, 2\]"),
    ],
)
def test_damaged_parts_are_refused(name: str, part: torch.Tensor, said: str) -> None:
    with pytest.raises(ArtifactError, match=said) as error:
        decode_parts(by_hand().layout, pack_codes(by_hand()) | {name: part})
    assert "\n" not in str(error.value)


def test_missing_parts_are_refused() -> None:
    parts = pack_codes(by_hand())
    for name in parts:
        with pytest.raises(ArtifactError, match="found parts"):
            decode_parts(by_hand().layout, {key: part for key, part in parts.items() if key != name})
