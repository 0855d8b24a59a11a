"""Half-quadratic quantization: against slow reference code, its norm against round to nearest, edge cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkvq.errors import QuantizationError, ShapeError
from rwkvq.formats import AffineLayout, ScalarLayout, affine, scalar
from rwkvq.quantize import hessian, hqq, rtn


def heavy_tailed(rows: int, columns: int, seed: int = 0, size: float = 0.05) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, rows, columns, generator=generator)
    return size * normal[0] / (normal[1:].square().mean(0)).sqrt()


def norm(weight: Tensor, quantized: Tensor) -> float:
    return float((weight - quantized).abs().double().pow(hqq.POWER).sum())


def _slow(group: Tensor, bits: int) -> tuple[float, float]:
    """(scale, zero) of one group of weights, number by number in float64."""
    levels = 2**bits - 1
    low, high = float(group.min()), float(group.max())
    scale = float(torch.tensor((high - low) / levels).half())
    zero, best, least, beta = -low / scale, 0.0, float("inf"), hqq.BETA
    for _ in range(hqq.ITERATIONS):
        total, targets = 0.0, []
        for value in group.tolist():
            code = min(max(round(value / scale + zero), 0), levels)
            error = value - (code - zero) * scale
            total += abs(error) ** hqq.POWER
            kept = max(abs(error) - abs(error) ** (hqq.POWER - 1) / beta, 0.0) if error else 0.0
            targets.append(code - (value - (kept if error > 0 else -kept)) / scale)
        if total >= least:
            break
        best, least, zero = zero, total, sum(targets) / len(targets)
        beta *= hqq.KAPPA
    return scale, best


@pytest.mark.parametrize(("bits", "size"), [(2, 0.05), (3, 0.05), (3, 3.0), (4, 20.0)])
def test_zero_points_are_those_of_the_slow_reference(bits: int, size: float) -> None:
    weight = heavy_tailed(6, 64, size=size)
    codes = hqq.quantize(weight, AffineLayout(6, 64, bits, 32))
    for row in range(6):
        for group in range(2):
            scale, zero = _slow(weight[row, 32 * group : 32 * group + 32], bits)
            assert codes.scale[row, group].item() == scale
            assert codes.zero[row, group].item() == pytest.approx(zero, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(("error", "expected"), [(0.0, 0.0), (0.1, 0.0), (1.0, 0.9), (-1.0, -0.9), (-16.0, -15.95647)])
def test_shrinkage_by_hand(error: float, expected: float) -> None:
    assert hqq.shrunk(torch.tensor([error]), 10.0).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("bits", [3, 4])  # with 4 levels, that round to nearest has one at 0 counts for more
@pytest.mark.parametrize("size", [0.05, 5.0])
def test_the_norm_is_below_that_of_round_to_nearest_on_heavy_tails(bits: int, size: float) -> None:
    weight = heavy_tailed(32, 256, size=size)
    fitted = affine.decode(hqq.quantize(weight, AffineLayout(32, 256, bits, 64)))
    nearest = scalar.decode(rtn.quantize(weight, ScalarLayout(32, 256, bits, 64, False)))
    assert norm(weight, fitted) < 0.99 * norm(weight, nearest)


def test_no_group_is_worse_than_its_range() -> None:
    weight = heavy_tailed(64, 64)
    codes = hqq.quantize(weight, AffineLayout(64, 64, 3, 64))
    low, scale = weight.amin(1, keepdim=True), codes.scale.float()
    plain = ((weight - low) / scale).round().clamp(0, 7) * scale + low
    before, after = ((weight - found).abs().pow(hqq.POWER).sum(1) for found in (plain, affine.decode(codes)))
    # storing the zero point in 16 bits moves a group's weights by at most 2**-9 of a step
    assert (after <= before * 1.002).all()
    assert float(after.sum()) < 0.99 * float(before.sum())


def test_levels_on_a_grid_are_exact() -> None:
    weight = torch.tensor([[-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0]])
    assert torch.equal(affine.decode(hqq.quantize(weight, AffineLayout(1, 8, 3, 8))), weight)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-6, 1e4])
def test_constant_groups_are_kept(value: float) -> None:
    weight = torch.full((2, 16), value)
    decoded = affine.decode(hqq.quantize(weight, AffineLayout(2, 16, 3, 8)))
    # as well as two float16 numbers can say it; below 1e-5 scales have few bits
    torch.testing.assert_close(decoded, weight, rtol=1e-3, atol=1e-7)


def test_a_narrow_range_far_from_zero_is_kept() -> None:
    weight = 100 + torch.linspace(0, 1e-4, 16)[None]
    torch.testing.assert_close(
        affine.decode(hqq.quantize(weight, AffineLayout(1, 16, 3, 16))), weight, rtol=1e-3, atol=0
    )


def test_pieces_of_rows_do_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, layout = heavy_tailed(9, 64), AffineLayout(9, 64, 3, 32)
    whole = hqq.quantize(weight, layout)
    monkeypatch.setattr(hessian, "CHUNK", 128)
    pieces = hqq.quantize(weight, layout)
    assert all(torch.equal(getattr(whole, name), getattr(pieces, name)) for name in ("codes", "scale", "zero"))


def test_unusable_weights_are_refused() -> None:
    layout = AffineLayout(2, 32, 3, 32)
    with pytest.raises(ShapeError, match=r"\[2, 16\].*\[2, 32\]"):
        hqq.quantize(torch.zeros(2, 16), layout)
    with pytest.raises(QuantizationError, match="NaN"):
        hqq.quantize(torch.full((2, 32), torch.nan), layout)
