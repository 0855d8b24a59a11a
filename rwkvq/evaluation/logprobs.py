"""Log-probabilities and KL from logits: float64 throughout, one exponential per model, token and vocabulary entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ELEMENTS = 1 << 17
"""Logits in work at once: three float64 buffers of this size stay in a core's second-level cache."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What one model says about n tokens.

    logprob [n] float64, nats: ln p(target); best [n] int64: arg max of the logits; kl [n] float64, nats, >= 0:
    KL(reference || this model), None for the reference itself.
    """

    logprob: Tensor
    best: Tensor
    kl: Tensor | None


def score(logits: Sequence[Tensor], targets: Tensor) -> list[TokenScores]:
    """Score n tokens under several models; the first is the reference of every KL.

    logits: one [n, vocab] tensor a model, float32 or float64; targets [n] int64. With a and b the logits of reference
    and other, each less its own maximum, E = exp(a) and Z their sums of exponentials,
    KL = E.(a - b) / Z_a - ln Z_a + ln Z_b: two dot products, and no exponential but the two that normalise.
    """
    count, vocab = logits[0].shape
    rows = max(1, _ELEMENTS // vocab)
    best = [_argmax(part) for part in logits]
    logprob = torch.empty(len(logits), count, dtype=torch.float64)
    kl = torch.empty(len(logits), count, dtype=torch.float64)
    buffers = [torch.empty(min(rows, count), vocab, dtype=torch.float64) for _ in range(3)]
    for start in range(0, count, rows):
        part = slice(start, min(start + rows, count))
        views = [buffer[: part.stop - start] for buffer in buffers]
        _score_part(
            [x[part] for x in logits], [b[part] for b in best], targets[part], views, logprob[:, part], kl[:, part]
        )
    return [TokenScores(logprob[i], best[i], kl[i] if i else None) for i in range(len(logits))]


def _score_part(
    logits: Sequence[Tensor],
    best: Sequence[Tensor],
    targets: Tensor,
    buffers: Sequence[Tensor],
    logprob: Tensor,
    kl: Tensor,
) -> None:
    """Fill logprob and kl [models, n] for a few rows; `buffers` are three float64 [n, vocab] work areas."""
    reference, weights, other = buffers
    for index, (values, top) in enumerate(zip(logits, best, strict=True)):
        shifted = reference if index == 0 else other
        shifted.copy_(values)
        shifted -= shifted.gather(1, top[:, None])
        at_target = shifted.gather(1, targets[:, None]).squeeze(1)
        if index == 0:
            torch.exp(shifted, out=weights)
            total = weights.sum(-1)
            reference_mean = torch.linalg.vecdot(weights, shifted) / total
            reference_log_total = log_total = total.log()
        else:
            mean = torch.linalg.vecdot(weights, shifted) / total
            log_total = shifted.exp_().sum(-1).log()
            # rounding can leave a KL of equal distributions a few 1e-16 below zero
            kl[index] = ((reference_mean - mean) + (log_total - reference_log_total)).clamp_(min=0.0)
        logprob[index] = at_target - log_total


def _argmax(logits: Tensor) -> Tensor:
    """Arg max of every row; numpy's is vectorised and takes a twentieth of torch's time on the CPU."""
    return torch.from_numpy(logits.numpy().argmax(-1))
