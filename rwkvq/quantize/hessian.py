"""What feedback quantizers need of the second moment H = sum x x^T: its damped inverse factor, and the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvq.errors import QuantizationError, ShapeError

ATTEMPTS = 4
"""Damping is tried as given and then 10, 100 and 1000 times larger."""


def check_statistics(weight: Tensor, second_moment: Tensor) -> None:
    """Raise ShapeError unless weight is [out, in] and second_moment [in, in]; QuantizationError for NaN or Inf."""
    columns = weight.shape[-1]
    if weight.ndim != 2 or tuple(second_moment.shape) != (columns, columns):
        found = f"{list(weight.shape)} with second moment {list(second_moment.shape)}"
        raise ShapeError(f"weight [out, in] needs a second moment [in, in]; found {found}; collect statistics again")
    if not bool(torch.isfinite(weight).all()):
        raise QuantizationError("weight: found NaN or Inf, expected finite values; check the checkpoint")
    if not bool(torch.isfinite(second_moment).all()):
        raise QuantizationError("second moment: found NaN or Inf, expected finite values; collect statistics again")


def revived(second_moment: Tensor) -> Tensor:
    """Return H in float64 with the mean diagonal in place of zero diagonal entries (inputs that never fired).

    Their weights are then rounded like any other instead of being lost (docs/method.md 5). A zero H becomes the
    identity.
    """
    result = second_moment.double().clone()
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
    identity = torch.eye(size, dtype=torch.float64)
    for attempt in range(ATTEMPTS):
        reversed_hessian = damped(second_moment, damping * 10**attempt).flip(0, 1)
        lower, failed = torch.linalg.cholesky_ex(reversed_hessian)
        if int(failed) == 0:
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            upper: Tensor = inverse.flip(0, 1).float().contiguous()
            if bool(torch.isfinite(upper).all()):
                return upper
    raise QuantizationError(
        f"second moment [{size}, {size}]: not positive definite even with damping "
        f"{damping * 10 ** (ATTEMPTS - 1):g}; use more calibration tokens or a larger damping"
    )


def loss(weight: Tensor, quantized: Tensor, second_moment: Tensor) -> float:
    """Return tr(dW H dW^T) with dW = weight - quantized, both [out, in]: the squared output error that H predicts."""
    error = weight.float() - quantized.float()
    return float(((error @ second_moment.float()) * error).sum(dtype=torch.float64))


def relative_loss(weight: Tensor, quantized: Tensor, second_moment: Tensor) -> float:
    """Return the loss over tr(W H W^T), the squared output itself; 0 for a weight whose output is 0."""
    whole = loss(weight, torch.zeros_like(weight), second_moment)
    return loss(weight, quantized, second_moment) / whole if whole > 0 else 0.0
