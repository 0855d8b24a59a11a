"""SQ or VQ: the decision rules of docs/method.md 4.2, as pure functions of a table of candidates.

Every rule names the thresholds that give the same map in mode `fixed`, up to ties, and a reason for each matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from rwkvq.errors import PlanError
from rwkvq.plan.presets import Decision
from rwkvq.settings import ShareBy

Arm = Literal["sq", "vq"]

_TOLERANCE = 1e-9
"""Relative slack of sums of shares, far below one weight of any model."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One matrix to decide on: its proxies in one gap mode, and the exact bits that each arm would store."""

    name: str
    numel: int
    p_c: float
    p_f: float
    max_over_rms: float
    sq_bits: int
    vq_bits: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Arm and reason of every candidate by name, and the thresholds; a threshold that is absent excludes none."""

    arms: Mapping[str, Arm]
    reasons: Mapping[str, str]
    thresholds: Mapping[str, float]


def _ranks(values: Mapping[str, float]) -> dict[str, int]:
    """Rank 1 .. M of each name by value, ties by name."""
    ordered = sorted(values, key=lambda name: (values[name], name))
    return {name: rank for rank, name in enumerate(ordered, 1)}


def _present(**values: float | None) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _verdict(chosen: Iterable[str], reasons: Mapping[str, str], thresholds: Mapping[str, float]) -> Verdict:
    """SQ for the names in `chosen`, VQ for the others; the arm is put before each reason."""
    sq = set(chosen)
    arms: dict[str, Arm] = {name: "sq" if name in sq else "vq" for name in reasons}
    return Verdict(arms, {name: f"{arms[name]}: {reason}" for name, reason in reasons.items()}, thresholds)


def fixed(candidates: Sequence[Candidate], *, tau_c: float, tau_f: float) -> Verdict:
    """SQ where P_c < tau_c and P_f < tau_f (arXiv 2505.03803 eq. 18)."""
    reasons, chosen = {}, []
    for item in candidates:
        if item.p_c >= tau_c:
            reasons[item.name] = f"P_c {item.p_c:.4g} >= {tau_c:.4g}"
        elif item.p_f >= tau_f:
            reasons[item.name] = f"P_c {item.p_c:.4g} < {tau_c:.4g} but P_f {item.p_f:.4g} >= {tau_f:.4g}"
        else:
            reasons[item.name] = f"P_c {item.p_c:.4g} < {tau_c:.4g} and P_f {item.p_f:.4g} < {tau_f:.4g}"
            chosen.append(item.name)
    return _verdict(chosen, reasons, {"tau_c": tau_c, "tau_f": tau_f})


def percentile(candidates: Sequence[Candidate], *, coarse: float, fine: float) -> Verdict:
    """SQ for the fraction `fine` with the smallest P_f of the fraction `coarse` with the smallest P_c.

    Both counts are rounded half up. tau_c is the smallest P_c outside the first set, tau_f the smallest P_f in it but
    outside the second.
    """
    total = len(candidates)
    by_c = _ranks({item.name: item.p_c for item in candidates})
    passing_c = math.floor(coarse * total + 0.5)
    first = [item for item in candidates if by_c[item.name] <= passing_c]
    by_f = _ranks({item.name: item.p_f for item in first})
    passing_f = math.floor(fine * len(first) + 0.5)
    reasons = {}
    for item in candidates:
        reason = f"P_c rank {by_c[item.name]} of {total}, the first {passing_c} pass"
        if item.name in by_f:
            reason += f"; P_f rank {by_f[item.name]} of these {len(first)}, the first {passing_f} are sq"
        reasons[item.name] = reason
    thresholds = _present(
        tau_c=min((item.p_c for item in candidates if item.name not in by_f), default=None),
        tau_f=min((item.p_f for item in first if by_f[item.name] > passing_f), default=None),
    )
    return _verdict((name for name, rank in by_f.items() if rank <= passing_f), reasons, thresholds)


def share(candidates: Sequence[Candidate], *, target: float, by: ShareBy) -> Verdict:
    """SQ for the matrices with the smallest max(rank of P_c, rank of P_f), ties by name, until the target is met.

    by count or weights: target is the share of SQ in 0 .. 1, met as soon as it is reached. by bits: target is an upper
    bound of stored bits per weight over all candidates, met by the number of SQ matrices that comes closest to it from
    below. Raises PlanError if no number does.
    """
    by_c = _ranks({item.name: item.p_c for item in candidates})
    by_f = _ranks({item.name: item.p_f for item in candidates})
    worse = {item.name: max(by_c[item.name], by_f[item.name]) for item in candidates}
    ordered = sorted(candidates, key=lambda item: (worse[item.name], item.name))
    count = _count_for_bits(ordered, target) if by == "bits" else _count_for_share(ordered, target, by)
    goal = f"{target:.4g} stored bits" if by == "bits" else f"a share of {target:.4g} by {by}"
    reasons = {}
    for place, item in enumerate(ordered, 1):
        ranks = f"P_c rank {by_c[item.name]} and P_f rank {by_f[item.name]} of {len(ordered)}"
        reasons[item.name] = f"{ranks}: place {place}, the first {count} make {goal}"
    last = worse[ordered[count - 1].name] if count else 0
    thresholds = _present(
        tau_c=min((item.p_c for item in candidates if by_c[item.name] > last), default=None),
        tau_f=min((item.p_f for item in candidates if by_f[item.name] > last), default=None),
    )
    return _verdict((item.name for item in ordered[:count]), reasons, thresholds)


def _count_for_share(ordered: Sequence[Candidate], target: float, by: ShareBy) -> int:
    """The smallest number of leading candidates whose share of all reaches `target`."""
    sizes = [1 if by == "count" else item.numel for item in ordered]
    needed = target * sum(sizes) * (1 - _TOLERANCE)
    return next((count for count, total in enumerate(accumulate(sizes, initial=0)) if total >= needed), len(ordered))


def _count_for_bits(ordered: Sequence[Candidate], target: float) -> int:
    """The number of leading SQ candidates whose total of bits is the largest one within `target` bits per weight."""
    weights = sum(item.numel for item in ordered)
    all_vq = sum(item.vq_bits for item in ordered)
    totals = list(accumulate((item.sq_bits - item.vq_bits for item in ordered), initial=all_vq))
    within = [count for count, total in enumerate(totals) if total <= target * weights * (1 + _TOLERANCE)]
    if not within and ordered:
        low, high = min(totals) / weights, max(totals) / weights
        raise PlanError(
            f"plan.decision.target_bits is {target}, but SQ and VQ together store {low:.4f} to {high:.4f} "
            f"bits per weight; set at least {math.ceil(low * 1000) / 1000} or choose larger groups"
        )
    # the first of equal totals has the fewest SQ matrices
    return max(within, key=lambda count: totals[count], default=0)


def maxrms(candidates: Sequence[Candidate], *, threshold: float) -> Verdict:
    """VQ where the largest weight exceeds `threshold` times the root mean square (the released code's rule)."""
    reasons = {
        item.name: f"max/rms {item.max_over_rms:.4g} {'>' if item.max_over_rms > threshold else '<='} {threshold:.4g}"
        for item in candidates
    }
    chosen = [item.name for item in candidates if item.max_over_rms <= threshold]
    return _verdict(chosen, reasons, {"max_over_rms": threshold})


def decide(candidates: Sequence[Candidate], decision: Decision) -> Verdict:
    """Apply the decision's mode. Raises PlanError if a target cannot be met."""
    if decision.mode == "fixed":
        return fixed(candidates, tau_c=decision.tau_c, tau_f=decision.tau_f)
    if decision.mode == "percentile":
        return percentile(candidates, coarse=decision.coarse, fine=decision.fine)
    if decision.mode == "maxrms":
        return maxrms(candidates, threshold=decision.max_over_rms)
    target = decision.target_bits if decision.share_by == "bits" else decision.share
    return share(candidates, target=target, by=decision.share_by)
