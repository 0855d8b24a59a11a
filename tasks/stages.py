"""One Prefect task for each stage that is one unit of work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE

from rwkvq.run import Run
from rwkvq.settings import parse
from rwkvq.stages import finish_quantized, finish_stage, run_stage, save_seconds
from tasks.retries import is_transient


@task(
    name="stage",
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    retries=1,
    retry_delay_seconds=1,
    retry_condition_fn=is_transient,
)
def stage_task(name: str, settings: Mapping[str, Any]) -> str:
    """Run one stage in this task; return its name. See rwkvq.stages.run_stage."""
    log = get_run_logger()
    artifact = create_progress_artifact(progress=0.0, key=name, description=name)
    last = -1

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        if (tenth := 10 * done // total) > last:  # a line a unit would bury everything else
            last = tenth
            log.info("%s: %s (%d of %d)", name, what, done, total)
            update_progress_artifact(artifact_id=artifact, progress=100.0 * done / total)

    result = run_stage(Run(parse(settings, "the flow's settings")), name, show)
    update_progress_artifact(artifact_id=artifact, progress=100.0)
    log.info("%s: %s", name, f"done in {result.seconds:.1f} s ({result.reason})" if result.ran else result.reason)
    return name


@task(name="finish-quantize", cache_policy=NO_CACHE)
def finish_quantize_task(settings: Mapping[str, Any], seconds: float) -> str:
    """Check that every tensor of the plan is quantized and record the stage as done."""
    run = Run(parse(settings, "the flow's settings"))
    finish_quantized(run)
    finish_stage(run, "quantize")
    save_seconds(run, "quantize", seconds)
    return "quantize"
