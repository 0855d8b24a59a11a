"""The methods of a plan, the format each writes, and the options each takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from rwkvq.errors import PlanError

Method = Literal[
    "keep",
    "rtn",
    "gptq",
    "kmeans",
    "gptvq",
    "elementwise",
    "trellis",
    "table",
    "awq",
    "rotation",
    "hqq",
    "residual",
]

FORMAT_OF: Mapping[Method, str] = {
    "keep": "dense",
    "rtn": "scalar",
    "gptq": "scalar",
    "kmeans": "vector",
    "gptvq": "vector",
    "elementwise": "elementwise",
    "trellis": "trellis",
    "table": "table",
    "awq": "scaled",
    "rotation": "rotated",
    "hqq": "affine",
    "residual": "residual",
}
"""The one format that each method writes."""


@dataclass(frozen=True, slots=True)
class Number:
    """The values an option may have: of type `kind` (an int serves as a float), low <= value <= high."""

    kind: type
    low: float
    high: float

    def accepts(self, value: object) -> bool:
        """True for a value in range."""
        fits = type(value) is self.kind or (self.kind is float and type(value) is int)
        return fits and self.low <= cast(float, value) <= self.high

    def __str__(self) -> str:
        """What to write instead."""
        name = "a whole number" if self.kind is int else "a number"
        return f"{name} from {self.low:g} to {self.high:g}"


_FLAG = (True, False)
_DAMPING = Number(float, 1e-9, 1.0)
_ITERATIONS = Number(int, 1, 10_000)
_SWEEPS = Number(int, 0, 20)
_GPTQ: Mapping[str, Number | tuple[object, ...]] = {
    "clip_search": _FLAG,
    "static_groups": _FLAG,
    "act_order": _FLAG,
    "sweeps": _SWEEPS,
    "damping": _DAMPING,
}
_GUIDED: Mapping[str, Number | tuple[object, ...]] = {
    "guide": Number(float, 0.0, 1.0),
    "row_weights": _FLAG,
    "damping": _DAMPING,
}

OPTIONS_OF: Mapping[Method, Mapping[str, Number | tuple[object, ...]]] = {
    "keep": {},
    "rtn": {"clip_search": _FLAG},
    "gptq": _GPTQ,
    "kmeans": {"iterations": _ITERATIONS},
    "gptvq": {
        "iterations": _ITERATIONS,
        "exact_assignment": _FLAG,
        "m_step": _FLAG,
        "sweeps": _SWEEPS,
        "damping": _DAMPING,
    },
    "elementwise": {
        "weight": ("second_moment", "mean_sq", "official", "none"),
        "percentile": Number(float, 50.0, 100.0),
    },
    "trellis": {**_GUIDED, "sweeps": _SWEEPS},
    "table": {**_GUIDED, "sweeps": _SWEEPS, "output_feedback": _FLAG},
    "awq": {"clip_search": _FLAG},
    "rotation": _GPTQ,
    "hqq": {},
    "residual": {"iterations": _ITERATIONS, "damping": _DAMPING},
}
"""Options of each method: a range, or the accepted values."""

_BEFORE: Mapping[Method, Mapping[str, Any]] = {"table": {"output_feedback": False}}
"""Options that plans and artifacts once lacked, and what was done then."""


def checked_options(method: Method, options: Any) -> dict[str, Any]:
    """The options of a row, which a person may have edited. Raises PlanError naming the first that does not fit."""
    known = OPTIONS_OF[method]
    if isinstance(options, Mapping):
        options = {**_BEFORE.get(method, {}), **options}
    if not isinstance(options, Mapping) or set(options) != set(known):
        found = ", ".join(map(str, options)) if isinstance(options, Mapping) else repr(options)
        raise PlanError(f"options of method {method} are {found or 'none'}, expected {', '.join(known) or 'none'}")
    for key, accepted in known.items():
        value = options[key]
        if isinstance(accepted, Number):
            fits, expected = accepted.accepts(value), str(accepted)
        else:
            fits = any(value is item if isinstance(item, bool) else value == item for item in accepted)
            expected = "true or false" if accepted is _FLAG else " or ".join(map(str, accepted))
        if not fits:
            raise PlanError(f"option {key} of method {method} is {value!r}, expected {expected}")
    if options.get("act_order") and not options["static_groups"]:
        raise PlanError("option act_order needs static_groups: true")
    return dict(options)
