"""Totals of a plan, by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from rwkvq.formats import DenseLayout, ElementwiseLayout, Layout, ScalarLayout, VectorLayout
from rwkvq.plan.bits import totals
from rwkvq.plan.tensor import PlannedTensor


@dataclass(frozen=True)
class Rows:
    tensors: tuple[PlannedTensor, ...]


def planned(name: str, weight_class: str, shape: tuple[int, ...], layout: Layout, method: str) -> PlannedTensor:
    return PlannedTensor(name, name, None, False, weight_class, None, shape, layout, method, {}, "", None)  # type: ignore[arg-type]


MATRIX = planned("m", "matrix", (64, 64), ScalarLayout(64, 64, 3, 64, False), "gptq")
LORA = planned("l", "lora", (32, 64), VectorLayout(32, 64, 2, 64, 32, 64, 8, None), "gptvq")
PLAIN_LORA = planned("f", "lora", (32, 64), DenseLayout((32, 64), "float16"), "keep")
VECTOR = planned("v", "elementwise", (64,), ElementwiseLayout(64, 8, 64), "elementwise")
NORM = planned("n", "keep", (64,), DenseLayout((64,), "float32"), "keep")
EMB = planned("emb.weight", "keep", (100, 64), DenseLayout((100, 64), "float16"), "keep")
HEAD = planned("head.weight", "keep", (100, 64), ScalarLayout(100, 64, 8, 64, True), "rtn")


def test_totals_by_hand() -> None:
    found = totals(Rows((EMB, MATRIX, LORA, PLAIN_LORA, VECTOR, NORM, HEAD)))
    matrix = 4096 * 3 + 64 * 16 + 64 * 3
    lora = 2048 * 3 + 64 * 2 * 8 + 16
    body = matrix + lora + 2048 * 16 + (64 * 3 + 8 * 8 + 16) + 64 * 32
    everything = body + 6400 * 16 + 6400 * 8 + 100 * 16
    assert (found.matrices, found.matrix_weights) == (2, 6144)
    assert found.matrix_bits == (matrix + lora) / 6144
    assert (found.body_bits, found.body_weights) == (body / 8320, 8320)
    assert (found.total_stored_bits, found.weights) == (everything, 21120)
    assert found.stored_bits_per_weight == everything / 21120
    assert found.nominal_by_count == pytest.approx((3.25 + 3.5) / 2)
    assert found.nominal_by_weights == pytest.approx((3.25 * 4096 + 3.5 * 2048) / 6144)
    assert found.to_json()["matrices"] == 2


def test_without_quantized_matrices_their_fields_are_empty() -> None:
    found = totals(Rows((EMB, PLAIN_LORA)))
    assert (found.matrix_bits, found.nominal_by_count, found.nominal_by_weights) == (None, None, None)
    assert found.body_bits == 16.0
    assert totals(Rows(())).body_bits == 0.0
