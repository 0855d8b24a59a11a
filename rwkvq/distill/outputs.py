"""What stage `distill` leaves: the vectors as they are stored, and the curve of the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from rwkvq.checkpoint.headers import open_safetensors
from rwkvq.checkpoint.writer import write_safetensors
from rwkvq.distill.student import trained_weights
from rwkvq.distill.train import Distilled
from rwkvq.documents import read_json
from rwkvq.errors import QuantizationError
from rwkvq.files import write_json
from rwkvq.plan.plan import Plan

_FIGURES = ("vectors", "before", "after", "step")
_REMEDY = "run stage distill again"


def write_distilled(result: Distilled, tensors: Path, curve: Path) -> None:
    """Write the vectors (safetensors, by weight name) and the curve (JSON). Equal results give equal bytes."""
    entries = [(name, value.dtype, tuple(value.shape)) for name, value in result.values.items()]
    write_safetensors(tensors, entries, result.values.items(), {})
    figures: dict[str, Any] = {
        "vectors": len(result.values),
        "before": result.before,
        "after": result.after,
        "step": result.step,
        "checks": [asdict(check) for check in result.checks],
    }
    write_json(curve, figures)


def read_distilled(path: Path, plan: Plan) -> dict[str, Tensor]:
    """The vectors by weight name. Raises QuantizationError: missing, damaged, or not those that `plan` keeps."""
    expected = {entry.name for entry in trained_weights(plan)}
    try:
        with open_safetensors(path) as file:
            if set(file.keys()) == expected:
                return {name: file.get_tensor(name) for name in sorted(expected)}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise QuantizationError(f"{path}: missing or damaged; {_REMEDY}") from error
    raise QuantizationError(f"{path}: its tensors are not the vectors that the plan keeps; {_REMEDY}")


def read_curve(path: Path) -> Mapping[str, Any]:
    """vectors (how many), before, after (held-out KL, nats a token), step (the best one), checks.

    Raises QuantizationError.
    """
    try:
        figures = read_json(path)
        if all(type(figures[key]) in (int, float) for key in _FIGURES):
            return dict(figures)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QuantizationError(f"{path}: missing or damaged; {_REMEDY}") from error
    raise QuantizationError(f"{path}: damaged (figures that are no numbers); {_REMEDY}")
