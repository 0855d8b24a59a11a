"""The curves of embedding and head: what they predict is what rounding then costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rwkvq.calibration.outer import OuterStatistics
from rwkvq.checkpoint.names import OUTER, Weight
from rwkvq.formats import ScalarLayout, scalar
from rwkvq.plan.outer import KEPT, WIDTHS, outer_candidates
from rwkvq.plan.presets import resolve_preset
from rwkvq.quantize import gptq, rtn
from rwkvq.quantize.outer_curves import OuterCurveJob, curve_of, drawn_rows
from rwkvq.settings import PlanSettings, QuantizeSettings

VOCAB, WIDTH = 1000, 128
JOB = OuterCurveJob("", "", 1024, 0.01)


def made_up(name: str) -> tuple[Weight, Tensor, OuterStatistics]:
    """Columns that come together, and tokens as often as in a language."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    x = torch.randn(2000, WIDTH // 2, generator=generator) @ torch.randn(WIDTH // 2, WIDTH, generator=generator)
    x += torch.randn(2000, WIDTH, generator=generator)
    fisher = 1.0 / torch.arange(1, VOCAB + 1)
    described = Weight(name, name, None, "keep", False, (VOCAB, WIDTH), None, None)
    return described, weight, OuterStatistics(fisher[torch.randperm(VOCAB, generator=generator)], x.T @ x / len(x))


@pytest.mark.parametrize("name", OUTER)
def test_the_curve_is_what_rounding_costs(name: str) -> None:
    weight, tensor, statistics = made_up(name)
    candidates = {item.label: item for item in outer_candidates(weight, torch.bfloat16)}
    points = curve_of(name, tensor, statistics, list(candidates.values()), JOB)
    assert [point.candidate for point in points] == [f"rows-{bits}" for bits in (*WIDTHS, KEPT)]
    assert points[-1].loss == 0.0 and points[-1].stored_bits == 16 * VOCAB * WIDTH
    for point in points[:-1]:
        item = candidates[point.candidate]
        assert isinstance(item.layout, ScalarLayout)
        assert point.stored_bits == item.layout.stored_bits()
        clip_search = item.layout.bits < 8
        if item.method == "gptq":
            options = gptq.GptqOptions(clip_search=clip_search)
            codes = gptq.quantize(tensor, statistics.second_moment, item.layout, options)
        else:
            codes = rtn.quantize(tensor, item.layout, clip_search=clip_search)
        error = scalar.decode(codes) - tensor
        real = 0.5 * float(statistics.fisher @ ((error @ statistics.second_moment) * error).sum(1))
        # feedback leaves a column more than the sample knows of, and D is damped
        assert point.loss == pytest.approx(real, rel=0.25), point.candidate
    assert {item.method for item in candidates.values()} == {"keep", "gptq" if name == "head.weight" else "rtn"}


def test_feedback_pays() -> None:
    (_, tensor, statistics), losses = made_up("head.weight"), {}
    for name in OUTER:
        weight = made_up(name)[0]
        points = curve_of(name, tensor, statistics, outer_candidates(weight, torch.bfloat16), JOB)
        losses[name] = points[0].loss
    assert losses["head.weight"] < 0.7 * losses["emb.weight"]


def test_rows_are_drawn_as_often_as_they_cost() -> None:
    costs = torch.tensor([0.0, 3.0, 0.0, 1.0, 4.0], dtype=torch.float64)
    assert drawn_rows(costs, 8).tolist() == [1, 1, 1, 3, 4, 4, 4, 4]
    assert drawn_rows(torch.zeros(3, dtype=torch.float64), 2).max() < 3


def test_a_model_that_never_reads_them_loses_nothing() -> None:
    weight, tensor, statistics = made_up("emb.weight")
    nothing = OuterStatistics(torch.zeros(VOCAB), torch.zeros(WIDTH, WIDTH))
    for name in OUTER:
        candidates = outer_candidates(made_up(name)[0], torch.bfloat16)
        assert {point.loss for point in curve_of(name, tensor, nothing, candidates, JOB)} == {0.0}
    assert float(statistics.fisher.sum()) > 0 and weight.name == "emb.weight"


def test_widths_below_eight_bits_share_scales_by_group() -> None:
    weight = made_up("emb.weight")[0]
    settings = resolve_preset(PlanSettings(), QuantizeSettings())
    assert settings.outer_bits == dict.fromkeys(OUTER, 16)
    sized = resolve_preset(PlanSettings(size="1MB", head_bits=8), QuantizeSettings())
    assert sized.outer_bits == {"emb.weight": "auto", "head.weight": 8}
    layouts = {item.label: item.layout for item in outer_candidates(weight, torch.bfloat16)}
    assert layouts["rows-4"] == ScalarLayout(VOCAB, WIDTH, 4, 64, True)
    assert layouts["rows-8"] == ScalarLayout(VOCAB, WIDTH, 8, WIDTH, True)
