"""How much the loss depends on the embedding and the head: what the backward pass sees at both ends of the model.

An error dW [vocab, width] of either costs 0.5 * sum_v f_v dW_v M dW_v^T nats a token (docs/method.md 14). Of the head,
f_v is the mean of p_v (1 - p_v), the Fisher diagonal of its logits, and M the second moment of what it is multiplied
with. Of the embedding, M is the second moment of the gradient at its rows, through ln0, and f_v the share of row v in
the squares of that gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from rwkvq.checkpoint.headers import open_safetensors
from rwkvq.checkpoint.names import OUTER
from rwkvq.checkpoint.writer import write_safetensors
from rwkvq.errors import ActivationError
from rwkvq.models.layers import layer_norm
from rwkvq.tensors import is_finite

_PARTS = ("fisher", "second_moment")


@dataclass(frozen=True, slots=True)
class OuterStatistics:
    """fisher float32 [vocab] and second_moment float32 [width, width] of one of OUTER: f and M of the module."""

    fisher: Tensor
    second_moment: Tensor


def outer_path(folder: Path) -> Path:
    """File with the statistics of embedding and head, beside those of the blocks."""
    return folder / "outer.safetensors"


class HeadSums:
    """Sums over the tokens that the head has seen."""

    def __init__(self, vocab: int, width: int, device: torch.device) -> None:
        self.fisher = torch.zeros(vocab, dtype=torch.float64, device=device)
        self.second_moment = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, probabilities: Tensor, x: Tensor) -> None:
        """Count tokens: probabilities [tokens, vocab], x [tokens, width] the input of the head."""
        # the mean of (p - t)^2 over targets t drawn from p
        self.fisher += torch.addcmul(probabilities, probabilities, probabilities, value=-1).sum(0).double()
        self.second_moment += (x.t() @ x).double()
        self.tokens += len(x)

    def merge(self, other: HeadSums) -> None:
        """Count the tokens of `other` too."""
        self.fisher += other.fisher
        self.second_moment += other.second_moment
        self.tokens += other.tokens

    def finish(self) -> OuterStatistics:
        """The means, on the processor."""
        fisher, moment = self.fisher.cpu(), self.second_moment.cpu()
        return OuterStatistics((fisher / self.tokens).float(), (moment / self.tokens).float())


def embedding_statistics(
    emb: Tensor, ln0: tuple[Tensor, Tensor], windows: Iterable[tuple[Tensor, Tensor]]
) -> OuterStatistics:
    """The statistics of emb [vocab, width] from windows of (ids [time], dL/dx [time, width]), x = ln0(emb[ids])."""
    vocab, width = emb.shape
    shares = torch.zeros(vocab, dtype=torch.float64)
    moment = torch.zeros(width, width, dtype=torch.float64)
    tokens = 0
    for ids, gradient in windows:
        with torch.enable_grad():
            rows = emb[ids].float().requires_grad_()
            (found,) = torch.autograd.grad(layer_norm(rows, *ln0), rows, gradient)
        shares.index_add_(0, ids, found.square().sum(1, dtype=torch.float64))
        moment += (found.t() @ found).double()
        tokens += len(ids)
    energy = float(shares.sum())
    return OuterStatistics((shares / energy if energy > 0 else shares).float(), (moment / tokens).float())


def write_outer(folder: Path, statistics: Mapping[str, OuterStatistics]) -> Path:
    """Write the statistics by weight name; return the file. Raises ActivationError for values that are not finite."""
    tensors = {f"{name}::{part}": getattr(item, part) for name, item in statistics.items() for part in _PARTS}
    if bad := next((name for name, tensor in tensors.items() if not is_finite(tensor)), None):
        raise ActivationError(f"{bad}: gradients that are not finite; use an undamaged checkpoint")
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
    write_safetensors(outer_path(folder), entries, sorted(tensors.items()), {})
    return outer_path(folder)


def read_outer(folder: Path) -> dict[str, OuterStatistics]:
    """The statistics of both of OUTER. Raises ActivationError for a missing or damaged file."""
    path = outer_path(folder)
    try:
        with open_safetensors(path) as file:
            found = {name: [file.get_tensor(f"{name}::{part}") for part in _PARTS] for name in OUTER}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ActivationError(f"{path}: {reason}; run the gradients stage again") from error
    if bad := next((name for name, parts in found.items() if not all(map(is_finite, parts))), None):
        raise ActivationError(f"{path}: damaged ({bad}); run the gradients stage again")
    return {name: OuterStatistics(*parts) for name, parts in found.items()}
