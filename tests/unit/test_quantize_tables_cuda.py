"""The table quantizer's loops on CUDA against those on the processor."""

from __future__ import annotations

import pytest
import torch

from rwkvq.formats import TableLayout
from rwkvq.formats.table import UNIT, decode
from rwkvq.quantize import table_search
from rwkvq.quantize.hessian import relative_loss
from rwkvq.quantize.tables import TableOptions, quantize, round_to_tables
from tests.unit.test_quantize_tables import gaussian
from tests.unit.test_quantize_trellis import correlated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_are_fitted_alike_and_to_the_same_bits(bits: int) -> None:
    from rwkvq.quantize.table_cuda import fit_cuda

    generator = torch.Generator().manual_seed(bits)
    groups = torch.randn(1000, 16, generator=generator) * (torch.rand(1000, 1, generator=generator) + 0.3)
    weights = torch.rand(1000, 16, generator=generator) + 0.5
    start = torch.randn(16, 1 << bits, generator=generator).sort(1).values
    start[3] = 40  # no group chooses it
    expected = start.clone()
    table_search.fit(groups.numpy(), weights.numpy(), expected.numpy(), 3)
    found = [start.to(DEVICE, copy=True) for _ in range(2)]
    for tables in found:
        fit_cuda(groups.to(DEVICE), weights.to(DEVICE), tables, 3)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0].cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rows", "columns", "bits"), [(5, 32, 2), (70, 128, 3), (33, 48, 4)])
def test_groups_are_rounded_alike(rows: int, columns: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    targets, importance = torch.randn(rows, columns, generator=generator), torch.rand(columns, generator=generator)
    feedback = 0.1 * torch.randn(columns, columns, generator=generator)
    table = torch.randint(-80, 81, (16, 1 << bits), generator=generator).to(torch.int8).sort(1).values
    arguments = targets, importance, feedback, table
    codes, selector, errors = (item.cpu() for item in round_to_tables(*(item.to(DEVICE) for item in arguments)))
    here = round_to_tables(*arguments)
    assert (codes[:, :16] == here[0][:, :16]).float().mean() > 0.99
    assert (selector[:, 0] == here[1][:, 0]).all()
    values = (table.float() * UNIT)[selector.long().repeat_interleave(16, 1), codes.long()]
    moved = values + errors  # what each column was when it was rounded: the target less the errors of earlier ones
    torch.testing.assert_close(moved, targets - errors @ feedback.triu(1), rtol=1e-4, atol=1e-4)
    cost, expected = (float((importance * error**2).mean()) for error in (errors, here[2]))
    assert cost == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("rows", "columns", "bits"), [(5, 32, 2), (70, 208, 3), (33, 144, 4)])
def test_a_sweep_finds_what_the_processor_finds(rows: int, columns: int, bits: int) -> None:
    """Over more columns than are changed at once."""
    from rwkvq.quantize.table_cuda import sweep_rows_cuda

    generator = torch.Generator().manual_seed(0)
    targets, hessian = torch.randn(rows, columns, generator=generator), correlated(columns, 2).contiguous()
    levels = torch.randn(16, 1 << bits, generator=generator).sort(1).values
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    selector = torch.randint(0, 16, (rows, columns // 16), generator=generator).to(torch.uint8)

    def loss(values: torch.Tensor) -> float:
        return float(torch.einsum("oi,ij,oj->", targets - values, hessian, targets - values))

    def swept(device: str) -> torch.Tensor:
        now = levels[selector.long().repeat_interleave(16, 1), codes.long()].to(device)
        pull = (targets.to(device) - now) @ hessian.to(device)
        own = codes.to(device, copy=True), selector.to(device, copy=True)
        tensors = now, pull, hessian.to(device), levels.to(device), *own
        if device == "cpu":
            table_search.sweep_rows(*(tensor.numpy() for tensor in tensors))
        else:
            sweep_rows_cuda(*tensors)
        chosen = levels[own[1].cpu().long().repeat_interleave(16, 1), own[0].cpu().long()]
        torch.testing.assert_close(now.cpu(), chosen)
        torch.testing.assert_close(pull.cpu(), (targets - chosen) @ hessian, rtol=1e-3, atol=1e-3)
        return chosen

    found, expected = swept(DEVICE), swept("cpu")
    assert (found[:, :16] == expected[:, :16]).float().mean() > 0.99
    assert loss(found) == pytest.approx(loss(expected), rel=0.02)


@pytest.mark.parametrize("output_feedback", [False, True])
def test_a_weight_is_quantized_as_well(output_feedback: bool) -> None:
    weight, moment, layout = gaussian(96, 320), correlated(320, 0), TableLayout(96, 320, 3)
    options = TableOptions(sweeps=1, output_feedback=output_feedback)
    outputs = torch.stack([correlated(48, seed) for seed in (1, 2)])
    losses = []
    for device in ("cpu", DEVICE):
        known = (item.to(device) for item in (outputs.diagonal(dim1=1, dim2=2).flatten(), outputs))
        codes = quantize(weight.to(device), moment.to(device), layout, options, *known)
        losses.append(relative_loss(weight, decode(codes).cpu(), moment))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
