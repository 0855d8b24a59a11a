"""quantization.json: the plan of an artifact with each weight's error, written as plain values, read with suspicion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkvq.artifact.layout import CONFIG, FORMAT, QUANTIZATION
from rwkvq.artifact.shards import read_json
from rwkvq.checkpoint.spec import ModelSpec
from rwkvq.errors import ArtifactError, CheckpointError, PlanError
from rwkvq.plan.plan import Plan

Errors = dict[str, dict[str, Any]]
"""Figures by weight name; kept weights have none."""


def quantization_json(plan: Plan, errors: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The plan's plain values with each weight's figures as `error` in its row (null if kept).

    `format` is the artifact's; the plan's own moves to `plan_format`.
    """
    values = plan.to_json()
    rows = [{**row, "error": dict(errors[row["name"]]) if row["name"] in errors else None} for row in values["tensors"]]
    return {**values, "format": FORMAT, "plan_format": values["format"], "tensors": rows}


def _plan_and_errors(values: Mapping[str, Any]) -> tuple[Plan, Errors]:
    """The inverse of `quantization_json`."""
    rows = [dict(row) for row in values["tensors"]]
    errors = {row["name"]: row.pop("error") for row in rows}
    plain = {**values, "format": values["plan_format"], "tensors": rows}
    del plain["plan_format"]
    return Plan.from_json(plain), {name: dict(error) for name, error in errors.items() if error is not None}


def read_quantization(path: Path) -> tuple[Plan, Errors]:
    """Plan and errors of the artifact folder `path`.

    The plan covers exactly the weights of one model, each in a layout of its shape, and config.json states the same
    sizes. Raises ArtifactError for anything else.
    """
    file, config = path / QUANTIZATION, path / CONFIG
    values = read_json(file)
    version = values.get("format") if isinstance(values, dict) else None
    if version != FORMAT:
        raise ArtifactError(f"{file}: format is {version!r}, expected {FORMAT!r}; use the rwkvq that wrote it")
    try:
        plan, errors = _plan_and_errors(values)
    except PlanError as error:
        raise ArtifactError(f"{file}: {error}; pack or copy the artifact again") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"{file}: not of the expected form ({error!r}); pack or copy the artifact again") from error
    try:
        spec = ModelSpec.from_json(read_json(config))
    except CheckpointError as error:
        raise ArtifactError(f"{config}: {error}") from error
    if spec != plan.spec:
        raise ArtifactError(f"{config}: describes another model than {QUANTIZATION}; pack or copy the artifact again")
    return plan, errors
