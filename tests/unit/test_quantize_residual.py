"""Residual codebooks: against slow reference code, k-means at the same bits, and what feedback and residual are for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkvq.errors import PlanError, QuantizationError, ShapeError
from rwkvq.formats import ResidualLayout, VectorLayout, vector
from rwkvq.formats import residual as residual_format
from rwkvq.quantize import kmeans, residual
from rwkvq.quantize.hessian import damped, loss
from rwkvq.quantize.residual import ResidualOptions

DAMPING = 0.01


def case(rows: int = 64, columns: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of inputs of unequal sizes that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3 * torch.eye(columns)
    sizes = torch.rand(columns, generator=generator) + 0.1
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing * sizes
    return weight, inputs.t() @ inputs / len(inputs)


def _slow(weight: Tensor, moment: Tensor, main: Tensor, other: Tensor) -> Tensor:
    """Column by column by falling second moment, vector by vector, in float64, on given codebooks."""
    order = moment.diagonal().argsort(descending=True, stable=True)
    hessian = damped(moment, DAMPING)[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, result = weight.double()[:, order], torch.zeros_like(weight, dtype=torch.float64)
    d = main.shape[1]
    for column in range(weight.shape[1]):
        for top in range(0, len(weight), d):
            point = left[top : top + d, column]
            first = main[(point - main).square().sum(1).argmin()]
            second = other[(point - first - other).square().sum(1).argmin()]
            result[top : top + d, column] = first + second
        error = (left[:, column] - result[:, column]) / upper[column, column]
        left[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    return result[:, order.argsort()]


@pytest.mark.parametrize(("dimension", "columns"), [(4, 24), (2, 24), (1, 24), (4, 140)])
def test_codes_are_those_of_the_slow_reference(dimension: int, columns: int) -> None:
    weight, moment = case(rows=16, columns=columns)
    codes = residual.quantize(weight, moment, ResidualLayout(16, columns, dimension, 16, 4), ResidualOptions())
    expected = _slow(weight, moment, codes.codebook.double(), codes.residual_codebook.double())
    found = residual_format.decode(codes).double()
    # float32 and float64 part ways where two entries are almost equally near; from there on the feedback differs
    assert ((found - expected).abs() < 1e-6).double().mean() > 0.9
    assert loss(weight, found.float(), moment) == pytest.approx(loss(weight, expected.float(), moment), rel=0.05)


def test_the_weighted_error_is_below_that_of_kmeans_at_the_same_bits() -> None:
    weight, moment = case(rows=128, columns=128)
    layout = ResidualLayout(128, 128, 4, 64, 32)
    books = VectorLayout(128, 128, 2, 64, 32, 128, 8, None)
    assert layout.stored_bits() <= books.stored_bits() + 0.02 * 128 * 128
    ours = residual_format.decode(residual.quantize(weight, moment, layout, ResidualOptions()))
    theirs = vector.decode(kmeans.quantize(weight, books, iterations=100))
    assert loss(weight, ours, moment) < 0.9 * loss(weight, theirs, moment)


def test_the_residual_codebook_lowers_the_loss() -> None:
    weight, moment = case()
    losses = [
        loss(weight, residual_format.decode(residual.quantize(weight, moment, layout, ResidualOptions())), moment)
        for layout in (ResidualLayout(64, 64, 4, 16, count) for count in (2, 4, 16))
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < 0.5 * losses[0]


def test_feedback_and_the_second_moment_are_used() -> None:
    weight, moment = case()
    layout = ResidualLayout(64, 64, 4, 32, 8)
    guided = residual.quantize(weight, moment, layout, ResidualOptions())
    blind = residual.quantize(weight, torch.eye(64), layout, ResidualOptions())
    found, plain = residual_format.decode(guided), residual_format.decode(blind)
    assert loss(weight, found, moment) < 0.8 * loss(weight, plain, moment)
    assert (weight - found).square().sum() > (weight - plain).square().sum()


def test_vectors_that_the_codebooks_hold_are_exact() -> None:
    vectors = torch.tensor([[1.0, 2, 3, 4], [-1, 0.5, 0, 0], [8, 8, 8, 8], [0, 0, 0, -2]])
    chosen = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 2, 2]])
    weight = vectors[chosen].transpose(1, 2).reshape(12, 4)
    codes = residual.quantize(weight, torch.eye(4), ResidualLayout(12, 4, 4, 4, 2), ResidualOptions())
    torch.testing.assert_close(residual_format.decode(codes), weight, rtol=0, atol=1e-3)


def test_inputs_that_never_fire_do_no_harm() -> None:
    weight, moment = case(rows=16, columns=16)
    moment[3], moment[:, 3] = 0, 0
    for silent in (moment, torch.zeros(16, 16)):
        codes = residual.quantize(weight, silent, ResidualLayout(16, 16, 2, 16, 4), ResidualOptions())
        found = residual_format.decode(codes)
        assert float((found - weight).square().sum() / weight.square().sum()) < 0.3


def test_codebooks_of_large_weights_are_fitted_to_a_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = case(rows=128)
    layout = ResidualLayout(128, 64, 4, 16, 8)
    whole = residual.quantize(weight, moment, layout, ResidualOptions())
    monkeypatch.setattr(residual, "FITTED", 1024)
    part = residual.quantize(weight, moment, layout, ResidualOptions())
    assert not torch.equal(whole.codebook, part.codebook)
    losses = [loss(weight, residual_format.decode(codes), moment) for codes in (whole, part)]
    assert losses[1] < 1.1 * losses[0]


def test_results_repeat_and_the_arguments_are_left_alone() -> None:
    weight, moment = case()
    copies = weight.clone(), moment.clone()
    layout = ResidualLayout(64, 64, 4, 16, 8)
    torch.manual_seed(1)
    first = residual_format.pack(residual.quantize(weight, moment, layout, ResidualOptions()))
    torch.manual_seed(2)
    second = residual_format.pack(residual.quantize(weight, moment, layout, ResidualOptions()))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(weight, copies[0]) and torch.equal(moment, copies[1])


def test_options_round_trip_and_are_checked() -> None:
    options = ResidualOptions(iterations=7, damping=0.1)
    assert ResidualOptions.from_json(options.to_json()) == options
    for bad in ({"iterations": 1.5}, {"damping": 2}, {"m_step": True}):
        with pytest.raises(PlanError, match="residual options"):
            ResidualOptions.from_json(bad)


def test_unusable_weights_are_refused() -> None:
    layout = ResidualLayout(8, 16, 4, 4, 2)
    with pytest.raises(ShapeError, match=r"\[8, 8\]"):
        residual.quantize(torch.zeros(8, 8), torch.eye(8), layout, ResidualOptions())
    with pytest.raises(ShapeError, match="second moment"):
        residual.quantize(torch.zeros(8, 16), torch.eye(8), layout, ResidualOptions())
    with pytest.raises(QuantizationError, match="NaN"):
        residual.quantize(torch.full((8, 16), torch.nan), torch.eye(16), layout, ResidualOptions())
