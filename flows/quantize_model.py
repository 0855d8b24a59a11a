"""The line as a Prefect flow: `python -m flows.quantize_model --params params.yaml`.

Runs on an embedded server without any set-up, or reports to a real one that PREFECT_API_URL names.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_LOGGING_SETTINGS_PATH", str(Path(__file__).with_name("logging.yml")))
os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")

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

from flows.server import connect
from rwkvq.cli.line import show_summary
from rwkvq.errors import RwkvqError
from rwkvq.files import remove_leftovers, run_lock
from rwkvq.report.collect import read_metrics, read_report_markdown, read_summary
from rwkvq.run import Run
from rwkvq.settings import Settings, load
from rwkvq.stages import STAGES, block_jobs, check_inputs, reason_for, stages_of
from rwkvq.workers import JobTimeout, WorkerPool
from tasks.blocks import quantize_block_task
from tasks.stages import finish_quantize_task, stage_task


@flow(name="quantize-model", flow_run_name="{settings.run_dir}")
def quantize_model(settings: Settings) -> dict[str, Any]:
    """Run the whole line, each stage only if something it depends on has changed, and return the metrics.

    A failed task fails the flow. Raises RwkvqError for bad input, JobTimeout at the time limit.
    """
    run = Run(settings)
    with run_lock(run.folder):
        remove_leftovers(run.folder)
        check_inputs(run)
        for stage in stages_of(run):
            if stage != "quantize":
                run_stage(run, stage)
            elif (reason := reason_for(run, STAGES[stage])) is None:
                get_run_logger().info("quantize: up to date")
            else:
                get_run_logger().info("quantize: %s", reason)
                quantize_blocks.with_options(task_runner=task_runner(run))(settings)
        publish_artifacts(run)
        return read_metrics(run.metrics)


def run_stage(run: Run, stage: str) -> None:
    """Run the task of one stage with the run's retries and time limit."""
    limits = run.settings.run
    task = stage_task.with_options(retries=limits.retries, timeout_seconds=limits.task_timeout)
    try:
        task(stage, run.settings)
    except TimeoutError as error:
        raise JobTimeout(
            f"stage {stage}: still running after {limits.task_timeout:g} s and stopped; raise run.task_timeout"
        ) from error


@flow(name="quantize-blocks", flow_run_name="{settings.run_dir}: blocks")
def quantize_blocks(settings: Settings) -> None:
    """Map one task a block over the task runner; the stage is recorded as done when all have finished."""
    run, log = Run(settings), get_run_logger()
    begin = time.monotonic()
    jobs = block_jobs(run)
    labels = ["outer" if job.block is None else f"block-{job.block:03d}" for job in jobs]
    log.info("quantize: %d block jobs, %d workers (%s)", len(jobs), run.workers, settings.run.runner)
    bar = create_progress_artifact(progress=0.0, key="quantize", description="blocks quantized")
    task = quantize_block_task.with_options(retries=settings.run.retries)
    with block_pool(run) as pool:
        futures = task.map(labels, jobs, unmapped(settings.run), unmapped(pool))
        for done, future in enumerate(as_completed(list(futures)), 1):
            future.result()
            update_progress_artifact(artifact_id=bar, progress=100.0 * done / len(jobs))
    finish_quantize_task(settings, time.monotonic() - begin)


def block_pool(run: Run) -> Any:
    """Worker processes of this process for runner `threads`; the other runners' processes have a worker each."""
    if run.settings.run.runner == "threads":
        return WorkerPool(run.workers, run.settings.run.threads)
    return nullcontext()


def task_runner(run: Run) -> TaskRunner[PrefectFuture[Any]]:
    """The runner that `run.runner` names, with run.workers workers. `dask` needs the extra of that name."""
    limits = run.settings.run
    if limits.runner == "processes":
        return ProcessPoolTaskRunner(max_workers=run.workers)
    if limits.runner == "dask":
        try:
            from prefect_dask import DaskTaskRunner
        except ImportError as error:
            raise RwkvqError("run.runner: dask needs the extra `dask`; pip install 'rwkvq[dask]'") from error
        if limits.dask_address:
            return DaskTaskRunner(address=limits.dask_address)
        cluster = {"n_workers": run.workers, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
        return DaskTaskRunner(cluster_kwargs=cluster)
    return ThreadPoolTaskRunner(max_workers=run.workers)


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
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        quantize_model(settings)
    show_summary(run, run.artifact)


def main() -> None:
    """Entry point with the exit codes of the `rwkvq` command."""
    from rwkvq.cli import run_app

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    sys.exit(run_app(app))


if __name__ == "__main__":
    main()
