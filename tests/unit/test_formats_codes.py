"""Encoded weights: decoding by hand, pack and unpack, damaged parts."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rwkvq.errors import ArtifactError, QuantizationError, ShapeError
from rwkvq.formats import (
    FORMATS,
    Codes,
    DenseCodes,
    DenseLayout,
    ElementwiseCodes,
    ElementwiseLayout,
    RotatedCodes,
    RotatedLayout,
    ScalarCodes,
    ScalarLayout,
    ScaledCodes,
    ScaledLayout,
    VectorCodes,
    VectorLayout,
    decode_parts,
    dense,
    elementwise,
    pack_codes,
    scalar,
    vector,
)


def _half(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float16)


def _scalar(*, symmetric: bool) -> ScalarCodes:
    codes = torch.tensor([[0, 3, 5, 7], [1, 2, 3, 4]], dtype=torch.uint8)
    scale = _half(0.5, 2, -1 if symmetric else 1, 4).view(2, 2)
    zero = None if symmetric else torch.tensor([[2, 1], [0, 7]], dtype=torch.uint8)
    return ScalarCodes(ScalarLayout(2, 4, 3, 2, symmetric), codes, scale, zero)


def _vector() -> VectorCodes:
    layout = VectorLayout(3, 4, 2, 2, 2, 2, 8, None)  # 2 row groups (the second of one row) x 2 stripes
    codebook = torch.arange(16, dtype=torch.int8).view(4, 2, 2)
    codes = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.uint8)
    return VectorCodes(layout, codes, codebook, _half(1, 2, 3, 4), None)


def _factored() -> VectorCodes:
    layout = VectorLayout(2, 4, 1, 2, 1, 2, 8, 1)
    codebook = torch.tensor([[1], [2], [3], [4]], dtype=torch.int8)
    codes = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.uint8)
    return VectorCodes(layout, codes, codebook, _half(1, 10).view(2, 1), _half(-1, 2).view(1, 2))


def _elementwise() -> ElementwiseCodes:
    layout = ElementwiseLayout(5, 3, 4)
    codebook = torch.tensor([[0, 1, 2], [-3, 0, 3]], dtype=torch.int8)
    return ElementwiseCodes(layout, torch.tensor([0, 1, 2, 1, 0], dtype=torch.uint8), codebook, _half(0.5, 2))


def _scaled() -> ScaledCodes:
    inner = _scalar(symmetric=False)
    return ScaledCodes(ScaledLayout(inner.layout), inner, _half(1, 2, 4, 0.5))


def _rotated() -> RotatedCodes:
    inner = _scalar(symmetric=True)
    return RotatedCodes(RotatedLayout(inner.layout), inner, torch.tensor([0, 1, 0, 0], dtype=torch.uint8))


ALL: list[Codes] = [
    _scalar(symmetric=False),
    _scalar(symmetric=True),
    _vector(),
    _factored(),
    _elementwise(),
    _scaled(),
    _rotated(),
    DenseCodes(DenseLayout((2, 2), "bfloat16"), torch.eye(2, dtype=torch.bfloat16)),
]


def test_scalar_weights_are_steps_from_the_zero_point() -> None:
    assert scalar.decode(_scalar(symmetric=False)).tolist() == [[-1, 0.5, 8, 12], [1, 2, -16, -12]]


def test_symmetric_scales_may_turn_the_grid_over() -> None:
    assert scalar.decode(_scalar(symmetric=True)).tolist() == [[-2, -0.5, 2, 6], [3, 2, -4, 0]]


def test_vector_weights_are_entries_of_their_own_group() -> None:
    assert vector.decode(_vector()).tolist() == [[0, 1, 12, 14], [2, 3, 8, 10], [30, 33, 56, 60]]


def test_factored_codebooks_are_scaled_by_stripe() -> None:
    # group (i, s) is i * 2 + s; its codebook is coefficient * scale[s] * (-1, 2)
    assert vector.decode(_factored()).tolist() == [[-1, 2, -20, 40], [6, 6, -40, -40]]


def test_elementwise_blocks_have_their_own_codebook() -> None:
    assert elementwise.decode(_elementwise()).tolist() == [0, 0.5, 1, 0.5, -6]


@pytest.mark.parametrize("codes", ALL)
def test_parts_are_what_the_layout_says_and_decode_alike(codes: Codes) -> None:
    parts = pack_codes(codes)
    found = {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()}
    assert found == codes.layout.parts()
    assert torch.equal(decode_parts(codes.layout, parts), FORMATS[codes.layout.format].decode(codes))


@pytest.mark.parametrize("codes", ALL)
def test_wrong_parts_are_refused(codes: Codes) -> None:
    parts = pack_codes(codes)
    for name, part in parts.items():
        rest = {key: value for key, value in parts.items() if key != name}
        for broken in (rest, parts | {"other": part}, parts | {name: part.double()}, parts | {name: part[:-1]}):
            with pytest.raises(ArtifactError) as error:
                decode_parts(codes.layout, broken)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("codes", ALL)
def test_floats_that_are_not_finite_are_refused(codes: Codes) -> None:
    parts = pack_codes(codes)
    for name, part in parts.items():
        if part.is_floating_point():
            for bad in (torch.nan, torch.inf):
                broken = part.clone()
                broken.view(-1)[0] = bad
                with pytest.raises(ArtifactError, match="NaN or Inf"):
                    decode_parts(codes.layout, parts | {name: broken})


@pytest.mark.parametrize("codes", [codes for codes in ALL if codes.layout.format != "dense"])
def test_a_scale_of_zero_is_refused(codes: Codes) -> None:
    parts = pack_codes(codes)
    with pytest.raises(ArtifactError, match="'scale'"):
        decode_parts(codes.layout, parts | {"scale": torch.zeros_like(parts["scale"])})


def test_negative_scales_are_refused_where_a_zero_point_is_stored() -> None:
    codes = _scalar(symmetric=False)
    with pytest.raises(ArtifactError, match="above 0"):
        decode_parts(codes.layout, pack_codes(codes) | {"scale": -codes.scale})


def test_padding_that_is_not_zero_is_refused() -> None:
    codes = _elementwise()
    parts = pack_codes(codes)
    parts["codes"][-1] = 1
    with pytest.raises(ArtifactError, match="padding"):
        decode_parts(codes.layout, parts)


def test_a_code_without_an_entry_is_refused() -> None:
    codes = _elementwise()
    broken = dataclasses.replace(codes, codes=torch.full((5,), 3, dtype=torch.uint8))
    with pytest.raises(ArtifactError, match="code 3"):
        decode_parts(codes.layout, pack_codes(broken))


def test_dense_tensors_that_overflow_their_dtype_are_refused() -> None:
    with pytest.raises(QuantizationError, match="float16"):
        dense.encode(torch.tensor([1e6]), DenseLayout((1,), "float16"))
    with pytest.raises(ShapeError):
        dense.encode(torch.zeros(2), DenseLayout((1,), "float16"))
    kept = dense.encode(torch.tensor([1.5]), DenseLayout((1,), "bfloat16"))
    assert kept.values.dtype == torch.bfloat16 and kept.values.item() == 1.5
