"""GPTQ after an input rotation: the same loss in other coordinates, and lower where columns stand out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkvq.errors import QuantizationError, ShapeError
from rwkvq.formats import RotatedLayout, ScalarLayout, rotated, scalar
from rwkvq.formats.hadamard import rotate, rotate_moment
from rwkvq.quantize import gptq, rotation
from rwkvq.quantize.gptq import GptqOptions
from rwkvq.quantize.hessian import loss

INNER = ScalarLayout(48, 192, 3, 64, True)
OPTIONS = GptqOptions(clip_search=True)


def case(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A Gaussian weight [48, 192] with six columns ten times as large, and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(48, 192, generator=generator) * 0.05
    weight[:, torch.randperm(192, generator=generator)[:6]] *= 10
    mixing = torch.randn(192, 192, generator=generator) / 192**0.5 + torch.eye(192)
    inputs = torch.randn(800, 192, generator=generator) @ mixing
    return weight, inputs.t() @ inputs / len(inputs)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_outlier_columns_cost_less_than_without_rotation(seed: int, symmetric: bool) -> None:
    weight, moment = case(seed)
    inner = ScalarLayout(48, 192, 3, 64, symmetric)
    plain = loss(weight, scalar.decode(gptq.quantize(weight, moment, inner, OPTIONS)), moment)
    codes = rotation.quantize(weight, moment, RotatedLayout(inner), OPTIONS)
    assert loss(weight, rotated.decode(codes), moment) < 0.8 * plain


def test_the_loss_is_that_of_the_rotated_weight() -> None:
    weight, moment = case()
    codes = rotation.quantize(weight, moment, RotatedLayout(INNER), OPTIONS)
    turned, turned_moment = rotate(weight, codes.flips), rotate_moment(moment, codes.flips)
    inside = loss(turned, scalar.decode(codes.inner), turned_moment)
    assert loss(weight, rotated.decode(codes), moment) == pytest.approx(inside, rel=1e-4)


def test_flips_are_the_same_in_every_run_and_both_signs_occur() -> None:
    flips = rotation.draw_flips(256)
    assert flips.dtype == torch.uint8 and torch.equal(flips, rotation.draw_flips(256))
    assert 96 < int(flips.sum()) < 160


def test_an_odd_number_of_columns_is_not_rotated() -> None:
    weight, moment = case()
    weight, moment = weight[:, :63], moment[:63, :63]
    layout = ScalarLayout(48, 63, 3, 63, True)
    codes = rotation.quantize(weight, moment, RotatedLayout(layout), GptqOptions())
    plain = scalar.decode(gptq.quantize(weight, moment, layout, GptqOptions()))
    # a symmetric grid with an even number of levels is not the same for both signs; the loss is of the same size
    assert loss(weight, rotated.decode(codes), moment) == pytest.approx(loss(weight, plain, moment), rel=0.2)


def test_the_arguments_are_left_alone() -> None:
    weight, moment = case()
    copies = weight.clone(), moment.clone()
    rotation.quantize(weight, moment, RotatedLayout(INNER), OPTIONS)
    assert torch.equal(weight, copies[0]) and torch.equal(moment, copies[1])


def test_unusable_weights_are_refused() -> None:
    layout = RotatedLayout(ScalarLayout(2, 4, 3, 4, False))
    with pytest.raises(ShapeError, match=r"\[2, 5\]"):
        rotation.quantize(torch.zeros(2, 5), torch.eye(5), layout, OPTIONS)
    with pytest.raises(ShapeError, match="second moment"):
        rotation.quantize(torch.zeros(2, 4), torch.eye(5), layout, OPTIONS)
    with pytest.raises(QuantizationError, match="NaN"):
        rotation.quantize(torch.full((2, 4), torch.nan), torch.eye(4), layout, OPTIONS)
