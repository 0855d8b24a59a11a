"""P_c and P_f on the worked examples of docs/method.md 2 and 3.1."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rwkvq.proxies.coarse import coarse
from rwkvq.proxies.fine import fine
from rwkvq.proxies.gaps import Gaps, gaps_of, spectrum
from rwkvq.settings import GapMode


def normal_quantiles() -> Tensor:
    return torch.special.ndtri((torch.arange(1, 1001, dtype=torch.float64) - 0.5) / 1000)


def with_outlier() -> Tensor:
    weight = normal_quantiles()
    weight[-1] = 30.0
    return weight


A = torch.arange(8, dtype=torch.float64)
B = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 100], dtype=torch.float64)
C = torch.tensor([0, 0, 0, 1, 2, 2, 4], dtype=torch.float64)
D = normal_quantiles()
E = with_outlier()

EXAMPLES: list[tuple[str, Tensor, GapMode, int, float, float, float]] = [
    ("A", A, "raw", 7, 0.0, 0.0, 1e-9),
    ("B", B, "raw", 8, 1.6895888843, 26.3827394133, 1e-9),
    ("B", B, "unique", 2, 0.6342327479, 0.5554140390, 1e-9),
    ("C", C, "raw", 6, 0.7520386984, 1.0364583333, 1e-9),
    ("C", C, "distinct", 3, 0.0588915178, 0.0696614583, 1e-9),
    ("C", C, "unique", 2, 0.0566330123, 0.0565843621, 1e-9),
    ("D", D, "raw", 999, 0.8335091936, 999.6848896, 1e-9),
    ("D fp16", D.half(), "raw", 999, 0.8351786081, 1014.763473, 1e-6),
    ("D fp16", D.half(), "unique", 44, 0.8393796308, 21.13579416, 1e-6),
    ("E", E, "raw", 999, 5.2615556881, 36032468.255, 1e-9),
    ("E fp16", E.half(), "unique", 45, 3.4731973556, 5968.195902, 1e-6),
]


@pytest.mark.parametrize(("name", "weight", "mode", "count", "p_c", "p_f", "tolerance"), EXAMPLES)
def test_worked_examples(
    name: str, weight: Tensor, mode: GapMode, count: int, p_c: float, p_f: float, tolerance: float
) -> None:
    gaps = gaps_of(spectrum(weight), mode)
    assert gaps.count == count, name
    assert coarse(gaps) == pytest.approx(p_c, rel=tolerance, abs=tolerance)
    # published digits: 10 significant ones
    assert fine(gaps) == pytest.approx(p_f, rel=max(tolerance, 1e-9), abs=1e-9)


def test_example_b_by_hand() -> None:
    gaps = gaps_of(spectrum(B), "raw")
    assert coarse(gaps) == pytest.approx(math.log(8) + 0.07 * math.log(0.01) + 0.93 * math.log(0.93), abs=1e-12)
    assert fine(gaps) == pytest.approx(5.9248 / 2 + 32.704896 / 6 + 215.634281 / 12, abs=1e-6)


def test_uniform_samples_reach_their_limits() -> None:
    gaps = gaps_of(
        spectrum(torch.rand(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))), "raw"
    )
    assert coarse(gaps) == pytest.approx(0.42278, abs=0.005)  # 1 - Euler's gamma
    assert fine(gaps) == pytest.approx(1.58333, abs=0.06)


def test_signed_series_converges_to_the_coarse_proxy() -> None:
    gaps = Gaps(1 + 0.5 * torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 0)
    assert fine(gaps, order=40, signed=True) == pytest.approx(coarse(gaps), abs=1e-12)


def test_sign_changes_the_third_moment_only() -> None:
    gaps = gaps_of(spectrum(B), "raw")
    assert fine(gaps) - fine(gaps, signed=True) == pytest.approx(2 * 32.704896 / 6, abs=1e-6)


def test_higher_orders_add_their_terms() -> None:
    gaps = gaps_of(spectrum(C), "raw")
    u = torch.tensor([0, 0, 1.5, 1.5, 0, 3], dtype=torch.float64) - 1
    fifth, sixth = float((u**5).mean()), float((u**6).mean())
    assert fine(gaps, order=5) - fine(gaps, order=4) == pytest.approx(abs(fifth) / 20, abs=1e-12)
    assert fine(gaps, order=6) - fine(gaps, order=5) == pytest.approx(sixth / 30, abs=1e-12)
    assert fine(gaps, order=2) == pytest.approx(float((u**2).mean()) / 2, abs=1e-12)


def test_degenerate_gaps_give_zero() -> None:
    for gaps in (Gaps(torch.zeros(0, dtype=torch.float64), 5), Gaps(torch.ones(1, dtype=torch.float64), 0)):
        assert coarse(gaps) == fine(gaps) == 0.0
