"""What a family page shows, as plain values. The family run fills it; tables, pictures and the page only read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rwkvq.report.data import Estimate, QualityRow, ReportData, StageTime

State = Literal["done", "failed", "not run"]
STATES: tuple[State, ...] = ("done", "failed", "not run")
SHARED_STAGES = ("windows", "activations", "proxies", "gradients", "curves")
"""Stages that run once for all policies of a model."""


@dataclass(frozen=True, slots=True)
class CellData:
    """One model under one policy. `report` is None unless the cell is done."""

    model: str
    policy: str
    state: State
    error: str | None
    """Why it failed or did not run, on one line; None = done, or no reason is known."""
    seconds: float | None
    """Wall time of the cell; None = it did not run."""
    report: ReportData | None
    page: str | None
    """Link to the cell's own report, relative to the family page; anything else is not linked."""
    kept: tuple[str, ...] = ()
    """Names of the stages that a failed cell had finished."""

    @property
    def name(self) -> str:
        """`MODEL POLICY`."""
        return f"{self.model} {self.policy}"

    @property
    def quality(self) -> QualityRow | None:
        """The quantized model's figures; None if the cell was not evaluated."""
        return None if self.report is None else self.report.quality_of("quantized")

    @property
    def kl(self) -> Estimate | None:
        """KL(float || quantized) in nats a token; None = not measured."""
        return None if self.quality is None else self.quality.kl

    @property
    def stages(self) -> tuple[StageTime, ...]:
        """Its own stages, without those shared by all policies of the model."""
        return () if self.report is None else tuple(s for s in self.report.stages if s.name not in SHARED_STAGES)


@dataclass(frozen=True, slots=True)
class FamilyData:
    """A run of several models under several policies. `cells` holds every pair of the run once, in its order."""

    name: str
    cells: tuple[CellData, ...]
    provenance: Mapping[str, Any]
    """Nested plain values about the run as a whole; those of a cell are in its report."""

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models in the order of the run."""
        return tuple(dict.fromkeys(cell.model for cell in self.cells))

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies in the order of the run."""
        return tuple(dict.fromkeys(cell.policy for cell in self.cells))

    def cells_of(self, model: str) -> tuple[CellData, ...]:
        """All cells of one model."""
        return tuple(cell for cell in self.cells if cell.model == model)

    def in_state(self, state: State) -> tuple[CellData, ...]:
        """All cells in that state."""
        return tuple(cell for cell in self.cells if cell.state == state)


def float_row(cells: tuple[CellData, ...]) -> QualityRow | None:
    """The unquantized model, from the first of its cells that measured it."""
    rows = (cell.report.quality_of("float") for cell in cells if cell.report is not None)
    return next((row for row in rows if row is not None), None)


def shared_stages(cells: tuple[CellData, ...]) -> tuple[StageTime, ...]:
    """The shared stages of one model, each with the longest time any of its cells names.

    The cell that did the work knows its time; the others found it done and name a shorter one or none.
    """
    found: dict[str, StageTime] = {}
    for cell in cells:
        for stage in () if cell.report is None else cell.report.stages:
            known = found.get(stage.name)
            if stage.name in SHARED_STAGES and (known is None or stage.seconds > known.seconds):
                found[stage.name] = stage
    return tuple(found[name] for name in SHARED_STAGES if name in found)
