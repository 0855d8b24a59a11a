"""Layouts: stored and nominal bits of docs/method.md 5 to 7, reading from JSON, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rwkvq.errors import PlanError, ShapeError
from rwkvq.formats import (
    FORMATS,
    AffineLayout,
    DenseLayout,
    ElementwiseLayout,
    Layout,
    ResidualLayout,
    RotatedLayout,
    ScalarLayout,
    ScaledLayout,
    TableLayout,
    TrellisLayout,
    VectorLayout,
    layout_from_json,
)

LAYOUTS: list[Layout] = [
    DenseLayout((3, 1, 5), "bfloat16"),
    ScalarLayout(6, 64, 3, 32, False),
    ScalarLayout(6, 64, 4, 64, True),
    VectorLayout(6, 64, 2, 64, 4, 32, 8, None),
    VectorLayout(6, 64, 1, 8, 2, 32, 8, 4),
    VectorLayout(6, 64, 4, 16, 6, 64, 16, None),
    ElementwiseLayout(130, 8, 64),
    TrellisLayout(64, 10, 13, 12, 32),
    TrellisLayout(64, 10, 13, 12, 32, 3, 4),
    TableLayout(6, 64, 3),
    ScaledLayout(ScalarLayout(6, 64, 3, 32, False)),
    RotatedLayout(ScalarLayout(6, 64, 3, 64, True)),
    AffineLayout(6, 64, 3, 32),
    ResidualLayout(8, 64, 4, 64, 8),
]


@pytest.mark.parametrize(
    ("group_size", "symmetric", "nominal", "stored"),
    [(64, False, 3.25, 3.296875), (64, True, 3.25, 3.25), (32, False, 3.5, 3.59375)],
)
def test_scalar_bits(group_size: int, symmetric: bool, nominal: float, stored: float) -> None:
    layout = ScalarLayout(1024, 256, 3, group_size, symmetric)
    assert layout.nominal_bits() == nominal
    assert layout.stored_bits() / (1024 * 256) == stored


@pytest.mark.parametrize(
    ("dimension", "entries", "group", "codebook_bits", "svd_rank", "nominal"),
    [
        (1, 8, (2, 32), 8, 4, 3.5),
        (1, 8, (2, 32), 8, None, 4.0),
        (1, 8, (2, 64), 8, None, 3.5),
        (1, 8, (2, 64), 8, 4, 3.25),
        (1, 8, (4, 64), 8, None, 3.25),
        (2, 64, (32, 64), 8, None, 3.5),
        (2, 64, (64, 64), 8, None, 3.25),
        (4, 4096, (512, 512), 8, None, 3.5),
        (2, 64, (64, 64), 16, None, 3.5),
        (2, 64, (128, 64), 16, None, 3.25),
    ],
)
def test_vector_bits(
    dimension: int, entries: int, group: tuple[int, int], codebook_bits: int, svd_rank: int | None, nominal: float
) -> None:
    layout = VectorLayout(1024, 1024, dimension, entries, *group, codebook_bits, svd_rank)
    assert layout.nominal_bits() == nominal
    weights = 1024 * 1024
    if svd_rank is not None:
        scales = 16 * (1024 // group[1]) * svd_rank + 16 * svd_rank * entries  # by stripe, and the basis
    else:
        scales = 16 * layout.groups if codebook_bits == 8 else 0
    assert layout.stored_bits() == nominal * weights + scales


def test_elementwise_bits() -> None:
    layout = ElementwiseLayout(768, 8, 64)
    assert layout.nominal_bits() == 4.0
    assert layout.stored_bits() / 768 == 4.25


def test_dense_bits() -> None:
    layout = DenseLayout((7, 3), "float32")
    assert layout.nominal_bits() == 32 and layout.stored_bits() == 32 * 21


def test_padding_and_ragged_groups_are_counted() -> None:
    layout = VectorLayout(5, 6, 2, 4, 3, 6, 8, None)
    # 15 codes of 2 bits = 4 bytes; two row groups of one stripe: 2 * (4 * 2 + 2) bytes
    assert layout.row_groups == 2 and layout.stored_bits() == 8 * (4 + 20)


def test_fewer_rows_than_a_group_need_one_codebook_a_stripe() -> None:
    layout = VectorLayout(32, 64, 2, 64, 64, 64, 8, None)
    assert layout.groups == 1 and layout.nominal_bits() == 3 + 64 * 2 * 8 / (32 * 64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_json_round_trip(layout: Layout) -> None:
    assert layout_from_json(layout.format, layout.to_json()) == layout
    assert layout.stored_bits() == sum(
        8 * torch.zeros(shape, dtype=dtype).nbytes for dtype, shape in layout.parts().values()
    )
    assert isinstance(layout, FORMATS[layout.format].layout)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scalar", {"bits": 9}),
        ("scalar", {"bits": True}),
        ("scalar", {"bits": "3"}),
        ("scalar", {"rows": 0}),
        ("scalar", {"rows": 1 << 40}),
        ("scalar", {"group_size": 48}),
        ("scalar", {"symmetric": 1}),
        ("scalar", {"more": 1}),
        ("vector", {"entries": 63}),
        ("vector", {"entries": 1 << 16}),
        ("vector", {"dimension": 3}),
        ("vector", {"group_columns": 48}),
        ("vector", {"codebook_bits": 7}),
        ("vector", {"svd_rank": 2}),
        ("vector", {"rows": 2.0}),
        ("elementwise", {"entries": 1}),
        ("elementwise", {"entries": 257}),
        ("elementwise", {"block": 0}),
        ("elementwise", {"block": 4096}),
        ("dense", {"shape": [2, -1]}),
        ("dense", {"shape": "22"}),
        ("dense", {"shape": [1] * 9}),
        ("dense", {"dtype": "float64"}),
        ("dense", {"dtype": ["float32"]}),
    ],
)
def test_unusable_json_is_one_plan_error(name: str, change: dict[str, Any]) -> None:
    json = next(layout.to_json() for layout in LAYOUTS if layout.format == name)
    with pytest.raises(PlanError) as error:
        layout_from_json(name, json | change)
    assert "\n" not in str(error.value)


def test_missing_keys_and_unknown_formats_are_plan_errors() -> None:
    with pytest.raises(PlanError, match="expected"):
        layout_from_json("scalar", {"rows": 1})
    with pytest.raises(PlanError, match="mapping"):
        layout_from_json("scalar", [1])  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"known: dense, scalar, .*, trellis, table, scaled, rotated, affine, residual"):
        layout_from_json("lattice", {})


def test_layouts_that_do_not_tile_the_weight_are_shape_errors() -> None:
    with pytest.raises(ShapeError, match="group_size 48 does not divide 64"):
        ScalarLayout(2, 64, 3, 48, False)
    with pytest.raises(ShapeError, match="group_columns must divide columns"):
        VectorLayout(2, 64, 2, 64, 2, 48, 8, None)
    with pytest.raises(ShapeError, match="svd_rank"):
        VectorLayout(2, 64, 2, 64, 2, 64, 8, 4)
