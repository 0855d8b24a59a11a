"""A tiny model with its matrices rounded to nearest and its vectors kept: what distillation has to work with."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from rwkvq.checkpoint.names import extract, weights_of
from rwkvq.checkpoint.reader import Checkpoint
from rwkvq.distill.student import Parts
from rwkvq.plan.plan import Plan, PlannedTensor
from rwkvq.plan.policies import make_plan
from rwkvq.proxies import table
from rwkvq.quantize.block import quantize_tensor
from rwkvq.quantize.inputs import NOTHING
from rwkvq.settings import PlanSettings, ProxiesSettings, QuantizeSettings
from tests.unit.test_activations import checkpoint


def rounded_model(folder: Path, version: str, layers: int = 2) -> tuple[Checkpoint, Plan, Parts]:
    """A checkpoint, a plan of policy rtn that keeps vectors, and the packed parts of its matrices."""
    source = checkpoint(folder, version, layers=layers)
    weights = weights_of(source.spec, {name: source.shape(name) for name in source.names()})
    blocks = {weight.block for weight in weights if weight.block is not None}
    rows = [row for block in sorted(blocks) for row in _proxies(source, block)]
    settings = PlanSettings(policy="rtn", elementwise="fp16")
    plan = make_plan(source, rows, settings, QuantizeSettings(), 0)
    catalogue = {weight.name: weight for weight in weights}

    def parts(entry: PlannedTensor) -> dict[str, Tensor]:
        weight = extract(source.tensor(entry.tensor), catalogue[entry.name]).float()
        return quantize_tensor(weight, entry, NOTHING)[0]

    return source, plan, parts


def _proxies(source: Checkpoint, block: int) -> list[table.Row]:
    weights = weights_of(source.spec, {name: source.shape(name) for name in source.names()})
    return table.measure_block(source, [item for item in weights if item.block == block], ProxiesSettings())
