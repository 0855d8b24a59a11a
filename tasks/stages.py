"""One Prefect task for each stage that is one unit of work."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE

from rwkvq.run import Run
from rwkvq.settings import Settings
from rwkvq.stages import finish_quantized, finish_stage, run_stage, save_seconds
from tasks.progress import progress_of
from tasks.retries import is_transient


@task(
    name="stage",
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    retry_delay_seconds=1,
    retry_condition_fn=is_transient,
)
def stage_task(name: str, settings: Settings) -> bool:
    """Run one stage in this task; return whether there was anything to do. See rwkvq.stages.run_stage."""
    log = get_run_logger()
    bar = create_progress_artifact(progress=0.0, key=name, description=f"stage {name}")
    result = run_stage(Run(settings), name, progress_of(name, bar))
    update_progress_artifact(artifact_id=bar, progress=100.0)
    log.info("%s: %s", name, f"done in {result.seconds:.1f} s" if result.ran else result.reason)
    return result.ran


@task(name="finish-quantize", task_run_name="finish-quantize", cache_policy=NO_CACHE)
def finish_quantize_task(settings: Settings, seconds: float) -> None:
    """Check that every tensor of the plan is quantized and record the stage as done."""
    run = Run(settings)
    finish_quantized(run)
    finish_stage(run, "quantize")
    save_seconds(run, "quantize", seconds)
    get_run_logger().info("quantize: done in %.1f s", seconds)
