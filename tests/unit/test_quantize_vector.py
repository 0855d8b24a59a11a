"""K-means, GPTVQ, the codebook update and vector sweeps, against slow reference code."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rwkvq.errors import PlanError, QuantizationError, ShapeError
from rwkvq.formats import VectorCodes, VectorLayout, vector
from rwkvq.quantize import codebooks, gptvq, kmeans
from rwkvq.quantize.codebooks import Vectors
from rwkvq.quantize.gptvq import Geometry, GptvqOptions
from rwkvq.quantize.hessian import damped, inverse_factor, loss
from rwkvq.quantize.refine import refined
from rwkvq.quantize.sweep import nearest_entries, sweep_vector

DAMPING = 0.01
LAYOUTS = [
    VectorLayout(24, 32, 1, 8, 4, 16, 8, None),
    VectorLayout(24, 32, 1, 8, 2, 16, 8, 4),
    VectorLayout(24, 32, 2, 16, 10, 16, 8, None),  # the last row group is ragged
    VectorLayout(24, 32, 2, 16, 64, 16, 16, None),  # one row group, larger than the weight
    VectorLayout(24, 32, 4, 16, 24, 32, 8, None),
]


def _case(rows: int = 24, columns: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3 * torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    return weight, inputs.t() @ inputs / len(inputs)


def _slow_kmeans(points: Tensor, weights: Tensor, entries: int, start: Tensor) -> Tensor:
    """Lloyd's algorithm on one group, entry by entry, from given entries."""
    table = start.clone()
    for _ in range(100):
        labels = (weights[:, None] * (points[:, None] - table).square()).sum(-1).argmin(1)
        for entry in range(entries):
            mine = labels == entry
            if mine.any():
                table[entry] = (weights[mine] * points[mine]).sum(0) / weights[mine].sum(0)
    return table


def _slow_gptvq(weight: Tensor, moment: Tensor, layout: VectorLayout) -> Tensor:
    """Group by group and vector by vector in float64: weighted k-means, exact assignment, joint feedback; no M-step."""
    hessian = damped(moment, DAMPING)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, result = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    d, wide, tall = layout.dimension, layout.group_columns, layout.group_rows
    for first in range(0, layout.columns, wide):
        omega = (1 / upper.diagonal()[first : first + wide] ** 2).view(-1, d)
        tables = []
        for top in range(0, layout.rows, tall):
            points = left[top : top + tall, first : first + wide].reshape(-1, d)
            weights = omega.repeat(len(points) // len(omega), 1)
            start = codebooks.initial(Vectors(points.float()[None], weights.float()[None]), layout.entries)[0]
            table = _slow_kmeans(points, weights, layout.entries, start.double())
            scale = (table.abs().max() / 127).half().double()
            tables.append((table / scale).round() * scale)
        for at in range(first, first + wide, d):
            span = slice(at, at + d)
            inverse = torch.linalg.inv(upper[span, span])
            for row in range(layout.rows):
                table = tables[row // tall]
                errors = left[row, span] - table
                best = (errors @ inverse).square().sum(1).argmin()
                result[row, span] = table[best]
                left[row, at + d :] -= errors[best] @ inverse @ upper[span, at + d :]
    return result.float()


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_fit_is_as_good_as_the_slow_reference(dimension: int) -> None:
    generator = torch.Generator().manual_seed(dimension)
    vectors = Vectors(
        torch.randn(3, 200, dimension, generator=generator), torch.rand(3, 200, dimension, generator=generator)
    )
    start = codebooks.initial(vectors, 8)
    tables = codebooks.fit(vectors, 8, 100)
    for group in range(3):
        points, weights = vectors.values[group], vectors.weights[group]
        costs = []
        for table in (tables[group], _slow_kmeans(points, weights, 8, start[group])):
            costs.append(float((weights[:, None] * (points[:, None] - table).square()).sum(-1).amin(1).sum()))
        assert costs[0] <= 1.02 * costs[1]


def test_separate_clusters_are_found_exactly() -> None:
    centres = torch.tensor([[-3.0, 0], [0, 5], [4, 4], [6, -2]])
    points = centres.repeat_interleave(10, 0) + torch.tensor([0.01, -0.01]).repeat(20)[:, None]
    tables = codebooks.fit(Vectors(points[None], torch.ones(1, 40, 2)), 4, 100)[0]
    torch.testing.assert_close(tables[tables[:, 0].argsort()], centres, atol=1e-5, rtol=0)


def test_empty_entries_move_to_the_vectors_of_largest_error() -> None:
    points = torch.tensor([0.0] * 50 + [1.0, 10.0, 100.0])[:, None]
    tables = codebooks.fit(Vectors(points[None], torch.ones(1, 53, 1)), 4, 100)[0]
    assert sorted(tables.view(-1).tolist()) == [0.0, 1.0, 10.0, 100.0]


def test_fewer_distinct_vectors_than_entries_are_stored_exactly() -> None:
    weight = torch.tensor([[0.5, -0.5] * 8, [0.25, 0.75] * 8])
    layout = VectorLayout(2, 16, 2, 16, 2, 16, 16, None)
    assert torch.equal(vector.decode(kmeans.quantize(weight, layout, iterations=20)), weight)
    constant = kmeans.quantize(torch.zeros(2, 16), layout, iterations=20)
    assert torch.equal(vector.decode(constant), torch.zeros(2, 16))


def test_rows_that_fill_up_a_group_do_not_pull_its_codebook() -> None:
    weight = torch.full((3, 8), 2.0) + torch.arange(24).view(3, 8) / 100
    layout = VectorLayout(3, 8, 1, 8, 2, 8, 16, None)
    codes = kmeans.quantize(weight, layout, iterations=50)
    assert torch.allclose(vector.decode(codes), weight, atol=0.011)
    assert float(codes.codebook.float().min()) > 1.9


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kmeans_takes_the_nearest_entry(layout: VectorLayout) -> None:
    weight, _ = _case()
    codes = kmeans.quantize(weight, layout, iterations=30)
    found = vector.decode(codes)
    tables = vector.codebooks(codes)
    for row, step in itertools.product(range(0, 24, 7), range(0, 32 // layout.dimension, 3)):
        at = step * layout.dimension
        table = tables[row // layout.group_rows, at // layout.group_columns]
        point = weight[row, at : at + layout.dimension]
        nearest = (point - table).square().sum(1).min()
        assert (point - found[row, at : at + layout.dimension]).square().sum() <= nearest + 1e-9


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[4]])
def test_gptvq_is_as_good_as_the_slow_reference(layout: VectorLayout) -> None:
    weight, moment = _case()
    reference = loss(weight, _slow_gptvq(weight, moment, layout), moment)
    plain = gptvq.quantize(weight, moment, layout, GptvqOptions(m_step=False))
    assert loss(weight, vector.decode(plain), moment) <= 1.05 * reference  # fits end a little earlier
    full = gptvq.quantize(weight, moment, layout, GptvqOptions())
    assert loss(weight, vector.decode(full), moment) <= reference


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_part_of_the_method_lowers_the_loss(layout: VectorLayout) -> None:
    weight, moment = _case()
    kinds = [
        kmeans.quantize(weight, layout, iterations=50),
        gptvq.quantize(weight, moment, layout, GptvqOptions(m_step=False)),
        gptvq.quantize(weight, moment, layout, GptvqOptions()),
        gptvq.quantize(weight, moment, layout, GptvqOptions(sweeps=1)),
    ]
    losses = [loss(weight, vector.decode(codes), moment) for codes in kinds]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 4


def test_exact_assignment_is_no_worse_over_many_weights() -> None:
    layout = LAYOUTS[4]
    totals = [0.0, 0.0]
    for seed in range(4):
        weight, moment = _case(seed=seed)
        for index, exact in enumerate((True, False)):
            options = GptvqOptions(exact_assignment=exact, m_step=False)
            totals[index] += loss(weight, vector.decode(gptvq.quantize(weight, moment, layout, options)), moment)
    assert totals[0] < totals[1]


def test_joint_feedback_is_the_least_squares_optimum() -> None:
    _, moment = _case(columns=9)
    hessian = damped(moment, DAMPING)
    geometry = Geometry.of(inverse_factor(moment, DAMPING), 3, exact=True)
    error = torch.tensor([[0.3, -0.2, 0.5]]).double()
    first, rest = slice(0, 3), slice(3, 9)
    # the rest of dW that minimises dW H dW^T while its first three entries are `error`
    best = -error @ hessian[first, rest] @ torch.linalg.inv(hessian[rest, rest])
    joint = error @ geometry.feedback[first, rest].double()
    torch.testing.assert_close(joint, best, atol=1e-5, rtol=1e-4)
    whole = torch.cat([error, best], 1)
    expected = float((whole @ hessian * whole).sum())
    assert float((error @ geometry.metric[0].double() * error).sum()) == pytest.approx(expected, rel=1e-4)
    upper = inverse_factor(moment, DAMPING).double()
    by_column = torch.cat([error, (error / upper.diagonal()[first]) @ upper[first, rest]], 1)
    assert float((by_column @ hessian * by_column).sum()) > 1.01 * expected


def test_nearest_entries_minimise_the_metric() -> None:
    generator = torch.Generator().manual_seed(0)
    target, tables = torch.randn(3, 10, generator=generator), torch.randn(2, 8, 3, generator=generator)
    root = torch.randn(3, 3, generator=generator)
    codes, values = nearest_entries(target, tables, root @ root.t())
    for row in range(10):
        errors = (target[:, row] - tables[row // 5]) @ root
        assert codes[row] == errors.square().sum(1).argmin()
        assert torch.equal(values[:, row], tables[row // 5, codes[row]])


def test_the_codebook_update_reaches_the_least_squares_solution() -> None:
    weight, moment = _case(rows=6, columns=8)
    layout = VectorLayout(6, 8, 2, 4, 3, 8, 16, None)
    codes = kmeans.quantize(weight, layout, iterations=20)
    updated = refined(codes, weight, moment)
    root = torch.linalg.cholesky(moment.double())
    # one column for each codebook number: the weight that it alone would make
    columns = []
    for number in range(codes.codebook.numel()):
        one = torch.zeros_like(codes.codebook).view(-1)
        one[number] = 1
        single = VectorCodes(layout, codes.codes, one.view_as(codes.codebook), None, None)
        columns.append((vector.decode(single).double() @ root).reshape(-1))
    design = torch.stack(columns, 1)
    target = (weight.double() @ root).reshape(-1, 1)
    best = float((target - design @ torch.linalg.lstsq(design, target, driver="gelsd").solution).square().sum())
    assert loss(weight, vector.decode(updated), moment) == pytest.approx(best, rel=1e-3)
    assert torch.equal(updated.codes, codes.codes)


def test_an_update_that_cannot_help_is_not_taken() -> None:
    weight = torch.tensor([[0.5, -0.5] * 8, [0.25, 0.75] * 8])
    codes = kmeans.quantize(weight, VectorLayout(2, 16, 2, 16, 2, 16, 16, None), iterations=20)
    assert refined(codes, weight, torch.eye(16)) is codes
    assert sweep_vector(codes, weight, torch.eye(16), DAMPING) is codes


def test_factored_codebooks_have_the_rank_that_is_stored() -> None:
    weight, moment = _case()
    codes = gptvq.quantize(weight, moment, LAYOUTS[1], GptvqOptions())
    assert int(torch.linalg.matrix_rank(vector.codebooks(codes).view(-1, 8), rtol=1e-4)) == 4
    assert codes.codebook.shape == (24, 4) and codes.basis is not None and codes.basis.shape == (4, 8)


def test_results_repeat_and_the_arguments_are_left_alone() -> None:
    weight, moment = _case()
    copies = weight.clone(), moment.clone()
    torch.manual_seed(1)
    first = vector.pack(gptvq.quantize(weight, moment, LAYOUTS[2], GptvqOptions(sweeps=1)))
    torch.manual_seed(2)
    second = vector.pack(gptvq.quantize(weight, moment, LAYOUTS[2], GptvqOptions(sweeps=1)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(weight, copies[0]) and torch.equal(moment, copies[1])


def test_options_round_trip_and_are_checked() -> None:
    options = GptvqOptions(iterations=7, exact_assignment=False, m_step=False, damping=0.1, sweeps=2)
    assert GptvqOptions.from_json(options.to_json()) == options
    assert GptvqOptions.from_json({"m_step": False}) == GptvqOptions(m_step=False)
    for bad in ({"iterations": 1.5}, {"m_step": None}, {"damping": 2}, {"unknown": 1}):
        with pytest.raises(PlanError, match="gptvq options"):
            GptvqOptions.from_json(bad)


def test_unusable_weights_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[24, 16\]"):
        kmeans.quantize(torch.zeros(24, 16), LAYOUTS[0], iterations=3)
    with pytest.raises(ShapeError):
        gptvq.quantize(torch.zeros(24, 32), torch.eye(16), LAYOUTS[0], GptvqOptions())
    with pytest.raises(QuantizationError, match="NaN"):
        kmeans.quantize(torch.full((24, 32), torch.nan), LAYOUTS[0], iterations=3)
    with pytest.raises(QuantizationError, match="second moment"):
        gptvq.quantize(torch.zeros(24, 32), torch.eye(32) * torch.inf, LAYOUTS[0], GptvqOptions())
