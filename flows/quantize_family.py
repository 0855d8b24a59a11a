"""A family of models as a Prefect flow: `python -m flows.quantize_family families/demo.yaml`.

Every cell (model x policy) is a sub-flow with its own state; what cells of one model share is done once, before them. A
cell that fails leaves the others running. Running again does only what is missing or has changed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, get_current_settings, temporary_settings

from flows.clusters import local_cluster
from flows.command import run_command
from flows.notify import notify
from flows.quantize_model import pool_of, prepare_model, quantize_model
from flows.runners import task_runner
from flows.server import connect, lost_server_named
from flows.turns import Turns
from rwkvq.cli.board import Board
from rwkvq.cli.family import show_preview, show_results
from rwkvq.errors import FamilyError, RwkvqError
from rwkvq.family.costs import estimate_costs, longest_first
from rwkvq.family.events import CellEvent
from rwkvq.family.family import Cell, Family, load_family
from rwkvq.family.results import (
    CellResult,
    first_reason,
    is_complete,
    reasons_to_run,
    with_earlier_seconds,
    write_results,
)
from rwkvq.files import run_lock
from rwkvq.report.family import family_markdown
from rwkvq.run import SHARED, Run
from rwkvq.settings import Settings
from rwkvq.stages import stages_of
from tasks.events import listening, tell
from tasks.workers import sharing

HOOKS = [notify]


@flow(
    name="quantize-family",
    flow_run_name="{family_file}",
    on_completion=HOOKS,
    on_failure=HOOKS,
    on_crashed=HOOKS,
    on_cancellation=HOOKS,
)
def quantize_family(family_file: str, overrides: list[str] | None = None) -> dict[str, Any]:
    """Run every cell of the family that is not complete, write its page, and return state and seconds of each cell.

    Raises FamilyError after all cells have ended if one of them failed, SettingsError for a bad file, OutputError if
    another run works on the same family.
    """
    family = load_family(Path(family_file), overrides or [])
    with run_lock(family.out), shared_runner(family) as family:
        results = with_earlier_seconds(family, run_cells(family))
        data = write_results(family, results)
    create_table_artifact(key="cells", table=[asdict(result) for result in results])
    create_markdown_artifact(key="family", markdown=family_markdown(data))
    raise_failures(family, results)
    return {"family": family.name, "cells": [asdict(result) for result in results]}


@contextmanager
def shared_runner(family: Family) -> Iterator[Family]:
    """The family with one pool or cluster for all of its cells, while the block lasts."""
    run = family.cells[0].run
    with local_cluster(run) as address, pool_of(run):
        yield (
            family if address is None else load_family(family.path, [*family.overrides, f"run.dask_address={address}"])
        )


def run_cells(family: Family) -> list[CellResult]:
    """Run what is to do: shared work of each model, then its cells, the longest first; one result a cell, in order."""
    log = get_run_logger()
    costs = estimate_costs(family.cells)
    order = {cell.name: rank for rank, cell in enumerate(longest_first(family.cells, costs))}
    todo = reasons_to_run(family)
    log.info("family %s: %d of %d cells to do in %s", family.name, len(todo), len(family.cells), family.out)
    with closing(Turns(cells_at_once(family))) as turns:
        prepared = {}
        for folder, cells in family.groups().items():
            if group := [cell for cell in cells if cell.name in todo]:
                rank = min(order[cell.name] for cell in group) - len(order)  # before every cell
                prepared[folder] = start_shared(folder, group, turns, rank)
        running: dict[str, PrefectFuture[float]] = {}
        for cell in sorted(family.cells, key=lambda cell: order[cell.name]):
            if cell.name not in todo:
                tell(CellEvent(cell.name, "kept"))
                continue
            before = prepared[str(cell.settings.shared_dir)]
            running[cell.name] = cell_task.submit(
                cell.name, cell.settings, turns, order[cell.name], wait_for=[before] if before else None
            )
        return [result_of(cell, running.get(cell.name), prepared) for cell in family.cells]


def cells_at_once(family: Family) -> int:
    """How many cells work at the same time: as many as there are workers, where they share these."""
    run = family.cells[0].run
    return run.workers if run.settings.run.runner in ("threads", "dask") else 1


def start_shared(folder: str, cells: Sequence[Cell], turns: Turns, rank: int) -> PrefectFuture[None] | None:
    """Start the stages that these cells share; None if they are up to date for all."""
    stages = [stage for stage in SHARED if any(stage in _stages(cell.run) for cell in cells)]
    if first_reason(cells[0].run, stages) is None:
        return None
    return shared_task.submit(f"{Path(folder).name} shared", cells[0].settings, stages, turns, rank)


def _stages(run: Run) -> list[str]:
    try:
        return stages_of(run)
    except RwkvqError:
        return list(SHARED)  # whatever is wrong, the stage says it


@task(name="shared", task_run_name="{name}", cache_policy=NO_CACHE)
def shared_task(name: str, settings: Settings, stages: list[str], turns: Turns, rank: int) -> None:
    """Run the flow of one model's shared stages when it is its turn."""
    with turns.turn(rank), sharing():
        prepare_model.with_options(task_runner=task_runner(Run(settings)))(settings, name, stages)


@task(name="cell", task_run_name="{name}", cache_policy=NO_CACHE)
def cell_task(name: str, settings: Settings, turns: Turns, rank: int) -> float:
    """Run the flow of one cell when it is its turn; return its seconds."""
    with turns.turn(rank), sharing():
        begin = time.monotonic()
        try:
            quantize_model.with_options(task_runner=task_runner(Run(settings)))(settings, name)
        except BaseException as error:
            tell(CellEvent(name, "failed", message=one_line(error), seconds=time.monotonic() - begin))
            raise
        seconds = time.monotonic() - begin
        tell(CellEvent(name, "done", seconds=seconds))
        return seconds


def result_of(
    cell: Cell, future: PrefectFuture[float] | None, prepared: Mapping[str, PrefectFuture[None] | None]
) -> CellResult:
    """Wait for one cell and say how it ended."""
    if future is None:
        return CellResult(cell.model, cell.policy, "done")
    before = prepared[str(cell.settings.shared_dir)]
    try:
        return CellResult(cell.model, cell.policy, "done", seconds=future.result())
    except Exception as error:
        if before is not None and before.state.is_failed():
            error = _error_of(before) or error
            result = CellResult(cell.model, cell.policy, "not run", f"shared work failed: {one_line(error)}")
            tell(CellEvent(cell.name, "failed", message=result.error or ""))
            return result
        return CellResult(cell.model, cell.policy, "failed", one_line(error))


def _error_of(future: PrefectFuture[None]) -> Exception | None:
    try:
        future.result()
    except Exception as error:
        return error
    return None


def one_line(error: BaseException) -> str:
    """An error as one line; a kind that users do not know is named."""
    text = " ".join(str(error).split())
    return text if isinstance(error, RwkvqError) else f"{type(error).__name__}: {text}"


def raise_failures(family: Family, results: Sequence[CellResult]) -> None:
    """Raise FamilyError if a cell is not done."""
    if left := [result for result in results if result.state != "done"]:
        first = f"{left[0].name}: {left[0].error}"
        raise FamilyError(
            f"{family.path}: {len(left)} of {len(results)} cells are not done ({first}); "
            "mend the cause and run the same command again, it does only these"
        )


def command(
    file: Annotated[Path, typer.Argument(help="Family file: models x policies and their settings.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value (repeatable).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run and why, and what it costs.")] = False,
) -> None:
    """Quantize a family of models: every model under every policy, as far as that is not done already."""
    family = load_family(file, overrides or [])
    if dry_run:
        show_preview(family)
        return
    if get_current_settings().api.url is None and is_complete(family):
        show_results(family)  # without waiting for a server that would have nothing to do
        return
    estimates = {name: cost.seconds for name, cost in estimate_costs(family.cells).items()}
    connect()
    board = Board([cell.name for cell in family.cells], estimates, workers=family.cells[0].run.workers)
    try:
        quiet = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
        with lost_server_named(), board, listening(board.update), quiet:
            quantize_family(str(file), overrides or [])
    finally:
        show_results(family)


def main() -> None:
    """Entry point with the exit codes of the `rwkvq` command."""
    run_command(command)


if __name__ == "__main__":
    main()
