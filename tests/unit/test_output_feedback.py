"""Error feedback from output to output: against the optimum it stands for, and what it gains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rwkvq.checkpoint.names import Weight
from rwkvq.errors import QuantizationError, ShapeError
from rwkvq.formats.table import TableLayout, decode
from rwkvq.plan.candidates import Candidate
from rwkvq.quantize.curves import CurveJob, curve_of
from rwkvq.quantize.hessian import damped
from rwkvq.quantize.inputs import WeightInputs
from rwkvq.quantize.output_feedback import SHRINKAGE, STEPS, OutputFeedback
from rwkvq.quantize.tables import TableOptions, quantize

FED, PLAIN = TableOptions(sweeps=1, output_feedback=True), TableOptions(sweeps=1)


def moment(size: int, seed: int, rank: int | None = None) -> Tensor:
    """A second moment [size, size] of strongly correlated values."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, rank or size // 4, generator=generator)
    return rows @ rows.t() + 0.1 * torch.eye(size)


def whole(blocks: Tensor) -> Tensor:
    """The blocks along the diagonal of one matrix."""
    return torch.block_diag(*blocks)


def loss(weight: Tensor, codes: Tensor, second_moment: Tensor, outputs: Tensor) -> float:
    """tr(G dW H dW^T)."""
    error = (weight - codes).double()
    return float(((whole(outputs).double() @ error) * (error @ second_moment.double())).sum())


def weight_of(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.1


@pytest.mark.parametrize(("blocks", "size"), [(1, 48), (3, 32), (2, 6)])
def test_later_rows_make_up_for_the_first_round_as_well_as_they_can(blocks: int, size: int) -> None:
    outputs = torch.stack([moment(size, seed) for seed in range(blocks)])
    feedback = OutputFeedback.of(outputs, torch.ones(blocks * size))
    first = torch.randn(feedback.rounds[0].numel(), 5, generator=torch.Generator().manual_seed(1))
    errors, visited = torch.zeros(blocks * size, 5), []

    def round_rows(rows: Tensor, shift: Tensor) -> Tensor:
        missing = torch.zeros_like(shift) if visited else first
        visited.append(rows)
        errors[rows] = missing - shift
        return missing

    feedback.row_by_row(5, round_rows)
    assert torch.cat(visited).sort().values.tolist() == list(range(blocks * size))
    metric = whole(feedback.metric).double()
    done, rest = visited[0], torch.cat(visited[1:])
    best = -torch.linalg.solve(metric[rest][:, rest], metric[rest][:, done] @ first.double())
    torch.testing.assert_close(errors[rest].double(), best, rtol=1e-4, atol=1e-4)


def test_weights_are_costs_with_later_rows_free() -> None:
    feedback = OutputFeedback.of(moment(64, 0)[None], torch.ones(64))
    metric = feedback.metric[0].double()
    done = torch.empty(0, dtype=torch.int64)
    for rows in feedback.rounds.flatten(1):
        rest = torch.tensor(
            [row for row in range(64) if row not in {*done.tolist(), *rows.tolist()}], dtype=torch.int64
        )
        cost = metric[rows][:, rows]
        if len(rest):
            cost = cost - metric[rows][:, rest] @ torch.linalg.solve(metric[rest][:, rest], metric[rest][:, rows])
        torch.testing.assert_close(feedback.weights[rows].double(), cost.diagonal(), rtol=1e-4, atol=1e-6)
        done = torch.cat([done, rows])
    torch.testing.assert_close(feedback.shares, feedback.weights / feedback.metric[0].diagonal())
    assert float(feedback.shares.max()) <= 1 + 1e-5 and float(feedback.shares.mean()) < 0.9


def test_the_metric_is_g_in_units_of_scales_with_smaller_correlations() -> None:
    outputs, scales = moment(32, 3), torch.linspace(0.5, 2, 32)
    feedback = OutputFeedback.of(outputs[None], scales)
    expected = outputs.double() * scales.double()[:, None] * scales.double()
    expected /= expected.diagonal().mean()
    diagonal = expected.diagonal().clone()
    expected *= 1 - SHRINKAGE
    expected.diagonal().copy_(diagonal)
    torch.testing.assert_close(feedback.metric[0].double(), expected, rtol=1e-5, atol=1e-5)
    assert feedback.rounds.shape == (STEPS, 1, 2)


@pytest.mark.parametrize("sweeps", [0, 1])
def test_it_lowers_what_it_is_for(sweeps: int) -> None:
    weight, second_moment, layout = weight_of(128, 160), moment(160, 0), TableLayout(128, 160, 3)
    outputs = torch.stack([moment(64, seed) for seed in (1, 2)])
    fisher = outputs.diagonal(dim1=1, dim2=2).flatten()
    found = [
        loss(weight, decode(quantize(weight, second_moment, layout, options, fisher, outputs)), second_moment, outputs)
        for options in (replace(PLAIN, sweeps=sweeps), replace(FED, sweeps=sweeps))
    ]
    assert found[1] < 0.7 * found[0]


def test_a_sweep_lowers_the_loss_between_outputs() -> None:
    weight, second_moment, layout = weight_of(64, 96), moment(96, 0), TableLayout(64, 96, 3)
    outputs = moment(64, 1)[None]
    known = outputs[0].diagonal(), outputs
    losses = []
    for sweeps in (0, 1, 2):
        codes = quantize(weight, second_moment, layout, replace(FED, sweeps=sweeps), *known)
        shrunk = OutputFeedback.of(outputs, torch.ones(64)).metric
        hessian = damped(second_moment, FED.damping).float()
        losses.append(loss(weight, decode(codes), hessian, shrunk))
    assert losses[2] < losses[1] < 0.99 * losses[0]


def test_uncorrelated_outputs_change_nothing() -> None:
    weight, second_moment, layout = weight_of(64, 96), moment(96, 0), TableLayout(64, 96, 3)
    outputs = torch.eye(64)[None] * 4
    plain, fed = (
        quantize(weight, second_moment, layout, options, torch.full((64,), 4.0), outputs) for options in (PLAIN, FED)
    )
    same = (plain.codes == fed.codes).float().mean()
    assert float(same) > 0.99
    first, second = (loss(weight, decode(codes), second_moment, outputs) for codes in (plain, fed))
    assert second == pytest.approx(first, rel=1e-2)


def test_outputs_that_never_matter_are_rounded_like_others() -> None:
    weight, second_moment, layout = weight_of(64, 96), moment(96, 0), TableLayout(64, 96, 3)
    outputs = moment(64, 1)
    outputs[5], outputs[:, 5] = 0, 0
    error = weight - decode(quantize(weight, second_moment, layout, FED, outputs.diagonal(), outputs[None]))
    assert float(error[5].square().mean()) < 2 * float(error.square().mean())
    nothing = torch.zeros(1, 64, 64)
    assert torch.isfinite(decode(quantize(weight, second_moment, layout, FED, torch.zeros(64), nothing))).all()


def test_bad_moments_are_named() -> None:
    weight, second_moment, layout = weight_of(64, 96), moment(96, 0), TableLayout(64, 96, 3)
    with pytest.raises(ShapeError, match="needs the moment of the outputs"):
        quantize(weight, second_moment, layout, FED, torch.ones(64))
    with pytest.raises(ShapeError, match="does not fit 64 rows"):
        quantize(weight, second_moment, layout, FED, torch.ones(64), torch.ones(1, 32, 32))
    with pytest.raises(QuantizationError, match="not positive definite"):
        quantize(weight, second_moment, layout, FED, torch.ones(64), torch.full((1, 64, 64), float("nan")))


def test_the_curve_foresees_what_it_gains() -> None:
    weight, second_moment, layout = weight_of(128, 160), moment(160, 0, rank=200), TableLayout(128, 160, 3)
    outputs = torch.stack([moment(64, seed, rank=80) for seed in (1, 2)])
    fisher = outputs.diagonal(dim1=1, dim2=2).flatten()
    name = "blocks.0.att.key.weight"
    entry = Weight(name, name, None, "matrix", False, (128, 160), 0, "att.key")
    known = WeightInputs(second_moment, None, fisher, outputs)
    candidates = (Candidate("table-3", layout, "table"),)
    for output_feedback in (False, True):
        job = CurveJob("", "", "", "", 0, 1 << 20, 12, 0.5, 0.01, output_feedback)
        (point,) = curve_of(entry, weight, known, candidates, job)
        options = TableOptions(output_feedback=output_feedback)
        decoded = decode(quantize(weight, second_moment, layout, options, fisher, outputs))
        shrunk = outputs * (1 - SHRINKAGE) if output_feedback else torch.zeros_like(outputs)
        shrunk.diagonal(dim1=1, dim2=2).copy_(fisher.view(2, 64))
        assert point.loss == pytest.approx(0.5 * loss(weight, decoded, second_moment, shrunk), rel=0.15)
