"""The trellis quantizer: loss, feedback, scales, and weights that are hard."""

from __future__ import annotations

import itertools

import pytest
import torch

from rwkvq.errors import PlanError, QuantizationError, ShapeError
from rwkvq.formats import TrellisLayout
from rwkvq.formats.trellis import decode, scales_of
from rwkvq.quantize.hessian import damped, relative_loss
from rwkvq.quantize.trellis import TrellisOptions, find_row_scales, quantize, search_weights

OPTIONS = TrellisOptions()
LAYOUT = TrellisLayout(64, 160, 12, 10, 64)


def correlated(size: int, seed: int) -> torch.Tensor:
    """A second moment with a falling spectrum and channels of unequal size."""
    generator = torch.Generator().manual_seed(seed + 100)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    spectrum = 1 / torch.arange(1, size + 1)
    sizes = torch.exp(0.5 * torch.randn(size, generator=generator))
    return sizes[:, None] * (basis * spectrum) @ basis.T * sizes


def weight_and_moment(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(64, 160, generator=generator), correlated(160, seed)


def test_feedback_lowers_the_loss() -> None:
    weight, moment = weight_and_moment()
    ones = torch.ones(64)
    alone = decode(quantize(weight, torch.eye(160), LAYOUT, OPTIONS, ones))
    fed = decode(quantize(weight, moment, LAYOUT, OPTIONS, ones))
    assert relative_loss(weight, fed, moment) < 0.75 * relative_loss(weight, alone, moment)
    assert relative_loss(weight, alone, torch.eye(160)) == pytest.approx(0.0195, rel=0.15)


def test_sweeps_lower_the_damped_loss() -> None:
    weight, moment = weight_and_moment(5)
    fisher = torch.rand(64, generator=torch.Generator().manual_seed(5)) + 0.1
    hessian = damped(moment, OPTIONS.damping).float()
    layout = TrellisLayout(64, 160, 12, 10, 32, 3, 3)

    def loss(sweeps: int) -> torch.Tensor:
        error = decode(quantize(weight, moment, layout, TrellisOptions(sweeps=sweeps), fisher)) - weight
        return fisher * ((error @ hessian) * error).sum(1)

    losses = [loss(sweeps).view(2, 32).sum(1) for sweeps in (0, 1, 3)]
    assert (losses[1] < losses[0]).all() and (losses[2] < losses[1]).all()


def test_the_order_of_the_columns_changes_nothing() -> None:
    """They are encoded by falling second moment, wherever they stand, and their codes come back to their places."""
    weight, moment = weight_and_moment(8)
    order = torch.randperm(160, generator=torch.Generator().manual_seed(8))
    layout, options = TrellisLayout(64, 160, 12, 10, 32, 3, 3), TrellisOptions(sweeps=1)
    moved = decode(quantize(weight[:, order], moment[order][:, order], layout, options, torch.ones(64)))
    torch.testing.assert_close(moved, decode(quantize(weight, moment, layout, options, torch.ones(64)))[:, order])


def test_rate_offsets_lower_the_loss() -> None:
    weight, moment = weight_and_moment(6)
    fisher = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(6)))

    def loss(row_bits: int, column_bits: int) -> float:
        layout = TrellisLayout(64, 160, 12, 10, 64, row_bits, column_bits)
        error = decode(quantize(weight, moment, layout, OPTIONS, fisher)) - weight
        return float(fisher @ ((error @ moment) * error).sum(1))

    assert loss(3, 0) < 0.95 * loss(0, 0) and loss(0, 3) < 0.95 * loss(0, 0)
    assert loss(3, 3) < 0.97 * min(loss(3, 0), loss(0, 3))


def test_more_bits_lose_less() -> None:
    weight, moment = weight_and_moment(1)
    losses = []
    for rate in (8, 10, 13, 16, 20):
        layout = TrellisLayout(64, 160, rate, 10, 64)
        losses.append(relative_loss(weight, decode(quantize(weight, moment, layout, OPTIONS, torch.ones(64))), moment))
    assert all(later < 0.75 * earlier for earlier, later in itertools.pairwise(losses))


def test_rows_the_loss_depends_on_lose_less() -> None:
    weight, moment = weight_and_moment(2)
    fisher = torch.where(torch.arange(64) % 2 == 0, 16.0, 1.0)
    plain = decode(quantize(weight, moment, LAYOUT, TrellisOptions(row_weights=False), fisher))
    weighted = decode(quantize(weight, moment, LAYOUT, OPTIONS, fisher))

    def loss(decoded: torch.Tensor) -> float:
        error = decoded - weight
        return float(fisher @ ((error @ moment) * error).sum(1))

    assert loss(weighted) < 0.97 * loss(plain)
    assert torch.equal(plain, decode(quantize(weight, moment, LAYOUT, OPTIONS, torch.ones(64))))


def test_scales_are_within_half_a_step_of_the_rows() -> None:
    weight, _ = weight_and_moment(3)
    weight = weight * torch.logspace(-2, 0, 64)[:, None]
    scale, base = find_row_scales(weight)
    rms = weight.double().square().mean(1).sqrt()
    ratio = torch.log2(scales_of(scale, base).double() / rms).abs()
    assert float(ratio.max()) <= 1 / 16 + 1e-3 and int(scale.min()) == 0


def test_zero_rows_dead_inputs_and_zero_weights() -> None:
    weight, moment = weight_and_moment(4)
    weight[7] = 0
    moment[20], moment[:, 20] = 0, 0
    decoded = decode(quantize(weight, moment, LAYOUT, OPTIONS, torch.ones(64)))
    assert float(decoded[7].abs().max()) < 0.01 * float(weight.abs().max())
    assert torch.isfinite(decoded).all()
    assert float((decoded - weight)[:, 20].square().mean() / weight[:, 20].square().mean()) < 0.1
    nothing = decode(quantize(torch.zeros(64, 160), moment, LAYOUT, OPTIONS, torch.zeros(64)))
    assert float(nothing.abs().max()) < 1e-6


def test_search_weights_have_mean_one() -> None:
    scales = torch.tensor([1.0, 2.0, 4.0])
    assert search_weights(scales, None).tolist() == pytest.approx([1 / 7, 4 / 7, 16 / 7])
    assert search_weights(scales, torch.tensor([4.0, 1.0, 0.25])).tolist() == pytest.approx([1, 1, 1])
    assert search_weights(scales, torch.zeros(3)).tolist() == [1, 1, 1]


def test_bad_arguments_are_named() -> None:
    weight, moment = weight_and_moment()
    with pytest.raises(ShapeError, match="does not fit"):
        quantize(weight[:32], moment, LAYOUT, OPTIONS, torch.ones(32))
    with pytest.raises(QuantizationError, match="NaN"):
        quantize(weight.fill_(float("nan")), moment, LAYOUT, OPTIONS, torch.ones(64))
    with pytest.raises(PlanError, match="guide"):
        TrellisOptions.from_json({"guide": 2})
    assert TrellisOptions.from_json({"guide": 0}).guide == 0
    with pytest.raises(PlanError, match="damping"):
        TrellisOptions.from_json({"damping": 0})
