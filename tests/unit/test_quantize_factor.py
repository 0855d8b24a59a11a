"""The inverse factor inside the memory of a wide second moment, and quantizers that use it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkvq.errors import QuantizationError
from rwkvq.formats import scalar, vector
from rwkvq.formats.scalar import ScalarLayout
from rwkvq.formats.vector import VectorLayout
from rwkvq.quantize import factor, gptq, gptvq, hessian, kmeans, refine, rtn
from rwkvq.quantize.factor import factor_in_place, permuted, restore
from rwkvq.quantize.gptq import GptqOptions
from rwkvq.quantize.gptvq import GptvqOptions
from rwkvq.quantize.hessian import inverse_factor, inverse_factor_of, loss, with_damping

SIZE = 100


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second moment counts as wide, in blocks that do not divide it."""
    monkeypatch.setattr(factor, "BLOCK", 32)
    for module in (hessian, refine):
        monkeypatch.setattr(module, "FLOAT64_COLUMNS", 0)


def case(rows: int = 48, size: int = SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(4 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
    inputs = torch.relu(mixed / size**0.5).square()
    inputs[:, 3] = 0  # a column that never fired
    moment = inputs.t() @ inputs / len(inputs)
    return torch.randn(rows, size, generator=generator), (moment + moment.t()) / 2


@pytest.mark.parametrize("block", [1, 7, 32, 100, 128])
def test_the_factor_takes_the_upper_triangle_and_leaves_the_lower(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(factor, "BLOCK", block)
    _, moment = case()
    with with_damping(moment, 0.01) as damped:
        matrix = damped.clone()
    assert factor_in_place(matrix)
    torch.testing.assert_close(matrix.triu(), inverse_factor(moment, 0.01), rtol=1e-3, atol=1e-4)
    assert torch.equal(matrix.tril(-1), moment.tril(-1))
    restore(matrix, moment.diagonal())
    assert torch.equal(matrix, moment)


def test_the_moment_is_whole_again_whatever_happens(wide: None) -> None:
    _, moment = case()
    before = moment.clone()
    with inverse_factor_of(moment, 0.01) as upper:
        assert upper is moment and not torch.equal(moment, before)
    assert torch.equal(moment, before)
    with pytest.raises(KeyError), inverse_factor_of(moment, 0.01, torch.arange(SIZE).flip(0)):
        raise KeyError
    assert torch.equal(moment, before)


def test_damping_grows_as_it_does_beside_the_moment(wide: None) -> None:
    indefinite = torch.tensor([[1.0, 1.5], [1.5, 1.0]])
    with inverse_factor_of(indefinite, 0.01) as upper:
        torch.testing.assert_close(upper.triu(), inverse_factor(torch.tensor([[1.0, 1.5], [1.5, 1.0]]), 0.01))
    hopeless = torch.tensor([[1.0, 200.0], [200.0, 1.0]])
    with pytest.raises(QuantizationError, match="larger damping"), inverse_factor_of(hopeless, 0.01):
        pass
    assert hopeless.tolist() == [[1.0, 200.0], [200.0, 1.0]]


def test_a_permuted_moment_comes_back(wide: None) -> None:
    _, moment = case()
    before, order = moment.clone(), torch.randperm(SIZE, generator=torch.Generator().manual_seed(0))
    with permuted(moment, order):
        assert torch.equal(moment, before[order][:, order])
    assert torch.equal(moment, before)


@pytest.mark.parametrize(
    "options",
    [GptqOptions(), GptqOptions(clip_search=True, sweeps=2), GptqOptions(static_groups=True, act_order=True)],
)
def test_gptq_of_a_wide_weight_loses_what_it_loses_in_float64(
    options: GptqOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    (weight, moment), layout = case(), ScalarLayout(48, SIZE, 3, 25, False)
    before = moment.clone()
    expected = loss(weight, scalar.decode(gptq.quantize(weight, moment, layout, options)), moment)
    monkeypatch.setattr(factor, "BLOCK", 32)
    monkeypatch.setattr(hessian, "FLOAT64_COLUMNS", 0)
    found = loss(weight, scalar.decode(gptq.quantize(weight, moment, layout, options)), moment)
    assert found == pytest.approx(expected, rel=0.02)
    assert torch.equal(moment, before)


@pytest.mark.parametrize(
    "layout", [VectorLayout(48, SIZE, 2, 16, 20, 50, 8, None), VectorLayout(48, 100, 1, 8, 16, 50, 8, 4)]
)
def test_gptvq_of_a_wide_weight_loses_what_it_loses_in_float64(
    layout: VectorLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, moment = case()
    before, options = moment.clone(), GptvqOptions(sweeps=1)
    expected = loss(weight, vector.decode(gptvq.quantize(weight, moment, layout, options)), moment)
    monkeypatch.setattr(factor, "BLOCK", 32)
    for module in (hessian, refine):
        monkeypatch.setattr(module, "FLOAT64_COLUMNS", 0)
    found = loss(weight, vector.decode(gptvq.quantize(weight, moment, layout, options)), moment)
    assert found == pytest.approx(expected, rel=0.02)
    assert torch.equal(moment, before)


def test_work_in_pieces_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = case()
    grids, books = ScalarLayout(48, SIZE, 3, 25, True), VectorLayout(48, SIZE, 2, 16, 20, 50, 8, None)

    def results() -> list[Tensor]:
        codes = kmeans.quantize(weight, books, iterations=1)
        return [
            scalar.decode(rtn.quantize(weight, grids, clip_search=True)),
            vector.decode(codes),
            vector.decode(refine.refined(codes, weight, moment)),
        ]

    whole, lost = results(), loss(weight, weight * 0.9, moment)
    monkeypatch.setattr(hessian, "CHUNK", 7 * SIZE)
    monkeypatch.setattr(kmeans, "WEIGHTS", 20 * SIZE)
    monkeypatch.setattr(vector, "_CHUNK", 7 * SIZE)
    pieces = results()
    assert torch.equal(pieces[0], whole[0]) and torch.equal(pieces[1], whole[1])
    torch.testing.assert_close(pieces[2], whole[2], rtol=0.02, atol=0.02)
    assert loss(weight, weight * 0.9, moment) == pytest.approx(lost, rel=1e-6)
