"""What became of every cell, and the files that show it: page, table for plots, metrics, summary."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rwkvq.artifact.manifest import read_manifest
from rwkvq.artifact.writer import software_versions
from rwkvq.documents import read_json
from rwkvq.errors import RwkvqError
from rwkvq.family.family import Cell, Family
from rwkvq.files import sha256_of_file, write_json, write_text
from rwkvq.plan.plan import Plan
from rwkvq.report.collect import collect_report
from rwkvq.report.family import CellData, FamilyData, family_csv, family_metrics, render
from rwkvq.run import Run
from rwkvq.stages import STAGES, read_seconds, reason_for, stages_of

State = Literal["done", "failed", "not run"]

NO_FIGURES = ("activations", "report")
"""Stages whose outputs may be missing beside figures that are whole, as in a clone that pulled them from a remote."""


@dataclass(frozen=True, slots=True)
class CellResult:
    """How one cell ended. error: one line, for `failed` and `not run`; seconds: of this run, None if it did nothing."""

    model: str
    policy: str
    state: State
    error: str | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        """`MODEL POLICY`"""
        return f"{self.model} {self.policy}"


def reasons_to_run(family: Family) -> dict[str, str]:
    """Why each cell that is not complete has to run, by its name; empty if nothing is to do."""
    found = {}
    for cell in family.cells:
        if (reason := first_reason(cell.run)) is not None:
            found[cell.name] = reason
    return found


def is_complete(family: Family) -> bool:
    """True if every cell is up to date and the family's own files are there."""
    files = family.page, family.table, family.metrics, family.summary
    return not reasons_to_run(family) and all(path.is_file() for path in files)


def first_reason(run: Run, stages: Sequence[str] | None = None) -> str | None:
    """The first of the run's stages that has to run and why, or what is wrong with its input; None if nothing is."""
    try:
        for name in stages_of(run) if stages is None else stages:
            if (reason := reason_for(run, STAGES[name])) is not None:
                return f"{name}: {reason}"
    except RwkvqError as error:
        return str(error)
    return None


def read_results(family: Family) -> tuple[CellResult, ...]:
    """State of every cell as its files say: done if it is up to date, else what the last run wrote, or not run."""
    last = read_summary(family)
    results = []
    for cell in family.cells:
        before = last.get(cell.name)
        seconds = None if before is None else before.seconds
        reason = first_reason(cell.run, [name for name in stages_of(cell.run) if name not in NO_FIGURES])
        if reason is None:
            results.append(CellResult(cell.model, cell.policy, "done", seconds=seconds))
        elif before is not None and before.state == "failed":
            results.append(before)
        else:
            results.append(CellResult(cell.model, cell.policy, "not run", reason))
    return tuple(results)


def read_summary(family: Family) -> dict[str, CellResult]:
    """What the last run of the family wrote, by name of the cell; empty without one."""
    try:
        rows = read_json(family.summary)["cells"]
        results = [CellResult(**row) for row in rows]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return {result.name: result for result in results}


def with_earlier_seconds(family: Family, results: Sequence[CellResult]) -> tuple[CellResult, ...]:
    """The results, with the seconds of an earlier run where this one had nothing to do."""
    before = read_summary(family)
    merged = []
    for result in results:
        earlier = before.get(result.name)
        seconds = earlier.seconds if result.seconds is None and earlier is not None else result.seconds
        merged.append(CellResult(result.model, result.policy, result.state, result.error, seconds))
    return tuple(merged)


def write_results(family: Family, results: Sequence[CellResult]) -> FamilyData:
    """Write family.html, family.csv, metrics.json and summary.json; return what the page shows."""
    data = collect_family(family, results)
    write_text(family.page, render(data))
    write_text(family.table, family_csv(data))
    write_json(family.metrics, family_metrics(data))
    write_json(family.summary, {"family": family.name, "cells": [asdict(result) for result in results]})
    return data


def collect_family(family: Family, results: Sequence[CellResult]) -> FamilyData:
    """What the page shows: the results, and for cells that are done their reports."""
    by_name = {result.name: result for result in results}
    cells = tuple(_cell_data(family, cell, by_name[cell.name]) for cell in family.cells)
    return FamilyData(family.name, cells, provenance(family))


def _cell_data(family: Family, cell: Cell, result: CellResult) -> CellData:
    page = os.path.relpath(cell.run.report, family.out) if cell.run.report.is_file() else None
    if result.state != "done":
        kept = tuple(name for name in STAGES if read_manifest(cell.run.folder_of(name), name) is not None)
        return CellData(cell.model, cell.policy, result.state, result.error, result.seconds, None, None, kept)
    try:
        report = collect_report(cell.run, Plan.read(cell.run.plan), read_seconds(cell.run))
    except RwkvqError as error:  # a file of this one cell is damaged; the page shows the others
        return CellData(cell.model, cell.policy, "failed", str(error), result.seconds, None, None)
    return CellData(cell.model, cell.policy, "done", None, result.seconds, report, page)


def provenance(family: Family) -> Mapping[str, Any]:
    """Where the family came from: its file, its settings, versions. Each cell's own provenance is in its artifact."""
    return {
        "family_file": family.path.name,
        "family_sha256": sha256_of_file(family.path),
        "settings": family.file.settings,
        "policies": dict(family.file.policies),
        "variants": dict(family.file.variants),
        "software": software_versions(),
    }
