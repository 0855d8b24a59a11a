"""The affine format: sizes, decoding by hand, what a reader refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rwkvq.errors import ArtifactError, PlanError, ShapeError
from rwkvq.formats import AffineCodes, AffineLayout, decode_parts, layout_from_json, pack_codes
from rwkvq.formats.affine import decode


def by_hand() -> AffineCodes:
    return AffineCodes(
        AffineLayout(2, 5, 3, 5),
        torch.tensor([[0, 3, 5, 7, 1], [1, 2, 3, 4, 0]], dtype=torch.uint8),
        torch.tensor([[0.5], [2]], dtype=torch.float16),
        torch.tensor([[2.5], [-0.25]], dtype=torch.float16),
    )


def test_weights_are_steps_from_a_zero_point_between_the_codes() -> None:
    assert decode(by_hand()).tolist() == [[-1.25, 0.25, 1.25, 2.25, -0.75], [2.5, 4.5, 6.5, 8.5, 0.5]]


@pytest.mark.parametrize(("bits", "group_size", "expected"), [(3, 128, 3.25), (3, 64, 3.5), (2, 64, 2.5), (8, 32, 9.0)])
def test_both_numbers_of_a_group_are_counted(bits: int, group_size: int, expected: float) -> None:
    layout = AffineLayout(512, 256, bits, group_size)
    assert layout.nominal_bits() == expected
    assert layout.stored_bits() == expected * 512 * 256


def test_padding_is_counted() -> None:
    # 10 codes of 3 bits fill 4 bytes; 2 scales and 2 zero points of 2 bytes
    assert by_hand().layout.stored_bits() == 8 * (4 + 4 + 4)


@pytest.mark.parametrize("change", [{"bits": 1}, {"bits": 9}, {"group_size": 48}, {"rows": 0}, {"group_size": 0}])
def test_layouts_that_cannot_be(change: dict[str, Any]) -> None:
    values = {"rows": 8, "columns": 64, "bits": 3, "group_size": 32} | change
    with pytest.raises(ShapeError):
        AffineLayout(**values)
    with pytest.raises(PlanError):
        layout_from_json("affine", values)


def test_packing_is_undone_by_unpacking() -> None:
    codes = by_hand()
    parts = pack_codes(codes)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == codes.layout.parts()
    assert torch.equal(decode_parts(codes.layout, parts), decode(codes))


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("scale", torch.zeros(2, 1, dtype=torch.float16), "'scale'.*above 0"),
        ("scale", -torch.ones(2, 1, dtype=torch.float16), "'scale'.*above 0"),
        ("scale", torch.full((2, 1), torch.inf, dtype=torch.float16), "'scale'.*NaN or Inf"),
        ("zero", torch.full((2, 1), torch.nan, dtype=torch.float16), "'zero'.*NaN or Inf"),
        ("zero", torch.zeros(2, 1), "'zero'.*float32"),
        ("zero", torch.zeros(1, 2, dtype=torch.float16), r"'zero'.*\[1, 2\]"),
        ("codes", torch.full((4,), 255, dtype=torch.uint8), "padding"),
    ],
)
def test_damaged_parts_are_refused(name: str, part: torch.Tensor, said: str) -> None:
    with pytest.raises(ArtifactError, match=said) as error:
        decode_parts(by_hand().layout, pack_codes(by_hand()) | {name: part})
    assert "\n" not in str(error.value)


def test_missing_and_unknown_parts_are_refused() -> None:
    parts = pack_codes(by_hand())
    for broken in ({"codes": parts["codes"]}, parts | {"other": parts["codes"]}):
        with pytest.raises(ArtifactError, match="found parts"):
            decode_parts(by_hand().layout, broken)
