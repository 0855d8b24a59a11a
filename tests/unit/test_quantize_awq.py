"""Activation-aware scaling: never worse than rounding, and what the search and the clipping choose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkvq.errors import QuantizationError, ShapeError
from rwkvq.formats import ScalarLayout, ScaledLayout, scalar, scaled
from rwkvq.quantize import awq, rtn
from rwkvq.quantize.hessian import loss


def case(spread: float, rows: int = 32, columns: int = 128, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A Gaussian weight, and the second moment of correlated inputs whose sizes spread by `spread` (log-normal)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(spread * torch.randn(columns, generator=generator))
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing * sizes
    return weight, inputs.t() @ inputs / len(inputs)


def output_error(weight: Tensor, moment: Tensor, layout: ScaledLayout, *, clip_search: bool = False) -> float:
    return loss(weight, scaled.decode(awq.quantize(weight, moment, layout, clip_search=clip_search)), moment)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_the_output_error_is_never_above_that_of_rounding(spread: float, bits: int, symmetric: bool) -> None:
    weight, moment = case(spread)
    inner = ScalarLayout(32, 128, bits, 32, symmetric)
    rounded = loss(weight, scalar.decode(rtn.quantize(weight, inner)), moment)
    found = output_error(weight, moment, ScaledLayout(inner))
    assert found <= rounded
    if spread == 2.0:
        assert found < 0.7 * rounded


def test_the_best_of_all_exponents_is_taken() -> None:
    weight, moment = case(1.0)
    layout = ScaledLayout(ScalarLayout(32, 128, 3, 64, False))
    tried = {}
    for exponent in awq.EXPONENTS:
        scale = awq.column_scales(moment, exponent)
        inner = rtn.quantize(weight * scale.float(), layout.inner)
        tried[exponent] = loss(weight, scalar.decode(inner) / scale.float(), moment)
    best = min(tried, key=tried.__getitem__)
    codes = awq.quantize(weight, moment, layout)
    assert 0 < best < 0.95
    assert torch.equal(codes.column_scale, awq.column_scales(moment, best))
    assert loss(weight, scaled.decode(codes), moment) == pytest.approx(tried[best])


def test_scales_are_powers_of_the_inputs_root_mean_square() -> None:
    moment = torch.diag(torch.tensor([1.0, 16.0, 0.0, 256.0]))  # the third input never fired
    mean = (273 / 3) ** 0.5
    expected = torch.tensor([1.0, 4.0, mean, 16.0]) / 4  # smallest 1, largest 16
    torch.testing.assert_close(awq.column_scales(moment, 1.0).float(), expected, atol=0, rtol=1e-3)
    torch.testing.assert_close(awq.column_scales(moment, 0.5).float(), expected.sqrt(), atol=0, rtol=1e-3)
    assert awq.column_scales(moment, 0.0).tolist() == [1.0] * 4
    assert awq.column_scales(torch.zeros(4, 4), 0.5).tolist() == [1.0] * 4


@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_lowers_the_error_of_every_group(symmetric: bool) -> None:
    weight, moment = case(0.5)
    layout = ScaledLayout(ScalarLayout(32, 128, 3, 32, symmetric))
    plain, clipped = (awq.quantize(weight, moment, layout, clip_search=search) for search in (False, True))
    assert torch.equal(plain.column_scale, clipped.column_scale)
    errors = [scaled.decode(codes) - weight for codes in (plain, clipped)]
    for start in range(0, 128, 32):
        span = slice(start, start + 32)
        before, after = (((error[:, span] @ moment[span, span]) * error[:, span]).sum(1) for error in errors)
        assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.95 * before.sum()
    assert output_error(weight, moment, layout, clip_search=True) < output_error(weight, moment, layout)


def test_a_clipped_group_ends_at_a_share_of_its_largest_weight() -> None:
    weight = torch.full((1, 16), 0.1)
    weight[0, ::2] = -0.1
    weight[0, 3] = 0.16  # gives way to the others, which then lie on levels
    codes = awq.quantize(weight, torch.eye(16), ScaledLayout(ScalarLayout(1, 16, 2, 16, True)), clip_search=True)
    limits = codes.inner.scale.float() * 3 / 2 / 0.16
    assert limits.item() == pytest.approx(min(awq.CLIPS, key=lambda clip: abs(clip - limits.item())), rel=1e-3)
    assert limits < 1


def test_the_arguments_are_left_alone_and_the_result_is_repeatable() -> None:
    weight, moment = case(1.0)
    copies = weight.clone(), moment.clone()
    layout = ScaledLayout(ScalarLayout(32, 128, 3, 32, False))
    first, second = (scaled.pack(awq.quantize(weight, moment, layout, clip_search=True)) for _ in range(2))
    assert torch.equal(weight, copies[0]) and torch.equal(moment, copies[1])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unusable_weights_are_refused() -> None:
    layout = ScaledLayout(ScalarLayout(2, 4, 3, 4, False))
    with pytest.raises(ShapeError, match=r"\[2, 5\]"):
        awq.quantize(torch.zeros(2, 5), torch.eye(5), layout)
    with pytest.raises(ShapeError, match="second moment"):
        awq.quantize(torch.zeros(2, 4), torch.eye(5), layout)
    with pytest.raises(QuantizationError, match="NaN"):
        awq.quantize(torch.full((2, 4), torch.nan), torch.eye(4), layout)
