"""The plan: which format every weight of one model gets, and why. A readable file that people may edit."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rwkvq.checkpoint.names import expected_shapes, unused_tensors, weights_of
from rwkvq.checkpoint.reader import WeightSource
from rwkvq.checkpoint.spec import ModelSpec
from rwkvq.documents import read_json
from rwkvq.errors import CheckpointError, PlanError
from rwkvq.files import write_json
from rwkvq.plan.bits import totals
from rwkvq.plan.options import Method
from rwkvq.plan.tensor import PlannedTensor, ProxyValues, row_difference
from rwkvq.settings import Policy, Preset

__all__ = ["FORMAT", "Difference", "Method", "Plan", "PlannedTensor", "ProxyValues", "diff"]

FORMAT: Literal["rwkvq-plan/1"] = "rwkvq-plan/1"
_KEYS = ("format", "model_sha256", "spec", "policy", "preset", "seed", "bits", "decision", "thresholds", "tensors")
_OPTIONAL_KEYS = ("dropped", "totals")
_HEADER = ("model_sha256", "policy", "preset", "seed", "bits", "decision", "thresholds", "dropped")


@dataclass(frozen=True, slots=True)
class Plan:
    """A plan of one model: every used weight exactly once, in the order of `checkpoint.names.weights_of`.

    model_sha256: identity of the checkpoint; bits: b of both arms; decision: mode and target of policy `rwkvquant`,
    empty for the others; thresholds: tau_c and tau_f (or max_over_rms) that give this map, a missing one excludes
    nothing; dropped: tensors of the checkpoint that nothing reads and no artifact holds.
    """

    model_sha256: str
    spec: ModelSpec
    policy: Policy
    preset: Preset
    seed: int
    bits: int
    decision: dict[str, str | float]
    thresholds: dict[str, float]
    tensors: tuple[PlannedTensor, ...]
    dropped: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values; `totals` is there for the reader and is not read back."""
        return {
            "format": FORMAT,
            "model_sha256": self.model_sha256,
            "spec": self.spec.to_json(),
            "policy": self.policy,
            "preset": self.preset,
            "seed": self.seed,
            "bits": self.bits,
            "decision": dict(self.decision),
            "thresholds": dict(self.thresholds),
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "dropped": list(self.dropped),
            "totals": totals(self).to_json(),
        }

    @classmethod
    def from_json(cls, values: Any) -> Plan:
        """Read what to_json wrote, edited or not. Raises PlanError, one line about the first thing that is wrong."""
        if not isinstance(values, Mapping):
            raise PlanError(f"found {type(values).__name__}, expected a JSON object that holds a plan")
        if values.get("format") != FORMAT:
            raise PlanError(f"format is {values.get('format')!r}, expected {FORMAT!r}; make the plan with this version")
        missing = [key for key in _KEYS if key not in values]
        unknown = [str(key) for key in values if key not in _KEYS + _OPTIONAL_KEYS]
        if missing or unknown:
            listed = f"missing keys: {', '.join(missing) or 'none'}; unknown keys: {', '.join(unknown) or 'none'}"
            raise PlanError(f"{listed}; restore the plan's keys")
        _check_header(values)
        try:
            spec = ModelSpec.from_json(values["spec"])
        except CheckpointError as error:
            raise PlanError(f"spec: {error}") from error
        plan = cls(
            model_sha256=values["model_sha256"],
            spec=spec,
            policy=values["policy"],
            preset=values["preset"],
            seed=values["seed"],
            bits=values["bits"],
            decision=dict(values["decision"]),
            thresholds={key: float(value) for key, value in values["thresholds"].items()},
            tensors=tuple(PlannedTensor.from_json(row) for row in values["tensors"]),
            dropped=tuple(values.get("dropped", ())),
        )
        _check_tensors(plan)
        return plan

    def write(self, path: Path) -> None:
        """Write plan.json atomically; equal plans give equal bytes."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan.json. Raises PlanError naming the file for anything that is wrong with it."""
        try:
            return cls.from_json(read_json(path))
        except FileNotFoundError as error:
            raise PlanError(f"{path}: no such plan; run the stage `plan` first") from error
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PlanError(f"{path}: cannot be read as JSON ({reason}); make a new plan") from error
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def check_model(self, source: WeightSource) -> None:
        """Raise PlanError unless this is a plan of the model in `source`, tensor by tensor."""
        if self.model_sha256 != source.identity():
            raise PlanError(
                f"plan of another model: it was made for {self.model_sha256[:12]}..., but {source.path} is "
                f"{source.identity()[:12]}...; make a new plan"
            )
        for tensor in self.tensors:
            if source.shape(tensor.tensor) != tensor.tensor_shape:
                raise PlanError(
                    f"{tensor.name}: tensor_shape is {list(tensor.tensor_shape)}, but {source.path} holds "
                    f"{list(source.shape(tensor.tensor))}; make a new plan"
                )


def _check_header(values: Mapping[str, Any]) -> None:
    """Raise PlanError for the first header value of a wrong type or range."""
    numbers = (int, float)
    decision, thresholds, dropped = values["decision"], values["thresholds"], values.get("dropped", [])
    sha256 = values["model_sha256"]
    rules = (
        ("model_sha256", isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256), "64 hexadecimal digits"),
        ("policy", values["policy"] in get_args(Policy), f"one of {', '.join(get_args(Policy))}"),
        ("preset", values["preset"] in get_args(Preset), f"one of {', '.join(get_args(Preset))}"),
        ("seed", type(values["seed"]) is int and values["seed"] >= 0, "a whole number"),
        ("bits", type(values["bits"]) is int and 1 <= values["bits"] <= 8, "a whole number from 1 to 8"),
        (
            "decision",
            isinstance(decision, Mapping) and all(type(value) in (*numbers, str) for value in decision.values()),
            "an object of names and numbers",
        ),
        (
            "thresholds",
            isinstance(thresholds, Mapping)
            and all(type(value) in numbers and math.isfinite(value) for value in thresholds.values()),
            "an object of numbers",
        ),
        ("dropped", isinstance(dropped, list) and all(isinstance(name, str) for name in dropped), "a list of names"),
        ("tensors", isinstance(values["tensors"], list), "a list of rows"),
    )
    for key, holds, expected in rules:
        if not holds:
            raise PlanError(f"{key} is {str(values.get(key))[:120]}, expected {expected}")


def _check_tensors(plan: Plan) -> None:
    """Raise PlanError unless the rows are exactly the weights of the plan's model."""
    if plan.spec.layers > len(plan.tensors):
        # an absurd number of blocks would make the list of expected weights endless
        raise PlanError(f"spec has {plan.spec.layers} blocks, but only {len(plan.tensors)} weights are planned")
    names = Counter(tensor.name for tensor in plan.tensors)
    duplicated = [name for name, count in names.items() if count > 1]
    if duplicated:
        raise PlanError(f"{duplicated[0]}: planned {names[duplicated[0]]} times, expected once; remove a row")
    if strange := set(plan.dropped) - set(unused_tensors(plan.spec, plan.dropped)):
        raise PlanError(f"dropped names {sorted(strange)[0][:120]!r}, which the model uses or does not have; remove it")
    weights = {weight.name: weight for weight in weights_of(plan.spec, _tensor_shapes(plan))}
    missing = [name for name in weights if name not in names]
    unknown = [name for name in names if name not in weights]
    if missing or unknown:
        listed = f"{len(missing)} weights are missing" + (f" (first: {missing[0]})" if missing else "")
        listed += f", {len(unknown)} are unknown" + (f" (first: {unknown[0][:120]})" if unknown else "")
        raise PlanError(f"{listed}; expected each of the model's {len(weights)} weights once, add or remove rows")
    for tensor in plan.tensors:
        for key in ("tensor", "index", "transposed", "weight_class", "block"):
            found, wanted = getattr(tensor, key), getattr(weights[tensor.name], key)
            if found != wanted:
                label = key.removeprefix("weight_")
                raise PlanError(f"{tensor.name}: {label} is {found!r}, but the model's is {wanted!r}; restore it")


def _tensor_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model, as the rows state them. Raises PlanError if one cannot be the model's."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in plan.tensors:
        if shapes.setdefault(tensor.tensor, tensor.tensor_shape) != tensor.tensor_shape:
            raise PlanError(f"{tensor.name}: tensor_shape differs between the parts of {tensor.tensor}; restore it")
    expected = expected_shapes(plan.spec)
    # a vector may be stored as [1, 1, D]
    for name, shape in expected.items():
        found = shapes.get(name)
        if found is not None and found != shape and not (len(shape) == 1 and found == (1, 1, *shape)):
            raise PlanError(f"{name}: tensor_shape is {list(found)}, but the model's is {list(shape)}; make a new plan")
    return expected | shapes


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference between two plans; `name` is a weight, or `plan` for the header. Its text is one line."""

    name: str
    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        """name: field before -> after."""
        return f"{self.name}: {self.field} {_text(self.before)} -> {_text(self.after)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=list)


def diff(before: Plan, after: Plan) -> list[Difference]:
    """Every difference between two plans, header first, then weight by weight. Empty if they are equal."""
    found = [
        Difference("plan", key, getattr(before, key), getattr(after, key))
        for key in _HEADER
        if getattr(before, key) != getattr(after, key)
    ]
    if before.spec != after.spec:
        found.append(Difference("plan", "spec", before.spec.to_json(), after.spec.to_json()))
    rows: defaultdict[str, list[PlannedTensor | None]] = defaultdict(lambda: [None, None])
    for side, plan in enumerate((before, after)):
        for tensor in plan.tensors:
            rows[tensor.name][side] = tensor
    for name, (first, second) in rows.items():
        if first is None or second is None:
            found.append(Difference(name, "planned", first is not None, second is not None))
        else:
            found += [Difference(name, *changed) for changed in row_difference(first, second)]
    return found
