"""The Viterbi search against all streams there are, and against published distortions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from rwkvq.formats import TrellisCodes, TrellisLayout
from rwkvq.formats.trellis import codebook, decode, symbol_ends
from rwkvq.quantize.trellis_columns import encode_columns, sweep_columns


def codes_of(layout: TrellisLayout, streams: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> TrellisCodes:
    """Streams with these offsets of rows and columns, and scales of 1."""
    offsets = rows.to(torch.int8), columns.to(torch.int8)
    return TrellisCodes(layout, streams, *offsets, torch.zeros(layout.rows, dtype=torch.uint8), torch.ones(1).half())


def encoded(
    targets: np.ndarray,
    layout: TrellisLayout,
    weights: np.ndarray | None = None,
    row_offsets: np.ndarray | None = None,
    column_offsets: np.ndarray | None = None,
) -> TrellisCodes:
    """Encode targets [rows, columns] without feedback, with scales of 1."""
    columns = np.ascontiguousarray(targets.T.astype(np.float32))
    ones = np.ones(layout.rows, np.float32) if weights is None else weights.astype(np.float32)
    rows = np.zeros(layout.rows, np.int64) if row_offsets is None else row_offsets
    shifts = np.zeros(len(columns), np.int64) if column_offsets is None else column_offsets
    no_feedback = np.zeros((len(columns),) * 2, np.float32)
    streams, errors = encode_columns(columns.copy(), ones, no_feedback, layout.quarter_bits + shifts, rows, layout)
    codes = codes_of(layout, *map(torch.from_numpy, (streams, rows, shifts)))
    np.testing.assert_allclose(decode(codes).numpy(), (columns - errors).T, rtol=0, atol=1e-5)
    return codes


def all_values(layout: TrellisLayout) -> torch.Tensor:
    """The weights [streams, length] of every stream that one sequence can have."""
    bits = layout.length * layout.quarter_bits // 4
    streams = torch.arange(1 << bits)
    circle = streams | streams << bits
    ends = symbol_ends(torch.full((layout.length,), layout.quarter_bits))
    starts = (ends - layout.state_bits) % bits
    return codebook(layout.state_bits)[(circle[:, None] >> starts) & ((1 << layout.state_bits) - 1)]


@pytest.mark.parametrize(("quarter_bits", "length"), [(8, 8), (8, 4), (16, 4)])
def test_no_stream_with_the_same_seam_is_better(quarter_bits: int, length: int) -> None:
    layout = TrellisLayout(length, 6, quarter_bits, 8, length)
    generator = np.random.default_rng(quarter_bits + length)
    targets, weights = generator.standard_normal((length, 6)), generator.uniform(0.5, 2, length)
    codes = encoded(targets, layout, weights)
    found, values = decode(codes).double().numpy(), all_values(layout).double().numpy()
    bits = length * quarter_bits // 4
    seam = layout.state_bits - quarter_bits // 4  # the last bits of the stream, which the first state sees
    for column in range(6):
        costs = (values - targets[:, column]) ** 2 @ weights
        own = int.from_bytes(bytes(codes.codes[0].view(6, -1)[column].tolist()), "little")
        same_seam = np.arange(1 << bits) >> (bits - seam) == own >> (bits - seam)
        reached = float((found[:, column] - targets[:, column]) ** 2 @ weights)
        assert reached == pytest.approx(costs[own], rel=1e-4)
        assert reached <= costs[same_seam].min() * (1 + 1e-4)


@pytest.mark.parametrize(
    ("quarter_bits", "state_bits", "expected"),
    [(8, 12, 0.0735), (12, 12, 0.0195), (13, 12, 0.0145), (16, 12, 0.0055), (12, 8, 0.0238), (12, 10, 0.0213)],
)
def test_gaussian_weights_cost_what_others_found(quarter_bits: int, state_bits: int, expected: float) -> None:
    """Mean squared error on a standard normal source (docs/method.md 14)."""
    targets = np.random.default_rng(0).standard_normal((256, 40))
    codes = encoded(targets, TrellisLayout(256, 40, quarter_bits, state_bits, 256))
    assert float(((decode(codes).numpy() - targets) ** 2).mean()) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(("length", "expected"), [(16, 0.0285), (32, 0.0211), (64, 0.0195), (128, 0.0192)])
def test_short_sequences_pay_for_their_seam(length: int, expected: float) -> None:
    """At L = 12, k = 3: the bits that close a circle decide less and less."""
    targets = np.random.default_rng(0).standard_normal((length, 8192 // length))
    codes = encoded(targets, TrellisLayout(length, 8192 // length, 12, 12, length))
    assert float(((decode(codes).numpy() - targets) ** 2).mean()) == pytest.approx(expected, rel=0.06)


def test_errors_are_fed_into_later_columns() -> None:
    layout = TrellisLayout(32, 3, 12, 10, 32)
    targets = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    feedback = np.array([[9, 0.5, -0.25], [9, 9, 0.125], [9, 9, 9]], np.float32)
    ones = np.ones(32, np.float32)
    moved = targets.copy()
    rates, offsets = np.array([12, 14, 10]), np.tile([1, -1], 16)
    streams, errors = encode_columns(moved, ones, feedback, rates, offsets, layout)
    expected, begin = targets.copy(), 0
    for column in range(3):
        target = expected[column : column + 1].copy()
        alone, error = encode_columns(
            target, ones, np.zeros((1, 1), np.float32), rates[column : column + 1], offsets, layout
        )
        assert (alone == streams[:, begin : begin + rates[column]]).all()
        begin += rates[column]
        np.testing.assert_array_equal(error[0], errors[column])
        for later in range(column + 1, 3):
            expected[later] -= feedback[column, later] * error[0]
    np.testing.assert_array_equal(moved, expected)


def test_rows_that_count_more_get_less_error() -> None:
    layout, targets = TrellisLayout(256, 20, 12, 10, 256), np.random.default_rng(2).standard_normal((256, 20))
    weights = np.where(np.arange(256) % 2, 9.0, 1.0)
    error = (decode(encoded(targets, layout, weights)).numpy() - targets) ** 2
    plain = (decode(encoded(targets, layout)).numpy() - targets) ** 2
    assert error[1::2].mean() < 0.8 * plain.mean() < 0.8 * error[::2].mean()


def test_rows_and_columns_with_more_bits_get_less_error() -> None:
    """A quarter of the squared error with every bit more, and no more of it elsewhere than the bits say."""
    layout, generator = TrellisLayout(256, 32, 12, 12, 256, 3, 3), np.random.default_rng(3)
    targets = generator.standard_normal((256, 32))
    rows, columns = np.repeat([3, -3], 128), np.tile([2, -2], 16)
    codes = encoded(targets, layout, row_offsets=rows, column_offsets=columns)
    error = (decode(codes).numpy() - targets) ** 2
    for row, column in itertools.product((0, 1), (0, 1)):
        rate = (12 + rows[128 * row] + columns[column]) / 4
        found = error[128 * row : 128 * (row + 1), column::2].mean()
        assert found == pytest.approx(0.0195 * 4.0 ** (3 - rate), rel=0.35)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("quarter_bits", "length", "rows", "spread"),
    [(12, 256, 512, 0), (13, 64, 192, 3), (10, 32, 96, 1), (20, 256, 256, 0), (7, 256, 256, 1), (18, 128, 128, 3)],
)
def test_a_gpu_finds_paths_as_good(quarter_bits: int, length: int, rows: int, spread: int) -> None:
    from rwkvq.quantize.viterbi_cuda import encode_columns_cuda

    layout, generator = TrellisLayout(rows, 24, quarter_bits, 12, length, 3, 3), torch.Generator().manual_seed(0)
    targets, weights = torch.randn(24, rows, generator=generator), torch.rand(rows, generator=generator) + 0.5
    feedback = 0.1 * torch.randn(24, 24, generator=generator)
    offsets = torch.tensor([spread, -spread]).repeat(rows // 2)
    shifts = torch.tensor([spread, 0, -spread]).repeat(8)
    moved = targets.cuda()
    streams, errors = encode_columns_cuda(
        moved, weights.cuda(), feedback.cuda(), (quarter_bits + shifts).cuda(), offsets.cuda(), layout
    )
    decoded = decode(codes_of(layout, streams.cpu(), offsets, shifts))
    torch.testing.assert_close(decoded.t(), (moved - errors).cpu(), rtol=0, atol=1e-5)
    plain = [tensor.numpy() for tensor in (targets, weights, feedback, quarter_bits + shifts, offsets)]
    _, expected = encode_columns(*plain, layout)
    np.testing.assert_allclose(errors[0].cpu(), expected[0], rtol=0, atol=1e-5)  # later columns see other roundings
    cost, cost_here = (float((weights * error**2).mean()) for error in (errors.cpu(), torch.from_numpy(expected)))
    assert cost == pytest.approx(cost_here, rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("state_bits", "length", "rows"), [(12, 256, 512), (14, 64, 128)])
def test_a_gpu_sweeps_as_well(state_bits: int, length: int, rows: int) -> None:
    """Over more columns than are changed at once: codes stay those of the values, and the loss falls as far."""
    from rwkvq.quantize.viterbi_cuda import sweep_columns_cuda

    columns, generator = 200, torch.Generator().manual_seed(0)
    layout = TrellisLayout(rows, columns, 12, state_bits, length, 3, 3)
    targets, weights = torch.randn(columns, rows, generator=generator), torch.rand(rows, generator=generator) + 0.5
    mixed = torch.randn(columns, 2 * columns, generator=generator)
    hessian = mixed @ mixed.t() / columns
    offsets, shifts = torch.tensor([2, -2]).repeat(rows // 2), torch.tensor([3, -3]).repeat(columns // 2)
    rates = layout.quarter_bits + shifts
    no_feedback = np.zeros((columns, columns), np.float32)
    arrays = targets.numpy().copy(), weights.numpy(), no_feedback, rates.numpy(), offsets.numpy()
    codes, errors = map(torch.from_numpy, encode_columns(*arrays, layout))

    def swept(device: str) -> float:
        values, streams = (targets - errors).to(device), codes.to(device, copy=True)
        moment, goal = hessian.to(device), targets.to(device)
        pull = moment @ (goal - values)
        numbers = weights.to(device), rates.to(device), offsets.to(device)
        if device == "cuda":
            sweep_columns_cuda(values, pull, moment, *numbers, layout, streams)
        else:
            plain = (item.numpy() for item in (values, pull, moment, *numbers))
            sweep_columns(*plain, layout, streams.numpy())
        decoded = decode(codes_of(layout, streams.cpu(), offsets, shifts)).t()
        torch.testing.assert_close(decoded, values.cpu(), rtol=0, atol=1e-5)
        torch.testing.assert_close(pull.cpu(), hessian @ (targets - values.cpu()), rtol=0, atol=1e-3)
        difference = targets - values.cpu()
        return float(((hessian @ difference) * difference * weights).sum())

    before = float(((hessian @ errors) * errors * weights).sum())
    found, expected = swept("cuda"), swept("cpu")
    assert found < 0.9 * before
    assert found == pytest.approx(expected, rel=0.03)
