"""The job of one block for stage `curves`: what each candidate format of each weight would cost the model.

0.5 * sum_i f_i dW_i H dW_i^T with error feedback is 0.5 * sum_i f_i sum_j D_j e_ij^2, where D is the diagonal of the
factor that feeds errors on and e the rounding error of a column by itself. So a sample of columns, rounded without
feedback, tells the loss of the whole weight (docs/method.md 14).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvq.calibration import activations
from rwkvq.checkpoint.names import Weight, extract, weights_of
from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.device import map_on, working_on
from rwkvq.errors import QuantizationError
from rwkvq.formats import Layout, TableLayout, TrellisLayout
from rwkvq.formats.table import GROUP
from rwkvq.formats.trellis import scales_of
from rwkvq.plan.candidates import Candidate, CurvePoint, candidates_of
from rwkvq.quantize.block import CODE as BLOCK_CODE
from rwkvq.quantize.block import OnEvent
from rwkvq.quantize.hessian import inverse_factor_of
from rwkvq.quantize.inputs import Calibration, WeightInputs, collect_inputs
from rwkvq.quantize.output_feedback import OutputFeedback
from rwkvq.quantize.rates import chosen_offset_bits, rate_offsets
from rwkvq.quantize.tables import fit_tables, round_to_tables
from rwkvq.quantize.trellis import AMPLITUDE, column_costs, encode, find_row_scales, search_weights
from rwkvq.settings import Device

STATE_BITS = 12
"""Of the codes that are measured, at most: from one to the next the losses of all candidates shrink alike."""
EVERY, TOKENS_PER_INPUT = 4, 16
"""One batch of calibration windows out of so many is used, or of fewer where that leaves less tokens than this for each
input of the widest weight."""
CODE = (*BLOCK_CODE, "rwkvq.plan.candidates", "rwkvq.plan.outer")
"""The sources that decide the curves."""


@dataclass(frozen=True, slots=True)
class CurveJob:
    """One block to measure, as file names and numbers.

    sample: weights that are rounded for each candidate; state_bits: of trellis codes; guide, damping: as in
    TrellisOptions; output_feedback as in TableOptions. device: where statistics are taken and codes searched.
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
    output_feedback: bool
    device: Device = "cpu"


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
    used, length = activations.used_windows(Path(work.activations), work.block)
    widest = max(weight.shape[1] for weight in weights)
    points: list[CurvePoint] = []
    with working_on(work.device) as device:
        calibration = Calibration(
            Path(work.activations),
            Path(work.gradients),
            Path(work.scratch),
            work.guide,
            every=max(1, min(EVERY, len(used) * length // (TOKENS_PER_INPUT * widest))),
            device=device,
        )
        inputs = collect_inputs(source, work.block, weights, set(candidates), calibration)

        def measure(weight: Weight) -> list[CurvePoint]:
            tensor = extract(source.tensor(weight.tensor), weight).to(device, torch.float32)
            return curve_of(weight, tensor, inputs.of(weight.name), candidates[weight.name], work)

        for done, (weight, found) in enumerate(zip(weights, map_on(device, measure, weights), strict=True), 1):
            points += found
            on_event({"tensor": weight.name, "done": done, "total": len(weights)})
    return [asdict(point) for point in points]


def curve_of(
    weight: Weight,
    tensor: Tensor,
    known: WeightInputs,
    candidates: tuple[Candidate, ...],
    job: CurveJob,
) -> list[CurvePoint]:
    """The curve of one weight [out, in] with its second moment [in, in] and what its outputs mean to the loss.

    Of the widths of rate offsets it has those that are worth their bits.
    """
    second_moment, _, fisher, output_moment = known
    assert second_moment is not None and fisher is not None and output_moment is not None
    with inverse_factor_of(second_moment, job.damping) as upper:
        importance = upper.diagonal().square().reciprocal()  # D
        scales, plain = (scales_of(*find_row_scales(amplitude * tensor)) for amplitude in (AMPLITUDE, 1.0))
        rows = search_weights(scales, fisher)
        costs = column_costs(upper, (tensor / scales[:, None]).t(), rows)
    whole = 0.5 * float(fisher.double() @ (tensor.square() @ importance).double())
    outputs = OutputFeedback.of(output_moment, plain) if job.output_feedback else None
    widths: tuple[int, int] | None = None
    points = []
    for candidate in candidates:
        layout = candidate.layout
        if isinstance(layout, TrellisLayout):
            widths = widths or chosen_offset_bits(rows, costs, layout.length)
            if (layout.row_offset_bits, layout.column_offset_bits) != widths:
                continue
        columns = sampled_columns(layout, weight.shape, job.sample).to(tensor.device)
        sample, metric = tensor[:, columns], fisher.double()[:, None] * importance[columns].double()
        energy = float((metric * sample.double().square()).sum())
        no_feedback = torch.zeros(len(columns), len(columns), device=tensor.device)
        if isinstance(layout, TrellisLayout):
            row_offsets, column_offsets = rate_offsets(layout, rows, costs)
            rates = layout.quarter_bits + column_offsets[columns].long()
            targets = (sample / scales[:, None]).t().contiguous()
            measured = replace(layout, state_bits=min(layout.state_bits, STATE_BITS))
            error = encode(targets, rows, no_feedback, rates, row_offsets, measured)[1].t() * scales[:, None]
        else:
            assert isinstance(layout, TableLayout)
            targets, shares = sample / plain[:, None], importance[columns] / importance[columns].mean()
            table = fit_tables(targets, rows if outputs is None else outputs.weights, shares, layout.bits)
            error = round_to_tables(targets, shares, no_feedback, table)[2] * plain[:, None]
            if outputs is not None:
                metric = metric * outputs.shares.double()[:, None]
        ratio = float((metric * error.double().square()).sum()) / energy if energy > 0 else 0.0
        points.append(CurvePoint(weight.name, candidate.label, layout.stored_bits(), ratio * whole))
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
