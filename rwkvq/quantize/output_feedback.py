"""Error feedback from output to output: what an error of one row leaves for the later rows to make up for.

The loss of an error dW [out, in] is 0.5 tr(G dW H dW^T), G the second moment of the gradient at the outputs (Kronecker
factors of the Fisher information, arXiv 2505.22988). Error feedback along the columns asks nothing of G, so rows can be
rounded one after the other inside a column, each for what the earlier ones left, just as columns are by H.

G is known in blocks along its diagonal, and rows of different blocks do not know of each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from rwkvq.errors import QuantizationError, ShapeError
from rwkvq.quantize.hessian import damped

SHRINKAGE = 0.1
"""How much smaller correlations are taken than they were seen: few tokens make them too large."""
_DAMPING = 1e-6
"""Of the factorization; the shrinkage keeps it well conditioned."""
STEPS = 16
"""Rounds in which the rows of a block are rounded, at most: a search each, over the rows that are so far apart."""


@dataclass(frozen=True, slots=True)
class OutputFeedback:
    """G of the rows in units of their scales, and how errors go from row to row.

    metric float32 [blocks, size, size]: G with its correlations shrunk; links float32 [blocks, size, size]: what an
    error of a row takes from the targets of the rows of later rounds, rows in the order of the rounds. rounds int64
    [rounds, blocks, size / rounds]: the rows of the weight that each round has. weights float32 [out]: what a squared
    error of a row costs when later rows make up for it; shares float32 [out]: as a part of what it costs by itself.
    """

    metric: Tensor
    links: Tensor
    rounds: Tensor
    weights: Tensor
    shares: Tensor

    @classmethod
    def of(cls, moment: Tensor, scales: Tensor) -> Self:
        """Of the blocks of G, float [blocks, size, size], for rows with these scales [out].

        Raises ShapeError if they do not fit, QuantizationError for values that are not finite or no second moment.
        """
        blocks, size = moment.shape[:2]
        if moment.dim() != 3 or moment.shape[2] != size or blocks * size != len(scales):
            raise ShapeError(f"moment of outputs {list(moment.shape)} does not fit {len(scales)} rows")
        own = scales.double().view(blocks, size)
        metric = moment.double() * own[:, :, None] * own[:, None, :]
        metric = metric / metric.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-300)
        diagonal = metric.diagonal(dim1=1, dim2=2).clone()
        metric.mul_(1 - SHRINKAGE).diagonal(dim1=1, dim2=2).copy_(diagonal)
        metric = torch.stack([damped(each, _DAMPING) for each in metric])
        count = next(steps for steps in range(STEPS, 0, -1) if size % steps == 0)
        # neighbours, which are often alike, are in different rounds
        order = torch.arange(size, device=moment.device).view(-1, count).t().flatten()
        links, costs = _links(metric[:, order][:, :, order], size // count)
        rows = order.view(count, 1, -1) + size * torch.arange(blocks, device=moment.device)[None, :, None]
        weights = torch.empty(blocks * size, dtype=torch.float64, device=moment.device)
        weights[rows.transpose(0, 1).reshape(-1)] = costs.flatten()
        shares = weights / metric.diagonal(dim1=1, dim2=2).flatten()
        return cls(metric.float(), links.float(), rows, weights.float(), shares.float())

    def row_by_row(self, columns: int, round_rows: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Call round_rows(rows [n], shift [n, columns]) for one round after the other.

        shift: what the errors of earlier rounds add to the targets of these rows. It returns their errors [n, columns],
        the shifted target minus what stands for it.
        """
        count, blocks, own = self.rounds.shape
        shift = self.links.new_zeros(blocks, count * own, columns)
        for index, rows in enumerate(self.rounds):
            here = slice(index * own, (index + 1) * own)
            errors = round_rows(rows.flatten(), shift[:, here].reshape(-1, columns))
            links = self.links[:, here, here.stop :].transpose(1, 2)
            shift[:, here.stop :].baddbmm_(links, errors.view(blocks, own, columns), alpha=-1)


def _links(metric: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """Links float64 [blocks, size, size] and costs [blocks, size] for rounds of `own` consecutive rows each.

    With U^T U = G^-1, U upper, the links of a round are U_pp^-1 U, and G given the earlier rounds and with the later
    ones free is (U_pp^T U_pp)^-1.
    """
    links, costs = torch.zeros_like(metric), metric.new_empty(metric.shape[:2])
    for block, each in enumerate(metric):
        lower, failed = torch.linalg.cholesky_ex(each.flip(0, 1))
        if int(failed) or not bool(torch.isfinite(lower).all()):
            raise QuantizationError("moment of outputs: not positive definite; run the gradients stage again")
        one = torch.eye(len(each), dtype=each.dtype, device=each.device)
        upper = torch.linalg.solve_triangular(lower, one, upper=False).flip(0, 1)
        for first in range(0, len(each), own):
            stop = first + own
            inverse = torch.linalg.inv(upper[first:stop, first:stop])
            links[block, first:stop, stop:] = inverse @ upper[first:stop, stop:]
            costs[block, first:stop] = inverse.square().sum(1)
    return links, costs
