"""Exact weighted one-dimensional k-means and its encoding."""

from __future__ import annotations

import itertools
import operator

import pytest
import torch

from rwkvq.errors import QuantizationError, ShapeError
from rwkvq.formats import ElementwiseLayout
from rwkvq.formats import elementwise as elementwise_format
from rwkvq.quantize.elementwise import cluster, quantize


def test_worked_examples() -> None:
    values = torch.tensor([[0.0, 1.0, 2.0, 10.0]]).repeat(2, 1)
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0], [100.0, 1.0, 1.0, 1.0]])
    centroids, cost = cluster(values, weights, 2)
    assert centroids[0].tolist() == pytest.approx([1, 10]) and centroids[1].tolist() == pytest.approx([3 / 102, 10])
    assert cost.tolist() == pytest.approx([2, 4.911765])


def _cost(values: list[float], weights: list[float]) -> float:
    mean = sum(map(operator.mul, values, weights)) / sum(weights)
    return sum(weight * (value - mean) ** 2 for value, weight in zip(values, weights, strict=True))


@pytest.mark.parametrize("entries", [1, 2, 3, 4])
def test_no_partition_is_better(entries: int) -> None:
    generator = torch.Generator().manual_seed(entries)
    values = torch.randn(2, 6, generator=generator).double()
    weights = torch.rand(2, 6, generator=generator).double()
    centroids, cost = cluster(values, weights, entries)
    for row in range(2):
        best, x, s = float("inf"), values[row].tolist(), weights[row].tolist()
        for labels in itertools.product(range(entries), repeat=6):
            chosen = [[label == entry for label in labels] for entry in set(labels)]
            parts = [(list(itertools.compress(x, mine)), list(itertools.compress(s, mine))) for mine in chosen]
            best = min(best, sum(_cost(*part) for part in parts))
        reached = (weights[row, :, None] * (values[row, :, None] - centroids[row]).square()).amin(1).sum()
        assert float(reached) == pytest.approx(best, rel=1e-6, abs=1e-9)
        assert float(cost[row]) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_more_entries_than_values_repeat_some() -> None:
    centroids, cost = cluster(torch.tensor([[3.0, 1.0, 1.0]]), torch.ones(1, 3), 5)
    assert set(centroids[0].tolist()) == {1.0, 3.0} and centroids.shape == (1, 5)
    assert float(cost[0]) == pytest.approx(0, abs=1e-12)


def test_channels_of_no_importance_still_get_a_close_code() -> None:
    vector = torch.tensor([0.0, 0.1, 0.2, 5.0])
    layout = ElementwiseLayout(4, 4, 4)
    for importance in (torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 0.0])):
        decoded = elementwise_format.decode(quantize(vector, importance, layout))
        torch.testing.assert_close(decoded, vector, atol=0.02, rtol=0)


def test_importance_moves_the_codebook() -> None:
    generator = torch.Generator().manual_seed(0)
    vector, layout = torch.rand(128, generator=generator), ElementwiseLayout(128, 8, 64)
    importance = torch.rand(128, generator=generator) ** 4
    errors = []
    for weights in (importance, torch.ones(128)):
        decoded = elementwise_format.decode(quantize(vector, weights, layout))
        errors.append(float((importance * (decoded - vector).square()).sum()))
    assert errors[0] < 0.8 * errors[1]


def test_a_short_last_block_has_its_own_codebook() -> None:
    vector = torch.cat([torch.zeros(64), torch.tensor([7.0, -7.0, 3.5])])
    codes = quantize(vector, torch.ones(67), ElementwiseLayout(67, 8, 64))
    torch.testing.assert_close(elementwise_format.decode(codes), vector, atol=0.05, rtol=0)
    assert codes.codebook.shape == (2, 8)


def test_unusable_vectors_are_refused() -> None:
    layout = ElementwiseLayout(4, 2, 4)
    with pytest.raises(ShapeError, match="vector"):
        quantize(torch.zeros(5), torch.ones(5), layout)
    with pytest.raises(ShapeError, match="importance"):
        quantize(torch.zeros(4), torch.ones(5), layout)
    with pytest.raises(QuantizationError, match="NaN"):
        quantize(torch.full((4,), torch.nan), torch.ones(4), layout)
    with pytest.raises(QuantizationError, match="below 0"):
        quantize(torch.zeros(4), -torch.ones(4), layout)
