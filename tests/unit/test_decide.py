"""Decision rules on the example of docs/method.md 4.2 and on cases by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rwkvq.errors import PlanError
from rwkvq.plan.decide import Candidate, Verdict, decide, fixed, maxrms, percentile, share
from rwkvq.plan.presets import PRESETS


def candidate(name: str, p_c: float, p_f: float, *, numel: int = 100, sq: int = 330, vq: int = 350) -> Candidate:
    return Candidate(name, numel, p_c, p_f, max_over_rms=5.0, sq_bits=sq, vq_bits=vq)


def example() -> list[Candidate]:
    """P_c = 0.1 ... 1.0 and P_f = 10 ... 1: matrix m1 to m10, named so that name order is number order."""
    return [candidate(f"m{i:02d}", i / 10, 11.0 - i) for i in range(1, 11)]


def chosen(verdict: Verdict) -> list[str]:
    return sorted(name for name, arm in verdict.arms.items() if arm == "sq")


def test_percentile_example() -> None:
    verdict = percentile(example(), coarse=0.5, fine=0.2)
    assert chosen(verdict) == ["m05"]
    assert verdict.thresholds == {"tau_c": 0.6, "tau_f": 7.0}
    assert verdict.reasons["m05"] == "sq: P_c rank 5 of 10, the first 5 pass; P_f rank 1 of these 5, the first 1 are sq"
    assert verdict.reasons["m06"] == "vq: P_c rank 6 of 10, the first 5 pass"


def test_share_example() -> None:
    verdict = share(example(), target=0.3, by="count")
    assert chosen(verdict) == ["m04", "m05", "m06"]
    assert (
        "P_c rank 4 and P_f rank 7 of 10: place 3, the first 3 make a share of 0.3 by count" in verdict.reasons["m04"]
    )
    # one common percentile: rank 7 of both
    assert verdict.thresholds == {"tau_c": 0.8, "tau_f": 8.0}


def test_fixed_is_strict_on_both_thresholds() -> None:
    rows = [candidate("a", 1.0, 30.0), candidate("b", 1.54, 1.0), candidate("c", 1.5, 29.9), candidate("d", 2.0, 50.0)]
    verdict = fixed(rows, tau_c=1.54, tau_f=30.0)
    assert chosen(verdict) == ["c"]
    assert verdict.thresholds == {"tau_c": 1.54, "tau_f": 30.0}
    assert verdict.reasons["a"] == "vq: P_c 1 < 1.54 but P_f 30 >= 30"
    assert verdict.reasons["b"] == "vq: P_c 1.54 >= 1.54"


def test_recorded_thresholds_repeat_a_percentile_map() -> None:
    first = percentile(example(), coarse=0.7, fine=0.4)
    assert chosen(fixed(example(), **first.thresholds)) == chosen(first)


def test_percentile_rounds_half_up() -> None:
    # 0.25 * 10 = 2.5 -> 3; 0.5 * 3 = 1.5 -> 2
    assert chosen(percentile(example(), coarse=0.25, fine=0.5)) == ["m02", "m03"]


def test_percentile_of_everything_has_no_thresholds() -> None:
    verdict = percentile(example(), coarse=1.0, fine=1.0)
    assert len(chosen(verdict)) == 10
    assert verdict.thresholds == {}
    assert chosen(percentile(example(), coarse=0.0, fine=1.0)) == []


def test_ties_are_broken_by_name() -> None:
    rows = [candidate(name, 1.0, 1.0) for name in ("c", "a", "b", "d")]
    assert chosen(percentile(rows, coarse=0.5, fine=1.0)) == ["a", "b"]
    assert chosen(share(rows, target=0.25, by="count")) == ["a"]


def test_share_by_weights_stops_where_the_target_is_reached() -> None:
    rows = [candidate("a", 1, 1, numel=10), candidate("b", 2, 2, numel=60), candidate("c", 3, 3, numel=30)]
    assert chosen(share(rows, target=0.1, by="weights")) == ["a"]
    assert chosen(share(rows, target=0.11, by="weights")) == ["a", "b"]
    assert chosen(share(rows, target=0.7, by="weights")) == ["a", "b"]
    assert chosen(share(rows, target=0.0, by="weights")) == []
    assert chosen(share(rows, target=1.0, by="weights")) == ["a", "b", "c"]


def test_share_by_bits_comes_closest_from_below() -> None:
    # all VQ 3.5 bits, all SQ 3.3: each of four matrices moves the mean by 0.05
    cheaper_sq = [candidate(name, i, i) for i, name in enumerate("abcd")]
    assert chosen(share(cheaper_sq, target=3.41, by="bits")) == ["a", "b"]
    assert chosen(share(cheaper_sq, target=3.40, by="bits")) == ["a", "b"]
    assert chosen(share(cheaper_sq, target=4.0, by="bits")) == []
    dearer_sq = [candidate(name, i, i, sq=350, vq=330) for i, name in enumerate("abcd")]
    assert chosen(share(dearer_sq, target=3.41, by="bits")) == ["a", "b"]
    assert chosen(share(dearer_sq, target=4.0, by="bits")) == ["a", "b", "c", "d"]


def test_target_out_of_reach_is_refused_with_the_range() -> None:
    with pytest.raises(PlanError, match=r"target_bits is 3.2, .* 3.3000 to 3.5000 bits per weight; set at least 3.3 "):
        share(example(), target=3.2, by="bits")


def test_maxrms_sends_large_ratios_to_vq() -> None:
    rows = [replace(candidate(str(ratio), 1, 1), max_over_rms=ratio) for ratio in (7.9, 8.0, 8.1)]
    verdict = maxrms(rows, threshold=8.0)
    assert chosen(verdict) == ["7.9", "8.0"]
    assert verdict.reasons["8.1"] == "vq: max/rms 8.1 > 8"
    assert verdict.thresholds == {"max_over_rms": 8.0}


def test_decide_applies_the_mode() -> None:
    base = replace(PRESETS["rwkvq"].decision, tau_c=0.35, tau_f=9.0, max_over_rms=4.0)
    assert chosen(decide(example(), replace(base, mode="fixed"))) == ["m03"]
    assert chosen(decide(example(), replace(base, mode="percentile"))) == ["m05"]
    assert chosen(decide(example(), replace(base, mode="share", share=0.3, share_by="count"))) == ["m04", "m05", "m06"]
    assert chosen(decide(example(), replace(base, mode="share", share_by="bits", target_bits=3.46))) == ["m05", "m06"]
    assert chosen(decide(example(), replace(base, mode="maxrms"))) == []


def test_nothing_to_decide_gives_nothing() -> None:
    for decision in (replace(PRESETS[preset].decision, target_bits=3.0) for preset in PRESETS):
        assert decide([], decision).arms == {}
    assert share([], target=3.0, by="bits").arms == {}
