"""Any codes survive packing, and packing them again gives the same bytes."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvq.formats import (
    AffineLayout,
    ElementwiseLayout,
    ResidualLayout,
    ScalarLayout,
    VectorLayout,
    affine,
    scalar,
    vector,
)
from rwkvq.formats import elementwise as elementwise_format
from rwkvq.formats import residual as residual_format
from rwkvq.formats.bitpack import pack_bits, unpack_bits
from rwkvq.quantize import elementwise, hqq, kmeans, residual, rtn
from rwkvq.quantize.residual import ResidualOptions


def _weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@given(st.integers(1, 16).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1)))))
@settings(max_examples=60, deadline=None)
def test_any_codes_survive(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack_bits(torch.tensor(codes, dtype=torch.int64), bits)
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


@given(st.integers(0, 2**31 - 1), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([8, 24, 48]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_scalar_codes_survive_and_stay_within_half_a_step(
    seed: int, bits: int, group_size: int, symmetric: bool
) -> None:
    weight = _weight(5, 48, seed)
    layout = ScalarLayout(5, 48, bits, group_size, symmetric)
    codes = rtn.quantize(weight, layout)
    parts = scalar.pack(codes)
    decoded = scalar.decode(scalar.unpack(parts, layout))
    assert torch.equal(decoded, scalar.decode(codes))
    again = scalar.pack(scalar.unpack(parts, layout))
    assert all(torch.equal(again[name], part) for name, part in parts.items())
    if not symmetric:
        # the zero point is rounded too, so a range's ends may lie half a step further out
        step = codes.scale.float().repeat_interleave(group_size, 1)
        assert ((decoded - weight).abs() <= step * 1.01).all()


@given(st.integers(0, 2**31 - 1), st.integers(1, 9), st.sampled_from([(1, 8, 8), (2, 16, 8), (4, 16, 16)]))
@settings(max_examples=25, deadline=None)
def test_vector_codes_survive_any_number_of_rows(seed: int, rows: int, kind: tuple[int, int, int]) -> None:
    dimension, entries, codebook_bits = kind
    layout = VectorLayout(rows, 16, dimension, entries, 4, 8, codebook_bits, None)
    codes = kmeans.quantize(_weight(rows, 16, seed), layout, iterations=5)
    parts = vector.pack(codes)
    assert torch.equal(vector.decode(vector.unpack(parts, layout)), vector.decode(codes))


@given(st.integers(0, 2**31 - 1), st.integers(2, 8), st.sampled_from([8, 24, 48]))
@settings(max_examples=25, deadline=None)
def test_affine_codes_survive_and_stay_within_a_step(seed: int, bits: int, group_size: int) -> None:
    weight, layout = _weight(5, 48, seed), AffineLayout(5, 48, bits, group_size)
    codes = hqq.quantize(weight, layout)
    parts = affine.pack(codes)
    decoded = affine.decode(affine.unpack(parts, layout))
    assert torch.equal(decoded, affine.decode(codes))
    # a zero point moves by less than half a step, so a range's ends lie less than a step further out
    step = codes.scale.float().repeat_interleave(group_size, 1)
    assert ((decoded - weight).abs() <= step * 1.01).all()


@given(st.integers(0, 2**31 - 1), st.integers(1, 5), st.sampled_from([(1, 8, 2), (2, 16, 4), (4, 512, 2)]))
@settings(max_examples=25, deadline=None)
def test_residual_codes_survive_any_number_of_rows(seed: int, vectors: int, kind: tuple[int, int, int]) -> None:
    layout = ResidualLayout(vectors * kind[0], 6, *kind)
    codes = residual.quantize(_weight(layout.rows, 6, seed), torch.eye(6), layout, ResidualOptions(iterations=5))
    parts = residual_format.pack(codes)
    assert torch.equal(residual_format.decode(residual_format.unpack(parts, layout)), residual_format.decode(codes))


@given(st.integers(0, 2**31 - 1), st.integers(1, 40), st.integers(2, 9), st.sampled_from([1, 7, 16]))
@settings(max_examples=25, deadline=None)
def test_elementwise_codes_survive_any_size(seed: int, size: int, entries: int, block: int) -> None:
    layout = ElementwiseLayout(size, entries, block)
    codes = elementwise.quantize(_weight(1, size, seed)[0], torch.ones(size), layout)
    parts = elementwise_format.pack(codes)
    decoded = elementwise_format.decode(elementwise_format.unpack(parts, layout))
    assert torch.equal(decoded, elementwise_format.decode(codes))
