"""Properties of the decision rules: nested sets, targets met, thresholds that repeat a map."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvq.errors import PlanError
from rwkvq.plan.decide import Candidate, Verdict, fixed, percentile, share

VALUES = st.integers(0, 12)
ROWS = st.lists(
    st.tuples(VALUES, VALUES, st.integers(1, 50), st.integers(300, 380), st.integers(300, 380)), min_size=1, max_size=25
)
FRACTION = st.floats(0, 1)
Raw = list[tuple[int, int, int, int, int]]


def candidates(rows: Raw) -> list[Candidate]:
    return [
        Candidate(f"m{place:02d}", numel, float(p_c), float(p_f), 5.0, numel * sq, numel * vq)
        for place, (p_c, p_f, numel, sq, vq) in enumerate(rows)
    ]


def chosen(verdict: Verdict) -> set[str]:
    return {name for name, arm in verdict.arms.items() if arm == "sq"}


def by_thresholds(rows: list[Candidate], verdict: Verdict) -> set[str]:
    tau_c, tau_f = (verdict.thresholds.get(name, math.inf) for name in ("tau_c", "tau_f"))
    return chosen(fixed(rows, tau_c=tau_c, tau_f=tau_f))


@given(ROWS, FRACTION, FRACTION)
@settings(max_examples=80, deadline=None)
def test_percentile_counts_and_thresholds(raw: Raw, coarse: float, fine: float) -> None:
    rows = candidates(raw)
    verdict = percentile(rows, coarse=coarse, fine=fine)
    passing = math.floor(coarse * len(rows) + 0.5)
    assert len(chosen(verdict)) == math.floor(fine * passing + 0.5)
    # up to ties at the thresholds the recorded values give the same map
    assert by_thresholds(rows, verdict) <= chosen(verdict)
    distinct = len({row[0] for row in raw}) == len({row[1] for row in raw}) == len(raw)
    if distinct:
        assert by_thresholds(rows, verdict) == chosen(verdict)


@given(ROWS, st.sampled_from(["count", "weights"]))
@settings(max_examples=60, deadline=None)
def test_sets_are_nested_as_the_share_grows(raw: Raw, by: str) -> None:
    rows = candidates(raw)
    sets = [chosen(share(rows, target=step / 10, by=by)) for step in range(11)]  # type: ignore[arg-type]
    assert sets[0] == set()
    assert sets[-1] == {row.name for row in rows}
    assert all(small <= large for small, large in pairwise(sets))


@given(ROWS, FRACTION)
@settings(max_examples=80, deadline=None)
def test_share_is_met_and_not_exceeded_by_a_matrix(raw: Raw, target: float) -> None:
    rows = candidates(raw)
    sizes = {row.name: row.numel for row in rows}
    taken = chosen(share(rows, target=target, by="weights"))
    weight = sum(sizes[name] for name in taken)
    goal = target * sum(sizes.values())
    assert weight >= goal * (1 - 1e-8)
    assert not taken or any(weight - sizes[name] < goal for name in taken)


@given(ROWS, st.floats(3.0, 3.8))
@settings(max_examples=80, deadline=None)
def test_bits_stay_within_the_target(raw: Raw, target: float) -> None:
    rows = candidates(raw)
    weights = sum(row.numel for row in rows)
    try:
        taken = chosen(share(rows, target=target * 100, by="bits"))
    except PlanError:
        assert target * 100 * weights < min(sum(row.vq_bits for row in rows), sum(row.sq_bits for row in rows))
        return
    stored = sum(row.sq_bits if row.name in taken else row.vq_bits for row in rows)
    assert stored <= target * 100 * weights * (1 + 1e-8)


@given(ROWS)
@settings(max_examples=40, deadline=None)
def test_order_of_the_table_does_not_matter(raw: Raw) -> None:
    rows = candidates(raw)
    for verdict, again in (
        (share(rows, target=0.4, by="weights"), share(rows[::-1], target=0.4, by="weights")),
        (percentile(rows, coarse=0.6, fine=0.5), percentile(rows[::-1], coarse=0.6, fine=0.5)),
    ):
        assert chosen(verdict) == chosen(again)
        assert verdict.reasons == dict(again.reasons)
        assert verdict.thresholds == again.thresholds
