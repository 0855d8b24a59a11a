"""The line as a Prefect flow: `python -m flows.quantize_model --params params.yaml`.

Runs on an embedded server without any set-up, or reports to a real one that PREFECT_API_URL names.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import flow, get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from flows.blocks import map_blocks
from flows.command import run_command
from flows.runners import task_runner
from flows.server import connect, lost_server_named
from rwkvq.cli.line import show_summary
from rwkvq.errors import ActivationError
from rwkvq.family.events import CellEvent
from rwkvq.files import remove_leftovers, run_lock
from rwkvq.report.collect import read_metrics, read_report_markdown, read_summary
from rwkvq.run import SHARED, Run
from rwkvq.settings import Settings, load
from rwkvq.stages import STAGES, StageResult, block_jobs, check_inputs, check_shared_inputs, reason_for, stages_of
from rwkvq.stages.healing import heal_activations
from rwkvq.workers import WorkerPool
from tasks.events import tell
from tasks.stages import finish_quantize_task, stage_task
from tasks.workers import flow_pool, share_of


@flow(name="quantize-model", flow_run_name="{name}")
def quantize_model(settings: Settings, name: str) -> dict[str, Any]:
    """Run the whole line, each stage only if something it depends on has changed, and return the metrics.

    name: of the cell, for the UI and the log. Where runs share a folder, its stages have run before (`prepare-model`).
    A failed task fails the flow. Raises RwkvqError for bad input, JobTimeout at the time limit.
    """
    run = Run(settings)
    with run_lock(run.folder), pool_of(run) as pool:
        remove_leftovers(run.folder)
        check_inputs(run)
        for stage in stages_of(run):
            if stage in SHARED and settings.shared_dir:
                continue
            if stage == "quantize":
                quantize_blocks(run, name, pool)
            else:
                run_stage(run, stage, name, pool)
        remove_leftovers(run.folder)  # of workers that were killed
        publish_artifacts(run)
        return read_metrics(run.metrics)


@flow(name="prepare-model", flow_run_name="{name}")
def prepare_model(settings: Settings, name: str, stages: list[str]) -> None:
    """Run the stages whose outputs all runs of a model share. Raises what `quantize_model` raises."""
    run = Run(settings)
    with run_lock(run.folder_of(SHARED[0])), pool_of(run) as pool:
        remove_leftovers(run.folder_of(SHARED[0]))
        check_shared_inputs(run)
        for stage in stages:
            run_stage(run, stage, name, pool)


def pool_of(run: Run) -> AbstractContextManager[WorkerPool | None]:
    """Worker processes of this process for runner `threads`; the other runners' processes have a worker each."""
    return flow_pool(run) if run.settings.run.runner == "threads" else nullcontext()


def run_stage(run: Run, stage: str, name: str, pool: WorkerPool | None) -> None:
    """Run the task of one stage where the runner's tasks run, unless their processes do not see the run folder."""
    settings = run.settings
    limits = settings.run.model_copy(update={"workers": share_of(run.workers)})
    task = stage_task.with_options(retries=limits.retries)
    arguments = stage, settings.model_copy(update={"run": limits}), name, pool
    tell(CellEvent(name, "stage", stage))
    runs_here = pool is not None or limits.store is not None
    result: StageResult = task(*arguments) if runs_here else task.submit(*arguments).result()
    tell(CellEvent(name, "stage", stage, seconds=result.seconds) if result.ran else CellEvent(name, "kept", stage))


def quantize_blocks(run: Run, name: str, pool: WorkerPool | None) -> None:
    """Map one task a block over the task runner; the stage is recorded as done when all have finished."""
    log, begin = get_run_logger(), time.monotonic()
    if (reason := reason_for(run, STAGES["quantize"])) is None:
        log.info("%s: quantize: up to date", name)
        tell(CellEvent(name, "kept", "quantize"))
        return
    jobs = block_jobs(run)
    log.info("%s: quantize: %s", name, reason)
    log.info("%s: quantize: %d block jobs, %d workers (%s)", name, len(jobs), run.workers, run.settings.run.runner)
    tell(CellEvent(name, "stage", "quantize"))
    bar = create_progress_artifact(progress=0.0, key="quantize", description=f"{name}: blocks quantized")

    def show(done: int) -> None:
        update_progress_artifact(artifact_id=bar, progress=100.0 * done / len(jobs))
        tell(CellEvent(name, "block", "quantize", f"block {done}", done, len(jobs)))

    damaged = map_blocks(run, name, pool, jobs, show)
    if damaged:
        heal_activations(run)
        if left := map_blocks(run, name, pool, damaged, show):
            raise ActivationError(f"{run.activations}: damaged again after it was rebuilt; check the disk ({left[0]})")
    finish_quantize_task(run.settings, name, time.monotonic() - begin)
    tell(CellEvent(name, "stage", "quantize", seconds=time.monotonic() - begin))


def publish_artifacts(run: Run) -> None:
    """Show the result in the Prefect UI: the closing table and the report in Markdown."""
    header, rows = read_summary(run)
    create_table_artifact(key="result", table=[dict(zip(header, row, strict=True)) for row in rows])
    create_markdown_artifact(key="report", markdown=read_report_markdown(run))


def command(
    params: Annotated[Path, typer.Option(help="Settings file.")] = Path("params.yaml"),
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value (repeatable).")] = None,
) -> None:
    """Quantize one model as a Prefect flow and show what it cost and saved."""
    settings = load(params, overrides or [])
    run = Run(settings)
    check_inputs(run)  # before a server is waited for
    connect()
    with lost_server_named(), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        quantize_model.with_options(task_runner=task_runner(run))(settings, run.folder.name)
    show_summary(run, run.artifact)


def main() -> None:
    """Entry point with the exit codes of the `rwkvq` command."""
    run_command(command)


if __name__ == "__main__":
    main()
