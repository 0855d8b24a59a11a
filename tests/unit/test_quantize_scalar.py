"""Grids, round to nearest, GPTQ and scalar sweeps, against hand-worked numbers and slow reference code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkvq.errors import PlanError, QuantizationError, ShapeError
from rwkvq.formats import ScalarLayout, scalar
from rwkvq.quantize import gptq, rtn
from rwkvq.quantize.gptq import GptqOptions, Walk, unit_rows
from rwkvq.quantize.grid import Grid, find_grid, range_grid, round_to
from rwkvq.quantize.hessian import damped, inverse_factor, loss
from rwkvq.quantize.sweep import sweep_scalar

DAMPING = 0.01


def _case(rows: int = 24, columns: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A heavy-tailed weight and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) ** 3 * 0.02
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3 * torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    return weight, inputs.t() @ inputs / len(inputs)


def _slow_gptq(weight: Tensor, moment: Tensor, bits: int, group_size: int) -> Tensor:
    """Column by column in float64, feedback into all later columns at once: the textbook form, without a search."""
    hessian = moment.double() + DAMPING * moment.double().diagonal().mean() * torch.eye(len(moment))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, result = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for column in range(weight.shape[1]):
        if column % group_size == 0:
            group = left[:, column : column + group_size]
            low, high = group.amin(1).clamp_max(0), group.amax(1).clamp_min(0)
            scale = ((high - low) / (2**bits - 1)).half().double()
            zero = (-low / scale).round()
        levels = ((left[:, column] / scale).round() + zero).clamp(0, 2**bits - 1)
        result[:, column] = (levels - zero) * scale
        error = (left[:, column] - result[:, column]) / upper[column, column]
        left[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    return result.float()


def test_worked_example_of_the_grid() -> None:
    values = torch.tensor([[-0.3], [0.1], [0.5], [0.9]])
    grid = range_grid(values, 3, symmetric=False)
    assert grid.scale.item() == pytest.approx(1.2 / 7, rel=2**-11) and grid.zero.item() == 2
    assert round_to(values, grid, 3).view(-1).tolist() == [0, 3, 5, 7]
    decoded = scalar.decode(rtn.quantize(values.t(), ScalarLayout(1, 4, 3, 4, False)))
    expected = torch.tensor([[-0.342857, 0.171429, 0.514286, 0.857143]])
    torch.testing.assert_close(decoded, expected, atol=0, rtol=2**-11)  # the scale is rounded to float16


def test_worked_example_of_gptq() -> None:
    weight, moment = torch.tensor([[0.6, 0.6]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    integers = Grid(torch.ones(1, dtype=torch.float16), torch.tensor([4.0]))
    upper = inverse_factor(moment, 0.0)
    walk = Walk(weight.t().clone(), unit_rows(upper.clone()), torch.empty(2, 1), 3)
    walk.round_block(0, 2, [integers, integers])
    assert walk.steps.view(-1).tolist() == [1, 0]
    assert walk.columns[1].item() == pytest.approx(0.4)
    parts = ((torch.tensor([0.6, 0.4]) - walk.steps.view(-1)) / upper.diagonal()).square()
    assert parts.tolist() == pytest.approx([0.24, 0.32])
    assert loss(weight, walk.steps.t(), moment) == pytest.approx(0.56)
    assert loss(weight, torch.ones(1, 2), moment) == pytest.approx(0.96)


@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_zeros_and_constants_keep_a_usable_scale(symmetric: bool) -> None:
    weight = torch.tensor([[0.0] * 4 + [0.25] * 4 + [-1e-9] * 4 + [1e9] * 4])
    codes = rtn.quantize(weight, ScalarLayout(1, 16, 3, 4, symmetric), clip_search=True)
    assert bool(torch.isfinite(codes.scale).all()) and bool((codes.scale != 0).all())
    decoded = scalar.decode(codes)
    assert decoded[0, :4].tolist() == [0.0] * 4
    torch.testing.assert_close(decoded[0, 4:8], weight[0, 4:8], atol=0, rtol=0.002 if not symmetric else 0.02)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_clip_search_never_raises_the_error_it_minimises(bits: int, symmetric: bool) -> None:
    values = _case()[0].t().contiguous()
    weights = torch.linspace(0.5, 2, len(values))
    for omega, power in ((None, 2.4), (weights, 2.0)):
        errors = []
        for search in (False, True):
            grid = find_grid(values, bits, symmetric=symmetric, clip_search=search, weights=omega)
            decoded = (round_to(values, grid, bits) - grid.zero) * grid.scale.float()
            error = (values - decoded).abs() ** power
            errors.append((error if omega is None else error * omega[:, None]).sum(0))
        assert bool((errors[1] <= errors[0] * 1.001).all())
        assert bits == 8 or errors[1].sum() < 0.99 * errors[0].sum()


def test_the_clip_search_finds_what_trying_every_factor_finds() -> None:
    values = _case()[0].t().contiguous()
    start = range_grid(values, 3, symmetric=False)
    tried = []
    for factor in range(100, 20, -1):
        scale = (start.scale.float() * factor / 100).half().float()
        levels = ((values / scale).round() + start.zero).clamp(0, 7)
        tried.append(((levels - start.zero) * scale - values).square().sum(0))
    grid = find_grid(values, 3, symmetric=False, clip_search=True, weights=torch.ones(len(values)))
    found = (round_to(values, grid, 3) - grid.zero) * grid.scale.float() - values
    assert float(found.square().sum()) <= 1.001 * float(torch.stack(tried).amin(0).sum())


def test_a_symmetric_search_turns_the_grid_towards_the_heavier_side() -> None:
    values = torch.tensor([[4.0, -4.0], [3.0, -3.0], [2.0, -2.0], [-3.0, 3.0]])
    grid = find_grid(values, 3, symmetric=True, clip_search=True, weights=torch.ones(4))
    assert grid.scale.tolist() == pytest.approx([-1.0, 1.0], rel=0.01)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 16), (3, 16), (3, 64), (4, 32)])
def test_gptq_equals_the_slow_reference(bits: int, group_size: int) -> None:
    weight, moment = _case()
    codes = gptq.quantize(weight, moment, ScalarLayout(24, 64, bits, group_size, False), GptqOptions())
    reference = _slow_gptq(weight, moment, bits, group_size)
    assert (scalar.decode(codes) - reference).abs().lt(1e-6).float().mean() > 0.98  # float32 ties may fall elsewhere
    hessian = damped(moment, DAMPING)
    assert loss(weight, scalar.decode(codes), hessian) <= 1.01 * loss(weight, reference, hessian)


def test_groups_wider_than_a_block_are_one_group() -> None:
    weight, moment = _case(rows=4, columns=192)
    codes = gptq.quantize(weight, moment, ScalarLayout(4, 192, 3, 192, False), GptqOptions())
    reference = _slow_gptq(weight, moment, 3, 192)
    hessian = damped(moment, DAMPING)
    assert codes.scale.shape == (4, 1)
    assert loss(weight, scalar.decode(codes), hessian) <= 1.01 * loss(weight, reference, hessian)


def test_every_part_of_the_method_lowers_the_loss() -> None:
    weight, moment = _case()
    for symmetric in (False, True):
        layout = ScalarLayout(24, 64, 3, 32, symmetric)
        kinds = [
            rtn.quantize(weight, layout),
            gptq.quantize(weight, moment, layout, GptqOptions()),
            gptq.quantize(weight, moment, layout, GptqOptions(clip_search=True)),
            gptq.quantize(weight, moment, layout, GptqOptions(clip_search=True, sweeps=2)),
        ]
        losses = [loss(weight, scalar.decode(codes), moment) for codes in kinds]
        assert losses == sorted(losses, reverse=True) and len(set(losses)) == 4


def test_static_groups_use_the_grids_of_the_original_weight() -> None:
    weight, moment = _case()
    layout = ScalarLayout(24, 64, 3, 32, False)
    for act_order in (False, True):
        codes = gptq.quantize(weight, moment, layout, GptqOptions(static_groups=True, act_order=act_order))
        plain = rtn.quantize(weight, layout)
        assert codes.zero is not None and plain.zero is not None
        assert torch.equal(codes.scale, plain.scale) and torch.equal(codes.zero, plain.zero)
        assert loss(weight, scalar.decode(codes), moment) < loss(weight, scalar.decode(plain), moment)


def test_activation_order_is_a_permutation_that_nothing_stores() -> None:
    weight, moment = _case()
    layout, options = ScalarLayout(24, 64, 3, 64, False), GptqOptions(static_groups=True, act_order=True)
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    sorted_first = gptq.quantize(weight[:, order], moment[order][:, order], layout, options)
    back = torch.empty_like(order)
    back[order] = torch.arange(64)
    assert torch.equal(
        scalar.decode(sorted_first)[:, back], scalar.decode(gptq.quantize(weight, moment, layout, options))
    )


def test_dead_inputs_keep_their_weights() -> None:
    weight, moment = _case()
    moment[:, 5] = moment[5] = 0
    codes = gptq.quantize(weight, moment, ScalarLayout(24, 64, 8, 32, False), GptqOptions(sweeps=1))
    step = codes.scale[:, 0].float()
    assert ((scalar.decode(codes)[:, 5] - weight[:, 5]).abs() <= 0.51 * step).all()


def test_a_sweep_takes_every_single_change_that_helps() -> None:
    weight, moment = _case(rows=3, columns=8)
    layout = ScalarLayout(3, 8, 3, 8, False)
    codes = gptq.quantize(weight, moment, layout, GptqOptions())
    for _ in range(20):
        codes = sweep_scalar(codes, weight, moment, 1e-9)
    best = loss(weight, scalar.decode(codes), moment)
    for row in range(3):
        for column in range(8):
            for level in range(8):
                changed = codes.codes.clone()
                changed[row, column] = level
                other = scalar.ScalarCodes(layout, changed, codes.scale, codes.zero)
                assert loss(weight, scalar.decode(other), moment) >= best * (1 - 1e-5)


def test_the_arguments_are_left_alone() -> None:
    weight, moment = _case()
    copies = weight.clone(), moment.clone()
    gptq.quantize(weight, moment, ScalarLayout(24, 64, 3, 32, True), GptqOptions(clip_search=True, sweeps=1))
    assert torch.equal(weight, copies[0]) and torch.equal(moment, copies[1])


def test_options_round_trip_and_are_checked() -> None:
    options = GptqOptions(clip_search=True, static_groups=True, act_order=True, damping=0.02, sweeps=1)
    assert GptqOptions.from_json(options.to_json()) == options
    assert GptqOptions.from_json({"clip_search": True, "damping": 1}) == GptqOptions(clip_search=True, damping=1.0)
    for bad in (
        {"act_order": True},
        {"clip_search": 1},
        {"damping": 0},
        {"damping": True},
        {"damping": float("nan")},
        {"sweeps": -1},
        {"sweeps": 1.0},
        {"blocks": 3},
    ):
        with pytest.raises(PlanError):
            GptqOptions.from_json(bad)


def test_unusable_weights_are_refused() -> None:
    layout = ScalarLayout(2, 4, 3, 4, False)
    with pytest.raises(ShapeError, match=r"\[2, 5\]"):
        rtn.quantize(torch.zeros(2, 5), layout)
    with pytest.raises(ShapeError, match=r"\[3, 4\]"):
        gptq.quantize(torch.zeros(3, 4), torch.eye(4), layout, GptqOptions())
    with pytest.raises(QuantizationError, match="NaN"):
        rtn.quantize(torch.full((2, 4), torch.nan), layout)
