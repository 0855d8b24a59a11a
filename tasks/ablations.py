"""The Prefect task of one experiment on one model and seed."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from rwkvq.ablations.study import Study
from rwkvq.settings import RunSettings
from rwkvq.workers import WorkerPool
from tasks.progress import progress_of
from tasks.retries import is_transient


@task(
    name="experiment",
    task_run_name="{label}",
    cache_policy=NO_CACHE,
    retry_delay_seconds=1,
    retry_condition_fn=is_transient,
)
def experiment_task(
    label: str, study: Study, part: tuple[str, str, int], limits: RunSettings, pool: WorkerPool
) -> dict[str, int | bool]:
    """Measure one experiment on one model and seed in a worker process; see rwkvq.ablations.measure.run.

    part: experiment, model, seed. Raises what the job raises, JobTimeout, WorkerDied or OutOfMemory.
    """
    experiment, model, seed = part
    show = progress_of(label)
    done: dict[str, int | bool] = pool.run(
        "rwkvq.ablations.measure:run",
        {"study": study.model_dump(mode="json"), "experiment": experiment, "model": model, "seed": seed},
        timeout=limits.task_timeout,
        retries=0,  # Prefect tries again
        on_event=lambda event: show(event["what"], event["done"], event["total"]),
        label=label,
    )
    said = "up to date" if done["kept"] else f"{done['rows']} rows, {done['measured']} measured now"
    get_run_logger().info("%s: %s", label, said)
    return done
