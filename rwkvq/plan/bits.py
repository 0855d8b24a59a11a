"""What a plan stores, in bits, before anything is quantized (docs/method.md 8)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from rwkvq.checkpoint.names import OUTER
from rwkvq.plan.tensor import PlannedTensor


class HasTensors(Protocol):
    """A plan."""

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """All weights of the model."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a plan. Bits per weight unless a field says otherwise.

    Matrices are the quantized weights of the classes matrix and lora; the fields about them are None if there is none.
    """

    nominal_by_count: float | None  # published formulas, every matrix counts once
    nominal_by_weights: float | None  # published formulas, every weight counts once
    matrix_bits: float | None  # stored bits of the matrices over their weights
    body_bits: float  # everything but emb and head
    stored_bits_per_weight: float  # everything; file_bits adds the file's header
    total_stored_bits: int  # bits
    weights: int
    matrix_weights: int
    body_weights: int
    matrices: int

    def to_json(self) -> dict[str, float | int | None]:
        """The fields as plain values, rounded to 6 digits."""
        names = type(self).__dataclass_fields__
        values = {name: getattr(self, name) for name in names}
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}


def _stored(tensors: Iterable[PlannedTensor]) -> int:
    return sum(tensor.stored_bits for tensor in tensors)


def _weights(tensors: Iterable[PlannedTensor]) -> int:
    return sum(tensor.numel for tensor in tensors)


def totals(plan: HasTensors) -> Totals:
    """Sum up a plan."""
    matrices = [item for item in plan.tensors if item.weight_class in ("matrix", "lora") and item.method != "keep"]
    body = [item for item in plan.tensors if item.tensor not in OUTER]
    weights, matrix_weights, body_weights = _weights(plan.tensors), _weights(matrices), _weights(body)
    total = _stored(plan.tensors)
    nominal = [item.nominal_bits for item in matrices]
    weighted = sum(item.nominal_bits * item.numel for item in matrices)
    return Totals(
        nominal_by_count=sum(nominal) / len(nominal) if matrices else None,
        nominal_by_weights=weighted / matrix_weights if matrices else None,
        matrix_bits=_stored(matrices) / matrix_weights if matrices else None,
        body_bits=_stored(body) / body_weights if body else 0.0,
        stored_bits_per_weight=total / weights if weights else 0.0,
        total_stored_bits=total,
        weights=weights,
        matrix_weights=matrix_weights,
        body_weights=body_weights,
        matrices=len(matrices),
    )
