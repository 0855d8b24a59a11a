"""The job of embedding and head for stage `curves`: what each width would cost the model.

Rounded with error feedback, 0.5 * sum_v f_v dW_v M dW_v^T is 0.5 * sum_v f_v sum_j D_j e_vj^2 as for the weights of a
block; rounded to the nearest, errors of two columns have nothing to do with each other, and M_jj takes the place of D_j
(docs/method.md 14).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvq.calibration.outer import OuterStatistics, read_outer
from rwkvq.checkpoint.names import OUTER, weights_of
from rwkvq.checkpoint.reader import open_checkpoint
from rwkvq.errors import QuantizationError
from rwkvq.formats import ScalarLayout
from rwkvq.plan.candidates import Candidate, CurvePoint
from rwkvq.plan.options import Method
from rwkvq.plan.outer import outer_candidates
from rwkvq.quantize.block import OnEvent
from rwkvq.quantize.grid import find_grid, round_to
from rwkvq.quantize.hessian import inverse_factor_of, row_chunks

SHARE = 16
"""Times the weights of a sample of any other tensor: rows differ more than columns."""


@dataclass(frozen=True, slots=True)
class OuterCurveJob:
    """What to measure, as file names and numbers; sample, damping: as in CurveJob."""

    checkpoint: str
    gradients: str
    sample: int
    damping: float


def run(job: Mapping[str, Any], on_event: OnEvent) -> list[dict[str, Any]]:
    """Return the curve points of embedding and head, as plain values.

    Sends {"tensor": name, "done": n, "total": n} after each. Raises CheckpointError, ActivationError,
    QuantizationError.
    """
    work = OuterCurveJob(**job)
    source = open_checkpoint(Path(work.checkpoint))
    statistics = read_outer(Path(work.gradients))
    shapes = {name: source.shape(name) for name in source.names()}
    weights = [weight for weight in weights_of(source.spec, shapes) if weight.tensor in OUTER]
    points = []
    for done, weight in enumerate(weights, 1):
        tensor = source.tensor(weight.tensor)
        candidates = outer_candidates(weight, tensor.dtype)
        points += curve_of(weight.name, tensor.float(), statistics[weight.name], candidates, work)
        on_event({"tensor": weight.name, "done": done, "total": len(weights)})
    return [asdict(point) for point in points]


def curve_of(
    name: str, tensor: Tensor, statistics: OuterStatistics, candidates: Sequence[Candidate], job: OuterCurveJob
) -> list[CurvePoint]:
    """The curve of emb or head, float32 [vocab, width]; a kept one loses nothing."""
    points = []
    known: dict[Method, tuple[Tensor, Tensor]] = {}
    for candidate in candidates:
        layout, loss = candidate.layout, 0.0
        if isinstance(layout, ScalarLayout):
            if candidate.method not in known:
                importance = importance_of(statistics.second_moment, candidate.method, job.damping)
                known[candidate.method] = importance, row_costs(tensor, statistics.fisher, importance)
            importance, costs = known[candidate.method]
            rows = tensor[drawn_rows(costs, max(1, SHARE * job.sample // layout.columns))]
            errors = rounding_errors(rows, layout, importance if candidate.method == "gptq" else None)
            energy, lost = (x.square().double() @ importance.double() for x in (rows, errors))
            loss = 0.5 * float(costs.sum()) * float((lost / energy.clamp_min(1e-30)).mean())
        points.append(CurvePoint(name, candidate.label, layout.stored_bits(), loss))
    if not all(point.loss < float("inf") for point in points):
        raise QuantizationError(f"{name}: losses that are not finite; check the checkpoint")
    return points


def importance_of(second_moment: Tensor, method: Method, damping: float) -> Tensor:
    """What the squared error of each column [in] counts for: D with error feedback, else the diagonal of M."""
    if method != "gptq":
        return second_moment.diagonal().clone()
    with inverse_factor_of(second_moment, damping) as upper:
        return upper.diagonal().square().reciprocal()


def row_costs(tensor: Tensor, fisher: Tensor, importance: Tensor) -> Tensor:
    """f_v sum_j importance_j w_vj^2 of every row, float64 [vocab]."""
    squares = torch.cat([tensor[rows].square() @ importance for rows in row_chunks(tensor)])
    return fisher.double() * squares.double()


def drawn_rows(costs: Tensor, count: int) -> Tensor:
    """`count` rows at even steps of the sum of all costs [vocab], so that a row is as likely as it is dear."""
    sums = costs.cumsum(0)
    steps = (torch.arange(count, dtype=torch.float64) + 0.5) / count * sums[-1]
    return torch.searchsorted(sums, steps).clamp_max_(len(costs) - 1)


def rounding_errors(rows: Tensor, layout: ScalarLayout, importance: Tensor | None) -> Tensor:
    """Q - w of rows [count, width], each column by itself; importance [width]: what the search for a grid weighs by."""
    errors = torch.empty_like(rows)
    for start in range(0, layout.columns, layout.group_size):
        here = slice(start, start + layout.group_size)
        values = rows[:, here].t().contiguous()
        weights = None if importance is None else importance[here] / importance[here].mean()
        # as outer_options says
        grid = find_grid(values, layout.bits, symmetric=True, clip_search=layout.bits < 8, weights=weights)
        errors[:, here] = ((round_to(values, grid, layout.bits) - grid.zero) * grid.scale.float() - values).t()
    return errors
