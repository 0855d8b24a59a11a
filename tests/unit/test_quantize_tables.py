"""The table quantizer: distortion, feedback, tables that fit odd shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rwkvq.errors import QuantizationError, ShapeError
from rwkvq.formats import TableLayout
from rwkvq.formats.table import UNIT, decode
from rwkvq.quantize.hessian import relative_loss
from rwkvq.quantize.table_search import nearest, sweep_rows
from rwkvq.quantize.tables import TableOptions, fit_tables, quantize, round_to_tables
from tests.unit.test_quantize_trellis import correlated

OPTIONS = TableOptions()


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.071), (3, 0.0183), (4, 0.0052)])
def test_gaussian_weights_cost_what_is_known(bits: int, expected: float) -> None:
    """0.0181 at 3 bits with free tables on a normal source (docs/method.md 14)."""
    weight = gaussian(256, 512)
    decoded = decode(quantize(weight, torch.eye(512), TableLayout(256, 512, bits), OPTIONS, torch.ones(256)))
    assert relative_loss(weight, decoded, torch.eye(512)) == pytest.approx(expected, rel=0.08)


def test_feedback_lowers_the_loss() -> None:
    weight, moment, layout = gaussian(64, 160), correlated(160, 0), TableLayout(64, 160, 3)
    alone = decode(quantize(weight, torch.eye(160), layout, OPTIONS, torch.ones(64)))
    fed = decode(quantize(weight, moment, layout, OPTIONS, torch.ones(64)))
    assert relative_loss(weight, fed, moment) < 0.75 * relative_loss(weight, alone, moment)


def test_levels_are_the_nearest() -> None:
    levels = np.array([-1.0, 0.0, 0.5, 2.0], np.float32)
    values = (-5.0, -0.51, -0.49, 0.24, 0.26, 1.24, 1.26, 9.0)
    assert [nearest(np.float32(value), levels) for value in values] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_groups_get_the_table_of_least_error_and_errors_are_fed_on() -> None:
    generator = torch.Generator().manual_seed(0)
    targets, importance = torch.randn(5, 32, generator=generator), torch.rand(32, generator=generator)
    feedback = 0.1 * torch.randn(32, 32, generator=generator)
    table = torch.randint(-80, 81, (16, 4), generator=generator).to(torch.int8).sort(1).values
    codes, selector, errors = round_to_tables(targets, importance, feedback, table)
    moved, values = targets.clone(), table.float() * UNIT
    for start in (0, 16):
        group = moved[:, start : start + 16]
        distances = (group[:, None, :, None] - values[:, None]).abs().min(-1).values.square() @ importance[
            start : start + 16
        ]
        assert torch.equal(selector[:, start // 16].long(), distances.argmin(1))
        for column in range(start, start + 16):
            levels = values[selector[:, start // 16].long()]
            code = (moved[:, column : column + 1] - levels).abs().argmin(1)
            assert torch.equal(codes[:, column].long(), code)
            error = moved[:, column] - levels.gather(1, code[:, None])[:, 0]
            torch.testing.assert_close(errors[:, column], error)
            moved[:, column + 1 :] -= error[:, None] * feedback[column, column + 1 :]


def test_tables_rise_and_take_the_shape_of_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    two_humps = torch.randint(0, 2, (64, 128), generator=generator) * 2.0 - 1
    targets = two_humps + 0.01 * torch.randn(64, 128, generator=generator)
    table = fit_tables(targets, torch.ones(64), torch.ones(128), 2).float() * UNIT
    assert (table[:, 1:] >= table[:, :-1]).all()
    assert (table.abs() - 1).abs().median() < 0.05


def test_zero_weights_dead_inputs_and_heavy_tails() -> None:
    weight, moment, layout = gaussian(64, 160, 1), correlated(160, 1), TableLayout(64, 160, 3)
    weight[3] = 0
    weight[5, 7] = 2.0
    moment[20], moment[:, 20] = 0, 0
    decoded = decode(quantize(weight, moment, layout, OPTIONS, torch.ones(64)))
    assert torch.isfinite(decoded).all() and float(decoded[3].abs().max()) < 1e-3
    nothing = decode(quantize(torch.zeros(64, 160), moment, layout, OPTIONS, torch.zeros(64)))
    assert float(nothing.abs().max()) < 1e-6


def test_equal_arguments_give_equal_bytes() -> None:
    weight, moment, layout = gaussian(32, 64, 2), correlated(64, 2), TableLayout(32, 64, 3)
    first, second = (quantize(weight, moment, layout, OPTIONS, torch.ones(32)) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.table, second.table)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ShapeError, match="does not fit"):
        quantize(gaussian(8, 32), torch.eye(32), TableLayout(8, 64, 3), OPTIONS, torch.ones(8))
    with pytest.raises(QuantizationError, match="NaN"):
        quantize(gaussian(8, 32) * float("nan"), torch.eye(32), TableLayout(8, 32, 3), OPTIONS, torch.ones(8))


def test_a_sweep_lowers_the_loss_and_keeps_what_cannot_fall() -> None:
    weight, moment, layout = gaussian(64, 160), correlated(160, 0), TableLayout(64, 160, 3)
    losses = [
        relative_loss(
            weight, decode(quantize(weight, moment, layout, TableOptions(sweeps=sweeps), torch.ones(64))), moment
        )
        for sweeps in (0, 1, 2)
    ]
    assert losses[1] < 0.95 * losses[0] and losses[2] < losses[1]


def test_a_sweep_knows_what_every_group_gains() -> None:
    """Against the loss of the whole row, with a table and codes that are far from the best."""
    generator = torch.Generator().manual_seed(0)
    targets, hessian = torch.randn(3, 32, generator=generator), correlated(32, 2)
    values = torch.randn(16, 4, generator=generator).sort(1).values
    codes = torch.randint(0, 4, (3, 32), generator=generator).to(torch.uint8)
    selector = torch.randint(0, 16, (3, 2), generator=generator).to(torch.uint8)

    def quantized() -> torch.Tensor:
        return values[selector.long().repeat_interleave(16, 1), codes.long()]

    def losses() -> torch.Tensor:
        error = targets - quantized()
        return torch.einsum("oi,ij,oj->o", error, hessian, error)

    before, now, pull = losses(), quantized(), (targets - quantized()) @ hessian
    arrays = (tensor.numpy() for tensor in (now, pull, hessian.contiguous(), values, codes, selector))
    sweep_rows(*arrays)
    assert (losses() < 0.5 * before).all()
    torch.testing.assert_close(now, quantized())
    torch.testing.assert_close(pull, (targets - quantized()) @ hessian, rtol=1e-3, atol=1e-4)
