"""The scaled and the rotated format, and the Hadamard transform: sizes, decoding by hand, what a reader refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkvq.errors import ArtifactError, PlanError
from rwkvq.formats import (
    ColumnwiseLayout,
    RotatedCodes,
    RotatedLayout,
    ScalarCodes,
    ScalarLayout,
    ScaledCodes,
    ScaledLayout,
    decode_parts,
    layout_from_json,
    pack_codes,
    scalar,
)
from rwkvq.formats.hadamard import block_size, rotate, rotate_moment, unrotate


def sylvester(size: int) -> Tensor:
    """Sylvester's matrix of size 2**n, by doubling."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def explicit(columns: int, flips: Tensor) -> Tensor:
    """R as a matrix [columns, columns]."""
    block = block_size(columns)
    blocks = torch.block_diag(*[sylvester(block)] * (columns // block))
    return blocks * block**-0.5 * (1 - 2 * flips.float())


def some_flips(columns: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 2, (columns,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-50, 51, shape, generator=torch.Generator().manual_seed(seed)).float()


def scalar_codes(rows: int, columns: int, *, symmetric: bool) -> ScalarCodes:
    layout = ScalarLayout(rows, columns, 3, columns // 2, symmetric)
    codes = (torch.arange(rows * columns, dtype=torch.uint8).view(rows, columns) * 5) % 8
    scale = torch.tensor([0.5, 2.0], dtype=torch.float16).expand(rows, 2).contiguous()
    return ScalarCodes(layout, codes, scale, None if symmetric else torch.full((rows, 2), 3, dtype=torch.uint8))


def scaled_codes(columns: int = 8) -> ScaledCodes:
    inner = scalar_codes(5, columns, symmetric=False)
    column_scale = 2.0 ** (torch.arange(columns) % 5 - 2)
    return ScaledCodes(ScaledLayout(inner.layout), inner, column_scale.half())


def rotated_codes(columns: int = 12) -> RotatedCodes:
    inner = scalar_codes(5, columns, symmetric=True)
    return RotatedCodes(RotatedLayout(inner.layout), inner, some_flips(columns))


def test_blocks_are_the_largest_power_of_two_that_divides_the_columns() -> None:
    sizes = {1: 1, 7: 1, 12: 4, 48: 16, 96: 32, 768: 256, 2560: 512, 4096: 4096, 14336: 2048}
    assert {columns: block_size(columns) for columns in sizes} == sizes


@pytest.mark.parametrize("columns", [1, 7, 12, 48, 64, 96])
def test_the_fast_transform_is_the_matrix(columns: int) -> None:
    values, flips = whole_numbers(9, columns), some_flips(columns)
    matrix = explicit(columns, flips).double()
    torch.testing.assert_close(rotate(values, flips).double(), values.double() @ matrix.t(), atol=0, rtol=1e-6)
    torch.testing.assert_close(unrotate(values, flips).double(), values.double() @ matrix, atol=0, rtol=1e-6)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(columns).double())


@pytest.mark.parametrize("columns", [7, 12, 48, 64, 3 * 256])
def test_the_inverse_is_exact_where_the_factor_is_a_power_of_two(columns: int) -> None:
    values, flips = whole_numbers(300, columns), some_flips(columns)
    assert torch.equal(unrotate(rotate(values, flips), flips), values)
    assert torch.equal(rotate(unrotate(values, flips), flips), values)


def test_rotation_leaves_its_arguments_alone_and_keeps_lengths() -> None:
    values, flips = whole_numbers(4, 96), some_flips(96)
    copy = values.clone()
    torch.testing.assert_close(rotate(values, flips).norm(dim=1), values.norm(dim=1))
    unrotate(values, flips)
    assert torch.equal(values, copy)


def test_rotated_inputs_have_the_rotated_second_moment() -> None:
    inputs, flips = whole_numbers(40, 24), some_flips(24)
    turned = rotate(inputs, flips)
    torch.testing.assert_close(rotate_moment(inputs.t() @ inputs, flips), turned.t() @ turned, atol=0.1, rtol=1e-5)


def test_scaled_weights_are_divided_by_the_scale_of_their_column() -> None:
    codes = scaled_codes()
    expected = scalar.decode(codes.inner) * torch.tensor([4, 2, 1, 0.5, 0.25, 4, 2, 1])
    assert torch.equal(decode_parts(codes.layout, pack_codes(codes)), expected)


def test_rotated_weights_are_the_codes_times_the_rotation() -> None:
    codes = rotated_codes()
    expected = scalar.decode(codes.inner) @ explicit(12, codes.flips)  # blocks of 4: exact
    assert torch.equal(decode_parts(codes.layout, pack_codes(codes)), expected)


@pytest.mark.parametrize(("kind", "columns_bits"), [(ScaledLayout, 16 * 512), (RotatedLayout, 512)])
def test_stored_bits_count_the_columns(kind: type[ColumnwiseLayout], columns_bits: int) -> None:
    inner = ScalarLayout(1024, 512, 3, 64, False)
    layout = kind(inner)
    assert layout.stored_bits() == inner.stored_bits() + columns_bits
    assert layout.nominal_bits() == 3.25
    assert (layout.rows, layout.columns) == (1024, 512)


@pytest.mark.parametrize("name", ["scaled", "rotated"])
@pytest.mark.parametrize("change", [{"bits": 9}, {"group_size": 5}, {"symmetric": 1}, {"more": 1}, {"rows": 0}])
def test_layouts_that_cannot_be(name: str, change: dict[str, object]) -> None:
    values = {"rows": 8, "columns": 32, "bits": 3, "group_size": 16, "symmetric": True}
    assert layout_from_json(name, values).to_json() == values
    with pytest.raises(PlanError, match=f"^{name} format: "):
        layout_from_json(name, values | change)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (torch.zeros(8, dtype=torch.float16), "'column_scale': found values down to 0"),
        (torch.full((8,), -1, dtype=torch.float16), "above 0"),
        (torch.full((8,), torch.inf, dtype=torch.float16), "NaN or Inf"),
        (torch.ones(7, dtype=torch.float16), "expected torch.float16"),
    ],
)
def test_damaged_column_scales_are_refused(part: Tensor, said: str) -> None:
    codes = scaled_codes()
    with pytest.raises(ArtifactError, match=said):
        decode_parts(codes.layout, pack_codes(codes) | {"column_scale": part})


def test_flips_with_bits_after_the_last_column_are_refused() -> None:
    codes = rotated_codes()
    parts = pack_codes(codes)
    parts["flips"][1] |= 16  # bit 12 of 12 columns
    with pytest.raises(ArtifactError, match="'flips': found non-zero padding after 12 codes"):
        decode_parts(codes.layout, parts)


@pytest.mark.parametrize("codes", [scaled_codes(), rotated_codes()])
def test_the_codes_inside_are_checked_too(codes: ScaledCodes | RotatedCodes) -> None:
    parts = pack_codes(codes)
    with pytest.raises(ArtifactError, match="'scale'"):
        decode_parts(codes.layout, parts | {"scale": torch.zeros_like(parts["scale"])})
    broken = parts["codes"].clone()
    broken[-1] = 255
    with pytest.raises(ArtifactError, match="'codes': found non-zero padding"):
        decode_parts(codes.layout, parts | {"codes": broken})
