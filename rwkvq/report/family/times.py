"""Wall time by stage: one stacked bar a cell, one more for the stages that all policies of a model share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from rwkvq.report.data import StageTime
from rwkvq.report.family.data import FamilyData, shared_stages
from rwkvq.report.text import seconds_text
from rwkvq.run import LINE


def _kind(name: str) -> str:
    return f"stage-{name}" if name in LINE else "stage-other"


def _usable(stages: Iterable[StageTime]) -> list[StageTime]:
    """Stages with a time that can be drawn."""
    return [stage for stage in stages if 0 < stage.seconds < math.inf]


def _bar(label: str, stages: Sequence[StageTime], longest: float) -> str:
    shown = _usable(stages)
    pieces = "".join(
        f'<i class="{_kind(stage.name)}" style="width:{100 * stage.seconds / longest:.2f}%" '
        f'title="{escape(stage.name)}: {seconds_text(stage.seconds)}"></i>'
        for stage in shown
    )
    total = seconds_text(sum(stage.seconds for stage in shown)) if shown else "–"
    return f"<li><span>{escape(label)}</span><div>{pieces}</div><b>{total}</b></li>"


def _key(data: FamilyData) -> str:
    names = {stage.name for cell in data.cells if cell.report is not None for stage in _usable(cell.report.stages)}
    known = [name for name in LINE if name in names]
    items = [f'<li><i class="swatch {_kind(name)}"></i>{name}</li>' for name in known]
    if names - set(LINE):
        items.append('<li><i class="swatch stage-other"></i>other</li>')
    return f'<ul class="key">{"".join(items)}</ul>'


def time_bars(data: FamilyData) -> str:
    """Bars of all models; lengths compare within a model. Empty if no cell has a time."""
    groups = []
    for model in data.models:
        cells = data.cells_of(model)
        lines = [("shared", shared_stages(cells)), *((cell.policy, cell.stages) for cell in cells)]
        shown = [(label, stages) for label, stages in lines if _usable(stages)]
        longest = max((sum(stage.seconds for stage in _usable(stages)) for _, stages in shown), default=0.0)
        if shown:
            bars = "".join(_bar(label, stages, longest) for label, stages in shown)
            groups.append(f'<h3>{escape(model)}</h3><ul class="bars stacked">{bars}</ul>')
    return _key(data) + "".join(groups) if groups else ""
