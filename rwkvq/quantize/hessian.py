"""What feedback quantizers need of the second moment H = sum x x^T: its damped inverse factor, and the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rwkvq.errors import QuantizationError, ShapeError
from rwkvq.quantize.factor import factor_in_place, permuted, restore
from rwkvq.tensors import is_finite

ATTEMPTS = 4
"""Damping is tried as given and then 10, 100 and 1000 times larger."""

FLOAT64_COLUMNS = 4096
"""Up to this many columns H is factorised in float64, beside H. A wider one is factorised in float32 in its own memory:
the damping keeps it well conditioned (measured in benchmarks/scale.md), and a second matrix would not fit."""

CHUNK = 1 << 22
"""Weights whose float32 products with H exist at once."""


def check_statistics(weight: Tensor, second_moment: Tensor) -> None:
    """Raise ShapeError unless weight is [out, in] and second_moment [in, in]; QuantizationError for NaN or Inf."""
    columns = weight.shape[-1]
    if weight.ndim != 2 or tuple(second_moment.shape) != (columns, columns):
        found = f"{list(weight.shape)} with second moment {list(second_moment.shape)}"
        raise ShapeError(f"weight [out, in] needs a second moment [in, in]; found {found}; collect statistics again")
    if not is_finite(weight):
        raise QuantizationError("weight: found NaN or Inf, expected finite values; check the checkpoint")
    if not is_finite(second_moment):
        raise QuantizationError("second moment: found NaN or Inf, expected finite values; collect statistics again")


def revived(second_moment: Tensor) -> Tensor:
    """Return H in float64 with the mean diagonal in place of zero diagonal entries (inputs that never fired).

    Their weights are then rounded like any other instead of being lost (docs/method.md 5). A zero H becomes the
    identity.
    """
    result = second_moment.to(torch.float64, copy=True)
    diagonal = result.diagonal()  # a view
    dead = diagonal <= 0
    alive = diagonal[~dead]
    diagonal[dead] = alive.mean() if alive.numel() else 1.0
    return result


def damped(second_moment: Tensor, damping: float) -> Tensor:
    """Return H + damping * mean(diag H) * I in float64, dead columns revived."""
    hessian = revived(second_moment)
    hessian.diagonal().add_(float(hessian.diagonal().mean()) * damping)
    return hessian


def inverse_factor(second_moment: Tensor, damping: float) -> Tensor:
    """Return U, float32 upper triangular [in, in] with U^T U = (H + damping * mean(diag H) * I)^-1.

    Computed in float64. Damping is raised tenfold, at most three times, while the factorisation fails; then
    QuantizationError is raised. One Cholesky of H with rows and columns reversed gives U directly: with
    P H P = L L^T, U = P L^-1 P.
    """
    size = len(second_moment)
    for attempt in range(ATTEMPTS):
        lower, failed = torch.linalg.cholesky_ex(damped(second_moment, damping * 10**attempt).flip(0, 1))
        if int(failed) == 0:
            inverse = torch.linalg.solve_triangular(
                lower, torch.eye(size, dtype=torch.float64, device=lower.device), upper=False
            )
            del lower
            upper: Tensor = inverse.flip(0, 1).float().contiguous()
            if bool(torch.isfinite(upper).all()):
                return upper
    raise _failure(size, damping)


def _failure(size: int, damping: float) -> QuantizationError:
    return QuantizationError(
        f"second moment [{size}, {size}]: not positive definite even with damping "
        f"{damping * 10 ** (ATTEMPTS - 1):g}; use more calibration tokens or a larger damping"
    )


def damped_diagonal(diagonal: Tensor, damping: float) -> Tensor:
    """Return, in float64, the diagonal that `damped` gives an H whose own diagonal is given [in]."""
    result = diagonal.to(torch.float64, copy=True)
    dead = result <= 0
    alive = result[~dead]
    result[dead] = alive.mean() if alive.numel() else 1.0
    return result.add_(float(result.mean()) * damping)


@contextmanager
def with_damping(second_moment: Tensor, damping: float) -> Iterator[Tensor]:
    """Yield H as `damped` gives it, but float32 and in the memory of H, whose diagonal comes back at the end."""
    diagonal = second_moment.diagonal().clone()
    second_moment.diagonal().copy_(damped_diagonal(diagonal, damping))
    try:
        yield second_moment
    finally:
        second_moment.diagonal().copy_(diagonal)


@contextmanager
def inverse_factor_of(second_moment: Tensor, damping: float, order: Tensor | None = None) -> Iterator[Tensor]:
    """Yield U of H, float32 [in, in], with rows and columns of H in `order` [in] if that is given.

    U may be overwritten, but only its upper triangle and diagonal, and only these are to be read: above
    FLOAT64_COLUMNS, but on CUDA, U lies in the memory of H, which is whole again, bit by bit, at the end. H is not to
    be read inside.
    Raises QuantizationError like inverse_factor.
    """
    if len(second_moment) <= FLOAT64_COLUMNS or second_moment.is_cuda:
        yield inverse_factor(second_moment if order is None else second_moment[order][:, order], damping)
    elif order is not None:
        with permuted(second_moment, order), _factor_inside(second_moment, damping):
            yield second_moment
    else:
        with _factor_inside(second_moment, damping):
            yield second_moment


@contextmanager
def _factor_inside(second_moment: Tensor, damping: float) -> Iterator[None]:
    diagonal = second_moment.diagonal().clone()
    try:
        for attempt in range(ATTEMPTS):
            second_moment.diagonal().copy_(damped_diagonal(diagonal, damping * 10**attempt))
            if factor_in_place(second_moment):
                break
            restore(second_moment, diagonal)
        else:
            raise _failure(len(second_moment), damping)
        yield
    finally:
        restore(second_moment, diagonal)


def loss(weight: Tensor, quantized: Tensor, second_moment: Tensor) -> float:
    """Return tr(dW H dW^T) with dW = weight - quantized, both [out, in]: the squared output error that H predicts."""
    total, moment = 0.0, second_moment.float()
    for rows in row_chunks(weight):
        error = weight[rows].float() - quantized[rows].float()
        total += float((error @ moment).mul_(error).sum(dtype=torch.float64))
    return total


def row_chunks(weight: Tensor) -> list[slice]:
    """Blocks of rows of weight [out, in] of at most CHUNK elements."""
    rows = max(1, CHUNK // weight.shape[1])
    return [slice(start, min(start + rows, len(weight))) for start in range(0, len(weight), rows)]


def relative_loss(weight: Tensor, quantized: Tensor, second_moment: Tensor) -> float:
    """Return the loss over tr(W H W^T), the squared output itself; 0 for a weight whose output is 0."""
    whole = loss(weight, torch.zeros_like(weight), second_moment)
    return loss(weight, quantized, second_moment) / whole if whole > 0 else 0.0
