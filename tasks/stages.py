"""One Prefect task for each stage that is one unit of work."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE

from rwkvq.family.events import CellEvent
from rwkvq.run import Run
from rwkvq.settings import Settings
from rwkvq.stages import StageResult, finish_quantized, finish_stage, run_stage_in_pool, save_seconds
from rwkvq.workers import WorkerPool
from tasks.events import tell
from tasks.progress import progress_of
from tasks.retries import is_transient
from tasks.workers import own_pool


@task(
    name="stage",
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    retry_delay_seconds=1,
    retry_condition_fn=is_transient,
)
def stage_task(name: str, settings: Settings, cell: str, pool: WorkerPool | None) -> StageResult:
    """Run one stage in a worker process; return whether there was anything to do. See rwkvq.stages.run_stage.

    `pool` None: this task does not run in the flow's process, and uses a worker of its own.
    """
    log = get_run_logger()
    bar = create_progress_artifact(progress=0.0, key=name, description=f"{cell}: stage {name}")
    show_in_log = progress_of(f"{cell}: {name}", bar)

    def show(what: str, done: int, total: int) -> None:
        tell(CellEvent(cell, "progress", name, what, done, total))
        show_in_log(what, done, total)

    result = run_stage_in_pool(pool or own_pool(settings.run.threads), settings, name, show, f"{cell}: stage {name}")
    update_progress_artifact(artifact_id=bar, progress=100.0)
    why = "" if result.reason == "not run yet" else f" ({result.reason})"
    log.info("%s: %s: %s", cell, name, f"done in {result.seconds:.1f} s{why}" if result.ran else result.reason)
    return result


@task(name="finish-quantize", task_run_name="finish-quantize", cache_policy=NO_CACHE)
def finish_quantize_task(settings: Settings, cell: str, seconds: float) -> None:
    """Check that every tensor of the plan is quantized and record the stage as done."""
    run = Run(settings)
    finish_quantized(run)
    finish_stage(run, "quantize")
    save_seconds(run, "quantize", seconds)
    get_run_logger().info("%s: quantize: done in %.1f s", cell, seconds)
