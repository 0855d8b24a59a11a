"""The job of one block for stage `curves`: what each candidate format of each weight would cost the model.

0.5 * sum_i f_i dW_i H dW_i^T with error feedback is 0.5 * sum_i f_i sum_j D_j e_ij^2, where D is the diagonal of the
factor that feeds errors on and e the rounding error of a column by itself. So a sample of columns, rounded without
feedback, tells the loss of the whole weight (docs/method.md 14).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvq.checkpoint.names import Weight, extract, weights_of
from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.errors import QuantizationError
from rwkvq.formats import Layout, TableLayout, TrellisLayout
from rwkvq.formats.table import GROUP, UNIT
from rwkvq.formats.trellis import scales_of
from rwkvq.plan.candidates import Candidate, CurvePoint, candidates_of
from rwkvq.quantize.block import CODE as BLOCK_CODE
from rwkvq.quantize.block import OnEvent
from rwkvq.quantize.hessian import inverse_factor_of
from rwkvq.quantize.inputs import Calibration, collect_inputs
from rwkvq.quantize.tables import choose_tables, fit_tables, round_column
from rwkvq.quantize.trellis import encode, find_row_scales, search_weights

CODE = (*BLOCK_CODE, "rwkvq.plan.candidates")
"""The sources that decide the curves."""


@dataclass(frozen=True, slots=True)
class CurveJob:
    """One block to measure, as file names and numbers.

    sample: weights that are rounded for each candidate; state_bits: of trellis codes; guide, damping: as in
    TrellisOptions.
    """

    checkpoint: str
    activations: str
    gradients: str
    scratch: str
    block: int
    sample: int
    state_bits: int
    guide: float
    damping: float


def run(job: Mapping[str, Any], on_event: OnEvent) -> list[dict[str, Any]]:
    """Return the curve points of every matrix and LoRA factor of a block, as plain values.

    Sends {"tensor": name, "done": n, "total": n} after each weight. Raises CheckpointError, ActivationError, PlanError,
    QuantizationError.
    """
    work = CurveJob(**job)
    source = open_checkpoint(Path(work.checkpoint))
    shapes = {name: source.shape(name) for name in source.names()}
    weights = [
        weight
        for weight in weights_of(source.spec, shapes)
        if weight.block == work.block and weight.weight_class in ("matrix", "lora")
    ]
    candidates = {weight.name: candidates_of(weight, work.state_bits) for weight in weights}
    calibration = Calibration(Path(work.activations), Path(work.gradients), Path(work.scratch), work.guide)
    inputs = collect_inputs(source, work.block, weights, set(candidates), calibration)
    points = []
    for done, weight in enumerate(weights, 1):
        tensor = extract(source.tensor(weight.tensor), weight).float()
        moment, fisher = inputs.second_moments[weight.name], inputs.fisher[weight.name]
        points += curve_of(weight, tensor, moment, fisher, candidates[weight.name], work)
        on_event({"tensor": weight.name, "done": done, "total": len(weights)})
    return [asdict(point) for point in points]


def curve_of(
    weight: Weight,
    tensor: Tensor,
    second_moment: Tensor,
    fisher: Tensor,
    candidates: tuple[Candidate, ...],
    job: CurveJob,
) -> list[CurvePoint]:
    """The curve of one weight [out, in] with its second moment [in, in] and Fisher diagonal [out]."""
    with inverse_factor_of(second_moment, job.damping) as upper:
        importance = upper.diagonal().square().reciprocal()  # D
    whole = 0.5 * float(fisher.double() @ (tensor.square() @ importance).double())
    scale, base = find_row_scales(tensor)
    scales = scales_of(scale, base)
    rows = search_weights(scales, fisher)
    points = []
    for candidate in candidates:
        columns = sampled_columns(candidate.layout, weight.shape, job.sample)
        sample, metric = tensor[:, columns], fisher.double()[:, None] * importance[columns].double()
        error = rounded(sample / scales[:, None], candidate.layout, rows, importance[columns]) * scales[:, None]
        energy = float((metric * sample.double().square()).sum())
        ratio = float((metric * error.double().square()).sum()) / energy if energy > 0 else 0.0
        points.append(CurvePoint(weight.name, candidate.label, candidate.layout.stored_bits(), ratio * whole))
    if not all(point.loss < float("inf") for point in points):
        raise QuantizationError(f"{weight.name}: losses that are not finite; check the checkpoint")
    return points


def sampled_columns(layout: Layout, shape: tuple[int, ...], sample: int) -> Tensor:
    """Evenly spaced columns of a weight [out, in] with about `sample` weights; whole groups of the table format."""
    size = GROUP if isinstance(layout, TableLayout) else 1
    groups = shape[1] // size
    count = min(groups, max(1, sample // (shape[0] * size)))
    first = torch.linspace(0, groups - 1, count).round().long() * size
    return (first[:, None] + torch.arange(size)).flatten()


def rounded(sample: Tensor, layout: Layout, rows: Tensor, importance: Tensor) -> Tensor:
    """The rounding errors [out, n] of sampled columns in units of their rows' scales, without feedback."""
    if isinstance(layout, TrellisLayout):
        narrow = TrellisLayout(**{**layout.to_json(), "columns": sample.shape[1]})
        no_feedback = torch.zeros(sample.shape[1], sample.shape[1])
        return encode(sample.t().contiguous(), rows, no_feedback, narrow)[1].t()
    assert isinstance(layout, TableLayout)
    importance = importance / importance.mean()
    values = fit_tables(sample.t().contiguous(), rows, importance, layout.bits).float() * UNIT
    errors = []
    for start in range(0, sample.shape[1], GROUP):
        group, weights = sample[:, start : start + GROUP], importance[start : start + GROUP]
        levels = values[choose_tables(group, weights, values)]
        errors += [round_column(column, levels)[1] for column in group.t()]
    return torch.stack(errors, 1)
