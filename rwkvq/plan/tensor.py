"""One row of a plan: what becomes of one weight, and the checks of a row that a person may have edited."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, TypeVar, cast, get_args

from rwkvq.checkpoint.names import WeightClass
from rwkvq.errors import PlanError
from rwkvq.formats import (
    AffineLayout,
    ColumnwiseLayout,
    DenseLayout,
    ElementwiseLayout,
    Layout,
    ResidualLayout,
    ScalarLayout,
    TableLayout,
    TrellisLayout,
    VectorLayout,
    layout_from_json,
)
from rwkvq.plan.options import FORMAT_OF, Method, checked_options
from rwkvq.settings import GapMode

_KEYS = (
    "name",
    "tensor",
    "index",
    "transposed",
    "class",
    "block",
    "tensor_shape",
    "format",
    "layout",
    "method",
    "options",
    "reason",
    "proxies",
)
_DERIVED_KEYS = ("stored_bits", "bits_per_weight")
_MAX_AXES = 3
_Value = TypeVar("_Value")


class ProxyValues(TypedDict):
    """The proxies of a weight in the gap mode that the decision used."""

    p_c: float
    p_f: float
    gap_mode: GapMode


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One weight of the model and how it is stored.

    name, tensor, index, transposed, weight_class, block: as `checkpoint.names.Weight`; tensor_shape: shape of the whole
    checkpoint tensor; layout: of `shape`, in the format that `method` writes; options: of the method (OPTIONS_OF);
    reason: why, for people; proxies: None where none were measured.
    """

    name: str
    tensor: str
    index: int | None
    transposed: bool
    weight_class: WeightClass
    block: int | None
    tensor_shape: tuple[int, ...]
    layout: Layout
    method: Method
    options: dict[str, Any]
    reason: str
    proxies: ProxyValues | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in) of a matrix or LoRA factor, (size,) of an element-wise weight, as stored for class keep."""
        shape = self.tensor_shape if self.index is None else self.tensor_shape[1:]
        if self.weight_class == "elementwise":
            return (math.prod(shape),)
        return (shape[1], shape[0]) if self.transposed else shape

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def stored_bits(self) -> int:
        """Exact bits of all stored parts, padding included."""
        return self.layout.stored_bits()

    @property
    def nominal_bits(self) -> float:
        """Bits per weight by the published formulas (docs/method.md 8)."""
        return self.layout.nominal_bits()

    def to_json(self) -> dict[str, Any]:
        """The row as plain values, with its stored bits."""
        return {
            "name": self.name,
            "tensor": self.tensor,
            "index": self.index,
            "transposed": self.transposed,
            "class": self.weight_class,
            "block": self.block,
            "tensor_shape": list(self.tensor_shape),
            "format": self.layout.format,
            "layout": self.layout.to_json(),
            "method": self.method,
            "options": dict(self.options),
            "reason": self.reason,
            "proxies": None if self.proxies is None else dict(self.proxies),
            "stored_bits": self.stored_bits,
            "bits_per_weight": round(self.stored_bits / self.numel, 6),
        }

    @classmethod
    def from_json(cls, json: Any) -> PlannedTensor:
        """Read a row; raise PlanError naming the tensor and the first thing that is wrong.

        `stored_bits` and `bits_per_weight` may be left out; a stored_bits that is there must agree with the layout.
        """
        name = json.get("name") if isinstance(json, Mapping) else None
        if not isinstance(json, Mapping) or not isinstance(name, str) or not name:
            raise PlanError("a row of `tensors` has no name; expected one object a tensor with a text `name`")
        try:
            return _parse(name, json)
        except PlanError as error:
            raise PlanError(f"{name}: {error}") from error


def layout_shape(layout: Layout) -> tuple[int, ...]:
    """The shape of the weight that a layout describes."""
    if isinstance(layout, DenseLayout):
        return layout.shape
    if isinstance(layout, ElementwiseLayout):
        return (layout.size,)
    matrices = ScalarLayout | VectorLayout | TrellisLayout | TableLayout | ColumnwiseLayout | AffineLayout
    assert isinstance(layout, matrices | ResidualLayout)
    return (layout.rows, layout.columns)


def _typed(json: Mapping[str, Any], key: str, kind: type[_Value]) -> _Value:
    """json[key] if it is exactly of type `kind`; raise PlanError otherwise."""
    value = json[key]
    if type(value) is not kind:
        raise PlanError(f"{key} is {value!r}, expected a value of type {kind.__name__}")
    return value


def _chosen(json: Mapping[str, Any], key: str, known: tuple[_Value, ...]) -> _Value:
    """json[key] if it is one of `known`; raise PlanError otherwise."""
    value = json[key]
    if value not in known:
        raise PlanError(f"{key} {value!r} is unknown; known: {', '.join(map(str, known))}")
    return cast(_Value, value)


def _index(json: Mapping[str, Any], key: str) -> int | None:
    value = json[key]
    if value is not None and (type(value) is not int or value < 0):
        raise PlanError(f"{key} is {value!r}, expected null or a whole number")
    return value


def _parse(name: str, json: Mapping[str, Any]) -> PlannedTensor:
    missing = [key for key in _KEYS if key not in json]
    unknown = [str(key) for key in json if key not in _KEYS + _DERIVED_KEYS]
    if missing or unknown:
        raise PlanError(f"missing keys: {', '.join(missing) or 'none'}; unknown keys: {', '.join(unknown) or 'none'}")
    method = _chosen(json, "method", get_args(Method))
    row = PlannedTensor(
        name=name,
        tensor=_typed(json, "tensor", str),
        index=_index(json, "index"),
        transposed=_typed(json, "transposed", bool),
        weight_class=_chosen(json, "class", get_args(WeightClass)),
        block=_index(json, "block"),
        tensor_shape=_shape(json),
        layout=layout_from_json(_typed(json, "format", str), json["layout"]),
        method=method,
        options=checked_options(method, json["options"]),
        reason=_typed(json, "reason", str),
        proxies=_proxies(json["proxies"]),
    )
    _check(row)
    stated = json.get("stored_bits", row.stored_bits)
    if stated != row.stored_bits:
        raise PlanError(
            f"stored_bits is {stated!r}, but its layout stores {row.stored_bits}; write that number or remove the key"
        )
    return row


def _shape(json: Mapping[str, Any]) -> tuple[int, ...]:
    shape = json["tensor_shape"]
    is_list = isinstance(shape, list) and 1 <= len(shape) <= _MAX_AXES
    if not is_list or not all(type(side) is int and 0 < side < 1 << 31 for side in shape):
        raise PlanError(f"tensor_shape is {shape!r}, expected 1 to {_MAX_AXES} positive integers")
    return tuple(shape)


def _proxies(values: Any) -> ProxyValues | None:
    if values is None:
        return None
    if not isinstance(values, Mapping) or set(values) != {"p_c", "p_f", "gap_mode"}:
        raise PlanError("proxies must be null or hold p_c, p_f and gap_mode")
    numbers = [values["p_c"], values["p_f"]]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise PlanError(f"proxies p_c and p_f are {numbers}, expected numbers")
    return ProxyValues(p_c=numbers[0], p_f=numbers[1], gap_mode=_chosen(values, "gap_mode", get_args(GapMode)))


def _check(row: PlannedTensor) -> None:
    """Raise PlanError unless orientation, layout, method and shape of a row fit together."""
    axes = len(row.tensor_shape) - (row.index is not None)
    if row.index is not None and row.index >= row.tensor_shape[0]:
        raise PlanError(f"index {row.index} is outside tensor_shape {list(row.tensor_shape)}")
    if (row.weight_class in ("matrix", "lora") or row.transposed) and axes != 2:
        raise PlanError(f"class {row.weight_class} with tensor_shape {list(row.tensor_shape)}, expected two axes")
    if row.layout.format != FORMAT_OF[row.method]:
        raise PlanError(
            f"method {row.method} writes format {FORMAT_OF[row.method]}, but the row has format {row.layout.format}; "
            "change one of them"
        )
    found = layout_shape(row.layout)
    # the scalar formats see a vector as one row
    expected = (1, *row.shape) if len(row.shape) == 1 and len(found) == 2 else row.shape
    if found != expected:
        raise PlanError(f"{row.layout.format} layout is for shape {list(found)}, but the weight is {list(expected)}")


def row_difference(before: PlannedTensor, after: PlannedTensor) -> list[tuple[str, Any, Any]]:
    """(field, before, after) of every field in which two rows of one weight differ; layouts field by field."""
    pairs: list[tuple[str, Any, Any]] = [("format", before.layout.format, after.layout.format)]
    if before.layout.format == after.layout.format:
        first, second = before.layout.to_json(), after.layout.to_json()
        pairs += [(f"layout.{key}", first[key], second[key]) for key in first]
    keys = sorted(before.options | after.options)
    pairs += [("method", before.method, after.method)]
    if before.method == after.method:
        pairs += [(f"options.{key}", before.options[key], after.options[key]) for key in keys]
    pairs += [("stored_bits", before.stored_bits, after.stored_bits)]
    first, second = asdict(before), asdict(after)
    skipped = ("layout", "method", "options")
    pairs += [(key, first[key], second[key]) for key in first if key not in skipped]
    return [pair for pair in pairs if pair[1] != pair[2]]
