"""A family run with invented figures in the proportions of a real one: nothing in it was measured."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import replace

from rwkvq.report.data import Estimate, ProxyPlane, QualityRow, ReportData, StageTime, TensorRow
from rwkvq.report.family.data import CellData, FamilyData
from tests.made_up_report import report

MODELS = ("rwkv7-9m", "rwkv6-10m", "rwkv7-26m")
POLICIES = ("rtn", "sq", "rwkvquant")
LOSS: Mapping[str, float] = {"rtn": 0.097, "sq": 0.0615, "rwkvquant": 0.0567}
"""Mean KL of the known policies; others get one between 0.04 and 0.2."""


def _tensors(rows: tuple[TensorRow, ...], policy: str) -> tuple[TensorRow, ...]:
    """All scalar unless the policy mixes formats; round-to-nearest has the larger errors."""
    if policy == "rwkvquant":
        return rows
    factor = 2.1 if policy == "rtn" else 1.1
    return tuple(
        row
        if row.method == "keep"
        else replace(
            row,
            format="scalar",
            method=policy,
            stored_bits=round(3.297 * row.numel),
            relative_error=factor * (row.relative_error or 0.0),
        )
        for row in rows
    )


def _plane(plane: ProxyPlane | None, policy: str) -> ProxyPlane | None:
    if plane is None or policy == "rwkvquant":
        return plane
    rows = tuple(replace(row, arm=None if row.arm is None else "sq") for row in plane.rows)
    return replace(plane, rows=rows, decision=f"policy {policy}", tau_c=None, tau_f=None)


def _quality(data: ReportData, model: str, policy: str, file_bytes: int) -> tuple[QualityRow, ...]:
    noise = random.Random(f"{model} {policy}")
    loss = LOSS.get(policy, math.exp(noise.uniform(math.log(0.04), math.log(0.2)))) * noise.uniform(0.94, 1.06)
    shift = 1 / math.sqrt(data.sizes.weights / 9.4e6)
    reference = replace(
        data.quality[0], perplexity=Estimate(39.3 * shift**0.3, 1.2), lambada_accuracy=Estimate(0.214, 0.0183)
    )
    return (
        reference,
        QualityRow(
            policy,
            "quantized",
            file_bytes,
            data.sizes.matrix_bits,
            data.sizes.body_bits,
            8 * file_bytes / data.sizes.weights,
            Estimate(39.3 * shift**0.3 * (1 + 0.6 * loss), 1.23),
            Estimate(loss * shift**0.5, 0.018 * loss),
            7 * loss,
            Estimate(0.9 - loss, 0.0027),
            Estimate(152.6, 16.2),
            Estimate(0.214 - 0.1 * loss, 0.018),
        ),
    )


def cell_report(model: str, policy: str, layers: int = 6, width: int = 256) -> ReportData:
    """The report of one cell."""
    noise = random.Random(f"{model} {policy} size")
    data = report(layers, width)
    file_bytes = round(data.sizes.file_bytes * noise.uniform(0.985, 1.012))
    bits = data.sizes.matrix_bits if policy == "rwkvquant" else 3.297
    sizes = replace(data.sizes, file_bytes=file_bytes, matrix_bits=bits, file_bits=8 * file_bytes / data.sizes.weights)
    work = layers * width**2 / 4e5
    seconds = {"windows": 1.4, "activations": 20 * work, "proxies": 6.5 * work, "plan": 0.1, "pack": 0.6}
    seconds |= {"quantize": {"rtn": 2.0, "sq": 30.0}.get(policy, 62.0) * work, "evaluate": 40 * work}
    return replace(
        data,
        model=model,
        policy=policy,
        preset="rwkvq" if policy == "rwkvquant" else "",
        sizes=sizes,
        quality=_quality(data, model, policy, file_bytes),
        tensors=_tensors(data.tensors, policy),
        proxies=_plane(data.proxies, policy),
        stages=tuple(StageTime(name, seconds[name]) for name in seconds),
        provenance={**data.provenance, "checkpoint": {"path": f"{model}.pth"}, "plan": {"policy": policy}},
    )


def cell(model: str, policy: str, layers: int = 6, width: int = 256) -> CellData:
    """A finished cell."""
    data = cell_report(model, policy, layers, width)
    seconds = sum(stage.seconds for stage in data.stages)
    return CellData(model, policy, "done", None, seconds, data, f"{model}/{policy}/report.html")


def failed(model: str, policy: str) -> CellData:
    """A cell that failed while it quantized."""
    error = f"{model}.pth: blocks.3.att.key.weight holds 4 values that are not finite; use an undamaged checkpoint"
    kept = ("windows", "activations", "proxies", "plan")
    return CellData(model, policy, "failed", error, 31.4, None, None, kept)


def family(
    models: tuple[str, ...] = MODELS, policies: tuple[str, ...] = POLICIES, layers: int = 6, width: int = 256
) -> FamilyData:
    """Every model under every policy, all done; later models are wider."""
    cells = tuple(
        cell(model, policy, layers, width + 64 * at) for at, model in enumerate(models) for policy in policies
    )
    provenance = {"family": "demo.yaml", "sha256": "fa31" * 16, "libraries": {"prefect": "3.8.8"}}
    return FamilyData("demo", cells, provenance)


def with_failures(data: FamilyData) -> FamilyData:
    """The same run; its second cell failed and its last one was not run."""
    first, second, *middle, last = data.cells
    not_run = CellData(last.model, last.policy, "not run", "quantize: was not run before", None, None, None)
    return replace(data, cells=(first, failed(second.model, second.policy), *middle, not_run))
