"""Layouts of one weight: groups, fallbacks of narrow LoRA factors, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rwkvq.checkpoint.names import Weight
from rwkvq.errors import PlanError
from rwkvq.formats import AffineLayout, DenseLayout, ElementwiseLayout, ResidualLayout, ScalarLayout, VectorLayout
from rwkvq.plan import layouts
from rwkvq.plan.presets import Resolved, resolve_preset
from rwkvq.settings import PlanSettings, QuantizeSettings, ScalarSettings, VectorSettings


def weight(weight_class: str, *shape: int) -> Weight:
    return Weight("blocks.0.x", "blocks.0.x", None, weight_class, False, shape, 0, "site")  # type: ignore[arg-type]


def resolved(preset: str = "rwkvq", **quantize: Any) -> Resolved:
    return resolve_preset(PlanSettings(preset=preset), QuantizeSettings(**quantize))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "group", "remark"),
    [
        (256, 64, ""),
        (32, 32, "groups of 32, because 64 does not divide 32 columns"),
        (480, 32, "groups of 32, because 64 does not divide 480 columns"),
        (80, 16, "groups of 16, because 64 does not divide 80 columns"),
        (40, 40, "one group a row of 40 columns, because 64 does not divide them"),
        (8, 8, "one group a row of 8 columns, because 64 does not divide them"),
    ],
)
def test_lora_groups_fall_back(columns: int, group: int, remark: str) -> None:
    layout, found = layouts.scalar_layout(weight("lora", 128, columns), resolved(), 3)
    assert layout == ScalarLayout(128, columns, 3, group, False)
    assert found == remark


def test_lora_without_a_usable_group_is_refused() -> None:
    with pytest.raises(PlanError, match=r"blocks.0.x: quantize.scalar.group_size 64 does not divide its 100 columns"):
        layouts.scalar_layout(weight("lora", 128, 100), resolved(), 3)


def test_matrix_needs_an_exact_group() -> None:
    settings = resolved(scalar=ScalarSettings(group_size=48))
    with pytest.raises(
        PlanError, match=r"group_size 48 does not divide its 256 columns; set .* such as 16 or 32 or 64"
    ):
        layouts.scalar_layout(weight("matrix", 256, 256), settings, 3)
    settings = resolved(vector=VectorSettings(group_columns=48))
    with pytest.raises(PlanError, match=r"quantize.vector.group_columns 48 does not divide its 256 columns"):
        layouts.vector_layout(weight("matrix", 256, 256), settings)


def test_vector_layouts_of_the_presets() -> None:
    matrix = weight("matrix", 256, 512)
    assert layouts.vector_layout(matrix, resolved())[0] == VectorLayout(256, 512, 2, 64, 64, 64, 8, None)
    assert layouts.vector_layout(matrix, resolved("text"))[0] == VectorLayout(256, 512, 2, 64, 32, 64, 8, None)
    assert layouts.vector_layout(matrix, resolved("official"))[0] == VectorLayout(256, 512, 1, 8, 2, 32, 8, 4)


def test_narrow_weights_get_smaller_vector_groups() -> None:
    layout, remark = layouts.vector_layout(weight("lora", 24, 32), resolved())
    assert layout == VectorLayout(24, 32, 2, 64, 24, 32, 8, None)
    assert remark == "groups of 32, because 64 does not divide 32 columns"
    # two codebooks have two singular values
    assert layouts.vector_layout(weight("lora", 4, 32), resolved("official"))[0].svd_rank == 2


@pytest.mark.parametrize("preset", ["text", "camera", "official", "rwkvq"])
def test_nominal_bits_are_the_published_ones(preset: str) -> None:
    matrix, settings = weight("matrix", 2048, 2048), resolved(preset)
    scalar, vector = layouts.scalar_layout(matrix, settings, 3)[0], layouts.vector_layout(matrix, settings)[0]
    expected = {"text": (3.25, 3.5), "camera": (3.5, 3.25), "official": (3.25, 3.5), "rwkvq": (3.25, 3.25)}
    assert (scalar.nominal_bits(), vector.nominal_bits()) == expected[preset]


def test_stored_bits_by_hand() -> None:
    matrix = weight("matrix", 2048, 2048)
    numel = 2048 * 2048
    assert layouts.scalar_layout(matrix, resolved(), 3)[0].stored_bits() == numel * (3 + 16 / 64 + 3 / 64)
    assert layouts.scalar_layout(matrix, resolved("camera"), 3)[0].stored_bits() == numel * (3 + 19 / 32)
    symmetric = resolved(scalar=ScalarSettings(symmetric=True))
    assert layouts.scalar_layout(matrix, symmetric, 3)[0].stored_bits() == numel * 3.25
    assert layouts.vector_layout(matrix, resolved())[0].stored_bits() == numel * (3 + 0.25 + 16 / 4096)
    assert layouts.vector_layout(matrix, resolved("text"))[0].stored_bits() == numel * (3 + 0.5 + 16 / 2048)


def baseline(policy: str, **quantize: Any) -> Resolved:
    return resolve_preset(PlanSettings(policy=policy), QuantizeSettings(**quantize))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weight_class", "columns", "group", "remark"),
    [
        ("matrix", 256, 128, ""),
        ("matrix", 192, 64, "groups of 64, because 128 does not divide 192 columns"),
        ("lora", 64, 64, "groups of 64, because 128 does not divide 64 columns"),
        ("lora", 480, 32, "groups of 32, because 128 does not divide 480 columns"),
    ],
)
def test_hqq_takes_groups_of_128_where_they_divide(weight_class: str, columns: int, group: int, remark: str) -> None:
    found = layouts.affine_layout(weight(weight_class, 64, columns), baseline("hqq"))
    assert found == (AffineLayout(64, columns, 3, group), remark)


def test_hqq_takes_the_group_that_is_set() -> None:
    found, _ = layouts.affine_layout(weight("matrix", 64, 256), baseline("hqq", scalar=ScalarSettings(group_size=32)))
    assert found == AffineLayout(64, 256, 3, 32)
    with pytest.raises(PlanError, match=r"group_size 100 does not divide its 256 columns"):
        layouts.affine_layout(weight("matrix", 64, 256), baseline("hqq", scalar=ScalarSettings(group_size=100)))


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((256, 32), (2, 32, 2)),
        ((32, 256), (2, 32, 2)),
        ((256, 256), (4, 256, 16)),
        ((1024, 256), (4, 1024, 4)),
        ((2048, 2048), (4, 1024, 8)),
        ((4096, 4096), (4, 4096, 2)),
        ((255, 1024), (1, 4, 2)),
    ],
)
def test_residual_codebooks_fit_the_size_of_the_weight(shape: tuple[int, int], sizes: tuple[int, int, int]) -> None:
    layout, remark = layouts.residual_layout(weight("lora", *shape), baseline("residual"))
    assert layout == ResidualLayout(*shape, *sizes)
    assert remark == f"{sizes[1]} + {sizes[2]} entries of {sizes[0]} weights"
    assert 3 <= layout.stored_bits() / (shape[0] * shape[1]) <= 3.27


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_residual_codebooks_keep_to_the_bits(bits: int) -> None:
    layout, _ = layouts.residual_layout(weight("matrix", 256, 256), baseline("residual", bits=bits))
    assert bits <= layout.stored_bits() / 256**2 <= bits + 0.27
    short = baseline("residual", bits=bits, vector=VectorSettings(dimension=1))
    assert layouts.residual_layout(weight("matrix", 256, 256), short)[0].dimension == 1


def test_weights_that_are_smaller_than_their_codebooks_are_refused() -> None:
    with pytest.raises(PlanError, match=r"blocks.0.x: no two codebooks fit its 32 weights in 3 bits each"):
        layouts.residual_layout(weight("lora", 4, 8), baseline("residual"))


def test_oversized_codebooks_are_refused() -> None:
    matrix = weight("matrix", 256, 256)
    with pytest.raises(PlanError, match=r"a codebook of 131072 bits would serve a group of 49152 bits of codes"):
        layouts.vector_layout(matrix, resolved(vector=VectorSettings(dimension=4)))
    with pytest.raises(PlanError, match=r"8 bits with dimension 2 need a codebook of 65536 entries, at most 32768"):
        layouts.vector_layout(matrix, resolved(bits=8))


def test_dimension_that_does_not_divide_is_refused() -> None:
    with pytest.raises(PlanError, match=r"blocks.0.x: vector layout: dimension must divide"):
        layouts.vector_layout(weight("lora", 64, 33), resolved())


def test_other_layouts() -> None:
    vector = weight("elementwise", 320)
    assert layouts.elementwise_layout(vector, resolved()) == ElementwiseLayout(320, 8, 64)
    assert layouts.elementwise_scalar_layout(weight("elementwise", 96), resolved(), 8) == ScalarLayout(
        1, 96, 8, 32, False
    )
    # 3-bit codes, 8 int8 values for 64 channels, one fp16 scale
    assert layouts.elementwise_layout(vector, resolved()).stored_bits() == 320 * 4.25


def test_dense_dtypes() -> None:
    kept = weight("keep", 1, 1, 64)
    for dtype, own, half in (
        (torch.float16, "float16", "float16"),
        (torch.bfloat16, "bfloat16", "bfloat16"),
        (torch.float32, "float32", "float16"),
        (torch.float64, "float32", "float16"),
    ):
        assert layouts.kept_layout(kept, dtype) == DenseLayout((1, 1, 64), own)  # type: ignore[arg-type]
        assert layouts.half_layout(kept, dtype) == DenseLayout((1, 1, 64), half)  # type: ignore[arg-type]
