"""The options of every method, from resolved settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rwkvq.plan.options import Method
from rwkvq.plan.presets import Resolved
from rwkvq.settings import CurvesSettings


def method_options(method: Method, settings: Resolved, *, clip_search: bool, curves: CurvesSettings) -> dict[str, Any]:
    """The options of a method as plain values (plan.options.OPTIONS_OF).

    clip_search: of this weight, where its method has it; curves: what methods that gradients guide were measured with.
    """
    scalar, vector, elementwise = settings.scalar, settings.vector, settings.elementwise
    gptq = {
        "clip_search": clip_search,
        "static_groups": scalar.static_groups,
        "act_order": scalar.act_order,
        "sweeps": settings.sweeps,
        "damping": settings.damping,
    }
    guided = {
        "guide": curves.guide,
        "row_weights": True,
        "damping": settings.damping,
        "sweeps": settings.sweeps,
    }
    options: Mapping[Method, dict[str, Any]] = {
        "keep": {},
        "rtn": {"clip_search": clip_search},
        "gptq": gptq,
        "kmeans": {"iterations": vector.iterations},
        "gptvq": {
            "iterations": vector.iterations,
            "exact_assignment": vector.exact_assignment,
            "m_step": vector.m_step,
            "sweeps": settings.sweeps,
            "damping": settings.damping,
        },
        "elementwise": {"weight": elementwise.weight, "percentile": elementwise.percentile},
        "trellis": guided,
        "table": {**guided, "output_feedback": curves.output_feedback},
        "awq": {"clip_search": clip_search},
        "rotation": gptq,
        "hqq": {},
        "residual": {"iterations": vector.iterations, "damping": settings.damping},
    }
    return options[method]
