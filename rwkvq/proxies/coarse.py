"""The coarse proxy P_c: how far the gaps are from equal, in nats (docs/method.md 2; arXiv 2505.03803 eq. 5-9)."""

from __future__ import annotations

import torch

from rwkvq.proxies.gaps import Gaps


def coarse(gaps: Gaps) -> float:
    """P_c = ln n - H(G'), in [0, ln n]; 0 for equal gaps and for degenerate ones.

    Computed as mean(x ln x) with x = gap / mean gap: the difference of two near logarithms would lose digits.
    Zero gaps add 0.
    """
    if gaps.is_degenerate:
        return 0.0
    x = gaps.relative()
    # rounding may leave a sum of order -1e-17 for equal gaps
    return max(0.0, float(torch.special.xlogy(x, x).sum()) / gaps.count)
