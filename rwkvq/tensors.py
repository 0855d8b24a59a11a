"""What is asked of a tensor without another of its size."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Values that are looked at together."""


def is_finite(tensor: Tensor) -> bool:
    """True if no value is NaN or infinite; works in slices, so that nothing of the tensor's size is allocated."""
    flat = tensor.reshape(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        low, high = torch.aminmax(flat[begin : begin + _CHUNK])  # both are NaN if any value is
        if not (torch.isfinite(low) and torch.isfinite(high)):
            return False
    return True
