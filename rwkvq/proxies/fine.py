"""The fine proxy P_f: weighted moments of the gaps about their mean (docs/method.md 3; arXiv 2505.03803 eq. 10-17)."""

from __future__ import annotations

from rwkvq.proxies.gaps import Gaps


def fine(gaps: Gaps, *, order: int = 4, signed: bool = False) -> float:
    """P_f = sum over k = 2 .. `order` of |mean(u^k)| / (k (k - 1)) with u = gap / mean gap - 1; 0 for degenerate gaps.

    This equals sum of v_k |M_k| with v_k = n^k / (k (k - 1)), whose n^k would overflow. With `signed` the terms keep
    their Taylor signs (-1)^k mean(u^k): the series of P_c cut off at `order`.
    """
    if gaps.is_degenerate:
        return 0.0
    # in place: there may be as many gaps as weights
    u = gaps.relative().sub_(1.0)
    total, power = 0.0, u.clone()
    for k in range(2, order + 1):
        power.mul_(u)
        # every zero gap has u = -1
        moment = (float(power.sum()) + gaps.zeros * (-1) ** k) / gaps.count
        term = (-1) ** k * moment if signed else abs(moment)
        total += term / (k * (k - 1))
    return total
