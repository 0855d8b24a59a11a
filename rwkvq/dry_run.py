"""What a run would do: which stages and why, every tensor's format, exact bits, and estimated time and memory."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from rwkvq.calibration.activations import estimate_cache_bytes
from rwkvq.checkpoint.names import OUTER, Weight, weights_of
from rwkvq.formats.trellis import RATES
from rwkvq.plan.bits import Totals, totals
from rwkvq.plan.candidates import Candidate, CurvePoint, candidates_of, read_curves
from rwkvq.plan.outer import outer_candidates
from rwkvq.plan.plan import Plan, PlannedTensor
from rwkvq.plan.policies import Curves, make_plan
from rwkvq.proxies import table
from rwkvq.quantize.block import NEEDS_STATISTICS
from rwkvq.run import Run, cores
from rwkvq.stages import STAGES, WAITS, reason_for, stages_of

_PROCESS_BYTES = 350_000_000
"""A Python process with torch and this library, measured."""
_SECONDS_PER_WEIGHT = {
    "rtn": 2e-8,
    "gptq": 7e-7,
    "kmeans": 3e-6,
    "gptvq": 7e-6,
    "elementwise": 2e-5,
    "trellis": 4e-6,
    "table": 5e-7,
    "awq": 8e-7,
    "rotation": 7e-7,
    "hqq": 2e-7,
    "residual": 2e-5,
}
"""One-core seconds a weight of each method, measured on rwkv7-9m; the matrix products are counted apart."""


@dataclass(frozen=True, slots=True)
class Preview:
    """The result of a dry run. Seconds and bytes are estimates, bits are exact."""

    plan: Plan
    totals: Totals
    stages: tuple[tuple[str, float, str], ...]
    """(stage, estimated seconds, why it runs); seconds 0 and `up to date` where nothing is to do."""
    full: tuple[tuple[str, float], ...]
    """(stage, estimated seconds if it had to run)."""
    workers: int
    peak_bytes: float
    disk_bytes: float

    FORMAT_HEADER: ClassVar[tuple[str, ...]] = ("class", "format", "method", "tensors", "weights", "bits/weight")

    @property
    def seconds(self) -> float:
        """Estimated seconds of all stages that would run."""
        return sum(seconds for _, seconds, _ in self.stages)

    def full_seconds(self, without: Collection[str] = ()) -> float:
        """Estimated seconds of all stages but those of `without`, whether they would run or not."""
        return sum(seconds for name, seconds in self.full if name not in without)

    def stage_rows(self) -> list[tuple[str, ...]]:
        """Rows (stage, runs, seconds, why)."""
        return [
            (name, "no" if why == "up to date" else "yes", f"{seconds:.0f}" if seconds else "", why)
            for name, seconds, why in self.stages
        ]

    def format_rows(self) -> list[tuple[str, ...]]:
        """Rows by class, format and method: count, weights, stored bits a weight."""
        groups: dict[tuple[str, str, str], list[PlannedTensor]] = {}
        for entry in self.plan.tensors:
            groups.setdefault((entry.weight_class, entry.layout.format, entry.method), []).append(entry)
        return [
            (*key, str(len(group)), f"{(count := sum(e.numel for e in group)):,}", f"{_bits(group) / count:.3f}")
            for key, group in sorted(groups.items())
        ]

    def bit_rows(self) -> list[tuple[str, str]]:
        """Every quantity of the totals, as text."""
        return [
            (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
            for name, value in asdict(self.totals).items()
            if value is not None
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "stages": [{"stage": name, "seconds": seconds, "why": why} for name, seconds, why in self.stages],
            "totals": asdict(self.totals),
            "formats": dict(Counter(f"{entry.layout.format}/{entry.method}" for entry in self.plan.tensors)),
            "tensors": [
                {"name": entry.name, "format": entry.layout.format, "method": entry.method, "reason": entry.reason}
                for entry in self.plan.tensors
            ],
            "seconds": self.seconds,
            "workers": self.workers,
            "peak_bytes": self.peak_bytes,
            "disk_bytes": self.disk_bytes,
        }


def _bits(entries: list[PlannedTensor]) -> int:
    return sum(entry.stored_bits for entry in entries)


def dry_run(run: Run, rows: Sequence[table.Row] | None = None) -> Preview:
    """Plan a run without writing anything; rows: proxies to plan with, None = as `preview_rows` finds them.

    Raises CheckpointError, PlanError.
    """
    plan = preview_plan(run, rows)
    flops = _flops(run, plan)
    rate = measured_flops()
    full = tuple((name, _seconds(run, plan, name, flops, rate)) for name in stages_of(run))
    stages = []
    upstream = False
    for name, seconds in full:
        why = reason_for(run, STAGES[name])
        if upstream and (why is None or why.startswith(WAITS)):
            why = "an earlier stage runs"
        upstream = upstream or why is not None
        stages.append((name, seconds if why else 0.0, why or "up to date"))
    peak, disk = max(_peak_bytes(run), _distill_bytes(run, plan)), _disk_bytes(run, plan)
    return Preview(plan, totals(plan), tuple(stages), full, run.workers, peak, disk)


def preview_plan(run: Run, rows: Sequence[table.Row] | None = None) -> Plan:
    """The plan this run's settings give; the run's own plan.json if that is what it would use."""
    if reason_for(run, STAGES["plan"]) is None:
        return Plan.read(run.plan)
    found = preview_rows(run) if rows is None else rows
    settings = run.settings
    return make_plan(
        run.checkpoint,
        found,
        settings.plan,
        settings.quantize,
        settings.seed,
        Curves(preview_curves(run), settings.curves),
    )


def preview_curves(run: Run) -> list[CurvePoint]:
    """The curves of this run for policy `budget`; before they are measured, those of weights that all matter alike."""
    if run.settings.plan.policy != "budget":
        return []
    if reason_for(run, STAGES["curves"]) is None:
        return read_curves(run.curves)
    return [
        CurvePoint(weight.name, item.label, bits := item.layout.stored_bits(), numel * 4.0 ** (-bits / numel))
        for weight in _weights(run)
        for item in _candidates(run, weight)
        for numel in (math.prod(weight.shape),)
    ]


def _candidates(run: Run, weight: Weight) -> Sequence[Candidate]:
    """What stage `curves` measures of a weight."""
    if weight.tensor in OUTER:
        return outer_candidates(weight, run.checkpoint.dtype(weight.tensor))
    return candidates_of(weight, run.settings.curves.state_bits) if weight.weight_class in ("matrix", "lora") else ()


def preview_rows(run: Run) -> list[table.Row]:
    """The proxies of this run, from its stage `proxies` if that is up to date, else computed in memory."""
    if reason_for(run, STAGES["proxies"]) is None:
        return table.read(run.proxies)
    source, weights = run.checkpoint, _weights(run)
    rows = []
    for index in range(source.spec.layers):
        rows += table.measure_block(source, [w for w in weights if w.block == index], run.settings.proxies)
    return rows


def stand_in_rows(run: Run) -> list[table.Row]:
    """Rows with drawn proxies: they give a plan of about the right size and cost without reading any weight."""
    draw = random.Random(0)
    rows = []
    for weight in _weights(run):
        if weight.weight_class in table.MEASURED_CLASSES:
            some = table.GapMeasures(1, draw.random(), draw.random(), 0.0, 0.0, 0.0, 0.0, False)
            measures = table.Measures(some, some, some, some, 3 + 3 * draw.random())
            shape = weight.shape
            rows.append(table.Row(weight.name, weight.block, weight.weight_class, shape, "bfloat16", measures))
    return rows


def _weights(run: Run) -> list[Weight]:
    source = run.checkpoint
    return weights_of(source.spec, {name: source.shape(name) for name in source.names()})


def measured_flops() -> float:
    """Multiply-adds a second of one core on this machine now, from a short float32 matrix product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        left = torch.ones(512, 512)
        best = float("inf")
        for _ in range(5):
            begin = time.perf_counter()
            left @ left
            best = min(best, time.perf_counter() - begin)
    finally:
        torch.set_num_threads(threads)
    return 512**3 / best


@dataclass(frozen=True, slots=True)
class _Flops:
    """Multiply-adds over all calibration tokens: one forward pass, and the second moments."""

    forward: float
    moments: float


def _flops(run: Run, plan: Plan) -> _Flops:
    tokens = run.settings.windows.samples * run.settings.windows.length
    matrices = [entry for entry in plan.tensors if entry.weight_class in ("matrix", "lora")]
    forward = sum(entry.numel for entry in matrices)
    moments = sum(entry.shape[-1] ** 2 for entry in matrices if entry.method in NEEDS_STATISTICS)
    return _Flops(float(tokens * forward), float(tokens * moments))


def _seconds(run: Run, plan: Plan, stage: str, flops: _Flops, rate: float) -> float:
    """Estimated wall seconds of one stage on this run's workers. The recurrence costs about as much as the matmuls."""
    if stage == "activations":
        return 2 * flops.forward / (rate * cores())
    if stage == "gradients":
        share = min(1.0, run.settings.gradients.windows / run.settings.windows.samples)
        return share * 2 * 3 * flops.forward / (rate * cores())  # forward, and twice as much backward
    if stage == "curves":
        matrices = [entry for entry in plan.tensors if entry.method in ("trellis", "table")]
        sampled = len(matrices) * len(RATES) * run.settings.curves.sample * _SECONDS_PER_WEIGHT["trellis"]
        return (2 * flops.forward / rate + flops.moments / rate + sampled) / run.workers
    if stage == "quantize":
        methods = sum(entry.numel * _SECONDS_PER_WEIGHT.get(entry.method, 0.0) for entry in plan.tensors)
        return (2 * flops.forward / rate + flops.moments / rate + methods) / run.workers
    if stage == "distill":
        tokens = run.settings.distill.steps * run.settings.distill.batch * run.settings.windows.length
        body = flops.forward / (run.settings.windows.samples * run.settings.windows.length)
        head = run.checkpoint.spec.vocab * run.checkpoint.spec.width
        return tokens * 2 * (4 * body + 3 * head) / (rate * run.workers)  # forward twice, backward; two models' logits
    if stage == "evaluate":
        settings = run.settings.evaluate
        spec = run.checkpoint.spec
        tokens = (settings.windows * settings.length if settings.text else 0) + (
            90 * (settings.lambada_limit or 5000) if settings.lambada else 0
        )
        models = 2 + len(settings.baselines)
        per_token = flops.forward / (run.settings.windows.samples * run.settings.windows.length)
        return models * tokens * (2 * per_token + 4 * spec.vocab * spec.width) / (rate * cores())
    return 1.0


def _peak_bytes(run: Run) -> float:
    """The parent and its workers: each holds one float32 block, its second moments and a batch of windows."""
    spec, settings = run.checkpoint.spec, run.settings
    block = 4.0 * (6 * spec.width**2 + 2 * spec.width * spec.ffn)
    moments = 8.0 * (9 * spec.width**2 + spec.ffn**2)
    batch = 4.0 * settings.activations.batch * settings.windows.length * (20 * spec.width + 2 * spec.ffn)
    return (1 + run.workers) * (_PROCESS_BYTES + block + batch) + run.workers * moments


def _distill_bytes(run: Run, plan: Plan) -> float:
    """The quantized model and the float head in float32, and what the float model says of every window; 0 without."""
    settings, spec = run.settings, run.checkpoint.spec
    windows = min(settings.distill.steps * settings.distill.batch, settings.windows.samples) + settings.windows.held_out
    weights = sum(entry.numel for entry in plan.tensors) + spec.vocab * spec.width
    states = 2 * windows * settings.windows.length * spec.width
    return _PROCESS_BYTES + 4.0 * (weights + states) if settings.distill.steps else 0.0


def _disk_bytes(run: Run, plan: Plan) -> float:
    """The activation cache and two copies of the codes."""
    settings = run.settings.windows
    cache = estimate_cache_bytes(run.checkpoint.spec, settings.samples + settings.held_out, settings.length)
    return cache + 2 * sum(entry.stored_bits for entry in plan.tensors) / 8
