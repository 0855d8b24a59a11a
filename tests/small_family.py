"""A family in miniature: two tiny models under three policies, and the file that describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.small import write_inputs

POLICIES: dict[str, Any] = {name: {"plan": {"policy": name}} for name in ("rtn", "sq", "rwkvquant")}


def write_family(folder: Path, **changes: Any) -> Path:
    """Write models `seven` and `six`, their texts and `family.yaml` into `folder`; return that file."""
    seven = write_inputs(folder / "seven")
    six = write_inputs(folder / "six", "x060", ".safetensors")
    settings = {name: seven[name] for name in ("windows", "activations", "evaluate", "run")}
    settings["evaluate"] = settings["evaluate"] | {"baselines": []}
    values = {
        "family": "tiny",
        "out": str(folder / "out"),
        "settings": settings,
        "models": {"seven": {"model": seven["model"]}, "six": {"model": six["model"]}},
        "policies": POLICIES,
    }
    path = folder / "family.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path
