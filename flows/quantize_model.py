"""The line as a Prefect flow: `python -m flows.quantize_model --params params.yaml`.

Runs on Prefect's embedded server without any set-up, or on a real one through PREFECT_API_URL.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "rwkvq")

import typer
from prefect import flow, get_run_logger, unmapped
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.futures import PrefectFuture, as_completed
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from rwkvq.cli.line import show_summary
from rwkvq.errors import RwkvqError
from rwkvq.files import remove_leftovers, run_lock
from rwkvq.report.collect import read_metrics, read_report_markdown, read_summary
from rwkvq.run import Run
from rwkvq.settings import Settings, load, parse
from rwkvq.stages import STAGES, block_jobs, reason_for
from rwkvq.workers import WorkerPool
from tasks.blocks import quantize_block_task
from tasks.stages import finish_quantize_task, stage_task


def task_runner(run: Run) -> TaskRunner[PrefectFuture[Any]]:
    """The runner that `run.runner` names, with run.workers workers. `dask` needs the extra of that name."""
    kind = run.settings.run.runner
    if kind == "processes":
        return ProcessPoolTaskRunner(max_workers=run.workers)
    if kind == "dask":
        try:
            from prefect_dask import DaskTaskRunner
        except ImportError as error:
            raise RwkvqError("run.runner: dask needs the extra `dask`; pip install 'rwkvq[dask]'") from error
        address = os.environ.get("DASK_SCHEDULER_ADDRESS")
        if address:
            return DaskTaskRunner(address=address)
        return DaskTaskRunner(cluster_kwargs={"n_workers": run.workers, "threads_per_worker": 1})
    return ThreadPoolTaskRunner(max_workers=run.workers)


@flow(name="quantize-model", flow_run_name="{name}", validate_parameters=False)
def quantize_model(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run the whole line on plain settings values; return the metrics. A failed task fails the flow."""
    run = Run(parse(settings, "the flow's settings"))
    with ExitStack() as stack:
        pool = None
        if run.settings.run.runner == "threads":  # started now, so that workers are ready when the blocks are
            pool = stack.enter_context(WorkerPool(run.workers, run.settings.run.threads))
        for stage in STAGES:
            if stage == "quantize":
                quantize_blocks(run, settings, pool)
            else:
                stage_options(run, stage)(stage, settings)
    publish_artifacts(run)
    return read_metrics(run.metrics)


def stage_options(run: Run, stage: str) -> Any:
    """The stage task with the run's retries and time limit."""
    limits = run.settings.run
    return stage_task.with_options(retries=limits.retries, timeout_seconds=limits.task_timeout)


def quantize_blocks(run: Run, settings: dict[str, Any], pool: WorkerPool | None) -> None:
    """Map one task a block over the task runner; the stage is recorded as done when all have finished."""
    log = get_run_logger()
    reason = reason_for(run, STAGES["quantize"])
    if reason is None:
        log.info("quantize: up to date")
        return
    begin = time.monotonic()
    jobs = block_jobs(run)
    labels = ["outer" if job.block is None else f"block-{job.block:03d}" for job in jobs]
    log.info("quantize: %d blocks on %d workers (%s)", len(jobs), run.workers, reason)
    bar = create_progress_artifact(progress=0.0, key="quantize", description="blocks quantized")
    task = quantize_block_task.with_options(retries=run.settings.run.retries)
    if pool is None:
        task = task.with_options(timeout_seconds=run.settings.run.task_timeout)
    futures = task.map(labels, jobs, unmapped(settings), unmapped(pool))
    for done, future in enumerate(as_completed(list(futures)), 1):
        future.result()
        log.info("quantize: %d of %d blocks", done, len(jobs))
        update_progress_artifact(artifact_id=bar, progress=100.0 * done / len(jobs))
    finish_quantize_task(settings, time.monotonic() - begin)


def publish_artifacts(run: Run) -> None:
    """Show the result in the Prefect UI: the closing table and the report in Markdown."""
    header, rows = read_summary(run)
    create_table_artifact(key="result", table=[dict(zip(header, row, strict=True)) for row in rows])
    create_markdown_artifact(key="report", markdown=read_report_markdown(run))


def run_flow(settings: Settings) -> dict[str, Any]:
    """Run the flow under the run folder's lock and return the metrics."""
    run = Run(settings)
    values = settings.model_dump(mode="json")
    with run_lock(run.folder), temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        remove_leftovers(run.folder)
        return quantize_model.with_options(task_runner=task_runner(run))(run.folder.name, values)


def command(
    params: Annotated[Path, typer.Option(help="Settings file.")] = Path("params.yaml"),
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value (repeatable).")] = None,
) -> None:
    """Quantize one model as a Prefect flow and show what it cost and saved."""
    settings = load(params, overrides or [])
    run_flow(settings)
    run = Run(settings)
    show_summary(run, run.artifact)


def main() -> None:
    """Entry point with the exit codes of the `rwkvq` command."""
    from rwkvq.cli import run_app

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    sys.exit(run_app(app))


if __name__ == "__main__":
    main()
