"""Policy `budget`: the bits of a target go where the model needs them, by the curves that stage `curves` measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rwkvq.checkpoint.names import Weight
from rwkvq.errors import PlanError, SettingsError
from rwkvq.plan.allocate import Option, allocate
from rwkvq.plan.candidates import Candidate, CurvePoint, allowed, by_weight, candidates_of
from rwkvq.settings import FormatSet

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|KiB|MiB|GiB)")
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
TENSOR_HEADER_BYTES = 160
"""What one stored tensor takes in the header of a weight file, at most (measured on released names)."""


@dataclass(frozen=True, slots=True)
class BudgetChoice:
    """The candidate of every decided weight and why, and the sum of the predicted losses."""

    candidates: Mapping[str, Candidate]
    reasons: Mapping[str, str]
    loss: float


def size_in_bytes(text: str) -> int:
    """Bytes of `1.2GB`, `800 MB`, `1.5GiB`. Raises SettingsError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SettingsError("plan.size", [f"{text!r} is no size; expected a number and one of {', '.join(_UNITS)}"])
    return int(float(match[1]) * _UNITS[match[2]])


def choose(
    decided: Sequence[Weight],
    points: Sequence[CurvePoint],
    budget: int,
    *,
    state_bits: int,
    formats: FormatSet,
    target: str,
) -> BudgetChoice:
    """Spend `budget` bits on the decided weights. target: the user's words for it, for messages.

    Raises PlanError if the budget cannot be met, naming the floor, or the curves are of another model.
    """
    if not decided:
        raise PlanError("policy budget: no weight is left to decide; set plan.lora to quantize or use another policy")
    curves = by_weight(points)
    known = {weight.name: {item.label: item for item in candidates_of(weight, state_bits)} for weight in decided}
    for weight in decided:
        found = curves.get(weight.name, {})
        if not found or any(
            label not in known[weight.name] or point.stored_bits != known[weight.name][label].layout.stored_bits()
            for label, point in found.items()
        ):
            raise PlanError(f"{weight.name}: the table of curves does not fit this model; run the stage `curves` again")
    options = {
        name: [
            Option(item.label, curves[name][item.label].stored_bits, curves[name][item.label].loss)
            for item in allowed(candidates.values(), formats)
            if item.label in curves[name]
        ]
        for name, candidates in known.items()
    }
    if empty := next((name for name, choices in options.items() if not choices), None):
        raise PlanError(f"{empty}: no format of plan.formats {formats} fits it; use plan.formats quality")
    numel = sum(_numel(weight) for weight in decided)
    floor = sum(min(option.bits for option in choices) for choices in options.values())
    if floor > budget:
        raise PlanError(
            f"{target} cannot be met: at least {floor / numel:.3f} bits a matrix weight are needed, "
            f"{max(budget, 0) / numel:.3f} are left; choose a larger target"
        )
    made = allocate(options, budget)
    candidates = {name: known[name][label] for name, label in made.labels.items()}
    reasons = {name: _reason(choices, made.labels[name]) for name, choices in options.items()}
    return BudgetChoice(candidates, reasons, made.loss)


def _numel(weight: Weight) -> int:
    return weight.shape[0] * weight.shape[1]


def _reason(options: Sequence[Option], label: str) -> str:
    """Why a weight got its format: its predicted loss, and what a cheaper or dearer one would have changed."""
    ordered = sorted(options, key=lambda option: option.bits)
    place = [option.label for option in ordered].index(label)
    loss = ordered[place].loss
    said = f"budget: predicted KL {loss:.2e}"
    if place:
        said += f"; {ordered[place - 1].label} would add {ordered[place - 1].loss - loss:.2e}"
    if place + 1 < len(ordered):
        said += f"; {ordered[place + 1].label} would save {loss - ordered[place + 1].loss:.2e}"
    return said
