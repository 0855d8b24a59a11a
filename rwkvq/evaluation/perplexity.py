"""Text perplexity: which tokens are predicted, and means over windows with their standard errors."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvq.errors import TextError
from rwkvq.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over windows and its standard error; None where a single window gives none."""

    mean: float
    se: float | None


def estimate(window_means: Tensor) -> Estimate:
    """Mean of window means [windows] float64 and its standard error, std / sqrt(windows)."""
    count = len(window_means)
    se = window_means.std().item() / math.sqrt(count) if count > 1 else None
    return Estimate(window_means.mean().item(), se)


def perplexity(nll: float) -> float:
    """Return exp(nll), nll in nats; capped at exp(700), so that a ruined model's figure is still a number."""
    return math.exp(min(nll, 700.0))


def text_windows(text: str, tokenizer: Tokenizer, windows: int, length: int, *, where: str) -> Tensor:
    """Return the first `windows` consecutive, non-overlapping windows of `text` as ids [count, length] int64.

    The whole text is tokenised once, without special tokens; an incomplete last window is dropped; a short text gives
    fewer windows. Raises TextError, naming `where` the text came from, if it does not fill one window.
    """
    ids = tokenizer.encode(text)
    count = min(windows, len(ids) // length)
    if count < 1:
        raise TextError(f"{where}: found {len(ids)} tokens, one window needs {length}; use a longer text")
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def ids_sha256(ids: Tensor) -> str:
    """Hex SHA-256 of token ids as little-endian int32: which tokens a figure was measured on."""
    return hashlib.sha256(ids.numpy().astype("<i4").tobytes()).hexdigest()
