"""The WKV recurrences of RWKV-6 and RWKV-7: token by token, and in chunks that agree with it to rounding.

Shapes: r, k, v, kk, a, log_decay [B, T, H, N]; state [B, H, N, N]; results y [B, T, H, N] and the state after token T.
log_decay = ln w_t <= 0 may be any size in x060 and is at least -0.6066 in x070. Everything is in one dtype, float32 or
float64. A chunk holds C tokens; P_t is the sum of log_decay over the chunk up to and with token t.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_CHUNK = 32
"""Tokens a chunk. In x070 exp(-P) <= exp(19.5) then, far from the range of float32."""


def recurrent6(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = r_t (S + diag(u) k_t^T v_t); S <- diag(w_t) S + k_t^T v_t.  S [key, value], u [H, N]."""
    outputs = []
    for t in range(r.shape[1]):
        pair = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)  # [B, H, key, value]
        outputs.append((r[:, t].unsqueeze(-2) @ (state + u.unsqueeze(-1) * pair)).squeeze(-2))
        state = torch.exp(log_decay[:, t]).unsqueeze(-1) * state + pair
    return torch.stack(outputs, dim=1), state


def recurrent7(
    r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, kk: Tensor, a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S <- S diag(w_t) - (S kk_t) (a_t kk_t)^T + v_t k_t^T; y_t = S r_t.  S [value, key], kk of unit length."""
    outputs = []
    for t in range(r.shape[1]):
        removed = state @ kk[:, t].unsqueeze(-1)  # [B, H, value, 1]
        state = state * torch.exp(log_decay[:, t]).unsqueeze(-2) - removed * (a[:, t] * kk[:, t]).unsqueeze(-2)
        state = state + v[:, t].unsqueeze(-1) * k[:, t].unsqueeze(-2)
        outputs.append((state @ r[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1), state


def chunked6(r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same as recurrent6, all tokens of a chunk at once.

    Within a chunk y_t = (r_t e^{P_{t-1}}) S + sum_{s<t} (sum_i r_t k_s e^{P_{t-1} - P_s})_i v_s + (r_t . u k_t) v_t.
    The log decay has no lower bound, so e^{P_{t-1} - P_s} is never split into e^{P_{t-1}} e^{-P_s}, see below.
    """
    time = r.shape[1]
    chunk = _chunk_length(time)
    bonus = (r * u * k).sum(-1, keepdim=True) * v
    r, k, v, log_decay = (_split(x, chunk) for x in (r, k, v, log_decay))
    y = torch.zeros_like(v)
    _earlier_tokens(y, r, k, v, log_decay)
    reading = r * torch.exp(_sum_before(log_decay))
    added = (k * torch.exp(_sum_after(log_decay))).mT @ v  # [B, H, n, key, value]
    kept = torch.exp(log_decay.sum(-2)).unsqueeze(-1)  # [B, H, n, key, 1]
    for index in range(r.shape[2]):
        y[:, :, index] += reading[:, :, index] @ state
        state = kept[:, :, index] * state + added[:, :, index]
    return _join(y, time) + bonus, state


def _earlier_tokens(y: Tensor, r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> None:
    """Add to y [B, H, n, C, N] what each token takes from earlier tokens of its chunk.

    Blocks of 2 b tokens for b = C/2, ..., 1: the right half reads the left half, so each pair s < t falls in exactly
    one level. P_{t-1} - P_s is the sum over the left half after s plus the sum over the right half before t: both are
    <= 0, nothing overflows, and no two long sums are subtracted.
    """
    *outer, chunk, size = y.shape
    half = chunk // 2
    while half:
        blocks = (*outer, chunk // (2 * half), 2 * half, size)
        left, right = slice(None, half), slice(half, None)
        decays = log_decay.view(blocks)
        readers = r.view(blocks)[..., right, :] * torch.exp(_sum_before(decays[..., right, :]))
        sources = k.view(blocks)[..., left, :] * torch.exp(_sum_after(decays[..., left, :]))
        y.view(blocks)[..., right, :] += (readers @ sources.mT) @ v.view(blocks)[..., left, :]
        half //= 2


def chunked7(
    r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, kk: Tensor, a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as recurrent7, all tokens of a chunk at once.

    With A = -kk e^{P_{t-1}}, R = r e^{P_t}, B = kk a e^{-P_t}, K = k e^{-P_t} (rows are tokens), what the state loses
    is U = S A^T, which solves (I - tril(A B^T, -1)) U = A S^T + tril(A K^T, -1) V. The unit triangular system is solved
    by substitution: inverting it by repeated squaring loses all digits when successive keys are aligned.
    """
    time = r.shape[1]
    chunk = _chunk_length(time)
    r, k, v, log_decay, kk, a = (_split(x, chunk) for x in (r, k, v, log_decay, kk, a))
    sums = log_decay.cumsum(-2)
    removed, rates = -kk * torch.exp(_sum_before(log_decay)), kk * a
    reading, growth = r * torch.exp(sums), torch.exp(-sums)
    writing = torch.cat([rates * growth, k * growth], dim=-2)  # [B, H, n, 2C, N]: B, then K
    lost = removed @ writing.mT  # [B, H, n, C, 2C]
    seen = reading @ writing.mT
    right_side = torch.cat([removed, lost[..., chunk:].tril(-1) @ v], dim=-1)
    solved = torch.linalg.solve_triangular(-lost[..., :chunk].tril(-1), right_side, upper=False, unitriangular=True)
    from_state, from_values = solved.split(r.shape[-1], dim=-1)
    seen = torch.cat([seen[..., :chunk].tril(), seen[..., chunk:].tril()], dim=-1)
    to_end = torch.exp(sums[..., -1:, :] - sums)
    carried = torch.cat([rates * to_end, k * to_end], dim=-2).mT  # [B, H, n, N, 2C]
    kept = torch.exp(sums[..., -1, :]).unsqueeze(-1)  # [B, H, n, key, 1]
    y, flow = torch.empty_like(v), state.mT  # flow [B, H, key, value]
    for index in range(r.shape[2]):
        changes = torch.cat([from_values[:, :, index] + from_state[:, :, index] @ flow, v[:, :, index]], dim=-2)
        y[:, :, index] = reading[:, :, index] @ flow + seen[:, :, index] @ changes
        flow = kept[:, :, index] * flow + carried[:, :, index] @ changes
    return _join(y, time), flow.mT.contiguous()


def _chunk_length(time: int) -> int:
    """A power of two, for the halving of chunked6; not longer than needed."""
    return int(min(MAX_CHUNK, 1 << max(time - 1, 0).bit_length()))


def _split(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, N] -> [B, H, n, C, N]; zeros fill the last chunk, which changes neither state nor earlier outputs."""
    batch, time, heads, size = x.shape
    padded = F.pad(x, (0, 0, 0, 0, 0, -time % chunk))
    return padded.view(batch, -1, chunk, heads, size).permute(0, 3, 1, 2, 4).contiguous()


def _join(y: Tensor, time: int) -> Tensor:
    """[B, H, n, C, N] -> [B, T, H, N], without the filling."""
    return y.flatten(2, 3)[:, :, :time].transpose(1, 2)


def _sum_before(x: Tensor) -> Tensor:
    """Sum over the second last axis before each position; never a difference, so -inf is allowed."""
    return F.pad(x[..., :-1, :].cumsum(-2), (0, 0, 1, 0))


def _sum_after(x: Tensor) -> Tensor:
    """Sum over the second last axis after each position."""
    return F.pad(x[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))
