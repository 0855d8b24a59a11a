"""What both architectures share: state, norms, the token shift."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkvq.checkpoint.spec import ModelSpec

LAYER_NORM_EPS = 1e-5
"""eps of ln0, ln1, ln2 and ln_out."""
GROUP_NORM_EPS = 64e-5
"""eps of ln_x, the norm over each head's channels (RWKV-LM: 1e-5 * 8**2 in x060, 64e-5 in x070)."""

Observe = Callable[[str, Tensor], None]
"""Called as observe(site, x [batch, time, features]) with what feeds a weight."""
Weights = Mapping[str, Tensor]
"""Weights of one block by their name inside the block, e.g. att.receptance.weight."""


@dataclass(frozen=True, slots=True)
class BlockState:
    """What one block carries from token to token; all in the dtype of the computation.

    att_shift, ffn_shift [B, D]: the normalised inputs of the last token. wkv [B, H, N, N]: [value, key] in x070,
    [key, value] in x060.
    """

    att_shift: Tensor
    ffn_shift: Tensor
    wkv: Tensor

    @classmethod
    def zero(
        cls,
        spec: ModelSpec,
        batch: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> BlockState:
        """The state before the first token."""
        shift = torch.zeros(batch, spec.width, dtype=dtype, device=device)
        wkv = torch.zeros(batch, spec.heads, spec.head_size, spec.head_size, dtype=dtype, device=device)
        return cls(shift, shift.clone(), wkv)


def no_observe(site: str, x: Tensor) -> None:
    """An Observe that looks away."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise the last axis, then scale and shift."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, LAYER_NORM_EPS)


def head_norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalise the last axis of y [B, T, H, N], then scale and shift by channel; returns [B, T, D]."""
    normalised = F.layer_norm(y, y.shape[-1:], eps=GROUP_NORM_EPS).flatten(-2)
    return torch.addcmul(bias, normalised, weight)


def shift_difference(x: Tensor, last: Tensor) -> Tensor:
    """x_{t-1} - x_t for x [B, T, D]; `last` [B, D] stands before the first token."""
    return torch.cat([last.unsqueeze(1), x[:, :-1]], dim=1) - x


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)**2."""
    return torch.relu(x).square()
