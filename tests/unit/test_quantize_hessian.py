"""The inverse factor, dead columns, damping, the loss."""

from __future__ import annotations

import pytest
import torch

from rwkvq.errors import QuantizationError, ShapeError
from rwkvq.quantize.hessian import check_statistics, inverse_factor, loss, relative_loss, revived


def _moment(size: int, seed: int = 0) -> torch.Tensor:
    inputs = torch.randn(4 * size, size, generator=torch.Generator().manual_seed(seed))
    mixed = inputs @ torch.randn(size, size, generator=torch.Generator().manual_seed(seed + 1))
    return mixed.t() @ mixed / len(mixed)


def test_worked_example() -> None:
    upper = inverse_factor(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 0.0)
    expected = torch.tensor([[0.816497, -0.408248], [0.0, 0.707107]])
    torch.testing.assert_close(upper, expected, atol=1e-6, rtol=0)


def test_factor_is_upper_and_inverts_the_damped_moment() -> None:
    moment = _moment(24)
    upper = inverse_factor(moment, 0.01)
    damped = moment.double() + 0.01 * moment.double().diagonal().mean() * torch.eye(24)
    assert torch.equal(upper, upper.triu()) and upper.dtype == torch.float32
    torch.testing.assert_close(upper.double().t() @ upper.double() @ damped, torch.eye(24).double(), atol=1e-4, rtol=0)


def test_dead_columns_get_the_mean_diagonal_and_stay_apart() -> None:
    moment = torch.diag(torch.tensor([1.0, 0.0, 3.0]))
    assert revived(moment).diagonal().tolist() == [1.0, 2.0, 3.0]
    assert revived(torch.zeros(2, 2)).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert inverse_factor(moment, 0.01)[1].tolist()[0::2] == [0.0, 0.0]
    assert moment[1, 1] == 0  # the argument is left alone


def test_damping_grows_until_the_factorisation_succeeds() -> None:
    # eigenvalues 2.5 and -0.5, mean diagonal 1: damping 0.1 fails, 1.0 succeeds
    indefinite = torch.tensor([[1.0, 1.5], [1.5, 1.0]])
    upper = inverse_factor(indefinite, 0.01).double()
    inverse = torch.linalg.inv(upper.t() @ upper)
    torch.testing.assert_close(inverse, torch.tensor([[2.0, 1.5], [1.5, 2.0]]).double(), atol=1e-5, rtol=0)
    with pytest.raises(QuantizationError, match="larger damping"):
        inverse_factor(torch.tensor([[1.0, 200.0], [200.0, 1.0]]), 0.01)


def test_loss_is_the_squared_output_error() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, quantized = torch.randn(3, 5, generator=generator), torch.randn(3, 5, generator=generator)
    inputs = torch.randn(40, 5, generator=generator)
    expected = float((inputs @ (weight - quantized).t()).square().sum())
    assert loss(weight, quantized, inputs.t() @ inputs) == pytest.approx(expected, rel=1e-5)
    whole = float((inputs @ weight.t()).square().sum())
    assert relative_loss(weight, quantized, inputs.t() @ inputs) == pytest.approx(expected / whole, rel=1e-5)
    assert relative_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.eye(2)) == 0.0


def test_unusable_statistics_are_refused() -> None:
    weight = torch.zeros(2, 3)
    with pytest.raises(ShapeError, match=r"\[2, 3\]"):
        check_statistics(weight, torch.eye(2))
    with pytest.raises(QuantizationError, match="second moment"):
        check_statistics(weight, torch.eye(3) * torch.nan)
    with pytest.raises(QuantizationError, match="weight"):
        check_statistics(weight + torch.inf, torch.eye(3))
